"""Before/after comparison, report and dataset card."""
