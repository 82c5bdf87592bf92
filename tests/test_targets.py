import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_image
from sklearn.metrics import pairwise_distances_argmin
from torch.nn import functional

from simmim.method.k_means import k_means
from simmim.method.targets import (
    ClusterTarget,
    HogTarget,
    LocallyNormalizedTarget,
    NormalizedTarget,
    PixelTarget,
    Target,
    block_means,
    patchify,
    unpatchify,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CENTRES = ((-1.5, -1.4, -1.3), (0.0, 0.1, -0.2), (1.0, -1.0, 0.5), (0.7, 1.1, 1.6))
EVERY_TARGET = [
    PixelTarget(),
    NormalizedTarget(),
    NormalizedTarget(patch=8),
    LocallyNormalizedTarget(),
    ClusterTarget(centres=CENTRES),
    HogTarget(),
]


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Two normalised photographs (2, 64, 96, 3), float32."""
    crops = [load_sample_image(name)[100:164, 200:296] for name in ("china.jpg", "flower.jpg")]
    return ((np.stack(crops) / 255 - MEAN) / STD).astype(np.float32)


def test_unpatchify_is_the_pixel_shuffle_of_the_official_decoder() -> None:
    cells = torch.arange(2 * 3 * 4 * 48).reshape(2, 3, 4, 48)
    expected = functional.pixel_shuffle(cells.movedim(3, 1), 4).movedim(1, 3)
    assert torch.equal(unpatchify(torch, cells, 4), expected)


def test_patchify_is_the_inverse_of_unpatchify() -> None:
    images = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    assert np.array_equal(unpatchify(np, patchify(np, images, 4), 4), images)


@pytest.mark.parametrize("target", EVERY_TARGET, ids=repr)
def test_numpy_and_torch_give_the_same_target(target: Target, photos: np.ndarray) -> None:
    # Where a window is nearly flat, dividing by its deviation magnifies the rounding of float32.
    tolerance = 2e-4 if isinstance(target, LocallyNormalizedTarget) else 1e-5
    ours = target(torch, torch.from_numpy(photos), 16).numpy()
    np.testing.assert_allclose(ours, target(np, photos, 16), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("target", EVERY_TARGET, ids=repr)
def test_targets_compile_into_one_graph(target: Target, photos: np.ndarray) -> None:
    images = torch.from_numpy(photos)
    mask = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(0)) < 0.6

    def step(images: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return target(torch, images, 16), target.weights(torch, mask, 4, 16)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, mask), step(images, mask))


@pytest.mark.parametrize("target", EVERY_TARGET, ids=repr)
def test_channels_is_the_width_that_the_loss_divides(target: Target, photos: np.ndarray) -> None:
    channels, positions = target.channels(3, 16), target.weights(np, np.ones((2, 4, 6), bool), 16, 16).shape[-1]
    values = 1 if isinstance(target, ClusterTarget) else channels // positions
    assert target(np, photos, 16).shape == (2, 4, 6, values * positions)


@pytest.mark.parametrize(
    ("target", "width"),
    [
        (PixelTarget(), 3072),  # SimMIM §3.4: 3072 = 32 x 32 x 3 for Swin
        (HogTarget(), 432),  # 3 channels x 9 bins x 4 x 4 cells
        (ClusterTarget(centres=CENTRES), 256),  # 4 clusters x 8 x 8 blocks
    ],
    ids=repr,
)
def test_channels_at_the_stride_of_swin(target: Target, width: int) -> None:
    assert target.channels(3, 32) == width


@pytest.mark.parametrize(
    "target",
    [PixelTarget(), NormalizedTarget(), NormalizedTarget(patch=8), LocallyNormalizedTarget(window=15)],
    ids=repr,
)
def test_a_perfect_prediction_shows_the_image(target: Target, photos: np.ndarray) -> None:
    shown = target.to_pixels(np, target(np, photos, 16), photos, 16)
    assert shown is not None
    np.testing.assert_allclose(shown, photos, atol=1e-5)


def test_weights_are_the_mask_at_every_pixel() -> None:
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = mask.float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]  # as official SimMIM repeats it
    expected = functional.pixel_unshuffle(pixels, 8).movedim(1, 3)
    assert torch.equal(PixelTarget().weights(torch, mask, patch=4, stride=8), expected)


def test_a_position_weighs_its_masked_share() -> None:
    mask = np.zeros((1, 4, 4), bool)  # patches of 4 pixels; HOG cells of 8
    mask[0, 0, :2], mask[0, 2, 3] = True, True
    assert HogTarget().weights(np, mask, patch=4, stride=16).tolist() == [[[[0.5, 0.0, 0.0, 0.25]]]]


def test_normalized_patches_are_those_of_mae(photos: np.ndarray) -> None:
    images = torch.from_numpy(photos)
    patches = images.unfold(1, 16, 16).unfold(2, 16, 16)  # (B, h, w, C, i, j)
    flat = patches.flatten(3)
    expected = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(NormalizedTarget()(torch, images, 16), expected, rtol=1e-5, atol=1e-5)


def test_normalized_patches_may_be_smaller_than_the_stride(photos: np.ndarray) -> None:
    small = unpatchify(np, NormalizedTarget()(np, photos, 8), 8)
    assert np.array_equal(unpatchify(np, NormalizedTarget(patch=8)(np, photos, 32), 32), small)


def test_a_normalised_patch_that_does_not_divide_the_image_is_refused(photos: np.ndarray) -> None:
    message = "^image size 64x96 is not a multiple of the normalised patch 24; use a patch that divides 32$"
    with pytest.raises(ValueError, match=message):
        NormalizedTarget(patch=24)(np, photos, 16)


def _swin_v2_normalized(images: torch.Tensor, window: int) -> torch.Tensor:
    """SwinV2's normalised target of (B, C, H, W) by average pooling, as its official code defines it."""

    def pool(x: torch.Tensor, pad: bool) -> torch.Tensor:
        return functional.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=pad)

    count = pool(torch.ones_like(images), True) * window**2
    mean, mean_of_squares = pool(images, False), pool(images**2, False)
    variance = ((mean_of_squares - mean**2) * count / (count - 1)).clamp(min=0)
    return (images - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("window", [47, 5])
def test_local_normalisation_is_that_of_swin_v2(photos: np.ndarray, window: int) -> None:
    images = torch.from_numpy(photos).double()
    expected = _swin_v2_normalized(images.movedim(3, 1), window).movedim(1, 3)
    ours = unpatchify(torch, LocallyNormalizedTarget(window=window)(torch, images, 32), 32)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_local_normalisation_in_float32_is_as_exact_as_average_pooling(photos: np.ndarray) -> None:
    images = torch.from_numpy(photos)
    exact = _swin_v2_normalized(images.double().movedim(3, 1), 47).movedim(1, 3)
    pooled = _swin_v2_normalized(images.movedim(3, 1), 47).movedim(1, 3)
    ours = unpatchify(torch, LocallyNormalizedTarget()(torch, images, 32), 32)
    assert (ours - exact).abs().max() <= (pooled - exact).abs().max()


def test_a_flat_image_is_0_after_local_normalisation() -> None:
    white = np.broadcast_to(((1 - MEAN) / STD).astype(np.float32), (1, 64, 64, 3))
    np.testing.assert_allclose(LocallyNormalizedTarget()(np, white, 16), 0, atol=1e-6)


def test_black_beside_white_stays_finite_after_local_normalisation() -> None:
    # Flat windows far from the image's mean: rounding takes the variance below 0 by more than the floor.
    image = np.broadcast_to((-MEAN / STD).astype(np.float32), (1, 96, 96, 3)).copy()
    image[:, :, 32:] = (1 - MEAN) / STD
    assert np.isfinite(LocallyNormalizedTarget()(np, image, 16)).all()


def test_a_window_that_covers_the_image_normalises_it_as_one_patch(photos: np.ndarray) -> None:
    grey = photos[:, :16, :16, :1]
    local = LocallyNormalizedTarget(window=47)(np, grey, 16)
    np.testing.assert_allclose(local, NormalizedTarget()(np, grey, 16), rtol=1e-4, atol=1e-4)


def test_local_normalisation_keeps_float32_under_autocast(photos: np.ndarray) -> None:
    images = torch.from_numpy(photos)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = LocallyNormalizedTarget()(torch, images, 16)
    assert torch.equal(mixed, LocallyNormalizedTarget()(torch, images, 16))


@pytest.mark.parametrize("window", [46, 1])
def test_a_window_without_a_middle_pixel_or_variance_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"^normalisation window {window} is not an odd number from 3 up; use 47$"):
        LocallyNormalizedTarget(window=window)


