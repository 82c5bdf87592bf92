"""Features as colours: principal axes of all images at once, turned to the picture before."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from simmim.training.feature_pictures import draw_features, principal_axes, turned_to
from simmim.training.pictures import feature_panel

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)


def features(width: int, seed: int = 0) -> NDArray[np.float32]:
    """(3, 2, 2, width) that vary most along the first of their numbers, and are far from 0."""
    draw = np.random.default_rng(seed).normal(size=(3, 2, 2, width)) / np.arange(1, width + 1)
    return (draw + 5).astype(np.float32)


@pytest.mark.parametrize("width", [5, 40])  # fewer and more features than the 12 cells
def test_axes_are_those_of_one_pca_over_all_images(width: int) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    cells = features(width).reshape(-1, width)
    expected = decomposition.PCA(3, whiten=True, svd_solver="full").fit_transform(cells)
    found = principal_axes(features(width)).reshape(-1, 3)
    expected *= np.sign((expected * found).sum(0)) * np.sqrt(12 / 11)  # deviations over 12 cells, not 11
    assert np.abs(found - expected).max() < 1e-4


def test_axes_along_which_nothing_differs_are_grey() -> None:
    assert (principal_axes(np.ones((2, 3, 3, 6))) == 0).all()
    one = np.ones((2, 3, 3, 6)) * 5
    one[0, 0, 0] += 1
    assert (principal_axes(one).std((0, 1, 2)) > 0.9).tolist() == [True, False, False]
    assert principal_axes(features(2)).shape == (3, 2, 2, 3)


def test_colours_are_turned_to_those_before_and_distances_kept() -> None:
    values = principal_axes(features(6))
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    assert np.allclose(turned_to(values @ turn, values), values)
    other = principal_axes(features(6, seed=1))
    turned = turned_to(other, values)
    assert np.allclose(turned @ turned.reshape(-1, 3).T, other @ other.reshape(-1, 3).T)
    assert ((turned - values) ** 2).sum() < ((other - values) ** 2).sum()


def test_a_picture_depends_on_the_steps_before_it_alone(tmp_path: Path) -> None:
    def draw(step: int) -> bytes:
        assert draw_features(PIXELS, features(6, seed=step), tmp_path, step) is not None
        return (tmp_path / f"step-{step:08d}.png").read_bytes()

    first = [draw(step) for step in (0, 4, 8)]
    assert [draw(4), draw(8)] == first[1:]  # as a resumed run does: a later one is there already
    (tmp_path / "step-00000004.npy").write_bytes(b"broken")
    (tmp_path / "step-1 (copy).npy").write_bytes(b"")
    draw(8)
    assert draw_features(PIXELS, features(6) * np.nan, tmp_path, 12) is None
    assert not (tmp_path / "step-00000012.png").exists()


@pytest.mark.parametrize(("images", "columns"), [(1, 2), (2, 4), (5, 4)])
def test_each_image_has_its_features_at_its_right(images: int, columns: int) -> None:
    colours = np.linspace(0, 1, images)[:, None, None, None] * np.ones((1, 2, 2, 3))
    panel = feature_panel(np.zeros((images, 128, 128, 3)), colours)
    rows = -(-images // 2)
    assert panel.shape == (16 + rows * 132 - 4, columns * 132 - 4, 3)
    last, row = (3, images - 1 - rows) if images > 1 else (1, 0)
    assert (panel[16 + row * 132 :][:128, last * 132 :][:, :128] == round(255 * colours[-1, 0, 0, 0])).all()
