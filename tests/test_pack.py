"""`simmim pack` writes what it says, goes on after a kill, and verifies itself."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.commands import pack as module
from simmim.commands.pack import PackConfig, pack
from simmim.data.bad_images import TooManyBadImages
from simmim.data.decode import decode
from simmim.data.packed.format import open_packed
from simmim.data.packed.writer import Jpeg, Original, RawPixels, WebP
from simmim.data.picture import BadImage
from simmim.errors import UserError
from simmim.training.run_lock import LOCK, locked


def photo(height: int, width: int, mode: str = "RGB", **options) -> bytes:
    """A JPEG, or what `format` says, of a smooth picture."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, rows * 0 + 99], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(10):
        path = folder / f"{'cats' if number % 2 else 'dogs'}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(40 + number, 60))
    return folder


def config(images: Path, **changes) -> PackConfig:
    return PackConfig(**{"images": str(images), "out": str(images.parent / "out"), "shard_size": 4, **changes})


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_originals_are_kept_byte_for_byte(images: Path):
    pack(config(images))
    packed = open_packed(str(images.parent / "out"))
    assert [packed.read(index) for index in range(10)] == [path.read_bytes() for path in sorted(images.glob("*/*"))]


@pytest.mark.parametrize(
    ("form", "error"), [(RawPixels(short_side=32), 2.0), (Jpeg(short_side=32), 4.0), (WebP(short_side=32), 6.0)]
)
def test_a_small_form_shows_the_image_at_that_side(form, error: float):
    data, shape = form(photo(96, 128))
    pixels = np.frombuffer(data, np.uint8).reshape(shape) if shape else decode(data, channels=3, dtype=np.uint8)
    reference = Image.open(io.BytesIO(photo(96, 128))).resize((43, 32), Image.Resampling.BILINEAR)
    assert pixels.shape == (32, 43, 3)
    assert np.abs(pixels.astype(int) - np.asarray(reference)).mean() < error


def test_an_image_is_never_made_larger():
    assert RawPixels(short_side=300)(photo(40, 60)).shape == (40, 60, 3)


def test_raw_pixels_are_those_that_training_would_decode():
    raw = photo(40, 60)
    data, shape = RawPixels()(raw)
    assert shape is not None
    np.testing.assert_array_equal(np.frombuffer(data, np.uint8).reshape(shape), decode(raw, channels=3, dtype=np.uint8))


@pytest.mark.parametrize(("form", "format"), [(Jpeg(short_side=40), "JPEG"), (WebP(short_side=40), "WEBP")])
def test_a_file_that_is_small_enough_already_is_not_coded_twice(form, format: str):
    raw = photo(40, 60, format=format)
    assert form(raw).data == raw


@pytest.mark.parametrize("form", [Jpeg(), RawPixels()])
def test_grey_stays_grey_and_transparency_is_laid_on_white(form):
    for mode, channels in (("L", 1), ("LA", 1), ("RGBA", 3)):
        data, shape = form(photo(40, 60, mode, format="PNG"))
        found = shape[2] if shape else len(Image.open(io.BytesIO(data)).getbands())
        assert found == channels


def test_rotation_by_exif_is_undone():
    exif = Image.Exif()
    exif[274] = 6
    assert RawPixels()(photo(40, 60, exif=exif)).shape == (60, 40, 3)


def test_an_array_is_kept_as_npy_with_its_depth():
    pixels = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(decode(Original()(pixels).data, channels=7, dtype=np.float32), pixels)


@pytest.mark.parametrize(
    ("form", "raw", "reason"),
    [
        (Original(), b"no image", "not an image in a format that is read here"),
        (Original(), photo(40, 60)[:300], "Truncated File Read"),
        (RawPixels(), np.zeros((4, 4), np.uint16), "has uint16 values, which only --form original keeps"),
        (Jpeg(), np.zeros((4, 4, 5), np.uint8), "has 5 channels, and JPEG holds 1 or 3"),
        (WebP(), np.zeros((4, 4, 2), np.uint8), "has 2 channels, and WebP holds 3"),
    ],
)
def test_what_cannot_be_kept_is_a_bad_image(form, raw, reason: str):
    with pytest.raises(BadImage, match=reason):
        form(raw)


def test_bad_images_are_listed_and_counted(images: Path):
    (images / "cats/3.jpg").write_bytes(b"no image")
    lines = pack(config(images, max_bad_fraction=0.1))
    out = images.parent / "out"
    assert lines[-1] == f"1 images cannot be read; {out}/bad_images.txt lists them"
    assert (out / "bad_images.txt").read_text().startswith("cats/3.jpg\tnot an image")
    assert json.loads((out / "pack.json").read_text())["bad_images"] == 1


