"""A confusion matrix as a picture."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.training.whole_files import written_whole


def draw_confusion(matrix: NDArray[np.int64], classes: tuple[str, ...], file: Path) -> None:
    """Draw a confusion matrix (K, K), whose rows are the true classes, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = min(4 + 0.3 * len(classes), 24)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class")
    if len(classes) <= 60:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    if len(classes) <= 20:
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
    with written_whole(file) as path:
        figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
