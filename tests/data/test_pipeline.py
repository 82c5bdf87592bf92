"""Batches: their order, their exact repetition, and what happens to images that cannot be read."""

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import CentreCrop, RandomResizedCrop, draw_flips, load
from simmim.data.bad_images import BadImages, TooManyBadImages
from simmim.data.evaluation import eval_images
from simmim.data.pipeline import Batch, Reading, sample_batches, train_batches
from simmim.data.sources import ArrayImages
from simmim.data.statistics import measure_mean_std
from simmim.method.masks import RandomMask
from simmim.method.random_keys import sample_key
from simmim.training.pretrain_images import Images
from simmim.training.pretrain_plan import Plan

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


class Noise:
    """Images of random pixels; those of `broken` are an empty file."""

    def __init__(self, count: int, *, broken: tuple[int, ...] = ()):
        self.broken = broken
        self.images = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"images/{index}.png"

    def read(self, index: int) -> Any:
        self.reads[index] += 1
        return b"" if index in self.broken else self.images[index]


def batches(source: Any, folder: Path, **changes: Any) -> list[Batch]:
    views: dict[str, Any] = {"crop": RandomResizedCrop(size=(8, 8)), "channels": 3, "dtype": np.uint8}
    views |= {name: changes.pop(name) for name in (*views, "augment", "antialias") if name in changes}
    return list(train_batches(source, reading(source, folder, **changes), **views))


def reading(source: Any, folder: Path, **changes: Any) -> Reading:
    bad_images = BadImages(folder / "bad_images.txt", total=len(source), max_fraction=0.5)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "start_step": 0, "total_steps": 6, "threads": 2}
    return Reading(**options | {"bad_images": bad_images} | changes)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for field in ("image", "flip", "index", "epoch"):
            np.testing.assert_array_equal(one[field], other[field])


def test_a_batch_has_the_documented_shapes_and_dtypes(tmp_path: Path):
    batch = batches(Noise(10), tmp_path, total_steps=1)[0]
    found = {name: (value.shape, value.dtype.name) for name, value in batch.items()}  # type: ignore[attr-defined]
    assert found == {
        "image": ((4, 8, 8, 3), "uint8"),
        "flip": ((4, 1), "bool"),
        "index": ((4,), "int64"),
        "epoch": ((4,), "int64"),
    }


def test_deep_images_come_as_float32(tmp_path: Path):
    batch = batches(Noise(10), tmp_path, total_steps=1, dtype=np.float32)[0]
    assert batch["image"].dtype == np.float32
    assert batch["image"].max() > 100


def test_starting_at_a_later_step_gives_the_same_batches(tmp_path: Path):
    source = Noise(10, broken=(3,))
    assert_same(batches(source, tmp_path, start_step=3), batches(source, tmp_path)[3:])


def test_nothing_is_left_to_do_at_the_last_step(tmp_path: Path):
    assert batches(Noise(10), tmp_path, start_step=6) == []


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, threads: int):
    source = Noise(10)
    assert_same(batches(source, tmp_path, threads=threads), batches(source, tmp_path))


