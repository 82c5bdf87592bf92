"""What every training shares, whichever engine runs it: plan, loop, run directory, checkpoints, trackers."""