def test_cluster_ids_are_the_nearest_centres_of_the_block_means(photos: np.ndarray) -> None:
    expected = pairwise_distances_argmin(block_means(np, photos, 4).reshape(-1, 3), np.array(CENTRES))
    ids = unpatchify(np, ClusterTarget(centres=CENTRES)(np, photos, 16), 4)
    assert ids.ravel().tolist() == expected.tolist()


def test_block_means_are_average_pooling(photos: np.ndarray) -> None:
    expected = functional.avg_pool2d(torch.from_numpy(photos).movedim(3, 1), 4).movedim(1, 3)
    np.testing.assert_allclose(block_means(np, photos, 4), expected, rtol=1e-5, atol=1e-6)


def test_sure_logits_show_the_colours_of_their_clusters() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (2, 4, 6, 1))
    logits = patchify(np, np.where(ids == np.arange(4), 50.0, 0.0).astype(np.float32), 2)
    shown = ClusterTarget(centres=CENTRES, block=8).to_pixels(np, logits, np.zeros((2, 32, 48, 3)), 16)
    assert shown is not None
    expected = np.array(CENTRES)[ids[..., 0]].repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_even_logits_show_the_mean_of_the_clusters() -> None:
    logits, images = np.zeros((1, 1, 1, 64), np.float32), np.zeros((1, 16, 16, 3))
    shown = ClusterTarget(centres=CENTRES).to_pixels(np, logits, images, 16)
    assert shown is not None
    np.testing.assert_allclose(shown, np.broadcast_to(np.mean(CENTRES, axis=0), images.shape), atol=1e-6)