@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_share_out_the_batches_of_one(tmp_path: Path, world: int):
    source = Noise(10)
    ranks = [batches(source, tmp_path, rank=rank, world=world) for rank in range(world)]
    whole = [
        {
            field: np.stack([part[field] for part in parts], axis=1).reshape(4, *parts[0][field].shape[1:])
            for field in parts[0]
        }
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(whole, batches(source, tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 8, 11, 40])
def test_a_batch_of_any_size_holds_the_images_that_it_names(tmp_path: Path, batch_size: int):
    # With 2 threads these are read in pieces of 1, 4, 5, 5 and 1, and 8 images.
    source, whole = Noise(40), RandomResizedCrop(size=(12, 10), scale=(1, 1), ratio=(1, 1))
    found = batches(source, tmp_path, crop=whole, batch_size=batch_size)
    assert [len(batch["image"]) for batch in found] == [batch_size] * 6
    for batch in found:
        np.testing.assert_array_equal(batch["image"], source.images[batch["index"]])


def test_an_epoch_shows_each_image_once_and_leaves_out_what_fills_no_batch(tmp_path: Path):
    found = batches(Noise(10), tmp_path)
    index, epoch = (np.concatenate([batch[field] for batch in found]) for field in ("index", "epoch"))
    assert epoch.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert [len(set(index[epoch == number])) for number in range(3)] == [8, 8, 8]


def test_every_epoch_and_every_seed_has_an_order_of_its_own(tmp_path: Path):
    orders = [
        tuple(
            np.concatenate(
                [
                    batch["index"]
                    for batch in batches(Noise(40), tmp_path, start_step=step, total_steps=step + 10, seed=seed)
                ]
            )
        )
        for step, seed in [(0, 0), (10, 0), (0, 1), (10, 1)]
    ]
    assert len(set(orders)) == 4


def test_an_image_is_cropped_by_its_own_key(tmp_path: Path):
    source, crop = Noise(10), RandomResizedCrop(size=(8, 8))
    for batch in batches(source, tmp_path):
        for image, index, epoch in zip(batch["image"], batch["index"], batch["epoch"], strict=True):
            key = sample_key(0, int(epoch), int(index), stream="crop")
            alone = load(
                source.images[index],
                lambda *size, key=key: crop.box(key, *size),
                size=(8, 8),
                channels=3,
                dtype=np.uint8,
            )
            np.testing.assert_array_equal(image, alone)


@pytest.mark.parametrize("readers", ["threads", "processes"])
def test_a_plan_leaves_out_antialiasing_where_it_is_told_to(tmp_path: Path, readers: Literal["threads", "processes"]):
    source = ArrayImages(Noise(4).images, "noise")
    images, found = Images(train=source, val=source, dtype=np.dtype(np.uint8)), {}
    for antialias in (True, False):
        how = {"readers": readers, "antialias": antialias}
        plan = Plan(PretrainConfig(image_size=(4, 4), mask=RandomMask(cell=1), batch_size=4, steps=1, **how), images)
        crop = RandomResizedCrop(size=(4, 4))
        [expected] = batches(source, tmp_path, total_steps=1, crop=crop, antialias=antialias)
        whole = plan.reading(BadImages(tmp_path / "bad_images.txt", total=4), start_step=0, rank=0, world=1)
        [batch] = plan.batches(whole, patch=1, drop_path_layers=0)
        np.testing.assert_array_equal(batch["image"], expected["image"])
        found[antialias] = batch["image"]
    assert (found[True] != found[False]).mean() > 0.5


def test_arrays_of_different_lengths_are_filled_up_with_zeros(tmp_path: Path):
    def read(epoch: int, index: int) -> dict[str, np.ndarray]:
        return {"image": np.zeros((8, 8, 3)), "boxes": np.full((index, 4), index, np.float32)}

    source = Noise(4)
    [batch] = sample_batches(source, reading(source, tmp_path, total_steps=1), read)
    assert batch["boxes"].shape == (4, 3, 4)
    for boxes, index in zip(batch["boxes"], batch["index"], strict=True):
        assert (boxes[:index] == index).all()
        assert (boxes[index:] == 0).all()


def test_flips_are_drawn_for_the_images_of_the_batch(tmp_path: Path):
    for batch in batches(Noise(10), tmp_path):
        np.testing.assert_array_equal(batch["flip"], draw_flips(0, batch["epoch"], batch["index"], "horizontal"))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Noise, Any]]:
    """A source of 100 images and its batches of 10, of which one has been taken."""
    source = Noise(100)
    stream: Any = train_batches(
        source,
        reading(source, tmp_path, batch_size=10, total_steps=100, threads=4),
        crop=RandomResizedCrop(size=(8, 8)),
        channels=3,
        dtype=np.uint8,
    )
    next(stream)
    yield source, stream
    stream.close()


def test_no_more_than_two_batches_are_read_ahead(running: tuple[Noise, Any]):
    time.sleep(0.3)
    assert 10 <= running[0].reads.total() <= 30


def test_closing_stops_the_threads(running: tuple[Noise, Any]):
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    mine = readers()
    assert mine
    running[1].close()
    for thread in mine:
        thread.join(5)
    assert not any(thread.is_alive() for thread in mine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 11}, "batch size 11 is more than the 10 images; use --batch-size 10 or less"),
        ({"batch_size": 7, "world": 2}, "batch size 7 is not a multiple of the 2 processes; use 6"),
        ({"batch_size": 3, "world": 4}, "batch size 3 is not a multiple of the 4 processes; use 4"),
    ],
)
def test_a_batch_size_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        batches(Noise(10), tmp_path, **changes)


