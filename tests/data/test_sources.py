"""What `--data` finds, and what it says where there is nothing."""

import errno
import os
import socket
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.data import files
from simmim.data.decode import decode
from simmim.data.files import PathList
from simmim.data.packed.format import is_packed
from simmim.data.picture import BadImage
from simmim.data.sources import Subset, open_source, read_raw, register_source, sniff


def names(data: Path | str) -> list[str]:
    source = open_source(str(data))
    return [os.path.relpath(source.name(index), data) for index in range(len(source))]


def write(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())
    return folder


def arrays(folder: Path, *images: np.ndarray) -> PathList:
    for number, image in enumerate(images):
        np.save(folder / f"{number:03d}.npy", image)
    return PathList(sorted(folder.glob("*.npy")))


def test_a_folder_gives_its_images_of_any_depth_in_order(tmp_path: Path):
    write(tmp_path, "b.jpg", "a/z/1.PNG", "a/z/0.tiff", "a/y.npy", "a.b/c.webp")
    assert names(tmp_path) == ["a.b/c.webp", "a/y.npy", "a/z/0.tiff", "a/z/1.PNG", "b.jpg"]


def test_hidden_and_other_files_are_left_out(tmp_path: Path):
    write(tmp_path, "a.jpg", ".b.jpg", ".git/c.jpg", "notes.txt", "jpg", "masks.npz")
    assert names(tmp_path) == ["a.jpg"]


def test_a_folder_that_links_to_itself_is_walked_once(tmp_path: Path):
    write(tmp_path, "a/b.jpg")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names(tmp_path) == ["a/b.jpg"]


def test_a_linked_folder_is_walked(tmp_path: Path):
    write(tmp_path / "elsewhere", "b.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "data") == ["linked/b.jpg"]


def test_reading_gives_the_bytes_of_the_file_that_is_named(tmp_path: Path):
    source = open_source(str(write(tmp_path, "b/1.jpg", "a.jpg")))
    assert [source.read(index) for index in range(2)] == [b"a.jpg", b"b/1.jpg"]


def test_one_image_is_a_set_of_one(tmp_path: Path):
    source = open_source(str(write(tmp_path, "a.JPG", "b.jpg") / "a.JPG"))
    assert [source.read(index) for index in range(len(source))] == [b"a.JPG"]


def test_a_list_names_images_relative_to_its_folder(tmp_path: Path):
    write(tmp_path / "elsewhere", "c.jpg")
    write(tmp_path, "a.jpg", "b/b.jpg")
    absolute = tmp_path / "elsewhere" / "c.jpg"
    (tmp_path / "list.txt").write_text(f"# chosen by hand\n\nb/b.jpg\n  a.jpg  \n{absolute}\nlost.jpg\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [source.read(index) for index in range(3)] == [b"b/b.jpg", b"a.jpg", b"c.jpg"]


def test_a_subset_has_the_chosen_images_in_their_order(tmp_path: Path):
    source = Subset(open_source(str(write(tmp_path, "a.jpg", "b.jpg", "c.jpg"))), np.array([2, 0]))
    assert [source.read(index) for index in range(len(source))] == [b"c.jpg", b"a.jpg"]


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        (
            {},
            "none",
            "{0}/none does not exist; "
            "pass a folder of images or shards, a .zip or .tar, a .txt list of paths, an .npz, hf:NAME or demo",
        ),
        ({"a/b.txt": ""}, "a", "folder {0}/a holds no images; files read end in .avif, .bmp, .dcm, "),
        (
            {"a.dat": ""},
            "a.dat",
            "{0}/a.dat is neither a folder, nor an archive, nor a list of image paths, nor an image by its suffix; ",
        ),
        (
            {"a.tar.gz": ""},
            "a.tar.gz",
            "{0}/a.tar.gz is an archive whose files cannot be read one by one here; unpack",
        ),
        ({"a.txt": "\n# b.jpg\n"}, "a.txt", "list {0}/a.txt names no images; write one path a line"),
        (
            {"a.lst": "b.jpg\nc.jpg\n"},
            "a.lst",
            "none of the first 2 paths in {0}/a.lst is a file, such as {0}/b.jpg; "
            "write paths relative to the list's folder",
        ),
    ],
)
def test_data_without_images_is_refused_in_one_line(tmp_path: Path, files: dict[str, str], data: str, message: str):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        open_source(str(tmp_path / data))
    assert str(caught.value).startswith(message.format(tmp_path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path):
    write(tmp_path, "a/b.jpg")
    (tmp_path / "a").chmod(0)
    with pytest.raises(ValueError, match="a cannot be listed: Permission denied; check its permissions"):
        open_source(str(tmp_path))


def test_a_folder_that_may_not_be_looked_into_is_no_set_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)  # for anyone but root
    assert not is_packed(tmp_path)


def test_the_demo_images_are_small_and_in_colour():
    source = open_source("demo")
    assert len(source) > 900
    assert decode(source.read(0), channels=3, dtype=np.uint8).shape == (64, 64, 3)


def test_the_demo_images_are_read_alike_by_many_threads():
    source = open_source("demo")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(len(source)))) == [source.read(index) for index in range(len(source))]


def test_sniff_takes_8_bit_images_as_uint8(tmp_path: Path):
    assert sniff(arrays(tmp_path, np.zeros((8, 8, 3), np.uint8)), channels=3) == np.uint8


def test_sniff_takes_images_as_float32_where_one_is_deeper(tmp_path: Path):
    source = arrays(tmp_path, np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint16))
    assert sniff(source, channels=3) == np.float32


