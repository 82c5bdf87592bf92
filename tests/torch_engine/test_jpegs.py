"""JPEGs decoded, cropped and resized by a device: here the CPU, through the code that works on GPUs (test_gpu.py)."""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import validated
from simmim.data.bad_images import TooManyBadImages
from simmim.torch_engine.train import jpegs
from simmim.torch_engine.train.jpegs import JpegDecoder, open_decoder
from simmim.torch_engine.train.pretrain import pretrain
from simmim.training.pretrain_images import Images
from simmim.training.pretrain_plan import Plan

from . import tiny, worker
from .pictures import SIZE, Files, assert_alike, encode, picture, read, without_tables
from .pictures import jpegs as some_jpegs

CPU = torch.device("cpu")


def same(found: list[Any], expected: list[Any]) -> None:
    assert_alike(found, expected, levels=0)


def listed(folder: Path) -> list[str]:
    return sorted(line.split("\t")[0] for line in (folder / "bad_images.txt").read_text().splitlines())


def test_batches_are_close_to_those_of_the_threads(tmp_path: Path) -> None:
    source = Files(*some_jpegs(9))
    found, expected = read(source, tmp_path, "cpu"), read(source, tmp_path, None)
    assert_alike(found, expected, levels=1)
    assert any((one["image"] != other["image"]).any() for one, other in zip(found, expected, strict=True))


