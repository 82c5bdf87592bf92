"""Descriptors against loops in NumPy."""

import math

import numpy as np
import pytest
import torch

from simmim.torch_engine.models.descriptors import (
    Projection,
    VisualWords,
    gradient_histograms,
    shrink,
    small_copy,
)


def histograms_by_loop(image: np.ndarray) -> np.ndarray:
    """Compute HOG of an image (C, 16, 16) pixel by pixel: (4·9·7·7)."""
    cells = np.zeros((8, 8, 9))
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="edge")
    for y in range(16):
        for x in range(16):
            across = padded[:, y + 1, x + 2] - padded[:, y + 1, x]
            down = padded[:, y + 2, x + 1] - padded[:, y, x + 1]
            channel = int(np.argmax(across**2 + down**2))
            length = math.hypot(across[channel], down[channel])
            place = (math.atan2(down[channel], across[channel]) / math.pi) % 1 * 9
            low = int(place) % 9
            cells[y // 2, x // 2, low] += length * (1 - place % 1) / 4
            cells[y // 2, x // 2, (low + 1) % 9] += length * (place % 1) / 4
    blocks = np.zeros((4 * 9, 7, 7))
    for y in range(7):
        for x in range(7):
            block = np.concatenate([cells[y + i, x + j] for i in (0, 1) for j in (0, 1)])
            block = np.minimum(block / max(np.linalg.norm(block), 1e-3), 0.2)
            blocks[:, y, x] = block / max(np.linalg.norm(block), 1e-3)
    return blocks.ravel()


def test_gradient_histograms_are_those_of_a_loop_over_pixels() -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    expected = np.stack([histograms_by_loop(image) for image in images])
    np.testing.assert_allclose(gradient_histograms(torch.from_numpy(images)).numpy(), expected, atol=1e-5)


def test_a_large_image_is_described_as_its_copy_of_64_pixels() -> None:
    small = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(gradient_histograms(shrink(large)), gradient_histograms(small), atol=1e-5, rtol=0)
    torch.testing.assert_close(small_copy(shrink(large)), small_copy(small))


def test_projected_values_are_uncorrelated_and_half_whitened() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3)
    projection = Projection(6, 4)
    projection.fit(values)
    found = projection(values.float()).double()
    covariance = np.cov(found.numpy().T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(covariance.diagonal()), atol=1e-4)
    assert covariance.diagonal().mean() == pytest.approx(1, abs=1e-4)
    variances = np.linalg.eigvalsh(np.cov(values.numpy().T, bias=True))[::-1][:4]
    np.testing.assert_allclose(covariance.diagonal() ** 2 / variances, covariance[0, 0] ** 2 / variances[0], rtol=1e-3)


def test_fewer_images_than_axes_leave_axes_at_zero() -> None:
    projection = Projection(6, 5)
    projection.fit(torch.rand(3, 6))
    assert projection.axes[:, 2:].abs().sum() == 0 and projection.axes[:, :2].abs().sum() > 0


def activations_by_loop(image: np.ndarray, model: VisualWords, step: int) -> np.ndarray:
    """Compute the words' mean activations in an image (C, H, W) patch by patch: (W,)."""
    centre, whitening, words = (getattr(model, name).double().numpy() for name in ("centre", "whitening", "words"))
    found = []
    for y in range(0, image.shape[1] - 3, step):
        for x in range(0, image.shape[2] - 3, step):
            patch = image[:, y : y + 4, x : x + 4].astype(np.float64).ravel()
            distances = np.linalg.norm((patch - centre) @ whitening - words, axis=1)
            found.append(np.maximum(distances.mean() - distances, 0))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(("side", "step"), [(16, 1), (40, 3), (64, 4)])
def test_visual_words_are_those_of_a_loop_over_patches(side: int, step: int) -> None:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    words = VisualWords(channels=3, words=8)
    words.fit([images])
    expected = [activations_by_loop(image, words, step) for image in images.numpy()]
    np.testing.assert_allclose(words(images).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_patches_are_whitened_and_words_are_their_clusters() -> None:
    """Four textures with some noise: an image is near the words of its own texture, whatever else it shows."""
    generator = torch.Generator().manual_seed(0)
    textures = torch.randn(4, 1, 4, 4, generator=generator).repeat(8, 1, 8, 8)
    images = textures + 0.1 * torch.randn(32, 1, 32, 32, generator=generator)
    words = VisualWords(channels=1, words=32)
    words.fit([images])
    found = words(images)
    nearest = torch.cdist(found, found).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest % 4, torch.arange(32) % 4)
    whitened = (textures[:4, 0, :4, :4].flatten(1) - words.centre) @ words.whitening
    assert (torch.cdist(whitened, words.words).min(1).values < 0.5 * torch.cdist(whitened, whitened)[0, 1]).all()


def test_images_with_fewer_patches_than_words_repeat_words() -> None:
    words = VisualWords(channels=1, words=5)
    words.fit([torch.zeros(2, 1, 32, 32), torch.ones(1, 1, 32, 32)])
    found = words(torch.rand(2, 1, 32, 32))
    assert torch.equal(found[:, :2], found[:, 2:4])
    assert not torch.equal(found[:, 0], found[:, 1])
