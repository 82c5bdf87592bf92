"""Sums over the images of all ranks, within a step. With one process each function returns what it is given.

The loss of a step is the mean of all ranks' losses, and DDP and FSDP average gradients. A loss that every rank computes
from a sum over all ranks therefore has the gradients that one process would find for the whole batch.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_apart = False


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Let this process compute as if it trained alone: in a trial, another rank may not come as far."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def count_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _apart else 1


def this_rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if count_ranks() > 1 else 0


class _Sum(torch.autograd.Function):
    """Sum over ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum equally shaped tensors of all ranks, with gradients."""
    return values if count_ranks() == 1 else _Sum.apply(values)  # type: ignore[return-value]


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average equally shaped tensors of all ranks, with gradients."""
    return values if count_ranks() == 1 else sum_over_ranks(values) / count_ranks()


@torch.no_grad()
def gather_from_ranks(values: Tensor) -> Tensor:
    """Join equally shaped tensors (n, …) of all ranks in their order, without gradients: (ranks · n, …)."""
    if count_ranks() == 1:
        return values.detach()
    joined = values.new_empty(count_ranks() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(joined, values.detach().contiguous())
    return joined


@torch.no_grad()
def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Return log Σ exp over the first dimension of tensors (n, …) of all ranks, without gradients: (…)."""
    own = values.detach().logsumexp(dim=0)
    if count_ranks() == 1:
        return own
    most = own.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most + sum_over_ranks((own - most).exp()).log()
