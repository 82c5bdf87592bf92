"""Mathematics of the method: masks, targets, losses, schedules and random numbers. NumPy is the only array library."""
