"""Errors that the package raises on purpose. Every other error is a bug of ours."""


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: the value, the rule, the remedy."""


class TrainingFailedError(RuntimeError):
    """A training that ended early through no one's mistake: images or disk space went missing. One line, as above."""


class TrainingDivergedError(TrainingFailedError):
    """The loss was not finite for too many steps in a row. The last checkpoint is intact."""