@pytest.mark.parametrize(("stored", "asked"), [(1, 3), (3, 1), (5, 5)])
def test_sniff_accepts_what_decoding_converts(tmp_path: Path, stored: int, asked: int):
    assert sniff(arrays(tmp_path, np.zeros((8, 8, stored), np.uint8)), channels=asked) == np.uint8


@pytest.mark.parametrize(("stored", "asked"), [(5, 3), (3, 5), (4, 3)])
def test_sniff_refuses_a_wrong_number_of_channels_and_names_the_right_one(tmp_path: Path, stored: int, asked: int):
    with pytest.raises(ValueError, match=f"^images have {stored} channels, not {asked}: pass --channels {stored}$"):
        sniff(arrays(tmp_path, np.zeros((8, 8, stored), np.uint8)), channels=asked)


def test_sniff_leaves_a_single_misfit_to_the_bad_images(tmp_path: Path):
    source = arrays(tmp_path, *np.zeros((4, 8, 8, 3), np.uint8), np.zeros((8, 8, 2), np.uint8))
    assert sniff(source, channels=3) == np.uint8


def test_sniff_refuses_a_set_of_which_nothing_can_be_read(tmp_path: Path):
    write(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(ValueError, match=r"^none of the first 2 images can be read, such as .*/a.jpg: not an image in"):
        sniff(open_source(str(tmp_path)), channels=3)


class TestHuggingFace:
    """Data sets on disk, so that nothing is fetched."""

    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        datasets = pytest.importorskip("datasets")
        folder = tmp_path_factory.mktemp("hf")
        images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
        rows = datasets.Dataset.from_dict({"label": [0, 1, 2], "image": images}, features=features)
        rows.save_to_disk(str(folder / "single"))
        parts = datasets.DatasetDict({"train": rows, "test": rows.select([2])})
        parts.save_to_disk(str(folder / "split"))
        rows.remove_columns("image").save_to_disk(str(folder / "imageless"))
        return folder

    @pytest.mark.parametrize(
        ("data", "colours"),
        [
            ("single", [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
            ("split", [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
            ("split:test", [(0, 0, 255)]),
        ],
    )
    def test_a_saved_data_set_gives_its_images(self, saved: Path, data: str, colours: list[tuple[int, int, int]]):
        source = open_source(f"hf:{saved}/{data}")
        shown = [decode(source.read(index), channels=3, dtype=np.uint8)[0, 0] for index in range(len(source))]
        assert [tuple(colour.tolist()) for colour in shown] == colours

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("split:val", "data set hf:{0}/split has no split val; choose of train, test"),
            ("imageless", "data set hf:{0}/imageless has no image column, only label; pass another"),
            ("single:test", "data set hf:{0}/single has no splits; leave out :test"),
            ("nothing/here", "data set hf:{0}/nothing/here cannot be opened ("),
        ],
    )
    def test_a_data_set_without_images_is_refused_in_one_line(self, saved: Path, data: str, message: str):
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
            open_source(f"hf:{saved}/{data}")
        assert str(caught.value).startswith(message.format(saved))


@pytest.mark.parametrize(("scheme", "message"), [("demo", "is registered already"), ("s3://", "is not a word")])
def test_a_scheme_that_cannot_be_registered_is_refused(scheme: str, message: str):
    with pytest.raises(ValueError, match=message):
        register_source(scheme, lambda rest: PathList([rest]))


def test_an_unknown_scheme_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="scheme faces of faces:all is not known; use one of audio, demo, hf, lmdb"):
        open_source("faces:all")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "c.png"))  # a path of at most 108 bytes
    (tmp_path / "d.png").symlink_to(tmp_path / "none")
    source = open_source(str(tmp_path))
    assert [Path(source.name(index)).name for index in range(len(source))] == ["a.png", "d.png"]  # d is a bad image
    (tmp_path / "list.txt").write_text("a.png\nb.png\nc.png\n")
    listed = open_source(str(tmp_path / "list.txt"))
    for index, reason in ((1, "is no regular file"), (2, "No such device or address")):
        with pytest.raises(BadImage, match=reason):
            read_raw(listed, index)


@pytest.mark.parametrize(
    ("failures", "number", "is_read"), [(3, errno.ESTALE, True), (4, errno.EIO, False), (1, 13, False)]
)
def test_a_read_that_a_network_broke_is_tried_again(
    failures: int, number: int, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, left, waited = tmp_path / "a.png", [failures], []

    def open_at_once(path: str, flags: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return os.open(path, flags)

    path.write_bytes(b"content")
    monkeypatch.setattr(files, "_open_at_once", open_at_once)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    if is_read:
        assert read_raw(PathList([path]), 0) == b"content" and waited == [0.1, 1.0, 5.0]
    else:
        with pytest.raises(BadImage, match=os.strerror(number)):
            read_raw(PathList([path]), 0)
        assert left == [0] and len(waited) == failures - 1


@pytest.mark.slow
def test_a_hundred_thousand_files_in_a_folder_are_listed_in_seconds_and_little_memory(tmp_path: Path) -> None:
    for number in range(100_000):
        (tmp_path / f"image-{number:06d}.jpg").touch()
    begun = time.monotonic()
    assert len(open_source(str(tmp_path))) == 100_000
    assert time.monotonic() - begun < 10
    tracemalloc.start()
    source = open_source(str(tmp_path))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{held / 1e6:.1f} MB held, {most / 1e6:.1f} MB at most")
    assert source.name(99_999).endswith("image-099999.jpg")
    assert held < 5e6 and most < 40e6
