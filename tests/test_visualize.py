import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.commands.reconstruct import reconstruct
from simmim.training.pictures import reconstruction_panel, to_rgb


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pretraining of one step on the demo images, at 32×32 with patches of 8."""
    out = tmp_path_factory.mktemp("visualize") / "run"
    model = "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=12 num_heads=1 patch_size=8 --image-size 32"
    options = "--mask-cell 8 --steps 1 --batch-size 4 --device cpu --mask-ratio 0.5"
    assert main(f"pretrain --objective pixels --data demo --out {out} {model} {options}".split()) == 0
    return out


def columns_of(path, images: int, side: int = 128) -> list[np.ndarray]:
    """Original, masked and reconstruction of a panel, each (images, side, side, 3)."""
    pixels = np.asarray(Image.open(path))[16:]
    rows = [pixels[row * (side + 4) : row * (side + 4) + side] for row in range(images)]
    return [np.stack([row[:, left : left + side] for row in rows]) for left in (0, side + 4, 2 * (side + 4))]


def test_visible_pixels_keep_their_true_colours(run, tmp_path):
    original, masked, reconstruction = columns_of(reconstruct(run, ("demo",), out=tmp_path / "a.png", count=2), 2)
    visible = (original == masked).all(-1)
    assert 0.4 < visible.mean() < 0.7  # a hidden pixel may be grey by chance
    assert (reconstruction[visible] == original[visible]).all()


def test_half_of_the_cells_are_grey_in_the_masked_column(run, tmp_path):
    _, masked, _ = columns_of(reconstruct(run, ("demo",), out=tmp_path / "a.png", count=3), 3)
    cells = masked.reshape(3, 4, 32, 4, 32, 3)  # a cell of 8 pixels, enlarged four times
    assert ((cells == 128).all((2, 4, 5)).sum((1, 2)) == 8).all()


def test_the_same_seed_gives_the_same_masks_and_another_does_not(run, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    file = (str(tmp_path / "red.png"),)
    first = reconstruct(run, file, out=tmp_path / "a.png", seed=1).read_bytes()
    again = reconstruct(run, file, out=tmp_path / "b.png", seed=1).read_bytes()
    other = reconstruct(run, file, out=tmp_path / "c.png", seed=2).read_bytes()
    assert first == again != other


def test_another_seed_chooses_other_images(run, tmp_path):
    chosen = [columns_of(reconstruct(run, ("demo",), out=tmp_path / "a.png", count=2, seed=s), 2)[0] for s in (1, 2)]
    assert (chosen[0] != chosen[1]).any()


def test_files_are_drawn_in_their_order(run, tmp_path):
    for name, colour in (("b", "red"), ("a", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    files = (str(tmp_path / "b.png"), str(tmp_path / "a.png"))
    original, _, _ = columns_of(reconstruct(run, files, out=tmp_path / "out.png"), 2)
    assert original[0, 64, 64].tolist() == [255, 0, 0]
    assert original[1, 64, 64].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("channels", "rgb"), [(1, [51, 51, 51]), (2, [51, 51, 51]), (3, [51, 102, 153]), (5, [51, 102, 153])]
)
def test_any_number_of_channels_is_shown_in_colour(channels, rgb):
    images = np.arange(1, channels + 1, dtype=np.float32)[None, None, None] / 5
    assert to_rgb(images)[0, 0, 0].tolist() == rgb


def test_colours_outside_black_and_white_are_clipped():
    assert to_rgb(np.array([[[[-1.0, 0.5, 2.0]]]])).tolist() == [[[[0, 128, 255]]]]


def test_the_reconstruction_takes_the_prediction_where_pixels_were_hidden():
    hidden = np.zeros((1, 128, 128), bool)
    hidden[0, :64] = True
    panel = reconstruction_panel(np.zeros((1, 128, 128, 3)), np.ones((1, 128, 128, 3)), hidden)
    assert panel[16 + 32, -64].tolist() == [255, 255, 255]
    assert panel[16 + 96, -64].tolist() == [0, 0, 0]
