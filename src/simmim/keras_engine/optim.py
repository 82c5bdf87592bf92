"""Training state and its update: clip, AdamW, skip a step that is not finite.

Pure functions, shared by JAX and TensorFlow. Keras's AdamW differs from PyTorch's: it adds epsilon before the
bias correction of the second moment; with 1e-8, first updates of small gradients shrink to a third.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simmim.config.training import TrainingConfig
from simmim.keras_engine.layers import Array, ops
from simmim.keras_engine.model import MaskedImageModel

_EPSILON = 1e-8
_CLIP_EPSILON = 1e-6  # PyTorch's, added to the norm that divides
BAD_LIMIT = 10
"""Non-finite steps in a row that are tolerated."""


class State(NamedTuple):
    """All state that training changes; lists follow the model's trainable and other variables."""

    parameters: list[Any]
    statistics: list[Any]
    means: list[Any]
    """AdamW's first moments."""
    squares: list[Any]
    """AdamW's second moments."""
    updates: Any
    """Number of finite updates: a scalar."""
    bad: Any
    """Number of non-finite steps in a row up to now: a scalar."""


class Gradients(NamedTuple):
    """Loss, gradients and updated statistics of a batch."""

    loss: Any
    gradients: list[Any]
    statistics: list[Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Update rule; `decays` holds each parameter's weight decay."""

    decays: Sequence[float]
    betas: tuple[float, float]
    clip_grad: float | None


def rule_of(config: TrainingConfig, model: MaskedImageModel) -> Rule:
    decays = [config.weight_decay if model.has_weight_decay(v) else 0.0 for v in model.trainable_variables]
    return Rule(decays=decays, betas=config.betas, clip_grad=config.clip_grad)


def advance(rule: Rule, state: State, found: Gradients, lr: Array) -> tuple[State, Array]:
    """Apply an update; returns the state and figures (3,): loss, unclipped gradient norm, non-finite steps in a row.

    A non-finite step changes only `bad`.
    """
    norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in found.gradients))
    norm = ops.where(ops.isfinite(found.loss), norm, math.nan)  # an infinite L1 loss has finite gradients
    finite = ops.isfinite(norm)
    limit = math.inf if rule.clip_grad is None else rule.clip_grad
    scale = ops.minimum(limit / (norm + _CLIP_EPSILON), 1.0)
    updates = state.updates + 1.0
    changed = [
        _adamw(rule, decay, parameter, gradient, mean, square, updates, lr)
        for decay, parameter, gradient, mean, square in zip(
            rule.decays,
            state.parameters,
            [gradient * scale for gradient in found.gradients],
            state.means,
            state.squares,
            strict=True,
        )
    ]
    parameters, means, squares = (list(column) for column in zip(*changed, strict=True))

    def choose(new: Any, old: Any) -> Any:
        return ops.where(finite, new, old)

    def choose_all(new: list[Any], old: list[Any]) -> list[Any]:
        return [choose(*pair) for pair in zip(new, old, strict=True)]

    after = State(
        parameters=choose_all(parameters, state.parameters),
        statistics=choose_all(found.statistics, state.statistics),
        means=choose_all(means, state.means),
        squares=choose_all(squares, state.squares),
        updates=choose(updates, state.updates),
        bad=choose(ops.zeros_like(state.bad), state.bad + 1.0),
    )
    return after, ops.stack([found.loss, norm, after.bad])


def _adamw(
    rule: Rule, decay: float, parameter: Array, gradient: Array, mean: Array, square: Array, updates: Array, lr: Array
) -> tuple[Array, Array, Array]:
    """Apply AdamW as in PyTorch: decay by lr · weight decay, epsilon after the bias correction."""
    first, second = rule.betas
    mean = first * mean + (1.0 - first) * gradient
    square = second * square + (1.0 - second) * ops.square(gradient)
    deviation = ops.sqrt(square / _correction(second, updates)) + _EPSILON
    step = mean / _correction(first, updates) / deviation
    return parameter * (1.0 - lr * decay) - lr * step, mean, square


def _correction(beta: float, updates: Array) -> Array:
    """1 - beta ** updates, without float32 cancellation."""
    return -ops.expm1(updates * math.log(beta)) if beta else ops.ones_like(updates)


def in_pieces(
    pieces: int, batch: dict[str, Any], statistics: list[Any], judge: Callable[[dict[str, Any], list[Any]], Gradients]
) -> Gradients:
    """Compute mean loss and gradients of a batch, accumulated over `pieces` parts."""
    found: list[Gradients] = []
    for piece in range(pieces):
        # Each piece strides over the whole batch, so that a sharded batch stays on its devices.
        part = {name: _every(array, pieces, piece) for name, array in batch.items()} if pieces > 1 else batch
        found.append(judge(part, found[-1].statistics if found else statistics))
    return Gradients(
        loss=sum(part.loss for part in found) / pieces,
        gradients=[sum(parts) / pieces for parts in zip(*(part.gradients for part in found), strict=True)],
        statistics=found[-1].statistics,
    )


def _every(array: Array, pieces: int, piece: int) -> Array:
    return ops.reshape(array, (-1, pieces, *array.shape[1:]))[:, piece]