def test_a_broken_image_is_replaced_by_the_next_that_can_be_read(tmp_path: Path):
    whole = batches(Noise(10), tmp_path)
    patched = batches(Noise(10, broken=(3, 4)), tmp_path)
    for one, other in zip(whole, patched, strict=True):
        expected = np.where(np.isin(one["index"], (3, 4)), 5, one["index"])
        np.testing.assert_array_equal(other["index"], expected)


def test_the_last_image_is_replaced_by_the_first(tmp_path: Path):
    index = np.concatenate([batch["index"] for batch in batches(Noise(8, broken=(7,)), tmp_path)])
    assert Counter(index.tolist())[0] == 6


def test_broken_images_are_listed_once_with_the_reason(tmp_path: Path):
    batches(Noise(8, broken=(3, 5)), tmp_path)
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert sorted(lines) == ["images/3.png\tthe file is empty", "images/5.png\tthe file is empty"]


def test_an_image_that_vanished_is_a_broken_image(tmp_path: Path):
    class Vanished(Noise):
        def read(self, index: int) -> Any:
            return (tmp_path / "vanished").read_bytes() if index == 3 else super().read(index)

    batches(Vanished(8), tmp_path)
    assert (tmp_path / "bad_images.txt").read_text() == "images/3.png\tNo such file or directory\n"


def test_too_many_broken_images_end_the_run(tmp_path: Path):
    bad_images = BadImages(tmp_path / "bad_images.txt", total=100, max_fraction=0.02)
    with pytest.raises(TooManyBadImages) as caught:
        batches(Noise(100, broken=(7, 50, 99)), tmp_path, bad_images=bad_images, total_steps=25)
    assert re.fullmatch(
        r"3 of 100 images \(3.0%\) cannot be read, such as images/\d+.png, more than --max-bad-fraction 0.02; "
        f"they are listed in {tmp_path / 'bad_images.txt'}",
        str(caught.value),
    )


def test_reading_stops_when_broken_images_end_the_run(tmp_path: Path):
    class Slow(Noise):
        def read(self, index: int) -> Any:
            time.sleep(0.02)
            return super().read(index)

    source = Slow(20, broken=tuple(range(20)))
    bad_images = BadImages(tmp_path / "bad_images.txt", total=20, max_fraction=0)
    with pytest.raises(TooManyBadImages) as caught:
        batches(source, tmp_path, batch_size=10, threads=1, bad_images=bad_images)
    time.sleep(0.3)  # the exception keeps the frames alive, as a caller's handler would
    assert caught.tb is not None
    assert source.reads.total() < 5


def test_a_share_of_broken_images_that_is_allowed_does_not_end_the_run(tmp_path: Path):
    bad_images = BadImages(tmp_path / "bad_images.txt", total=100, max_fraction=0.03)
    assert len(batches(Noise(100, broken=(7, 50, 99)), tmp_path, bad_images=bad_images, total_steps=30)) == 30


def test_a_run_that_ended_on_broken_images_ends_again_when_it_is_repeated(tmp_path: Path):
    for _ in range(2):
        bad_images = BadImages(tmp_path / "bad_images.txt", total=8, max_fraction=0.1)
        with pytest.raises(TooManyBadImages, match="1 of 8 images"):
            batches(Noise(8, broken=(3,)), tmp_path, bad_images=bad_images)


def test_a_source_without_a_readable_image_is_an_error(tmp_path: Path):
    bad_images = BadImages(tmp_path / "bad_images.txt", total=8, max_fraction=1.0)
    with pytest.raises(TooManyBadImages, match=r"^none of the 8 images can be read; they are listed in "):
        batches(Noise(8, broken=tuple(range(8))), tmp_path, bad_images=bad_images)


def test_bad_images_of_an_earlier_run_and_of_other_processes_are_counted(tmp_path: Path):
    path = tmp_path / "bad_images.txt"
    path.write_text("a\tempty\n")
    one, other = (BadImages(path, total=10, max_fraction=1) for _ in range(2))
    one.add("b", "empty")
    other.add("b", "empty")
    other.add("c\nc\t", "empty")
    assert (len(one), len(other)) == (3, 3)
    assert path.read_text() == "a\tempty\nb\tempty\nc c \tempty\n"


