"""The training state, and what one update makes of it: clip, AdamW, or skip a step that is not finite.

Pure functions, so that JAX and TensorFlow take the same. Keras's own AdamW is not PyTorch's: it adds epsilon before the
second moment is corrected for its zero start, which for 1e-8 makes a small gradient's first updates a third as large.
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
"""Steps in a row that may fail to be finite."""


class State(NamedTuple):
    """All that training changes; the lists go with the model's (trainable and other) variables."""

    parameters: list[Any]
    statistics: list[Any]
    means: list[Any]
    """AdamW's average of gradients."""
    squares: list[Any]
    """AdamW's average of their squares."""
    updates: Any
    """Updates that were finite: a scalar."""
    bad: Any
    """Steps in a row, up to the last, that were not: a scalar."""


class Gradients(NamedTuple):
    """What a batch says: the loss, its gradients, and the statistics after it."""

    loss: Any
    gradients: list[Any]
    statistics: list[Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How parameters follow gradients; `decays` has a weight decay for each parameter."""

    decays: Sequence[float]
    betas: tuple[float, float]
    clip_grad: float | None


def rule_of(config: TrainingConfig, model: MaskedImageModel) -> Rule:
    decays = [config.weight_decay if model.has_weight_decay(v) else 0.0 for v in model.trainable_variables]
    return Rule(decays=decays, betas=config.betas, clip_grad=config.clip_grad)


def advance(rule: Rule, state: State, found: Gradients, lr: Array) -> tuple[State, Array]:
    """The state after an update, and its figures (3,): loss, gradient norm before clipping, steps not finite so far.

    A step that is not finite changes nothing but `bad`.
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
    """AdamW as PyTorch computes it: decay by lr · weight decay, epsilon after the correction."""
    first, second = rule.betas
    mean = first * mean + (1.0 - first) * gradient
    square = second * square + (1.0 - second) * ops.square(gradient)
    deviation = ops.sqrt(square / _correction(second, updates)) + _EPSILON
    step = mean / _correction(first, updates) / deviation
    return parameter * (1.0 - lr * decay) - lr * step, mean, square


def _correction(beta: float, updates: Array) -> Array:
    """1 - beta ** updates, without float32's loss of digits where that is small."""
    return -ops.expm1(updates * math.log(beta)) if beta else ops.ones_like(updates)


def in_pieces(
    pieces: int, batch: dict[str, Any], statistics: list[Any], judge: Callable[[dict[str, Any], list[Any]], Gradients]
) -> Gradients:
    """The mean loss and gradients of a batch, `pieces` parts of it one after the other."""
    found: list[Gradients] = []
    for piece in range(pieces):
        # Every piece takes from everywhere in the batch, so that a batch that lies on many devices need not move.
        part = {name: _every(array, pieces, piece) for name, array in batch.items()} if pieces > 1 else batch
        found.append(judge(part, found[-1].statistics if found else statistics))
    return Gradients(
        loss=sum(part.loss for part in found) / pieces,
        gradients=[sum(parts) / pieces for parts in zip(*(part.gradients for part in found), strict=True)],
        statistics=found[-1].statistics,
    )


def _every(array: Array, pieces: int, piece: int) -> Array:
    return ops.reshape(array, (-1, pieces, *array.shape[1:]))[:, piece]
