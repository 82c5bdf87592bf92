"""Views that are cut on the device."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from simmim.errors import UserError
from simmim.method.views import View
from simmim.torch_engine.models.views import cut_view

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
