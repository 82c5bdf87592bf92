"""Slices of NIfTI volumes, compared with what nibabel makes of the whole."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.data import volumes
from simmim.data.decode import decode
from simmim.data.files import PathList
from simmim.data.picture import BadImage
from simmim.data.sources import open_source, sniff
from simmim.data.volumes import Slices, read_slice
from simmim.data.windows import Windows
from simmim.errors import UserError

nibabel = pytest.importorskip("nibabel")
RNG = np.random.default_rng(0)
AFFINES = {
    "RAS": np.diag([1.0, 1, 2, 1]),
    "LPI": np.diag([-1.0, -1, -2, 1]),
    "ASR": np.array([[0, 0, 1, 5], [1, 0, 0, 0], [0, 3, 0, -9], [0, 0, 0, 1.0]]),
    "oblique PIR": np.array([[0.1, 0.05, 1, 0], [-1, 0.1, 0.1, 0], [0.1, -1, 0.05, 0], [0, 0, 0, 1.0]]),
}


def save(
    path: Path, shape: tuple[int, ...] = (7, 8, 9), affine: Any = "RAS", dtype: Any = np.int16, **scale: float
) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = RNG.integers(0, 3000, shape).astype(dtype)
    image = nibabel.Nifti1Image(values, AFFINES[affine] if isinstance(affine, str) else affine)
    image.header.set_data_dtype(dtype)
    if scale:
        image.header.set_slope_inter(**scale)
    nibabel.save(image, path)
    return path


def expected(path: Path, number: int) -> np.ndarray:
    """Return the slice of the whole volume as nibabel turns it: first axis to the right, second to anterior."""
    whole = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    time, level = divmod(number, whole.shape[2])
    plane = whole[:, :, level] if whole.ndim == 3 else whole[:, :, level, time]
    return plane.T[::-1]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [((7, 8, 9), np.int16, {"slope": 0.5, "inter": -1024}), ((7, 8, 9, 3), np.float32, {}), ((7, 8, 9), np.uint8, {})],
)
def test_slices_are_those_of_the_volume_turned_to_ras_and_scaled(
    suffix: str, affine: str, shape: tuple[int, ...], dtype: Any, scale: dict[str, float], tmp_path: Path
):
    path = save(tmp_path / f"a{suffix}", shape, affine, dtype, **scale)
    source = Slices(PathList([path]))
    canonical = nibabel.as_closest_canonical(nibabel.load(path)).shape
    assert len(source) == canonical[2] * (3 if len(shape) == 4 else 1)
    for number in range(len(source)):
        found = source.read(number)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected(path, number), rtol=1e-6)


def test_volumes_and_pictures_of_a_folder_have_names_in_order(tmp_path: Path):
    save(tmp_path / "brain.nii.gz", (4, 4, 3))
    save(tmp_path / "c.nii", (4, 4, 2))
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    names = [str(Path(source.name(index)).relative_to(tmp_path)) for index in range(len(source))]
    assert names == ["a.png", "brain.nii.gz#000", "brain.nii.gz#001", "brain.nii.gz#002", "c.nii#000", "c.nii#001"]
    assert sniff(source, channels=1) == np.float32


def test_a_volume_is_decompressed_once_for_all_of_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(save(tmp_path / "a.nii.gz"))
    monkeypatch.setattr(volumes, "_VOLUMES", volumes._Volumes())
    read_slice(path, 0)
    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "get_unscaled", lambda _: pytest.fail("read again"))
    read_slice(path, 5)


def test_kept_volumes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held = volumes._Volumes()
    monkeypatch.setattr(volumes, "_VOLUMES", held)
    monkeypatch.setattr(volumes, "_KEPT", 2 * 7 * 8 * 9 * 2)
    for number in range(5):
        read_slice(str(save(tmp_path / f"{number}.nii.gz")), 0)
    assert [Path(path).name for path, _ in held._held] == ["3.nii.gz", "4.nii.gz"]


def spoil_affine(path: Path) -> None:
    """Let the affine of a file map one of its axes to nothing."""
    open_ = gzip.open if path.suffix == ".gz" else open
    with open_(path, "rb") as file:
        raw = bytearray(file.read())
    raw[252:256] = np.array([0, 1], np.int16).tobytes()  # the affine is that of the three rows
    raw[296:312] = bytes(16)
    with open_(path, "wb") as file:
        file.write(raw)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no volume"), "is a damaged NIfTI file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is a damaged NIfTI file"),
        (lambda path: spoil_affine(path), "gives an axis no direction"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_broken_volume_is_one_bad_image_with_a_line(suffix: str, spoil: Any, message: str, tmp_path: Path):
    path = save(tmp_path / f"a{suffix}")
    spoil(path)
    source = Slices(PathList([path]))
    with pytest.raises(BadImage, match=message):
        source.read(len(source) - 1)


def test_windows_of_slices_are_counted_by_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "a.nii.gz", (130, 70, 2))
    monkeypatch.setattr(volumes, "read_slice", lambda *_: pytest.fail("a slice is read"))
    windows = Windows(open_source(str(tmp_path)), (32, 32))
    names = [Path(windows.name(index)).name for index in range(len(windows))]
    assert names == [f"a.nii.gz#00{level}#{number}" for level in range(2) for number in range(8)]


def test_packed_slices_keep_values_and_names(tmp_path: Path):
    save(tmp_path / "images/a.nii.gz", slope=0.5, inter=-10)
    assert main(["pack", str(tmp_path / "images"), "--out", str(tmp_path / "shards")]) == 0
    packed, loose = open_source(str(tmp_path / "shards")), open_source(str(tmp_path / "images"))
    assert [packed.name(index) for index in range(9)] == [f"a.nii.gz#00{level}" for level in range(9)]
    for index in range(9):
        found = decode(packed.read(index), channels=1, dtype=np.float32)
        np.testing.assert_array_equal(found[..., 0], loose.read(index))


def test_a_volume_in_an_archive_says_where_volumes_are_read(tmp_path: Path):
    save(tmp_path / "a.nii.gz")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.nii.gz", "a.nii.gz")
    with pytest.raises(UserError, match="volumes are read as unlabelled images, of folders and lists"):
        sniff(open_source(str(tmp_path / "all.zip")), channels=1)


def test_without_nibabel_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing() -> Any:
        raise BadImage("a NIfTI file needs nibabel; pip install 'simmim[medical]'")

    save(tmp_path / "a.nii")
    monkeypatch.setattr(volumes, "_nibabel", missing)
    with pytest.raises(UserError, match=r"a NIfTI file needs nibabel; pip install 'simmim\[medical\]'"):
        sniff(open_source(str(tmp_path)), channels=1)


def test_a_first_volume_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path):
    save(tmp_path / "a.nii", (4, 4, 120))
    (tmp_path / "a.nii").write_bytes((tmp_path / "a.nii").read_bytes()[:352])
    save(tmp_path / "b.nii")
    assert sniff(open_source(str(tmp_path)), channels=1) == np.float32
