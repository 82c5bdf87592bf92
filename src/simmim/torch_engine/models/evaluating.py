"""Evaluation mode for a while, in as much memory as there is."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode; afterwards each of its parts has the mode that it had before."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def by_halves(compute: Callable[[slice], T], parts: Iterable[slice]) -> Iterator[T]:
    """Yield what `compute` returns for each part or, where memory runs out, for its halves, in order.

    Parts have a start and an end. Raises `torch.OutOfMemoryError` where one item is too much.
    """
    waiting = [*parts][::-1]
    while waiting:
        part = waiting.pop()
        middle = (part.start + part.stop) // 2
        try:
            found = compute(part)
        except torch.OutOfMemoryError:
            if middle == part.start:
                raise
            waiting += [slice(middle, part.stop), slice(part.start, middle)]
        else:
            yield found
