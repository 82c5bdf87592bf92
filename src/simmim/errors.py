"""Errors that the package raises on purpose. Every other error is a bug of ours."""


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: the value, the rule, the remedy."""


class TrainingDivergedError(RuntimeError):
    """The loss was not finite for too many steps in a row. The last checkpoint is intact."""
