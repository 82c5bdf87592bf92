"""Descriptors of a whole image that need no training: gradient histograms, a small copy, visual words.

Shapes: `B` images, `C` channels, `H W` pixels, `S` raw values, `K` principal axes, `P` patches of an image, `W` words.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.method.k_means import k_means
from simmim.method.random_keys import sample_keys

_SIDE = 64  # pixels; larger images shrink first, so that a gradient spans a share of the image and not of a pixel
_CELLS = 8  # histograms along a side
_BINS = 9
_CLIP = 0.2  # of a normalised histogram (Dalal and Triggs, L2-Hys)
_PATCH = 4  # pixels a side of a visual word
_PLACES = 16  # patches along a side, at most
_WHITENING = 0.1  # added to each variance, as a share of their mean
_PATCHES_OF_IMAGE, _PATCHES = 64, 32_768  # to find the words in
COLOUR_SIDE = 16
"""Pixels a side of `small_copy`."""
SHAPE_VALUES = (_CELLS - 1) ** 2 * 4 * _BINS
"""Values of `gradient_histograms`."""


def shrink(images: Tensor) -> Tensor:
    """Shrink images (B, C, H, W) to 64 pixels a side by averages; smaller sides stay."""
    height, width = images.shape[2:]
    size = (min(height, _SIDE), min(width, _SIDE))
    return images if size == (height, width) else F.adaptive_avg_pool2d(images, size)


def gradient_histograms(images: Tensor) -> Tensor:
    """Describe shape: images (B, C, H, W) → histograms of oriented gradients (B, 7·7·4·9).

    8 × 8 cells of 9 unsigned orientations, shared between the two nearest bins, from the channel with the steepest
    gradient; blocks of 2 × 2 cells are scaled to length 1, clipped at 0.2 and scaled again (Dalal and Triggs, CVPR
    2005, section 6; without the interpolation between cells).
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    steepest = (across.square() + down.square()).argmax(dim=1, keepdim=True)
    across, down = across.gather(1, steepest), down.gather(1, steepest)  # (B, 1, H, W)
    place = torch.atan2(down, across) / math.pi % 1 * _BINS  # in bins
    bins = torch.arange(_BINS, device=images.device).view(1, -1, 1, 1)
    distance = (place - bins + _BINS / 2) % _BINS - _BINS / 2
    votes = (1 - distance.abs()).clamp(min=0) * (across.square() + down.square()).sqrt()  # (B, 9, H, W)
    cells = F.adaptive_avg_pool2d(votes, _CELLS)
    blocks = torch.stack([cells[:, :, i : _CELLS - 1 + i, j : _CELLS - 1 + j] for i in (0, 1) for j in (0, 1)], dim=1)
    blocks = F.normalize(blocks.flatten(1, 2), dim=1, eps=1e-3)  # (B, 36, 7, 7)
    return F.normalize(blocks.clamp(max=_CLIP), dim=1, eps=1e-3).flatten(1)


def small_copy(images: Tensor) -> Tensor:
    """Describe colour: images (B, C, H, W) → their means over 16 × 16 squares (B, C·16·16)."""
    return F.adaptive_avg_pool2d(images, COLOUR_SIDE).flatten(1)


class Projection(nn.Module):
    """Project values (B, S) on K principal axes, half whitened: (B, K), of variance 1 on the average.

    Half whitening, a division by the fourth root of an axis's variance, lets small axes count without letting noise
    rule. Before `fit` the axes are zero.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, values: int, axes: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(values))
        self.register_buffer("axes", torch.zeros(values, axes))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.centre) @ self.axes

    def fit(self, values: Tensor) -> None:
        """Find the axes of values (N, S); those beyond their rank stay zero."""
        data = values.double()
        centre = data.mean(dim=0)
        variances, vectors = torch.linalg.eigh((data - centre).T @ (data - centre) / len(data))
        count = min(self.axes.shape[1], len(variances), len(data) - 1)
        variances, vectors = variances.flip(0)[:count].clamp(min=1e-12), vectors.flip(1)[:, :count]
        scaled = vectors * variances**-0.25 / variances.sqrt().mean().sqrt()
        self.centre.copy_(centre)
        self.axes.zero_()
        self.axes[:, :count] = scaled.float()


class VisualWords(nn.Module):
    """Describe texture: how near an image's patches are to each of W typical ones, averaged over the image: (B, W).

    Patches of 4 × 4 pixels are whitened; words are their clusters. A patch counts for a word as far as that is nearer
    than the average word (the "triangle" features of Coates, Lee and Ng, AISTATS 2011, who also scale the contrast of
    patches away; to keep it did better, benchmarks/results/features_search.md). BoWNet (arXiv 2002.12247) predicts such
    bags of words, too. Before `fit` all words are one.
    """

    centre: Tensor
    whitening: Tensor
    words: Tensor

    def __init__(self, channels: int, words: int):
        super().__init__()
        values = channels * _PATCH**2
        self.register_buffer("centre", torch.zeros(values))
        self.register_buffer("whitening", torch.eye(values))
        self.register_buffer("words", torch.zeros(words, values))

    def forward(self, images: Tensor) -> Tensor:
        whitened = (_patches(images) - self.centre) @ self.whitening  # (B, P, S)
        squares = whitened.square().sum(-1, keepdim=True) + self.words.square().sum(-1)
        distances = (squares - 2 * whitened @ self.words.T).clamp(min=1e-6).sqrt()  # (B, P, W)
        return (distances.mean(-1, keepdim=True) - distances).clamp(min=0).mean(1)

    def fit(self, images: list[Tensor]) -> None:
        """Find the words in batches of images. Where fewer patches differ than there are words, words repeat."""
        found = torch.cat([part[:, _spread(part.shape[1], _PATCHES_OF_IMAGE)] for part in map(_patches, images)])
        points = found.flatten(0, 1)
        points = points[_spread(len(points), _PATCHES)].double()
        centre = points.mean(dim=0)
        variances, vectors = torch.linalg.eigh((points - centre).T @ (points - centre) / len(points))
        floor = (_WHITENING * variances.mean()).clamp(min=1e-6)
        whitening = vectors @ torch.diag((variances.clamp(min=0) + floor).rsqrt()) @ vectors.T
        whitened = ((points - centre) @ whitening).float().numpy()
        count = min(len(self.words), len(np.unique(whitened, axis=0)))
        words = k_means(whitened, clusters=count, iterations=20)
        self.centre.copy_(centre)
        self.whitening.copy_(whitening)
        self.words.copy_(torch.from_numpy(np.resize(words, self.words.shape)))


def _patches(images: Tensor) -> Tensor:
    """Cut patches from images (B, C, H, W), at most 16 along a side: (B, P, C·4·4)."""
    height, width = images.shape[2:]
    steps = (math.ceil(height / _PLACES), math.ceil(width / _PLACES))
    return F.unfold(images, _PATCH, stride=steps).transpose(1, 2)


def _spread(count: int, most: int) -> Tensor:
    """Choose `most` of `count` numbers, or all, at random but always the same."""
    order = np.argsort(sample_keys(0, 0, np.arange(count), stream="patches"))
    return torch.from_numpy(np.sort(order[:most]))
