"""Sessions, updates, processes and checkpoints."""
