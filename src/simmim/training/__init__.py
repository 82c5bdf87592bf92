"""Parts that every training shares, on any engine: plan, loop, run directory, checkpoints, trackers."""
