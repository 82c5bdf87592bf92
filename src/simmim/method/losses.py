"""Losses between prediction and target, over masked positions only.

Engine-neutral, like `simmim.method.targets`. Arrays are float32, class ids integers. In mixed precision, cast the
prediction first and call outside autocast.

Shapes: `B` batch, `h w` feature-map cells, `n²` positions of a cell, `V` values of a position.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from simmim.errors import UserError
from simmim.method.strategy import Strategy
from simmim.method.targets import Array, Namespace, Target

_COUNT_FLOOR = 1e-5  # as in official SimMIM, against a batch without masked pixels


@dataclass(frozen=True, kw_only=True)
class Loss(Strategy, ABC, family="loss"):
    """Weighted mean error, Σ(error · weight) / (Σ weight + 1e-5), a scalar.

    The error of a position is the mean over its values. For pixels and 0/1 weights, this is official SimMIM's
    loss, Σ|x-x̂|·m / (Σm + 1e-5) / C.
    """

    classes: ClassVar[bool] = False
    """Whether it judges logits by class ids, for targets of classes."""

    @abstractmethod
    def error(self, xp: Namespace, prediction: Array, target: Array) -> Array:
        """Compute the error (B, h, w, n²) of a prediction (B, h, w, V, n²).

        The target is (B, h, w, V, n²), or class ids (B, h, w, 1, n²).
        """

    def weighted_error(self, xp: Namespace, prediction: Array, target: Array, weights: Array) -> Array:
        """Compute error · weight of each position, (B, h, w, n²).

        Prediction (B, h, w, V·n²), target of the same shape or class ids (B, h, w, n²), and weights (B, h, w, n²),
        as a `simmim.method.targets.Target` lays them out.
        """
        h, w, positions = weights.shape[1:]
        error = self.error(
            xp,
            xp.reshape(prediction, (-1, h, w, prediction.shape[-1] // positions, positions)),
            xp.reshape(target, (-1, h, w, target.shape[-1] // positions, positions)),
        )
        return error * weights

    def sums(self, xp: Namespace, prediction: Array, target: Array, weights: Array) -> tuple[Array, Array]:
        """Return (Σ error · weight, Σ weight), two scalars that add up over the parts of a batch.

        Arguments as in `weighted_error`.
        """
        return xp.sum(self.weighted_error(xp, prediction, target, weights)), xp.sum(weights)

    def __call__(self, xp: Namespace, prediction: Array, target: Array, weights: Array) -> Array:
        """Return the mean error of masked positions; arguments as in `sums`."""
        return self.mean(*self.sums(xp, prediction, target, weights))

    def mean(self, total: Array, count: Array) -> Array:
        """Divide sums from `sums`, of a batch or added up over its parts."""
        return total / (count + _COUNT_FLOOR)


@dataclass(frozen=True, kw_only=True)
class L1Loss(Loss):
    """Absolute error (SimMIM §3.4, the default)."""

    kind: ClassVar[str] = "l1"

    def error(self, xp: Namespace, prediction: Array, target: Array) -> Array:
        return xp.mean(xp.abs(prediction - target), axis=3)


@dataclass(frozen=True, kw_only=True)
class MSELoss(Loss):
    """Squared error."""

    kind: ClassVar[str] = "mse"

    def error(self, xp: Namespace, prediction: Array, target: Array) -> Array:
        return xp.mean((prediction - target) ** 2, axis=3)


@dataclass(frozen=True, kw_only=True)
class SmoothL1Loss(Loss):
    """Squared error / (2·beta) for errors below `beta` (> 0), else absolute error minus beta/2."""

    kind: ClassVar[str] = "smooth_l1"
    beta: float = 1.0
    """Error above which the loss is absolute instead of squared."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"beta {self.beta} of the smooth L1 loss is not above 0; use 1.0, or the l1 loss")

    def error(self, xp: Namespace, prediction: Array, target: Array) -> Array:
        distance = xp.abs(prediction - target)
        small = distance * distance * (0.5 / self.beta)
        return xp.mean(xp.where(distance < self.beta, small, distance - 0.5 * self.beta), axis=3)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyLoss(Loss):
    """Cross-entropy in nats of V-way logits against class ids."""

    kind: ClassVar[str] = "cross_entropy"
    classes: ClassVar[bool] = True

    def error(self, xp: Namespace, prediction: Array, target: Array) -> Array:
        logits = prediction - xp.amax(prediction, axis=3, keepdims=True)
        # Class ids 0, 1, … V-1, derived from the logits to be on their device. torch's `equal` returns one bool.
        classes = xp.cumsum(xp.ones_like(logits[:1, :1, :1, :, :1]), axis=3) - 1
        chosen = xp.sum(xp.where(xp.not_equal(classes, target), 0.0, logits), axis=3)
        return xp.log(xp.sum(xp.exp(logits), axis=3)) - chosen


def check_pair(target: Target, loss: Loss) -> None:
    """Raise `UserError` if the loss is undefined for the target, such as l1 of class ids."""
    if loss.classes != target.classes:
        suitable = [kind for kind, other in Loss.kinds.items() if other.classes == target.classes]
        raise UserError(f"loss {loss.kind} is undefined for target {target.kind}; use {' or '.join(suitable)}")
