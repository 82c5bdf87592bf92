"""When features count as collapsed: see `simmim.torch_engine.tasks.guard`, which measures both figures."""

LEAST_STD = 0.05
"""Of `feature_std`."""
LEAST_RANK = 2.0
"""Of `effective_rank`."""


def collapsed(std: float, rank: float) -> bool:
    """Tell whether features of this deviation and effective rank are, in effect, one."""
    return std < LEAST_STD or rank < LEAST_RANK
