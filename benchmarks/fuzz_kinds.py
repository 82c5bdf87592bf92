"""What `fuzz.py` damages: real files of every kind that the package reads, and how a command reads each."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from fuzz_dicom import dicom_files
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
from simmim.interop.checkpoints import read_checkpoint
from simmim.report.facts import Facts
from simmim.report.verdict import judge


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
    found["GeoTIFF"] = {"a": geotiff(pictures, tile=(16, 16), compression="lzw"), "b": geotiff(pictures)}
    found["DICOM"] = dicom_files(np.asarray(deep))
    return {name: Kind(read_images, files) for name, files in found.items()}


def geotiff(bands: list[Image.Image], **options: Any) -> bytes:
    """Write the red of each picture as a 16-bit band, of which 0 is missing."""
    pixels, out = np.stack([np.asarray(band)[..., 0] for band in bands]).astype(np.uint16) // 2 * 300, io.BytesIO()
    tag = (42113, "s", 0, "0", True)
    tifffile.imwrite(out, pixels, photometric="minisblack", planarconfig="separate", extratags=[tag], **options)
    return out.getvalue()


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
