"""Windows side by side cover an image, whatever its format, and have names that say where they are."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from simmim.data import pillow
from simmim.data.files import PathList
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, open_source
from simmim.data.windows import GridWindows

SCENE = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray = SCENE, *, orientation: int = 1) -> Path:
    if path.suffix == ".tif":
        tags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), extratags=tags)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save(path, exif=exif)
    return path


def names(source: ImageSource) -> list[str]:
    return [Path(source.name(index)).name for index in range(len(source))]


@pytest.mark.parametrize("kind", ["tif", "png"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1)])
def test_windows_cover_an_image_and_are_named_by_their_first_pixel(
    kind: str, orientation: int, turns: int, tmp_path: Path
) -> None:
    grid = GridWindows(PathList([write(tmp_path / f"a.{kind}", orientation=orientation)]), (64, 64))
    scene, found = np.rot90(SCENE, turns), np.zeros((*np.rot90(SCENE, turns).shape[:2], 3), np.uint8)
    rows, columns = ([0, 64, 86], [0, 64, 128, 136]) if turns == 0 else ([0, 64, 128, 136], [0, 64, 86])
    assert names(grid) == [f"a.{kind}@{row},{column}" for row in rows for column in columns]
    for index in range(len(grid)):
        row, column = map(int, grid.name(index).rsplit("@")[-1].split(","))
        found[row : row + 64, column : column + 64] = grid.read(index).read(1)
    np.testing.assert_array_equal(found, scene)


def test_an_image_that_just_fits_is_one_window_and_so_is_a_smaller_one(tmp_path: Path) -> None:
    files = [write(tmp_path / "exact.png", SCENE[:64, :64]), write(tmp_path / "small.png", SCENE[:30, :20])]
    grid = GridWindows(PathList(files), (64, 64))
    assert names(grid) == ["exact.png@0,0", "small.png@0,0", "small.png@10,0"]  # enlarged until the window fits
    assert grid.read(1).read(1).shape == (20, 20, 3)


def test_images_of_a_file_share_its_size_and_other_files_have_theirs(tmp_path: Path) -> None:
    for name, shape in (("a", (64, 130)), ("b", (64, 64))):
        write(tmp_path / f"{name}.png", SCENE[: shape[0], : shape[1]])
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.zeros((64, 128, 2), np.float32), np.eye(4)), tmp_path / "c.nii")
    grid = GridWindows(open_source(str(tmp_path)), (64, 64))
    scans = [f"c.nii#00{level}@{row},0" for level in range(2) for row in (0, 64)]
    assert names(grid) == ["a.png@0,0", "a.png@0,64", "a.png@0,66", "b.png@0,0", *scans]
    assert grid.firsts == [0, 3, 4]


def test_a_broken_image_is_one_window_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    grid = GridWindows(PathList([tmp_path / "a.png", write(tmp_path / "b.png", SCENE[:64, :64])]), (64, 64))
    assert names(grid) == ["a.png@0,0", "b.png@0,0"]
    with pytest.raises(BadImage, match="not an image"):
        grid.read(0)


def test_an_image_is_decoded_once_for_all_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, decoded = GridWindows(PathList([write(tmp_path / "a.png"), write(tmp_path / "b.png")]), (64, 64)), []
    decode = pillow._pillow_pixels
    monkeypatch.setattr(pillow, "_pillow_pixels", lambda *told: decoded.append(1) or decode(*told))
    for index in range(len(grid)):
        grid.read(index).read(1)
    assert len(decoded) == 2


def test_an_image_of_another_size_than_the_first_of_its_file_is_refused() -> None:
    class Film:
        """A file of two images, which differ in size."""

        firsts = (0,)

        def __len__(self) -> int:
            return 2

        def name(self, index: int) -> str:
            return f"film#{index}"

        def read(self, index: int) -> bytes:
            file = io.BytesIO()
            Image.fromarray(SCENE[: 64 + index, :64]).save(file, "PNG")
            return file.getvalue()

    grid = GridWindows(Film(), (64, 64))
    assert grid.read(0).read(1).shape == (64, 64, 3)
    with pytest.raises(BadImage, match="is not of the size of the first image of its file"):
        grid.read(1)
