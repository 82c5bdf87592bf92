"""Zips, tars of WebDataset, LMDBs and Parquet are read where they are, by any process, and told apart when damaged."""

import io
import multiprocessing
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.data.archives import ArchiveImages
from simmim.data.decode import decode
from simmim.data.labelled.classes import open_labelled
from simmim.data.labelled.every import open_with_labels
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, open_source, read_raw
from simmim.errors import UserError

NAMES = ["b/1.png", "a/2.png", "a/deep/3.png", "c/4.png", "a/5.png", "b/6.png", "c/7.png"]


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


FILES = {name: picture(number) for number, name in enumerate(NAMES)}
OTHERS = {"notes.txt": b"text", ".hidden.png": b"none", "__MACOSX/b/1.png": b"none"}


def write_zip(path: Path, files: dict[str, bytes] = FILES | OTHERS, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes] = FILES | OTHERS, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(f"./{name}")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def contents(source: ImageSource) -> dict[str, bytes]:
    found = {source.name(index): read_raw(source, index) for index in reversed(range(len(source)))}
    return {name: bytes(content) for name, content in found.items() if isinstance(content, bytes)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None])
def test_an_archive_has_the_images_of_its_folder(tmp_path: Path, method: int | None) -> None:
    path = write_tar(tmp_path / "a.tar") if method is None else write_zip(tmp_path / "a.zip", method=method)
    source = open_source(str(path))
    assert contents(source) == {f"{path}/{name}": content for name, content in FILES.items()}
    names = [source.name(index) for index in range(len(source))]
    assert names == sorted(names)


def test_a_folder_of_archives_is_one_set(tmp_path: Path) -> None:
    write_zip(tmp_path / "0.zip", {name: FILES[name] for name in NAMES[:3]})
    write_tar(tmp_path / "1.tar", {name: FILES[name] for name in NAMES[3:]})
    write_tar(tmp_path / "2.tar", {})
    source = open_source(str(tmp_path))
    assert sorted(contents(source).values()) == sorted(FILES.values())
    assert source.name(0) == f"{tmp_path}/0.zip/a/2.png"


def test_loose_images_come_before_archives_beside_them(tmp_path: Path) -> None:
    write_zip(tmp_path / "more.zip")
    (tmp_path / "a.png").write_bytes(FILES["a/2.png"])
    assert list(contents(open_source(str(tmp_path)))) == [f"{tmp_path}/a.png"]
    with pytest.raises(UserError, match="has no class folders; put each class's images in a folder of its name"):
        open_labelled(str(tmp_path))


def test_archives_are_read_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    sources = [open_source(str(write_zip(tmp_path / "a.zip"))), open_source(f"lmdb:{write_lmdb(tmp_path / 'set')}")]
    expected = [contents(source) for source in sources]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(contents, sources) == expected


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_class_folders_in_an_archive_are_labels(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / ("a.zip" if write is write_zip else "a.tar"))
    source, labels = open_with_labels(str(path))
    assert labels.names(np.arange(len(source))) == ["a", "a", "a", "b", "b", "c", "c"]
    found = open_labelled(str(path))
    assert found.classes == ("a", "b", "c") and len(found.train) + len(found.val) == 7
    parts = {f"{part}/{name}": content for part in ("train", "val") for name, content in FILES.items()}
    both = open_labelled(str(write(path, parts)))
    assert both.train_labels.tolist() == both.val_labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_cls_files_of_a_webdataset_are_labels(tmp_path: Path) -> None:
    def samples(first: int) -> dict[str, bytes]:
        pairs = ({f"{n}.input.png": picture(n), f"{n}.cls": b"%d\n" % (n % 3)} for n in range(first, first + 6))
        return {name: content for pair in pairs for name, content in pair.items()}

    write_tar(tmp_path / "train-000.tar", samples(10))
    write_tar(tmp_path / "train-001.tar", samples(20))
    source, labels = open_with_labels(str(tmp_path))
    assert labels.names(np.arange(len(source))) == [str(n % 3) for n in (*range(10, 16), *range(20, 26))]
    assert len(open_labelled(str(tmp_path)).val) == 3  # a fifth of each class
    write_tar(tmp_path / "val-000.tar", samples(30))
    found = open_labelled(str(tmp_path))
    assert (len(found.train), len(found.val)) == (12, 6)
    assert found.val_labels.tolist() == [n % 3 for n in range(30, 36)]


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def encrypted(path: Path) -> Path:
    found = bytearray(path.read_bytes())
    for place in (found.find(b"PK\1\2") + 8, 6):
        found[place] |= 1
    path.write_bytes(found)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: cut(write_zip(path / "a.zip")), "cannot be read as an archive (File is not a zip file); copy it"),
        (lambda path: write_zip(path / "a.zip", OTHERS), "holds no images; files read end in .avif"),
        (lambda path: write_zip(path / "a.zip", method=zipfile.ZIP_BZIP2), "is compressed by method 12, which is not"),
        (lambda path: encrypted(write_zip(path / "a.zip")), "is encrypted; unpack it and give the folder"),
        (lambda path: write_tar(path / "a.tar", mode="w:gz"), "cannot be read as an archive ("),
        (lambda path: write_tar(path / "a.tar.gz", mode="w:gz"), "is an archive whose files cannot be read one by one"),
    ],
)
def test_an_archive_that_cannot_be_read_is_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)


def test_a_tar_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": picture(1), "2.png": bytes(5000)})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        UserError, match=r"a.tar is cut off, and 2.png beyond its end; copy it again|cannot be read as an archive"
    ):
        open_source(str(path))


def test_a_zip_that_lost_its_beginning_is_told(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[700:])
    with pytest.raises(UserError, match=r"a.zip is cut off, and \S+ beyond its end; copy it again"):
        open_source(str(path))


def test_a_damaged_member_is_a_bad_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", method=zipfile.ZIP_STORED)
    source = open_source(str(path))
    path.write_bytes(path.read_bytes().replace(FILES["a/2.png"][-30:-20], bytes(10)))
    with pytest.raises(BadImage, match="does not match its checksum in the archive"):
        read_raw(source, 0)
    assert decode(read_raw(source, 1), channels=3, dtype=np.uint8).shape == (8, 8, 3)


def test_a_member_that_unpacks_to_more_than_it_says_is_a_bad_image(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": bytes(10_000_000)})
    source = open_source(str(path))
    assert isinstance(source, ArchiveImages)
    source._sizes[0] = 1000
    with pytest.raises(BadImage, match="has another size than its archive says"):
        read_raw(source, 0)


def write_lmdb(path: Path) -> Path:
    import lmdb

    with lmdb.open(str(path), map_size=2**22) as file, file.begin(write=True) as transaction:
        for name, content in (FILES | {"__len__": b"7"}).items():
            transaction.put(name.encode(), content)
    return path


def test_an_lmdb_is_read_by_its_keys(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    assert contents(open_source(f"lmdb:{write_lmdb(tmp_path / 'set')}")) == FILES
    with pytest.raises(UserError, match=r"lmdb:\S+none cannot be read as an LMDB \(.*\); give its folder or file"):
        open_source(f"lmdb:{tmp_path / 'none'}")


def test_a_parquet_of_images_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [{"bytes": content, "path": None} for content in FILES.values()], "label": [0, 1, 0, 1, 0, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert list(contents(open_source(path)).values())[::-1] == list(FILES.values())
    source, labels = open_with_labels(path)
    assert labels.names(np.arange(len(source))) == ["cat", "dog"] * 3 + ["cat"]
    assert open_labelled(path).classes == ("cat", "dog")
