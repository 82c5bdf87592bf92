"""Feed damaged and hostile files to everything that reads files: 10,000 mutations.

    python benchmarks/fuzz.py --mutations 10000 --seed 0

Real files of each kind are made first, then mutated: flipped bits, extreme numbers, cut, doubled, swapped and spliced
parts, in archives also inside of their members. A reader may read what comes of it, or refuse it with a `UserError`
(one line). Faults are: any other exception, a crash of the process, over `_SECONDS` for a file, over `_MEMORY` more
memory, a program or module run, a connection, and a file written or removed outside of the folder of the trial.

Readers run in a forked process, which the main process watches; audit hooks (PEP 578) see what it opens and runs.
"""

import argparse
import io
import json
import os
import pickle
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
from PIL import Image

from simmim.commands.pack import PackConfig, pack
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml, to_toml
from simmim.data.augment import ScaleJitter
from simmim.data.decode import decode
from simmim.data.labelled.classes import open_labelled
from simmim.data.labelled.detection import DetectionReader, encode_mask, open_detection
from simmim.data.labelled.every import open_with_labels
from simmim.data.labelled.segmentation import open_segmentation
from simmim.data.pages import count_pages
from simmim.data.sources import ImageSource, open_source, read_raw
from simmim.errors import UserError
from simmim.interop.checkpoints import read_checkpoint
from simmim.report.facts import Facts
from simmim.report.verdict import judge

_SECONDS, _MEMORY = 20, 2 * 2**30  # for a file; bytes beyond what the process had
_RUNS = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Kind:
    """Files of one kind, by name, and what reads them."""

    read: Callable[[Path], None]
    """Takes the folder in which the files lie."""
    files: dict[str, bytes]
    mutated: Sequence[str] = ()
    """Names of those that are damaged, one in each trial (default: all)."""
    whole: str = "read"
    """What becomes of the files without damage, which is seed -1."""


@dataclass
class Tally:
    """What became of the trials of a kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Seed and reason of each fault."""
    seconds: float = 0.0


def mutate(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Damage a file's bytes in one to four ways; `other` is a file of which parts may be taken."""
    if data[:2] == b"PK" and draw.random() < 0.5:
        return mutate_member(data, other, draw)
    found = bytearray(data)
    for _ in range(int(draw.integers(1, 5))):
        size = len(found)
        place, length = int(draw.integers(size + 1)), int(2 ** draw.uniform(0, 10))
        match int(draw.integers(10)):
            case 0 if size:
                found[place % size] ^= 1 << int(draw.integers(8))
            case 1:
                found[place : place + 1] = draw.bytes(1)
            case 2 | 3:  # a length, an offset or a count, in either byte order
                value, order = _EXTREMES[draw.integers(len(_EXTREMES))], "<>"[draw.integers(2)]
                number = struct.pack(f"{order}I", value)
                found[place : place + 4] = number
            case 4:
                del found[place:]
            case 5:
                del found[place : place + length]
            case 6:
                found[place:place] = found[place : place + length] * int(draw.integers(1, 5))
            case 7:
                start = int(draw.integers(len(other) + 1))
                found[place : place + length] = other[start : start + length]
            case 8:
                found[place:place] = draw.bytes(length)
            case _:
                mutate_number(found, draw)
    return bytes(found)


def mutate_number(text: bytearray, draw: np.random.Generator) -> None:
    """Replace a number that is written in digits."""
    first = int(draw.integers(max(len(text) - 4096, 1)))
    digits = [place for place in range(first, min(first + 4096, len(text))) if 48 <= text[place] <= 57]
    if digits:
        end = start = digits[int(draw.integers(len(digits)))]
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        values = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"0.5", b"null", b'"x"', b"[]")
        text[start:end] = values[int(draw.integers(len(values)))]