def test_bad_images_are_listed_by_many_threads_without_loss(tmp_path: Path):
    bad_images = BadImages(tmp_path / "bad_images.txt", total=1000, max_fraction=1)
    threads = [
        threading.Thread(target=lambda: [bad_images.add(str(number), "empty") for number in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((tmp_path / "bad_images.txt").read_text().split()[::2], key=int) == [str(n) for n in range(200)]


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_bad_fraction_out_of_range_is_refused(tmp_path: Path, fraction: float):
    with pytest.raises(ValueError, match=f"^--max-bad-fraction {fraction} is not within 0..1; use 0.01$"):
        BadImages(tmp_path / "bad_images.txt", total=1, max_fraction=fraction)


def test_a_photograph_that_is_decoded_smaller_looks_the_same(tmp_path: Path):
    if not PHOTOS.exists():
        pytest.skip(f"no photographs at {PHOTOS}")
    photo = Image.open(next(PHOTOS.glob("02*.jpg")))
    photo.resize((2000, 1500)).save(tmp_path / "large.jpg", quality=95)
    raw, crop = (tmp_path / "large.jpg").read_bytes(), CentreCrop(size=(120, 160))
    # The same bytes as a Pillow image are not decoded by the JPEG path, so at their full size.
    smaller, full = (
        load(picture, crop.box, size=crop.size, channels=3, dtype=np.uint8)
        for picture in (raw, Image.open(tmp_path / "large.jpg"))
    )
    assert not np.array_equal(smaller, full)
    assert np.square(smaller.astype(float) - full).mean() < 255**2 / 10**3.3


def test_evaluation_images_are_the_same_every_time_and_without_the_broken(tmp_path: Path):
    source = Noise(8, broken=(3,))
    options: dict[str, Any] = {"size": (8, 8), "channels": 3, "dtype": np.uint8}
    images = eval_images(source, [5, 3, 0], **options)
    np.testing.assert_array_equal(images, np.concatenate([eval_images(source, [index], **options) for index in (5, 0)]))


def test_evaluation_images_that_are_all_broken_are_an_error():
    with pytest.raises(ValueError, match=r"^none of 1 images can be read; the last: images/3.png: the file is empty$"):
        eval_images(Noise(8, broken=(3,)), [3], size=(8, 8), channels=3, dtype=np.uint8)


class Plain(Noise):
    """Images of 256 x 256 pixels, each of one colour, so that resizing changes nothing."""

    def __init__(self, colours: np.ndarray, *, broken: tuple[int, ...] = ()):
        super().__init__(len(colours), broken=broken)
        self.images = np.broadcast_to(colours[:, None, None], (len(colours), 256, 256, colours.shape[1]))


def test_mean_and_deviation_are_those_that_numpy_finds():
    colours = np.random.default_rng(0).integers(0, 256, (20, 2), dtype=np.uint8)
    mean, std = measure_mean_std(Plain(colours, broken=(3,)), channels=2, dtype=np.uint8, seed=0)
    kept = np.delete(colours, 3, axis=0) / 255
    np.testing.assert_allclose(mean, kept.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(std, kept.std(axis=0), rtol=1e-9)


def test_mean_and_deviation_look_at_no_more_images_than_the_limit():
    source = Plain(np.zeros((20, 1), np.uint8))
    measure_mean_std(source, channels=1, dtype=np.uint8, seed=0, limit=5)
    assert source.reads.total() == 5


def test_a_channel_that_never_changes_is_not_divided_by_zero():
    assert measure_mean_std(Plain(np.full((2, 1), 51, np.uint8)), channels=1, dtype=np.uint8, seed=0) == (
        (0.2,),
        (1.0,),
    )


def test_reading_starts_without_a_word_and_leaves_logging_alone(tmp_path: Path):
    command = (
        "import sys, logging, pathlib; sys.path.insert(0, sys.argv[1]); import test_pipeline as t; "
        "t.batches(t.Noise(8), pathlib.Path(sys.argv[2])); print(logging.getLogger().handlers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_the_package_loads_no_heavy_library():
    heavy = ["PIL", "cv2", "datasets", "grain", "simplejpeg", "tifffile", "torch"]
    command = f"import sys, simmim.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
