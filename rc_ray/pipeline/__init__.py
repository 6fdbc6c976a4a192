"""The Ray Data graph, prompt sources, pool planning, progress, and the run from end to end."""