def test_one_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^1 colour clusters are too few to tell apart; use 2 or more$"):
        ClusterTarget(centres=CENTRES[:1])


def test_clusters_of_another_channel_count_are_refused() -> None:
    message = "^colour clusters of 3 channels do not fit images of 5; fit the clusters to these images$"
    with pytest.raises(ValueError, match=message):
        ClusterTarget(centres=CENTRES).channels(5, 16)


@pytest.mark.parametrize("clusters", [8, 64])
def test_colour_clusters_are_as_tight_as_those_of_scikit_learn(photos: np.ndarray, clusters: int) -> None:
    colours = photos[:, ::2, ::2].reshape(-1, 3)
    reference = -KMeans(clusters, n_init="auto", random_state=0).fit(colours).score(colours)
    centres = k_means(colours, clusters=clusters)
    inertia = ((colours[:, None] - centres) ** 2).sum(-1).min(1).sum()
    assert inertia < 1.05 * reference


def test_colour_clusters_are_the_same_each_time(photos: np.ndarray) -> None:
    colours = photos[:, ::4, ::4].reshape(-1, 3)
    np.testing.assert_array_equal(k_means(colours, clusters=8, seed=3), k_means(colours, clusters=8, seed=3))


def test_more_clusters_than_colours_are_refused() -> None:
    message = "^2 distinct points are fewer than the 3 clusters; use 2 clusters or more images$"
    with pytest.raises(ValueError, match=message):
        k_means([[0.0], [1.0], [0.0], [1.0]], clusters=3)


def _slow_hog(image: np.ndarray) -> np.ndarray:
    """MaskFeat's HOG of one channel (H, W), pixel by pixel in float64 → (H/8, W/8, 9)."""
    height, width = image.shape
    padded = np.pad(image.astype(np.float64), 1, mode="reflect")
    smooth_edge = np.outer([1, 2, 1], [1, 0, -1])
    histogram = np.zeros((height // 8, width // 8, 9))
    for y in range(height):
        for x in range(width):
            around = padded[y : y + 3, x : x + 3]
            gx, gy = (around * smooth_edge).sum(), (around * smooth_edge.T).sum()
            degrees = math.degrees(math.atan2(gx, gy)) % 180
            histogram[y // 8, x // 8, int(degrees // 20)] += math.hypot(gx, gy)
    return histogram / np.maximum(np.linalg.norm(histogram, axis=-1, keepdims=True), 1e-12)


def test_hog_of_normalised_images_is_the_slow_hog_of_their_bytes() -> None:
    # A slow HOG of whole numbers is exact at the borders of bins; ours has to find the same bins from rounded floats.
    photo = load_sample_image("china.jpg")[100:132, 200:248]
    expected = np.concatenate([_slow_hog(photo[..., c]) for c in range(3)], axis=-1)  # (4, 6, 27)
    ours = HogTarget()(np, ((photo / 255 - MEAN) / STD).astype(np.float32)[None], 16)
    np.testing.assert_allclose(unpatchify(np, ours, 2)[0], expected, rtol=1e-4, atol=1e-5)


def test_hog_of_a_flat_image_is_0() -> None:
    assert not HogTarget()(torch, torch.ones(1, 16, 16, 3), 16).any()


def test_hog_shows_no_picture(photos: np.ndarray) -> None:
    assert HogTarget().to_pixels(np, HogTarget()(np, photos, 16), photos, 16) is None


@pytest.mark.parametrize(
    ("target", "pixels"), [(HogTarget(), 8), (ClusterTarget(centres=CENTRES, block=8), 8)], ids=repr
)
def test_a_stride_that_does_not_suit_the_target_is_refused(target: Target, pixels: int) -> None:
    message = (
        f"^feature stride 14 is not a multiple of the {pixels} pixels of target {target.kind}; "
        f"use a model of stride {2 * pixels} or {4 * pixels}, or another target$"
    )
    with pytest.raises(ValueError, match=message):
        target.channels(3, 14)


@pytest.mark.parametrize("target", EVERY_TARGET, ids=repr)
def test_targets_are_values_known_by_their_name(target: Target) -> None:
    assert Target.kinds[target.kind] is type(target)
    assert replace(target) == target
    assert hash(replace(target)) == hash(target)
