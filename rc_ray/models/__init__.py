"""Where a model name leads: Hub id, local folder, or a model embedded in a package."""
