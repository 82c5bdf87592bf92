"""Prediction targets: raw pixels, normalised pixels, colour clusters or HOG.

A target is a map of `V` values at every position of a grid over the image, one position every `pitch` pixels. The head
predicts the positions of one feature-map cell together, so the map is folded in PyTorch's PixelShuffle order: channel
v·n² + i·n + j is value v of the position in row i, column j of the cell. Official SimMIM decoders load unchanged.

Engine-neutral: `xp` is torch, numpy, jax.numpy or keras.ops. No code here multiplies matrices, because autocast,
TF32 and TPUs round the factors to 8 to 11 bits.

Shapes: `B` batch, `C` channels, `H W` pixels, `r` stride of the feature map in pixels, `h w` = H/r, W/r feature-map
cells, `q` pitch in pixels, `n` = r/q positions along a side of a cell, `V` values of a position, `K` clusters.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from numpy.typing import ArrayLike
from tyro.conf import Suppress

from simmim.errors import UserError
from simmim.method.strategy import Strategy

Array: TypeAlias = Any  # an array of the engine
Namespace: TypeAlias = Any  # torch, numpy, jax.numpy or keras.ops

_VARIANCE_FLOOR = 1e-6  # added to variances, as in MAE and SwinV2


def patchify(xp: Namespace, grid: Array, n: int) -> Array:
    """Fold squares of n x n positions: (B, h·n, w·n, V) → (B, h, w, V·n²) in PixelShuffle order."""
    rows, columns, values = grid.shape[1:]
    squares = xp.reshape(grid, (-1, rows // n, n, columns // n, n, values))
    return xp.reshape(xp.moveaxis(squares, (2, 4), (-2, -1)), (-1, rows // n, columns // n, values * n * n))


def unpatchify(xp: Namespace, cells: Array, n: int) -> Array:
    """Invert `patchify`: (B, h, w, V·n²) → (B, h·n, w·n, V)."""
    h, w, channels = cells.shape[1:]
    squares = xp.reshape(cells, (-1, h, w, channels // (n * n), n, n))
    return xp.reshape(xp.moveaxis(squares, (-2, -1), (2, 4)), (-1, h * n, w * n, channels // (n * n)))


def block_means(xp: Namespace, images: Array, block: int) -> Array:
    """Compute the mean of each block x block pixels: (B, H, W, C) → (B, H/block, W/block, C)."""
    return xp.mean(_blocks(xp, images, block), axis=(2, 4))


def _blocks(xp: Namespace, images: Array, block: int) -> Array:
    """Split into blocks: (B, H, W, C) → (B, H/block, block, W/block, block, C)."""
    height, width, channels = images.shape[1:]
    return xp.reshape(images, (-1, height // block, block, width // block, block, channels))


def _enlarge(xp: Namespace, grid: Array, factor: int) -> Array:
    """Repeat each position as a square of factor x factor: (B, h, w, V) → (B, h·factor, w·factor, V)."""
    h, w, values = grid.shape[1:]
    repeated = xp.tile(grid[:, :, None, :, None, :], (1, 1, factor, 1, factor, 1))
    return xp.reshape(repeated, (-1, h * factor, w * factor, values))


def _constant(xp: Namespace, values: ArrayLike, like: Array) -> Array:
    if xp.__name__ == "torch":  # needs the device and has no `array`
        return xp.asarray(values, dtype=like.dtype, device=like.device)
    return xp.array(values, dtype=like.dtype)


@dataclass(frozen=True, kw_only=True)
class Target(Strategy, ABC, family="target"):
    """Prediction target of normalised images (B, H, W, C); a call returns it folded, (B, h, w, V·n²)."""

    classes: ClassVar[bool] = False
    """Whether a position has one class id instead of values, for losses of classes."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """Settings that are arrays of numbers. An engine may keep its own arrays of them on its device."""

    @property
    def pitch(self) -> int:
        """Distance between predicted positions in pixels."""
        return 1

    def values(self, image_channels: int) -> int:
        """Return the number of values that the head predicts at each position (V)."""
        return image_channels

    @abstractmethod
    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        """Encode images (B, H, W, C) as a target map (B, H/q, W/q, V), or class ids (B, H/q, W/q, 1)."""

    def decode(self, xp: Namespace, values: Array, images: Array, stride: int) -> Array | None:
        """Decode a predicted map (B, H/q, W/q, V) to normalised pixels (B, H, W, C), or None if it has no picture."""
        return None

    def __call__(self, xp: Namespace, images: Array, stride: int) -> Array:
        """Compute the target (B, h, w, V·n²), or class ids (B, h, w, n²), of normalised float32 images (B, H, W, C)."""
        return patchify(xp, self.encode(xp, images, stride), self._positions(stride))

    def channels(self, image_channels: int, stride: int) -> int:
        """Return the prediction width of a feature-map cell, V·n². Raises `UserError` for an unsuitable stride."""
        return self.values(image_channels) * self._positions(stride) ** 2

    def weights(self, xp: Namespace, mask: Array, patch: int, stride: int) -> Array:
        """Compute the masked share of each position: bool mask (B, H/patch, W/patch) → (B, h, w, n²) in [0, 1]."""
        pixels = _enlarge(xp, xp.where(mask, 1.0, 0.0)[..., None], patch)  # (B, H, W, 1)
        return patchify(xp, block_means(xp, pixels, self.pitch), self._positions(stride))

    def to_pixels(self, xp: Namespace, prediction: Array, images: Array, stride: int) -> Array | None:
        """Convert a prediction (B, h, w, V·n²) to normalised pixels (B, H, W, C), or None if it has no picture.

        `images` are the originals: normalised targets take their mean and variance from them.
        """
        return self.decode(xp, unpatchify(xp, prediction, self._positions(stride)), images, stride)

    def _positions(self, stride: int) -> int:
        if stride % self.pitch:
            raise UserError(
                f"feature stride {stride} is not a multiple of the {self.pitch} pixels of target {self.kind}; "
                f"use a model of stride {2 * self.pitch} or {4 * self.pitch}, or another target"
            )
        return stride // self.pitch


@dataclass(frozen=True, kw_only=True)
class PixelTarget(Target):
    """Raw pixels (SimMIM §3.4, the default)."""

    kind: ClassVar[str] = "pixels"

    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        return images

    def decode(self, xp: Namespace, values: Array, images: Array, stride: int) -> Array | None:
        return values


@dataclass(frozen=True, kw_only=True)
class NormalizedTarget(Target):
    """Pixels normalised by the mean and standard deviation of their patch (MAE §3, arXiv 2111.06377).

    Both are over all pixels and channels of a patch; the variance is unbiased. A call raises `UserError` if the patch
    does not divide the image.
    """

    kind: ClassVar[str] = "normalized"
    patch: int | None = None
    """Side of a normalised patch in pixels (default: the stride of the feature map)."""

    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        blocks, mean, deviation = self._statistics(xp, images, stride)
        return xp.reshape((blocks - mean) / deviation, (-1, *images.shape[1:]))

    def decode(self, xp: Namespace, values: Array, images: Array, stride: int) -> Array | None:
        blocks, mean, deviation = self._statistics(xp, images, stride)
        return xp.reshape(xp.reshape(values, (-1, *blocks.shape[1:])) * deviation + mean, (-1, *images.shape[1:]))

    def _statistics(self, xp: Namespace, images: Array, stride: int) -> tuple[Array, Array, Array]:
        height, width, channels = images.shape[1:]
        patch = self.patch or stride
        if height % patch or width % patch:
            raise UserError(
                f"image size {height}x{width} is not a multiple of the normalised patch {patch}; "
                f"use a patch that divides {math.gcd(height, width)}"
            )
        blocks = _blocks(xp, images, patch)
        mean = xp.mean(blocks, axis=(2, 4, 5), keepdims=True)
        squares = xp.sum((blocks - mean) ** 2, axis=(2, 4, 5), keepdims=True)
        return blocks, mean, xp.sqrt(squares / (patch * patch * channels - 1) + _VARIANCE_FLOOR)


@dataclass(frozen=True, kw_only=True)
class LocallyNormalizedTarget(Target):
    """Pixels normalised by the mean and standard deviation of the window around them (SwinV2 with SimMIM).

    Channels are normalised separately, by the unbiased variance. At borders, the window is clipped to the image.
    """

    kind: ClassVar[str] = "local_normalized"
    window: int = 47
    """Side of the window in pixels, odd (official recipe: 47)."""

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0:
            raise UserError(f"normalisation window {self.window} is not an odd number from 3 up; use 47")

    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        mean, deviation = self._statistics(xp, images)
        return (images - mean) / deviation

    def decode(self, xp: Namespace, values: Array, images: Array, stride: int) -> Array | None:
        mean, deviation = self._statistics(xp, images)
        return values * deviation + mean

    def _statistics(self, xp: Namespace, images: Array) -> tuple[Array, Array]:
        centre = xp.mean(images, axis=(1, 2), keepdims=True)
        x = images - centre  # in float32, E[x²] - E[x]² cancels far less for pixels around 0
        count = _window_sums(xp, xp.ones_like(x[:1, :, :, :1]), self.window)
        mean = _window_sums(xp, x, self.window) / count
        variance = (_window_sums(xp, x * x, self.window) / count - mean * mean) * (count / (count - 1))
        variance = xp.where(variance > 0, variance, 0.0)
        return mean + centre, xp.sqrt(variance + _VARIANCE_FLOOR)


def _window_sums(xp: Namespace, x: Array, window: int) -> Array:
    """Sum over the window x window pixels around each pixel, clipped to the image: (B, H, W, C)."""
    for _ in range(2):  # along H, then with swapped axes along W
        length = x.shape[1]
        reach = min(window // 2, length - 1)
        totals = xp.cumsum(x, axis=1)
        last = xp.concatenate([totals[:, reach:], xp.tile(totals[:, -1:], (1, reach, 1, 1))], axis=1)
        before = xp.concatenate([xp.zeros_like(x[:, : reach + 1]), totals[:, : length - reach - 1]], axis=1)
        x = xp.moveaxis(last - before, 1, 2)
    return x


@dataclass(frozen=True, kw_only=True)
class ClusterTarget(Target):
    """Colour cluster of the mean of each block x block pixels, as K-way classification.

    After iGPT; SimMIM §3.4 tried it per pixel with 512 clusters. Blocks keep the head small: 512 logits for each of
    32 x 32 pixels would be half a million outputs. `centres` (K, C) are colours of normalised images, as `k_means`
    finds them in 100,000 block means. The picture of a prediction shows each block's expected colour.
    """

    kind: ClassVar[str] = "clusters"
    classes: ClassVar[bool] = True
    arrays: ClassVar[tuple[str, ...]] = ("centres",)
    clusters: int = 128
    """Number of colours to find by k-means."""
    centres: Suppress[tuple[tuple[float, ...], ...] | None] = None
    """Normalised colours (default: found by k-means over the images)."""
    block: int = 4
    """Side of a block in pixels."""

    def __post_init__(self) -> None:
        if self.centres is not None:
            object.__setattr__(self, "clusters", len(self.centres))
        if self.clusters < 2:
            raise UserError(f"{self.clusters} colour clusters are too few to tell apart; use 2 or more")
        if self.block < 1:
            raise UserError(f"colour block {self.block} is less than 1 pixel; use 4")

    @property
    def pitch(self) -> int:
        return self.block

    def values(self, image_channels: int) -> int:
        assert self.centres is not None
        if image_channels != len(self.centres[0]):
            raise UserError(
                f"colour clusters of {len(self.centres[0])} channels do not fit images of {image_channels}; "
                f"fit the clusters to these images"
            )
        return len(self.centres)

    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        colours = block_means(xp, images, self.block)[..., None, :]  # (B, H/q, W/q, 1, C)
        assert self.centres is not None
        centres = _constant(xp, self.centres, images)
        # Channel by channel, since all differences at once would take C times the memory of the logits.
        distance = sum((colours[..., c] - centres[:, c]) ** 2 for c in range(images.shape[3]))
        return xp.argmin(distance, axis=-1)[..., None]

    def decode(self, xp: Namespace, values: Array, images: Array, stride: int) -> Array | None:
        assert self.centres is not None
        odds = xp.exp(values - xp.amax(values, axis=-1, keepdims=True))
        shares = (odds / xp.sum(odds, axis=-1, keepdims=True))[..., None]  # (B, H/q, W/q, K, 1)
        return _enlarge(xp, xp.sum(shares * _constant(xp, self.centres, images), axis=-2), self.block)


@dataclass(frozen=True, kw_only=True)
class HogTarget(Target):
    """Histograms of oriented gradients (MaskFeat, arXiv 2112.09133), as its published code computes them.

    Each channel has Sobel gradients with a reflected border. Their angle from the vertical, modulo 180°, selects one
    of `bins` equal bins (no interpolation), to which a pixel adds its gradient's length. Histograms of `cell` x `cell`
    pixels are scaled to length 1 (flat ones stay 0). Value c·bins + k is bin k of channel c. One difference: bins begin
    0.002° early, see `encode`. HOG has no picture.
    """

    kind: ClassVar[str] = "hog"
    bins: int = 9
    """Orientation bins of a histogram."""
    cell: int = 8
    """Side of a histogram's square in pixels."""

    @property
    def pitch(self) -> int:
        return self.cell

    def values(self, image_channels: int) -> int:
        return image_channels * self.bins

    def encode(self, xp: Namespace, images: Array, stride: int) -> Array:
        horizontal, vertical = _sobel(xp, images)
        turns = xp.arctan2(horizontal, vertical) / math.pi  # half turns: a gradient and its opposite differ by 1
        # Many gradients of 8-bit images are exactly 0°, a bin border. Without the shift, rounding would choose the bin.
        bins = xp.floor(turns * self.bins + 1e-4) % self.bins  # (B, H, W, C)
        lengths = xp.sqrt(horizontal**2 + vertical**2)
        # A loop over bins keeps one (B, H, W, C) array at a time; a one-hot array would hold `bins`.
        histogram = xp.stack(
            [block_means(xp, xp.where(bins == k, lengths, 0.0), self.cell) for k in range(self.bins)], axis=-1
        )  # (B, H/q, W/q, C, bins); means instead of sums, since normalisation removes the scale
        norm = xp.sqrt(xp.sum(histogram**2, axis=-1, keepdims=True))
        rows, columns, channels, _ = histogram.shape[1:]
        return xp.reshape(histogram / (norm + 1e-12), (-1, rows, columns, channels * self.bins))


def _sobel(xp: Namespace, images: Array) -> tuple[Array, Array]:
    """Compute horizontal and vertical Sobel gradients, left - right and top - bottom, each (B, H, W, C)."""
    x = xp.concatenate([images[:, 1:2], images, images[:, -2:-1]], axis=1)
    x = xp.concatenate([x[:, :, 1:2], x, x[:, :, -2:-1]], axis=2)  # (B, H + 2, W + 2, C), the border reflected
    rows_smoothed = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    columns_smoothed = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    return (
        rows_smoothed[:, :, :-2] - rows_smoothed[:, :, 2:],
        columns_smoothed[:, :-2] - columns_smoothed[:, 2:],
    )
