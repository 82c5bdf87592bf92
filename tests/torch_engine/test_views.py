"""Views that are cut on the device."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as colours

from simmim.errors import UserError
from simmim.method.views import View
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.models.views import cut_view, recolour

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_a_view_of_the_whole_image_is_the_image() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    found = cut_view(IMAGES, whole, (32, 48))
    torch.testing.assert_close(found[0], IMAGES[0])
    torch.testing.assert_close(found[1], IMAGES[1].flip(2))


@pytest.mark.parametrize("size", [(8, 8), (40, 24)])
def test_a_crop_is_resized_as_pytorch_resizes_it(size: tuple[int, int]) -> None:
    draws = torch.tensor([[8 / 32, 12 / 48, 16 / 32, 24 / 48, 0.0]] * 2)
    expected = interpolate(IMAGES[:, :, 8:24, 12:36], size, mode="bilinear", antialias=True)
    inside = (..., slice(2, -2), slice(2, -2))  # at its border a view sees the pixels around the crop
    torch.testing.assert_close(cut_view(IMAGES, draws, size)[inside], expected[inside])


def test_a_view_depends_on_its_image_alone() -> None:
    view = View(name="local", scale=(0.1, 0.3))
    epochs, indices = np.array([0, 0, 1, 1]), np.array([5, 9, 5, 9])
    together = view.draw(3, epochs, indices)
    assert np.array_equal(together[2:3], view.draw(3, 1, [5]))
    assert len(np.unique(together, axis=0)) == 4
    assert not np.array_equal(together, View(name="other", scale=(0.1, 0.3)).draw(3, epochs, indices))


def test_crops_lie_in_the_image_and_have_the_shares_and_ratios_asked_for() -> None:
    top, left, height, width, mirrored = View(name="a", scale=(0.1, 0.3)).draw(0, 0, np.arange(2000)).T
    assert min(top.min(), left.min()) >= 0 and max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    assert (height * width).min() >= 0.1 - 1e-6 and (height * width).max() <= 0.3 + 1e-6
    assert (width / height).min() >= 0.75 - 1e-6 and (width / height).max() <= 4 / 3 + 1e-6
    assert 0.4 < mirrored.mean() < 0.6
    assert not View(name="a", flip=False).draw(0, 0, np.arange(100))[:, 4].any()


def test_a_scale_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"scale \(0.5, 2.0\) of view a is not a range of shares"):
        View(name="a", scale=(0.5, 2.0))


def recoloured(images: torch.Tensor, **changes: float) -> torch.Tensor:
    """Recolour images by numbers that are the same for all."""
    usual = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "grey": 0.0, "sigma": 0.0} | changes
    return recolour(images, torch.tensor([[0, 0, 1, 1, 0, *usual.values()]]).expand(len(images), -1))


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_change_as_torchvision_changes_them(name: str, factor: float) -> None:
    found = recoloured(IMAGES, **{name: factor})
    for image, expected in zip(found, IMAGES, strict=True):
        expected = getattr(colours, f"adjust_{name}")(expected, factor)
        torch.testing.assert_close(image, expected, rtol=0, atol=3e-4)  # torchvision rounds its weights of grey


def test_grey_and_blur_are_those_of_torchvision() -> None:
    torch.testing.assert_close(recoloured(IMAGES, grey=1), colours.rgb_to_grayscale(IMAGES, 3), rtol=0, atol=3e-4)
    square = IMAGES[:, :, :, :32]
    found, expected = recoloured(square, sigma=1.5 / 32), colours.gaussian_blur(square, [21, 21], [1.5, 1.5])
    inside = (..., slice(10, -10), slice(10, -10))  # at its border torchvision mirrors the image
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-5)


def test_hue_turns_colours_around_grey_and_keeps_their_luma() -> None:
    faint = 0.4 + 0.1 * IMAGES  # so that no colour is clipped
    luma = lambda images: colours.rgb_to_grayscale(images)  # noqa: E731
    for turn in (0.0, 0.1, 1.0):
        found = recoloured(faint, hue=turn)
        torch.testing.assert_close(luma(found), luma(faint), rtol=0, atol=1e-4)
        assert torch.allclose(found, faint, atol=1e-5) == (turn in (0, 1))
    ours, theirs = ((each - faint).flatten() for each in (recoloured(faint, hue=0.05), colours.adjust_hue(faint, 0.05)))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.5  # torchvision turns the hue of HSV, the same way round
    back = recoloured(recoloured(faint, hue=0.2), hue=-0.2)
    torch.testing.assert_close(back, faint, rtol=0, atol=1e-5)


def test_each_image_has_its_own_colours() -> None:
    rows = torch.tensor([[0, 0, 1, 1, 0, 0.5, 1.2, 0.8, 0.1, 0, 0.01], [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0]])
    together = recolour(IMAGES, rows)
    for number in range(2):
        alone = recolour(IMAGES[number : number + 1], rows[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone)
    assert not torch.allclose(together[0], IMAGES[0], atol=0.01)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_that_are_not_rgb_change_in_brightness_contrast_and_blur_only(channels: int) -> None:
    images = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recoloured(images, saturation=0, hue=0.3, grey=1), images)
    torch.testing.assert_close(recoloured(images, brightness=0.5), images * 0.5)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(recoloured(images, contrast=0.5), (images + mean) / 2)


def test_colours_leave_the_numbers_of_the_crop_as_they_were() -> None:
    plain, coloured = View(name="a"), View(name="a", jitter=0.5, grey=0.2, blur=0.3)
    assert plain.draw(3, 1, np.arange(50)).shape == (50, 5)
    assert np.array_equal(coloured.draw(3, 1, np.arange(50))[:, :5], plain.draw(3, 1, np.arange(50)))


def test_colours_have_the_ranges_and_shares_asked_for() -> None:
    numbers = View(name="a", jitter=0.5, grey=0.2, blur=0.3).draw(0, 0, np.arange(4000))[:, 5:].T
    brightness, contrast, saturation, hue, grey, sigma = numbers
    for factor in (brightness, contrast, saturation):
        assert 0.6 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.4
        assert (factor != 1).mean() == pytest.approx(0.8, abs=0.02)
    assert np.abs(hue).max() == pytest.approx(0.1, abs=0.002)
    assert grey.mean() == pytest.approx(0.2, abs=0.02) and (sigma > 0).mean() == pytest.approx(0.3, abs=0.02)
    blurred = sigma[sigma > 0] * 224
    assert 0.1 <= blurred.min() < 0.15 and 1.95 < blurred.max() <= 2
    assert abs(np.corrcoef(numbers) - np.eye(6)).max() < 0.06
    only_grey = View(name="a", grey=1).draw(0, 0, np.arange(9))[:, 5:]
    assert np.array_equal(only_grey, np.tile(np.float32([1, 1, 1, 0, 1, 0]), (9, 1)))


def test_a_step_recolours_what_it_has_normalised() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    step = PretrainStep.__new__(PretrainStep)
    super(PretrainStep, step).__init__(mean, std)
    pixels = (IMAGES * 255).permute(0, 2, 3, 1)
    row = torch.tensor([[0, 0, 1, 1, 0, 0.5, 1.3, 0.7, 0.0, 0, 0]]).expand(2, -1)
    found = step._view(View(name="a", jitter=1), step.normalize(pixels), row)
    torch.testing.assert_close(
        found, step.normalize(recolour(IMAGES, row).permute(0, 2, 3, 1) * 255), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["jitter", "grey", "blur"])
def test_a_colour_change_that_is_no_share_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} 1.5 of view a is not a share; use 0 to 1"):
        View(name="a", **{name: 1.5})
