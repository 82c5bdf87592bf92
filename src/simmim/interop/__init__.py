"""Checkpoints of other packages: read safely, recognised, renamed."""