def test_too_many_bad_images_end_it(images: Path):
    (images / "cats/3.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyBadImages, match=r"1 of 10 images .* more than --max-bad-fraction 0.01"):
        pack(config(images))
    assert not (images.parent / "out/pack.json").exists()


def test_the_number_of_threads_changes_nothing(images: Path):
    for workers in (1, 5):
        pack(config(images, out=str(images.parent / str(workers)), workers=workers, form="webp"))
    assert shards_of(images.parent / "1") == shards_of(images.parent / "5")


def test_a_killed_packing_goes_on_and_gives_what_an_uninterrupted_one_does(images: Path):
    pack(config(images, out=str(images.parent / "whole"), form="jpeg", short_side=20))
    code = (
        "import time, simmim.commands.pack as m\n"
        "class Slow(m.Jpeg):\n"
        "    def __call__(self, raw):\n"
        "        time.sleep(0.1)\n"
        "        return super().__call__(raw)\n"
        "m.Jpeg = Slow\n"
        f"m.pack(m.PackConfig(images={str(images)!r}, out={str(images.parent / 'out')!r}, form='jpeg', short_side=20, "
        "shard_size=4, workers=1))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONUNBUFFERED": "1"})
    first, begun = images.parent / "out/00000.json", time.monotonic()
    while not first.exists() and time.monotonic() - begun < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = first.stat().st_mtime_ns
    assert not (images.parent / "out/pack.json").exists()
    pack(config(images, form="jpeg", short_side=20))
    assert first.stat().st_mtime_ns == kept
    assert shards_of(images.parent / "out") == shards_of(images.parent / "whole")


@pytest.mark.parametrize("file", ["00001.json", "00001.array_record"])
def test_a_shard_without_its_other_half_does_not_count(images: Path, file: str):
    pack(config(images))
    out = images.parent / "out"
    whole = shards_of(out)
    (out / "pack.json").unlink()
    (out / file).unlink()
    (out / "packing.json").write_bytes(whole["pack.json"])
    pack(config(images))
    assert shards_of(out) == whole


def test_a_finished_set_is_only_verified(images: Path):
    pack(config(images))
    before = shards_of(images.parent / "out")
    lines = pack(config(images))
    assert "was packed already" in lines[0]
    assert shards_of(images.parent / "out") == before


def test_a_damaged_shard_is_found_and_written_again(images: Path):
    pack(config(images))
    out = images.parent / "out"
    whole = shards_of(out)
    path = out / "00001.array_record"
    path.write_bytes(path.read_bytes()[:500] + b"x" + path.read_bytes()[501:])
    assert pack(config(images))[0] == "1 shards were damaged and are written again"
    assert shards_of(out) == whole


def test_a_second_packing_into_the_same_directory_is_refused(images: Path):
    out = Path(config(images).out)
    with locked(out), pytest.raises(UserError, match=re.escape(f"{out} is in use by process")):
        pack(config(images))
    pack(config(images))
    assert LOCK not in {path.name for path in out.iterdir()}


def test_a_shard_that_does_not_read_back_is_an_error(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_damage", lambda *words: "does not match its checksum")
    with pytest.raises(ValueError, match=r"00000.array_record does not match its checksum though it was just written"):
        pack(config(images))


def test_progress_is_told_line_by_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    from simmim.training.tracking import progress

    assert list(progress(range(3), 3, "images packed", every_seconds=0)) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1] == "3 of 3 images packed, 0s left"


BAD = {
    "--short-side 0": "short side 0 is less than 1",
    "--short-side 9": "--short-side 9 makes images smaller; choose --form jpeg, webp or raw",
    "--form png": "form 'png' is not known; choose from original, jpeg, webp, raw",
    "--form raw --quality 90": "--quality 90 is for --form jpeg and webp; leave it out for raw",
    "--form jpeg --quality 101": "quality 101 is more than 100",
    "--shard-size 0": "shard size 0 is less than 1",
    "--workers 0": "workers 0 is less than 1",
    "--max-bad-fraction 2": "max bad fraction 2",
    "--form jpeg": "holds another set (form original → jpeg, quality None → 90); repeat its command to resume it, or",
    "--shard-size 5": "holds another set (shard_size 4 → 5); repeat",
    "--out taken": "taken exists and holds no packed images; give a new directory as --out",
    "--out file": "file exists and holds no packed images; give a new directory as --out",
    "--out strange": "pack.json is not what simmim pack wrote; give a new directory as --out",
}


@pytest.mark.parametrize(("options", "line"), BAD.items(), ids=BAD)
def test_a_mistake_is_one_line_and_exit_code_2(images: Path, options: str, line: str, capsys, monkeypatch):
    monkeypatch.chdir(images.parent)
    for name in ("taken", "strange"):
        (images.parent / name).mkdir()
    (images.parent / "taken/thesis.tex").write_text("mine")
    (images.parent / "file").write_text("mine")
    (images.parent / "strange/pack.json").write_text("[]")
    pack(config(images))
    assert main(["pack", "images", "--out", "out", "--shard-size", "4", *options.split()]) == 2
    text = capsys.readouterr().err
    assert text.startswith("simmim: ")
    assert line in text
    assert text.count("\n") == 1


def test_other_images_under_the_same_out_are_refused(images: Path):
    pack(config(images))
    (images / "cats/new.jpg").write_bytes(photo(40, 60))
    with pytest.raises(ValueError, match=r"holds another set \(images 10 → 11, names_sha256 .*\); repeat its command"):
        pack(config(images))


def test_the_command_says_what_it_did(images: Path, capsys: pytest.CaptureFixture[str]):
    out = images.parent / "out"
    assert main(["pack", str(images), "--out", str(out), "--form", "raw", "--short-side", "32"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{images} is packed in {out}: 10 images in 1 shards, form raw, ")
    assert second == "verified: the digest of every shard, the checksum of every image, and 10 images decoded"
