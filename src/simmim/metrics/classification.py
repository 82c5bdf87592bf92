"""Metrics of classification and segmentation, and a k-nearest-neighbour classifier. NumPy only.

Shapes: `N` images, `M` training images, `D` features, `K` classes. Classes are 0 … K-1.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.errors import UserError


def top1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Accuracy in [0, 1] of predicted classes (N,)."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count images of class i (rows) predicted as class j (columns): (K, K)."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def balanced_accuracy(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> float:
    """Mean recall over classes, in [0, 1]; classes without images are left out."""
    matrix = confusion_matrix(labels, predictions, num_classes)
    images = matrix.sum(axis=1)
    present = images > 0
    return float(np.mean(matrix.diagonal()[present] / images[present]))


def intersection_over_union(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    """Intersection over union of each class (K,), from a confusion matrix of pixels (K, K).

    NaN for a class that appears in neither labels nor predictions.
    """
    right = confusion.diagonal()
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    return np.divide(right, either, out=np.full(len(right), np.nan), where=either > 0)


def class_rows(confusion: NDArray[np.integer], counted: str) -> list[dict[str, Any]]:
    """Return count, recall, precision and F1 of each class (K,) of a confusion matrix (K, K), rows the true classes.

    `counted` names what is counted, such as "images". A figure is `None` if its denominator is 0.
    """
    counts = np.stack([confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)], axis=1).tolist()
    return [
        {
            counted: true,
            "recall": right / true if true else None,
            "precision": right / predicted if predicted else None,
            "f1": 2 * right / (true + predicted) if true + predicted else None,
        }
        for right, true, predicted in counts
    ]


def most_confused(confusion: NDArray[np.integer], most: int, *, by_share: bool = False) -> list[tuple[int, int]]:
    """Return up to `most` pairs (true class, other answer) of a confusion matrix (K, K), the commonest mistake first.

    With `by_share`, a mistake counts as a share of its true class.
    """
    true, answer = np.nonzero(confusion)  # few of many classes
    true, answer = true[true != answer], answer[true != answer]
    counts = confusion[true, answer] / (confusion.sum(axis=1)[true] if by_share else 1)
    return [(int(true[place]), int(answer[place])) for place in np.argsort(-counts, kind="stable")[:most]]


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    features: ArrayLike,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> NDArray[np.int64]:
    """Classify features (N, D) by a weighted vote of the k nearest training features (M, D) with labels (M,): (N,).

    Similarity is the cosine; a vote weighs exp(cosine / temperature), as in DINO (arXiv 2104.14294 and its code).
    Raises `UserError` for fewer than k training features.
    """
    train, labels, queries = unit_length(train_features), np.asarray(train_labels, np.int64), unit_length(features)
    if k > len(train):
        raise UserError(f"{k} neighbours are more than the {len(train)} training images; use k of {len(train)} or less")
    predictions = [np.empty(0, np.int64)]
    for start in range(0, len(queries), 1024):  # bounds the similarity matrix to 1024 × M
        cosines = queries[start : start + 1024] @ train.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        votes = np.exp(np.take_along_axis(cosines, nearest, axis=1) / temperature)  # (n, k)
        cells = np.arange(len(cosines))[:, None] * num_classes + labels[nearest]
        scores = np.bincount(cells.ravel(), votes.ravel(), len(cosines) * num_classes)
        predictions.append(scores.reshape(-1, num_classes).argmax(axis=1))
    return np.concatenate(predictions)


def unit_length(features: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(features, np.float32)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
