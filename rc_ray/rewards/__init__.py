"""Reward models and rules: one small interface (`base.py`), one file per kind."""
