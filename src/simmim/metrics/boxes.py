"""Which found boxes are right, and which objects are missed. NumPy only.

Shapes: `n` found boxes of an image, `m` objects in it. A box is (left, top, right, bottom).
"""

import numpy as np
from numpy.typing import NDArray


def match_boxes(
    boxes: NDArray[np.floating],
    labels: NDArray[np.integer],
    true_boxes: NDArray[np.floating],
    true_labels: NDArray[np.integer],
    *,
    least: float = 0.5,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which found boxes (n, 4), best first, are right (n,), and which objects (m, 4) are found (m,).

    As in COCO's evaluation, each found box takes the free object of its class that it overlaps most, if their
    intersection over union is at least `least`.
    """
    overlaps = np.where(labels[:, None] == true_labels[None, :], intersection_over_union(boxes, true_boxes), 0.0)
    right, found = np.zeros(len(boxes), np.bool_), np.zeros(len(true_boxes), np.bool_)
    for number, row in enumerate(overlaps):
        free = np.where(found, 0.0, row)
        if len(free) and free.max() >= least:
            right[number] = found[free.argmax()] = True
    return right, found


def intersection_over_union(boxes: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the intersection over union (n, m) of boxes (n, 4) and others (m, 4)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = (high - low).clip(0).prod(axis=2)
    areas = [(some[:, 2:] - some[:, :2]).prod(axis=1) for some in (boxes, others)]
    either = areas[0][:, None] + areas[1][None, :] - both
    return np.divide(both, either, out=np.zeros(both.shape), where=either > 0)