def mutate_member(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Damage a member of a zip, so that its checksum is right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as written:
        names = archive.namelist()
        chosen = names[int(draw.integers(len(names)))]
        for name in names:
            content = archive.read(name)
            written.writestr(name, mutate(content, other, draw) if name == chosen else content)
    return out.getvalue()


def make_kinds(work: Path) -> dict[str, Kind]:
    """Make files of every kind, with the help of a folder."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(3)]
    classes = Image.fromarray(draw.integers(0, 3, (24, 32), np.uint8))
    deep = Image.fromarray(draw.integers(0, 60_000, (24, 32), np.uint16))
    return {
        **image_kinds(pictures, deep),
        **set_kinds(pictures, encoded(classes, "PNG"), work),
        **run_kinds(),
        **checkpoint_kinds(),
    }


def encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **settings)
    return out.getvalue()


def image_kinds(pictures: list[Image.Image], deep: Image.Image) -> dict[str, Kind]:
    frames = {"GIF": {"save_all": True, "append_images": pictures[1:]}}
    names = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    found = {name: {"a": encoded(pictures[0], name, **frames.get(name, {}))} for name in names}
    found["TIFF"] = {"a": encoded(deep, "TIFF"), "b": encoded(pictures[0], "TIFF", compression="tiff_lzw")}
    return {name: Kind(read_images, files) for name, files in found.items()}


def set_kinds(pictures: list[Image.Image], classes: bytes, work: Path) -> dict[str, Kind]:
    """Sets of images: arrays, lists, boxes, masks and packed shards."""
    arrays, stack = io.BytesIO(), np.stack([np.asarray(picture) for picture in pictures])
    np.savez_compressed(arrays, x_train=stack, y_train=np.arange(3), x_test=stack, y_test=np.arange(3))
    pngs = {f"{number}.png": encoded(picture, "PNG") for number, picture in enumerate(pictures)}
    rle = {"size": [24, 32], "counts": [100, 20, 648]}
    box = {"bbox": [2, 3, 10, 12], "area": 120, "iscrowd": 0}
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 1, **box, "segmentation": [[2, 3, 12, 3, 12, 15]]},
        {"id": 2, "image_id": 2, "category_id": 2, **box, "segmentation": rle},
        {"id": 3, "image_id": 2, "category_id": 1, **box, "segmentation": encode_mask(np.eye(24, 32, dtype=np.bool_))},
    ]
    images = [{"id": number, "file_name": f"{number}.png", "width": 32, "height": 24} for number in (1, 2)]
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    coco = json.dumps({"images": images, "annotations": boxes, "categories": categories}).encode()
    parts = {f"{part}/images/{name}": content for part in ("train", "val") for name, content in pngs.items()}
    masks = {name.replace("images", "masks"): classes for name in parts}
    listed = {f"{part}/annotations.json": coco for part in ("train", "val")}
    (work / "images").mkdir()
    for name, content in pngs.items():
        (work / "images" / name).write_bytes(content)
    pack(PackConfig(images=str(work / "images"), out=str(work / "packed")))
    table = b"path,label\n0.png,one\n1.png,two\n2.png,one\n0.png,two\n"
    return {
        "zip": Kind(read_zip, {"a.zip": zipped(pngs)}),
        "tar": Kind(read_tar, {"a.tar": tarred(pngs | {"0.cls": b"3", "1.cls": b"4", "2.cls": b"3"})}),
        "npz": Kind(read_arrays, {"a.npz": arrays.getvalue()}),
        "list": Kind(read_list, {"a.txt": b"0.png\n# none\n1.png\n", **pngs}, ["a.txt"]),
        "csv": Kind(read_table, {"a.csv": table, **pngs}, ["a.csv"]),
        "COCO JSON": Kind(read_boxes, listed | parts, list(listed)),
        "masks": Kind(read_masks, masks | parts, list(masks)),
        "packed shards": Kind(read_packed, {path.name: path.read_bytes() for path in (work / "packed").glob("[!.]*")}),
    }


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return out.getvalue()


def run_kinds() -> dict[str, Kind]:
    config = to_toml(PretrainConfig(data="images", out="run")).encode()
    rows = [{"step": step, "loss": 1 / step, "lr": 1e-3, "epoch": step / 9} for step in range(1, 40)]
    run = {
        "config.toml": config,
        "metrics.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "data.json": b'{"train": {}}',
        "machine.json": b'{"begun": [{"device": "cpu", "devices": 1}]}',
    }
    return {"TOML": Kind(read_settings, {"a.toml": config}), "run directory": Kind(read_run, run)}


class Command:
    """What a hostile pickle runs when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def checkpoint_kinds() -> dict[str, Kind]:
    import timm
    import torch
    from safetensors.torch import save

    small: dict[str, Any] = {"depth": 1, "img_size": 32, "num_classes": 0}
    state = timm.create_model("vit_tiny_patch16_224", **small).state_dict()
    tensors, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": state, "epoch": 3}, tensors)
    torch.save({"model": state, "epoch": 3}, legacy, _use_new_zipfile_serialization=False)
    hostile = pickle.dumps({"model": Command(), **{f"layer{number}": [number] * 9 for number in range(20)}})
    return {
        "safetensors": Kind(read_checkpoints, {"a.safetensors": save(state)}),
        ".pth": Kind(read_checkpoints, {"a.pth": tensors.getvalue()}),
        ".pth before torch 1.6": Kind(read_checkpoints, {"a.pth": legacy.getvalue()}),
        "hostile .pth": Kind(read_checkpoints, {"a.pth": hostile}, whole="refused"),
    }


def read_all(source: ImageSource) -> None:
    for index in range(min(len(source), 8)):
        decode(read_raw(source, index), channels=3, dtype=np.uint8)


def read_images(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        count_pages(raw)
        decode(raw, channels=3, dtype=np.uint8)


def read_arrays(folder: Path) -> None:
    read_all(open_source(str(folder / "a.npz")))
    open_labelled(str(folder / "a.npz"))


def read_zip(folder: Path) -> None:
    read_all(open_source(str(folder / "a.zip")))


def read_tar(folder: Path) -> None:
    read_all(open_with_labels(str(folder / "a.tar"))[0])


def read_list(folder: Path) -> None:
    read_all(open_source(str(folder / "a.txt")))


def read_table(folder: Path) -> None:
    read_all(open_labelled(str(folder / "a.csv")).train)


def read_boxes(folder: Path) -> None:
    images = open_detection(str(folder), masks=True).train
    jitter = ScaleJitter(size=(32, 32), scale=(0.7, 1.5))
    read = DetectionReader(images=images, jitter=jitter, channels=3, fill=(0, 0, 0), seed=0, masks=True)
    for index in range(len(images)):
        read(0, index)


def read_masks(folder: Path) -> None:
    open_segmentation(str(folder))


def read_packed(folder: Path) -> None:
    read_all(open_source(str(folder)))


def read_settings(folder: Path) -> None:
    read_toml(folder / "a.toml", PretrainConfig)


def read_run(folder: Path) -> None:
    judge(Facts.read(folder))


def read_checkpoints(folder: Path) -> None:
    for path in folder.iterdir():
        read_checkpoint(path, model="vit_tiny_patch16_224", model_args={"depth": 1})


class Watch:
    """An audit hook that notes what a reader must not do. It cannot be taken away again."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder), "", False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS:
            self.seen = f"{event} {arguments[:1]}"
        elif event in _CHANGES and not self.inside(arguments[0]):
            if "__pycache__" in os.fsdecode(arguments[0]):  # Python's own, of a module that a reader imports
                return
            self.seen = f"{event} {arguments[:2]}"
        elif event == "open" and not self.inside(arguments[0]):
            writes = set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & _WRITES
            if writes and "__pycache__" not in str(arguments[0]):
                self.seen = f"open {arguments[0]!r} to write"

    def inside(self, path: Any) -> bool:
        return isinstance(path, int) or os.path.abspath(os.fsdecode(path)).startswith(self.folder)  # noqa: PTH100


def try_one(kind: Kind, seed: int, folder: Path, watch: Watch) -> str:
    """Damage a file of a kind and read it: "read", "refused", or the fault."""
    draw = np.random.default_rng(abs(seed))
    names = list(kind.mutated or kind.files)
    chosen = names[int(draw.integers(len(names)))]
    other = kind.files[names[int(draw.integers(len(names)))]]
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in kind.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(mutate(content, other, draw) if name == chosen and seed >= 0 else content)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch.seen, watch.on = "", True
    begun = time.monotonic()
    try:
        kind.read(folder)
        outcome = "read"
    except UserError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        watch.on = False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if time.monotonic() - begun > _SECONDS:
        return f"took {time.monotonic() - begun:.0f} s"
    return watch.seen or (f"took {grown >> 20} MiB" if grown > _MEMORY else outcome)


def run_seeds(kind: Kind, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, str]]:
    """Try each seed in a forked process; after a crash or a hang, go on with the next seed in another one."""
    left = list(seeds)
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            watch = Watch(folder)
            for seed in left:
                text = " ".join(try_one(kind, seed, folder, watch).split())[:300]
                os.write(writing, f"{text}\n".encode(errors="replace"))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            for outcome in _lines(pipe.fileno()):
                yield left.pop(0), outcome
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if left:
            yield left.pop(0), f"no answer: the process ended with {status} or hung"


def _lines(pipe: int) -> Iterator[str]:
    """Yield lines from a pipe until it closes, or nothing comes for three times the limit of a file."""
    text = b""
    while select.select([pipe], [], [], 3 * _SECONDS)[0] and (part := os.read(pipe, 65_536)):
        *whole, text = (text + part).split(b"\n")
        yield from (line.decode() for line in whole)


def fuzz(kind: Kind, seeds: Sequence[int], folder: Path) -> Tally:
    """Try mutations of a kind, one for each seed, in `folder`, which is removed; first its files as they are."""
    tally, begun = Tally(), time.monotonic()
    for seed, outcome in run_seeds(kind, [-1, *seeds], folder):
        if seed < 0:
            if outcome != kind.whole:
                tally.faults.append(f"files without damage: {outcome}, not {kind.whole}")
            continue
        tally.outcomes[outcome if outcome in ("read", "refused") else "fault"] += 1
        if outcome not in ("read", "refused"):
            tally.faults.append(f"{seed}: {outcome}")
    shutil.rmtree(folder, ignore_errors=True)
    tally.seconds = round(time.monotonic() - begun, 1)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        kinds = make_kinds(Path(work))
        table: dict[str, dict[str, Any]] = {}
        for number, (name, kind) in enumerate(kinds.items()):
            count = len(range(number, options.mutations, len(kinds)))
            first = options.seed * 10_000_000 + number * 100_000
            tally = fuzz(kind, range(first, first + count), Path(work) / "trial")
            table[name] = {**tally.outcomes, "seconds": tally.seconds, "faults": tally.faults}
            print(name, table[name], flush=True)
    results.save("fuzz", {**results.machine(), "kinds": table})
    sys.exit(any(row["faults"] for row in table.values()))


if __name__ == "__main__":
    main()
