"""Prompts, preference pairs and the configuration of the demo, all written for this project."""
