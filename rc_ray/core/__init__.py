"""Pure functions on NumPy and Arrow: ids and seeds, schemas, the RC rule, pair selection, statistics. No Ray, torch or vllm."""
