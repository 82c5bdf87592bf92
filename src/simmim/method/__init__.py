"""The mathematics: masks, targets, losses, schedules and random numbers. Imports no array library but NumPy."""
