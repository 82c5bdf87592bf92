"""Errors that are not a user's mistake; those are `ValueError`s of one line: value, rule, remedy."""


class TrainingDivergedError(RuntimeError):
    """The loss was not finite for too many steps in a row. The last checkpoint is intact."""
