"""Linear classifiers of features: multinomial logistic regression.

Shapes: `N` images, `D` features, `K` classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from simmim.data.labelled.classes import hold_out

# Strengths of the linear probe's L2 penalty that are tried, from strong to weak.
_PENALTIES = tuple(10.0**-power for power in range(7))
_USUAL_PENALTY = 1e-2  # where there are too few labels to try


@dataclass(frozen=True)
class LinearClassifier:
    """Logits of features (N, D) are features · `weight` (K, D) transposed + `bias` (K,)."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    penalty: float
    """The L2 penalty with which it was learnt."""

    def classify(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the class (N,) of each image."""
        return (features @ self.weight.T + self.bias).argmax(axis=1)


def fit_linear(
    features: NDArray[np.float32], labels: NDArray[np.int64], num_classes: int, *, seed: int, device: torch.device
) -> LinearClassifier:
    """Learn a linear classifier from features (N, D), which are brought to mean 0 and deviation 1, and labels (N,).

    The penalty is the one with the least cross-entropy on a fifth of each class that is held out; then all are learnt.
    """
    mean, std = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    x = torch.from_numpy((features - mean) / std).to(device)
    y = torch.from_numpy(labels).to(device)
    penalty = choose_penalty(x, y, num_classes, held=hold_out(labels, 0.2, seed))
    found = fit_logistic(x, y, num_classes, penalty=penalty).cpu().numpy().astype(np.float64)
    weight = found[:-1].T / std  # of the features as they are
    return LinearClassifier(weight.astype(np.float32), (found[-1] - weight @ mean).astype(np.float32), penalty)


def choose_penalty(x: Tensor, y: Tensor, num_classes: int, *, held: NDArray[np.bool_]) -> float:
    """Choose the penalty with the least cross-entropy on the images of `held`, trained on the others."""
    if not held.any():
        return _USUAL_PENALTY
    aside = torch.from_numpy(held).to(x.device)
    weights, losses = None, []
    for penalty in _PENALTIES:  # each begins at the one before, which is near
        weights = fit_logistic(x[~aside], y[~aside], num_classes, penalty=penalty, start=weights)
        losses.append(float(functional.cross_entropy(logits(x[aside], weights), y[aside])))
    return _PENALTIES[int(np.argmin(losses))]


def fit_logistic(
    x: Tensor, y: Tensor, num_classes: int, *, penalty: float, start: Tensor | None = None, steps: int = 500
) -> Tensor:
    """Fit multinomial logistic regression by L-BFGS; return weights and biases (D + 1, K).

    They minimise the mean cross-entropy of features x (N, D) and labels y (N,), plus penalty / 2 times the squared
    weights: scikit-learn's C is 1 / (penalty N).
    """
    begin = torch.zeros(x.shape[1] + 1, num_classes, device=x.device) if start is None else start.clone()
    weights = begin.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(logits(x, weights), y) + penalty / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]  # it takes a tensor, as its documentation says
    return weights.detach()


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """Compute logits: (N, D), (D + 1, K) → (N, K)."""
    return x @ weights[:-1] + weights[-1]
