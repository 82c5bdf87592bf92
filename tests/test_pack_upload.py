"""`simmim pack` into object storage, here fsspec's in memory; tests/data/test_s3.py has an S3 server."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from simmim.cli import main
from simmim.commands.pack import PackConfig, pack
from simmim.data.bad_images import TooManyBadImages
from simmim.data.packed import format as packed_format
from simmim.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (20 + number, 20), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def url() -> Iterator[str]:
    files, root = fsspec.core.url_to_fs(f"memory://{uuid.uuid4()}")
    yield f"memory:/{root}"
    if files.exists(root):
        files.rm(root, recursive=True)


def config(images: Path, out: object, **changes) -> PackConfig:
    return PackConfig(images=str(images), out=str(out), shard_size=4, **changes)


def stored(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    return {path.split("/")[-1]: files.cat_file(path) for path in sorted(files.ls(root, detail=False))}


def on_disk(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".")}


def fail_after(monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    """Let the storage take this many files and no more; nothing is waited for between attempts."""
    files, _ = fsspec.core.url_to_fs("memory://")
    put, left = type(files).put_file, iter(range(sent))

    def put_file(self, *paths, **settings):
        if next(left, None) is None:
            raise ConnectionResetError(104, "Connection reset by peer")
        put(self, *paths, **settings)

    monkeypatch.setattr(type(files), "put_file", put_file)
    monkeypatch.setattr(packed_format.time, "sleep", lambda seconds: None)


def test_the_files_in_storage_are_those_of_a_directory(images: Path, url: str, tmp_path: Path):
    (images / "3.png").write_bytes(b"no image")
    for out in (url, tmp_path / "out"):
        assert f"{out}/bad_images.txt lists them" in pack(config(images, out, max_bad_fraction=0.1))[-1]
    assert stored(url) == on_disk(tmp_path / "out")


@pytest.mark.parametrize("sent", range(8))
def test_what_is_cut_after_any_file_is_no_pack_and_goes_on(
    images: Path, url: str, tmp_path: Path, sent: int, capsys: pytest.CaptureFixture[str]
):
    pack(config(images, tmp_path / "out"))
    words = ["pack", str(images), "--out", url, "--shard-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, sent)
        assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written: ConnectionResetError" in line and line.endswith("repeat the command, which goes on")
    with pytest.raises(UserError, match=r"has no pack\.json"):
        packed_format.open_packed(url)
    with pytest.MonkeyPatch.context() as patch:
        # The settings again, what is missing of three shards with their indices, and pack.json.
        fail_after(patch, 1 + 2 * (3 - max(sent - 1, 0) // 2) + 1)
        pack(config(images, url))
    assert stored(url) == on_disk(tmp_path / "out")


def test_an_index_follows_its_shard_and_pack_json_comes_last(images: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    files, _ = fsspec.core.url_to_fs(url)
    put, sent = type(files).put_file, []

    def put_file(self, local, remote, **settings):
        sent.append(remote.split("/")[-1])
        put(self, local, remote, **settings)

    monkeypatch.setattr(type(files), "put_file", put_file)
    pack(config(images, url))
    shards = [name for number in range(3) for name in (f"0000{number}.array_record", f"0000{number}.json")]
    assert sent == ["packing.json", *shards, "pack.json"]


def test_a_file_that_storage_keeps_only_a_part_of_is_told(images: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    files, _ = fsspec.core.url_to_fs(url)
    monkeypatch.setattr(
        type(files), "put_file", lambda self, local, remote, **_: self.pipe_file(remote, Path(local).read_bytes()[:9])
    )
    with pytest.raises(UserError, match=r"packing\.json cannot be written: it has 9 bytes there, and \d+ here"):
        pack(config(images, url))


def test_a_finished_set_in_storage_is_only_verified(images: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    pack(config(images, url))
    fail_after(monkeypatch, 1)  # pack.json
    assert "was packed already" in pack(config(images, url))[0]


def test_a_damaged_shard_in_storage_is_written_again(images: Path, url: str):
    pack(config(images, url))
    whole = stored(url)
    shard = whole["00001.array_record"]
    fsspec.filesystem("memory").pipe_file(f"{url}/00001.array_record", shard[:500] + b"x" + shard[501:])
    assert pack(config(images, url))[0] == "1 shards were damaged and are written again"
    assert stored(url) == whole


def test_storage_that_holds_something_else_is_refused(images: Path, url: str):
    fsspec.filesystem("memory").pipe_file(f"{url}/thesis.txt", b"words")
    with pytest.raises(UserError, match=f"{url} exists and holds no packed images; give a new directory as --out"):
        pack(config(images, url))
    pack(config(images, f"{url}/new"))
    with pytest.raises(UserError, match=rf"{url}/new holds another set \(form original → webp, "):
        pack(config(images, f"{url}/new", form="webp"))


def test_a_list_of_too_many_bad_images_is_in_storage(images: Path, url: str):
    (images / "3.png").write_bytes(b"no image")
    with pytest.raises(TooManyBadImages, match=f"they are listed in {url}/bad_images.txt"):
        pack(config(images, url))
    assert stored(url)["bad_images.txt"].startswith(b"3.png\t")
    assert "pack.json" not in stored(url)


def test_a_chain_of_storages_is_refused(images: Path, url: str):
    with pytest.raises(UserError, match=f"is a chain of storages; give the last one alone, {url}$"):
        pack(config(images, f"simplecache::{url}"))
