"""Watch features while they train: say when they collapse.

Shapes: `N` images, `D` features.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.method.collapse import collapsed
from simmim.torch_engine.models.evaluating import by_halves, evaluating
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.train.update import DTYPES

_IMAGES = 256


def effective_rank(features: NDArray[np.floating]) -> float:
    """Return the number of directions that features (N, D) fill: from 1 to min(N - 1, D).

    RankMe (arXiv 2210.02885, equation 1), the exponential of the entropy of the singular values, here without the
    features' mean, which says nothing about an image.
    """
    values = np.linalg.svd(np.asarray(features, np.float64) - features.mean(axis=0), compute_uv=False)
    shares = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: NDArray[np.floating]) -> float:
    """Return how much features (N, D) of length 1 differ: 0 if all are one, 1 if they point everywhere.

    The standard deviation over the images, times the root of D (SimSiam, arXiv 2011.10566, section 4.1).
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(features.shape[1]))


class CollapseGuard:
    """Measure the features of some training images, and tell once if they collapse.

    `pixels` are (N, H, W, C) in 0..255; `say` shows a line to the user.
    """

    def __init__(self, pixels: NDArray[np.generic], say: Callable[[str], None]):
        self._pixels, self._say = pixels[:_IMAGES], say
        self._told = False

    @torch.no_grad()
    def __call__(self, done: int, step: PretrainStep, precision: str) -> dict[str, float]:
        """Return figures of the encoder of `step` after `done` steps."""
        device, dtype = step.mean.device, DTYPES[precision]
        count = len(self._pixels)

        def encode(part: slice) -> NDArray[np.float32]:
            images = step.normalize(torch.from_numpy(self._pixels[part]).to(device))
            return step.model.encoder(images).float().mean(dim=(1, 2)).cpu().numpy()

        with evaluating(step), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            parts = by_halves(encode, (slice(first, min(first + 64, count)) for first in range(0, count, 64)))
            features = np.concatenate(list(parts))
        if not np.isfinite(features).all():
            self._say(f"warning    features of step {done} are not finite; watch the loss, or use --precision bf16")
            return {"effective_rank": float("nan"), "feature_std": float("nan")}
        rank, std = effective_rank(features), feature_std(features)
        if (found := collapsed(std, rank)) and not self._told:
            self._say(
                f"warning    features collapse at step {done}: effective rank {rank:.1f} of {features.shape[1]}, "
                f"deviation {std:.3f} of 1; start again (--fresh) with a lower --lr, or add a term that keeps them "
                "apart, such as --objective descriptor=1"
            )
        self._told = found
        return {"effective_rank": rank, "feature_std": std}