def test_pixels_are_those_of_torchvisions_resizing(tmp_path: Path) -> None:
    from torchvision.transforms.v2.functional import resized_crop

    source = Files(*some_jpegs(4))
    decoder = JpegDecoder(CPU, size=SIZE, channels=3)
    seen: list[Any] = []

    def spy(images: Any, files: Any, fill: Any) -> Any:
        seen.extend(files)
        return decoder(images, files, fill)

    batch = read(source, tmp_path, "cpu", decoder=spy, total_steps=1)[0]
    for image, jpeg in zip(batch["image"], seen, strict=True):
        whole = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg.raw)))).permute(2, 0, 1).float()
        expected = resized_crop(whole, *jpeg.box, list(SIZE), antialias=True).permute(1, 2, 0).numpy()
        assert np.abs(image - expected).max() <= 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_that_exif_names_is_undone(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    source = Files(*[encode(picture(seed), exif=exif, quality=95, subsampling=0) for seed in range(4)])
    assert_alike(read(source, tmp_path, "cpu"), read(source, tmp_path, None), levels=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_greys_and_colours_become_each_other(tmp_path: Path, mode: str, channels: int) -> None:
    source = Files(*[encode(picture(seed).convert(mode)) for seed in range(4)])
    found = read(source, tmp_path, "cpu", channels=channels)
    assert found[0]["image"].shape == (4, *SIZE, channels)
    assert_alike(found, read(source, tmp_path, None, channels=channels), levels=1)


def test_what_is_no_plain_jpeg_is_left_to_the_threads(tmp_path: Path) -> None:
    image = picture(0)
    source = Files(
        encode(image, "PNG"),
        encode(image.convert("CMYK")),
        encode(image, keep_rgb=True),
        encode(image.resize((1600, 1200))),  # decoded at an eighth of its size
    )

    def refuse(images: Any, files: Any, fill: Any) -> torch.Tensor:
        assert files == [None] * 4
        return torch.from_numpy(images)

    same(read(source, tmp_path, "cpu", decoder=refuse), read(source, tmp_path, None))


def test_a_jpeg_that_was_cut_off_is_listed_and_replaced_as_by_the_threads(tmp_path: Path) -> None:
    files = some_jpegs(8)
    preview = encode(picture(9, 40, 40))
    exif = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    files[2] = files[2][: len(files[2]) // 2]
    files[5] = (files[5][:2] + exif + files[5][2:])[: len(exif) + len(files[5]) // 2]  # its preview is whole
    source = Files(*files)
    (tmp_path / "threads").mkdir()
    expected = read(source, tmp_path / "threads", None)
    assert_alike(read(source, tmp_path, "cpu"), expected, levels=1)
    assert listed(tmp_path) == listed(tmp_path / "threads") == ["2", "5"]


def test_a_jpeg_that_no_decoder_can_read_is_listed_and_replaced_as_by_the_threads(tmp_path: Path) -> None:
    files = some_jpegs(8)
    files[2], files[3] = without_tables(files[2]), without_tables(files[3])
    source = Files(*files)
    (tmp_path / "threads").mkdir()
    expected = read(source, tmp_path / "threads", None)
    assert_alike(read(source, tmp_path, "cpu"), expected, levels=1)
    assert listed(tmp_path) == listed(tmp_path / "threads") == ["2", "3"]


def test_damage_of_any_kind_is_judged_as_by_the_threads(tmp_path: Path) -> None:
    draw, files = np.random.default_rng(0), some_jpegs(12)
    for number in range(36):
        damaged = bytearray(encode(picture(number), progressive=number % 2 == 0))
        begin = int(draw.integers(2, len(damaged)))
        if number % 3 == 0:
            del damaged[begin:]
        elif number % 3 == 1:
            del damaged[begin : begin + int(draw.integers(1, 40))]
        else:
            for place in draw.integers(2, len(damaged), 10):
                damaged[place] = draw.integers(256)
        files.append(bytes(damaged))
    source = Files(*files)
    (tmp_path / "threads").mkdir()
    expected = read(source, tmp_path / "threads", None, total_steps=12)
    found = read(source, tmp_path, "cpu", total_steps=12)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["index"], other["index"])
    assert listed(tmp_path) == listed(tmp_path / "threads")
    assert 12 < len(listed(tmp_path)) < 36


def test_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    source = Files(*[without_tables(file) if number % 4 else file for number, file in enumerate(some_jpegs(8))])
    with pytest.raises(TooManyBadImages, match=r"\d of 8 images .* cannot be read, .*more than --max-bad-fraction"):
        read(source, tmp_path, "cpu")


class Picky(JpegDecoder):
    """Refuses every batch with one of some files, as nvJPEG does with what it doesn't know."""

    refused: tuple[bytes, ...] = ()

    def decode(self, files: Any) -> list[torch.Tensor]:
        if set(files) & set(self.refused):
            raise RuntimeError("Error while decoding JPEG images")
        return super().decode(files)


def test_a_jpeg_that_the_device_alone_refuses_is_decoded_by_the_cpu(tmp_path: Path) -> None:
    source, decoder = Files(*some_jpegs(4)), Picky(CPU, size=SIZE, channels=3)
    decoder.refused = source.files[1:2]
    found, device, cpu = (
        read(source, tmp_path, "cpu", decoder=decoder),
        *(read(source, tmp_path, d) for d in ("cpu", None)),
    )
    for batch, on_device, on_cpu in zip(found, device, cpu, strict=True):
        for place, index in enumerate(batch["index"]):
            expected = on_cpu if index == 1 else on_device
            np.testing.assert_array_equal(batch["image"][place], expected["image"][place])
    assert not (tmp_path / "bad_images.txt").exists()


def test_a_jpeg_of_another_size_than_its_header_says_is_decoded_by_the_cpu(tmp_path: Path) -> None:
    class Cutting(JpegDecoder):
        def decode(self, files: Any) -> list[torch.Tensor]:
            return [pixels[:, :-1] for pixels in super().decode(files)]

    source = Files(*some_jpegs(4))
    same(read(source, tmp_path, "cpu", decoder=Cutting(CPU, size=SIZE, channels=3)), read(source, tmp_path, None))


def test_how_many_are_decoded_at_once_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Files(*some_jpegs(9))
    expected = read(source, tmp_path, "cpu")
    calls = []
    decode = JpegDecoder.decode
    monkeypatch.setattr(JpegDecoder, "decode", lambda self, files: calls.append(len(files)) or decode(self, files))
    monkeypatch.setattr(jpegs, "_AT_ONCE", 3 * 3 * 100 * 170)
    same(read(source, tmp_path, "cpu"), expected)
    assert set(calls) == {1, 3} or set(calls) == {2}


@pytest.mark.parametrize("changes", [{"threads": 1}, {"threads": 5}, {"start_step": 0}], ids=str)
def test_threads_and_repetition_change_nothing(tmp_path: Path, changes: dict[str, int]) -> None:
    source = Files(*some_jpegs(9))
    same(read(source, tmp_path, "cpu", **changes), read(source, tmp_path, "cpu"))


def test_starting_at_a_later_step_gives_the_same_batches(tmp_path: Path) -> None:
    source = Files(*some_jpegs(8), without_tables(some_jpegs(1)[0]))
    same(read(source, tmp_path, "cpu", start_step=2), read(source, tmp_path, "cpu")[2:])


def test_two_processes_share_out_the_batches_of_one(tmp_path: Path) -> None:
    source = Files(*some_jpegs(8), without_tables(some_jpegs(1)[0]))
    first, second = (read(source, tmp_path, "cpu", rank=rank, world=2) for rank in range(2))
    for batch, *parts in zip(read(source, tmp_path, "cpu"), first, second, strict=True):
        for field in ("image", "flip", "index", "epoch"):
            together = np.stack([part[field] for part in parts], axis=1).reshape(4, *batch[field].shape[1:])
            np.testing.assert_array_equal(together, batch[field])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    files = [*some_jpegs(11), encode(picture(11), "PNG")]
    files[4] = without_tables(files[4])
    for number, file in enumerate(files):
        (folder / f"{number:02}{'.png' if number == 11 else '.jpg'}").write_bytes(file)
    return folder


def training(folder: Path, out: Path) -> PretrainConfig:
    return dataclasses.replace(
        worker.settings(out), data=str(folder), steps=6, save_every_steps=2, log_every_steps=1, max_bad_fraction=0.5
    )


@pytest.fixture
def decoder_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "simmim.torch_engine.train.pretrain.open_decoder",
        lambda plan, device: JpegDecoder(device, size=plan.size, channels=plan.config.channels),
    )


@pytest.mark.usefixtures("decoder_on_the_cpu")
def test_a_training_that_was_broken_off_resumes_to_the_same_weights(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (training(photographs, tmp_path / name) for name in ("whole", "broken"))
    pretrain(whole)
    worker.break_off(broken, 5, monkeypatch)
    _, outcome = pretrain(broken)
    assert outcome.start == 4
    tiny.assert_same(worker.weights(broken), worker.weights(whole))
    assert [row["loss"] for row in worker.rows(broken)] == [row["loss"] for row in worker.rows(whole)]


def test_losses_are_close_to_those_of_the_threads_images(
    photographs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    threads, device = (training(photographs, tmp_path / name) for name in ("threads", "device"))
    pretrain(threads)
    request.getfixturevalue("decoder_on_the_cpu")
    pretrain(device)
    losses = [[row["loss"] for row in worker.rows(config)] for config in (threads, device)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


def test_reading_ahead_is_closed_with_what_it_reads() -> None:
    closed = []

    def numbers() -> Iterator[Any]:
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    ahead = jpegs.one_ahead(numbers())
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()  # type: ignore[attr-defined]
    assert closed


def test_an_error_of_reading_ahead_arrives_after_the_batches_before_it() -> None:
    def numbers() -> Iterator[Any]:
        yield 0
        raise TooManyBadImages("2 of 3")

    ahead = jpegs.one_ahead(numbers())
    assert next(ahead) == 0
    with pytest.raises(TooManyBadImages, match="2 of 3"):
        next(ahead)


def plan(folder: str = "demo", **changes: Any) -> Plan:
    config = tiny.config(data=folder, decode="gpu")
    return Plan(config, dataclasses.replace(Images(Files(), Files(), np.dtype(np.uint8)), **changes))  # type: ignore[arg-type]


def test_threads_need_no_decoder() -> None:
    assert open_decoder(plan().replace(decode="cpu"), CPU) is None


def test_a_device_without_nvjpeg_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--decode gpu is for --device cuda, and this is cpu; use --decode cpu$"):
        open_decoder(plan(), CPU)


def test_deep_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with pytest.raises(
        ValueError, match=r"^--decode gpu gives 8 bits, and the images of demo have more; use --decode cpu$"
    ):
        open_decoder(plan(dtype=np.dtype(np.float32)), torch.device("cuda"))


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^--decode gpu is for JPEGs, which have 1 or 3 channels, not 5; use --decode cpu$"
    ):
        validated(PretrainConfig(data="demo", out="run", decode="gpu", channels=5))


def test_a_torchvision_without_nvjpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> Any:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nsomewhere in C++")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    with pytest.raises(ValueError, match=r"^--decode gpu does not work here") as refusal:
        open_decoder(plan(), torch.device("cuda"))
    assert str(refusal.value) == (
        "--decode gpu does not work here: decode_jpegs_cuda: torchvision not compiled with nvJPEG support; "
        f"install the torchvision that belongs to torch {torch.__version__}, built for CUDA, or use --decode cpu"
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_working_decoder_has_no_fault(channels: int) -> None:
    assert JpegDecoder(CPU, size=SIZE, channels=channels).find_fault() is None


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda pixels: pixels.flip(0)], ids=["black", "colours swapped"])
def test_a_decoder_of_wrong_pixels_is_found_out(wrong: Any) -> None:
    class Wrong(JpegDecoder):
        def decode(self, files: Any) -> list[torch.Tensor]:
            return [wrong(pixels) for pixels in super().decode(files)]

    fault = Wrong(CPU, size=SIZE, channels=3).find_fault()
    assert fault is not None
    assert re.fullmatch(r"a test picture comes out \d\d+ levels off", fault)
