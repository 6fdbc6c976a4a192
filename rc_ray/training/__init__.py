"""Training: DPO with TRL on Ray Train, and Bradley–Terry reward models."""
