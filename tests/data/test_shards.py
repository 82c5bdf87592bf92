"""Packed images are read as loose ones are, from a directory and from object storage."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from simmim.commands.pack import PackConfig, pack
from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.labelled.classes import open_labelled
from simmim.data.packed.format import BLOCK, LocalStorage, RemoteStorage, open_packed
from simmim.data.packed.writer import Entry, Packed, write_shard
from simmim.data.picture import BadImage
from simmim.data.pipeline import Reading, train_batches
from simmim.data.sources import open_source


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eleven JPEGs in folders, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(11):
        path = folder / ("a b" if number % 3 else "a") / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60 + number, 70, 3), dtype=np.uint8)).save(path)
    (folder / "a" / "6.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    pack(PackConfig(images=str(photos), out=str(out), shard_size=4, max_bad_fraction=0.5))
    return out


def copy(packed: Path, out: Path) -> Path:
    out.mkdir()
    for file in packed.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_every_record_is_where_the_index_says_by_array_records_own_reader(tmp_path: Path):
    random = np.random.default_rng(0)
    near = [0, 1, 127, 128, 16383, 16384, BLOCK - 200, *range(BLOCK - 130, BLOCK - 20, 3), 3 * BLOCK]
    records = [random.bytes(size) for size in [*near, *random.integers(0, 2 * BLOCK, 50), 600 * BLOCK]]
    path = tmp_path / "shard"
    index = write_shard(path, [Entry(str(n), Packed(data)) for n, data in enumerate(records)], raw=False)
    storage = LocalStorage(tmp_path)
    found = [
        storage.read_range("shard", begin, size).tobytes()
        for begin, size in zip(index.begins, index.sizes, strict=True)
    ]
    assert found == records == ArrayRecordReader(str(path)).read_all()


def batches(data: Path | str, folder: Path) -> list[dict]:
    source = open_source(str(data))
    return list(
        train_batches(
            source,
            Reading(
                batch_size=4,
                seed=3,
                start_step=0,
                total_steps=6,
                threads=2,
                bad_images=BadImages(folder / "bad.txt", total=len(source), max_fraction=0.5),
            ),
            crop=RandomResizedCrop(size=(32, 48)),
            channels=3,
            dtype=np.uint8,
        )
    )


def test_packed_originals_give_the_batches_of_loose_ones_bit_for_bit(photos: Path, packed: Path, tmp_path: Path):
    loose, shards = batches(photos, tmp_path), batches(packed, tmp_path)
    assert len(loose) == len(shards) == 6
    for one, other in zip(loose, shards, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_names_and_order_are_those_of_the_folder(photos: Path, packed: Path):
    loose, shards = open_source(str(photos)), open_packed(str(packed))
    names = [os.path.relpath(loose.name(index), photos) for index in range(len(loose))]
    assert shards.names() == names == [shards.name(index) for index in range(len(shards))]


def test_a_broken_image_keeps_its_number_and_stays_broken(packed: Path):
    source = open_packed(str(packed))
    broken = [index for index in range(len(source)) if source.is_broken(index)]
    assert [source.name(index) for index in broken] == ["a/6.jpg"]
    with pytest.raises(BadImage, match="when packed"):
        source.read(broken[0])


@pytest.fixture
def classes(photos: Path, tmp_path: Path):
    """A folder with the splits of the names given, and the same packed."""

    def build(*splits: str) -> tuple[Path, Path]:
        for split in splits:
            for path in photos.glob("*/*.jpg"):
                file = tmp_path / "loose" / split / path.parent.name / path.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(path.read_bytes())
        out = tmp_path / "packed"
        pack(PackConfig(images=str(tmp_path / "loose"), out=str(out), shard_size=4, max_bad_fraction=0.5))
        return tmp_path / "loose", out

    return build


@pytest.mark.parametrize("splits", [("",), ("train",), ("train", "val"), ("train", "test")])
def test_classes_and_splits_of_a_packed_folder_are_those_of_the_loose_one(classes, splits: tuple[str, ...]):
    loose, shards = (open_labelled(str(data), seed=5) for data in classes(*splits))
    assert shards.classes == loose.classes
    for part in ("train", "val"):
        one, other = getattr(loose, part), getattr(shards, part)
        np.testing.assert_array_equal(getattr(loose, f"{part}_labels"), getattr(shards, f"{part}_labels"))
        assert [Path(one.name(n)).parts[-2:] for n in range(len(one))] == [
            Path(other.name(n)).parts[-2:] for n in range(len(other))
        ]


def test_packed_images_without_class_folders_are_no_labelled_ones(photos: Path, tmp_path: Path):
    pack(PackConfig(images=str(photos / "a b"), out=str(tmp_path / "flat")))
    with pytest.raises(ValueError, match=r"are in no class folders; pack a folder of class folders"):
        open_labelled(str(tmp_path / "flat"))


@pytest.mark.parametrize("form", ["original", "raw"])
@pytest.mark.parametrize("url", ["memory://{}", "file://{}", "simplecache::memory://{}"])
def test_object_storage_gives_the_images_of_the_directory(photos: Path, tmp_path: Path, url: str, form: str):
    out = tmp_path / "set"
    pack(PackConfig(images=str(photos), out=str(out), form=form, shard_size=4, max_bad_fraction=0.5))  # type: ignore[arg-type]
    if "memory" in url:
        files = fsspec.filesystem("memory")
        files.put(str(out), str(out), recursive=True)
    local, remote = open_packed(str(out)), open_source(url.format(out))
    assert len(local) == len(remote) == 11
    for index in (index for index in range(11) if not local.is_broken(index)):
        np.testing.assert_array_equal(local.read(index), remote.read(index))


def test_a_request_that_fails_is_made_again(packed: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_packed(f"file://{packed}")
    storage = source._storage
    assert isinstance(storage, RemoteStorage)
    read, failures = storage._files.cat_file, iter(range(2))

    def failing(*words, **options):
        if next(failures, None) is not None:
            raise ConnectionError("reset by peer")
        return read(*words, **options)

    monkeypatch.setattr(storage._files, "cat_file", failing)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert source.read(1) == open_packed(str(packed)).read(1)


def test_a_storage_that_stays_away_is_no_broken_image_at_first_sight(packed: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_packed(f"file://{packed}")
    asked = []

    def failing(*words, **options):
        asked.append(words)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(source._storage._files, "cat_file", failing)  # type: ignore[attr-defined]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match="ConnectionError: reset by peer"):
        source.read(1)
    assert len(asked) == 5


def shorten(folder: Path) -> None:
    os.truncate(folder / "00001.array_record", 1000)


def lose_a_shard(folder: Path) -> None:
    (folder / "00002.array_record").unlink()


def exchange_indices(folder: Path) -> None:
    (folder / "00000.json").write_bytes((folder / "00001.json").read_bytes())


def lose_the_manifest(folder: Path) -> None:
    (folder / "pack.json").rename(folder / "packing.json")


def change_the_manifest(**changes):
    def change(folder: Path) -> None:
        found = json.loads((folder / "pack.json").read_text())
        (folder / "pack.json").write_text(json.dumps(found | changes))

    return change


def break_the_manifest(folder: Path) -> None:
    (folder / "pack.json").write_text("{")


DAMAGE = {
    shorten: r"00001.array_record has 1000 bytes, not \d+; copy it again or pack again",
    lose_a_shard: r"shard 2 of .* cannot be read: .*No such file.*; copy it again or pack again",
    exchange_indices: r"00000.json does not match its checksum; copy it again or pack again",
    lose_the_manifest: r"has no pack.json, so it is no finished set of shards; run simmim pack .*",
    break_the_manifest: r"pack.json is not what simmim pack wrote \(.*\); pack again",
    change_the_manifest(
        form="tiff"
    ): r"is version 1, form tiff; this simmim reads version 1 and the forms original, .*",
    change_the_manifest(version=9): r"is version 9, form original; this simmim reads version 1 .*",
    change_the_manifest(shards=[{"images": 4}]): r"pack.json is not what simmim pack wrote \(a shard .*\); pack again",
    change_the_manifest(shards=[3]): r"pack.json is not what simmim pack wrote \(.*\); pack again",
    change_the_manifest(colour="red"): r"pack.json is not what simmim pack wrote \(.*'colour'\); pack again",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=range(len(DAMAGE)))
def test_damage_is_one_line_at_the_start(packed: Path, tmp_path: Path, damage, message: str):
    folder = copy(packed, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"memory://nowhere has no pack.json, so it is no finished set of shards; .*"),
        ("nothing://set", r"nothing://set cannot be opened: .*not known.*; install the fsspec package .*"),
    ],
)
def test_a_url_without_shards_is_one_line(url: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        open_source(url)
    assert "\n" not in str(error.value)


def test_more_shards_than_files_may_be_open_are_refused(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (202, 4096))
    with pytest.raises(
        ValueError, match=r"has 3 shards, and this process may open 202 files; raise the limit with ulimit .*"
    ):
        open_packed(str(packed))
