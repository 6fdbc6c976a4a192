"""Sampling: the vLLM engine, its CPU settings, and prompt rendering."""
