"""What is done, what is dropped, what failed: storage on any pyarrow filesystem, chunk commits, and the run directory."""
