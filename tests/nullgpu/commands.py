"""Every command on the GPU that computes nothing, in one process: `python -m nullgpu.commands FOLDER`.

Prints a JSON line for each command: its name, its exit status and the last line of what it said on the error stream.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from simmim.cli import main
from simmim.torch_engine.train.jpegs import JpegDecoder

DESCRIPTOR = "--objective descriptor=1 --descriptor.words 16"
TINY = "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=48 num_heads=2"
VIT = f"{TINY} --image-size 32 --mask.cell 16"
RESNET = "--from scratch --model resnet18 --model-args channels=[8,16,32,64]"
USUAL = "--device cuda --batch-size 4 --steps 2 --precision bf16 --no-compile --workers 1"
SIMMIM = "--objective pixels"
AUTO = "--accumulate-steps auto"
EFFICIENT, PRODUCTS = "--gpu.attention efficient", "--gpu.attention products"
FEW = "--labels-per-class 2"
COMMANDS = {
    "doctor": "doctor",
    "pretrain": f"pretrain {SIMMIM} --data demo --out F/pixels {VIT} {USUAL} --probe demo --picture-every-steps 1",
    "pretrain fp16": f"pretrain {SIMMIM} --data demo --out F/fp16 {VIT} {USUAL} --precision fp16 {EFFICIENT}",
    "pretrain from JPEGs": f"pretrain --data F/jpegs --out F/decoded {VIT} {USUAL} --decode gpu --val-images 2",
    "pretrain descriptor": f"pretrain --data demo --out F/descriptor {VIT} {USUAL} {DESCRIPTOR}",
    "pretrain views": f"pretrain --data demo --out F/views {VIT} {USUAL} --objective sigreg=1 infonce=1",
    "pretrain teacher": f"pretrain --data demo --out F/taught {VIT} {USUAL} --objective teacher=1 --teacher F/pixels",
    "resume": f"pretrain {SIMMIM} --data demo --out F/fp16 {VIT} {USUAL} --precision fp16",
    "reconstruct": "reconstruct F/pixels demo --out F/picture.png --count 2",
    "probe": "probe F/pixels --data demo --device cuda --labels-per-class 2 --k 5",
    "embed": "embed F/pixels --data demo --out F/features.npz --device cuda",
    "finetune classify": f"finetune classify --from F/pixels --data demo --out F/classify {USUAL} {FEW} {PRODUCTS}",
    "finetune segment": f"finetune segment {RESNET} --data F/cells --out F/segment --image-size 32 {USUAL} --dice 1",
    "finetune detect": f"finetune detect {RESNET} --data F/boxes --out F/detect --image-size 64 {USUAL} {AUTO}",
    "finetune fcos": f"finetune detect {RESNET} --data F/boxes --out F/fcos --image-size 64 {USUAL} --detector fcos",
    "finetune masks": f"finetune detect {RESNET} --data F/boxes --out F/m --image-size 64 {USUAL} --detector mask_rcnn",
    "predict classes": "predict F/classify F/boxes/val/images --device cuda",
    "predict cells": "predict F/segment F/boxes/val/images --device cuda --out F/found",
    "predict boxes": "predict F/detect F/boxes/val/images --device cuda",
    "export": "export F/pixels --format timm --out F/exported",
    "bench": "bench --model vit_tiny_patch16_224 --image-size 32 --device cuda --no-compile --seconds 0.1",
    "report": "report F/pixels F/descriptor --out F/report.html",
}
"""Arguments by name; F is the folder. A later one may use what an earlier one made."""

BLIND = "pretrain from JPEGs"
"""A command that would refuse, since no picture is decoded."""


def write_images(folder: Path) -> None:
    """Write six images of 40x56 pixels in each of train and val, as `finetune segment` and `detect` read them."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for place in ("cells/%s/images", "cells/%s/masks", "boxes/%s/images"):
            (folder / (place % part)).mkdir(parents=True)
        annotations = []
        for number in range(6):
            pixels, mask = np.full((40, 56, 3), 30, np.uint8), np.zeros((40, 56), np.uint8)
            top, left = (int(value) for value in random.integers(0, 20, 2))
            pixels[top : top + 18, left : left + 20], mask[top : top + 18, left : left + 20] = (220, 60, 60), 1
            Image.fromarray(pixels).save(folder / f"cells/{part}/images/{number}.png")
            Image.fromarray(pixels).save(folder / f"boxes/{part}/images/{number}.png")
            Image.fromarray(mask).save(folder / f"cells/{part}/masks/{number}.png")
            corners = [left, top, left + 20, top, left + 20, top + 18, left, top + 18]
            box = {"bbox": [left, top, 20, 18], "area": 360, "iscrowd": 0, "segmentation": [corners]}
            annotations.append({"id": number, "image_id": number, "category_id": 1, **box})
        images = [{"id": each, "file_name": f"{each}.png", "height": 40, "width": 56} for each in range(6)]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}]}
        (folder / f"boxes/{part}/annotations.json").write_text(json.dumps(content))
    (folder / "jpegs").mkdir()
    for number in range(8):
        pixels = random.integers(0, 256, (40 + number, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"jpegs/{number}.jpg")
    (folder / "cells" / "classes.txt").write_text("ground\nred")


def run(folder: Path) -> None:
    write_images(folder)
    for name, words in COMMANDS.items():
        said = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            if name == BLIND:  # as every picture, the one that a run begins with is not decoded
                stack.enter_context(mock.patch.object(JpegDecoder, "find_fault", return_value=None))
            try:
                status = main([word.replace("F/", f"{folder}/", 1) for word in words.split()])
            except (Exception, SystemExit) as error:
                status, _ = 1, said.write(f"{type(error).__name__}: {error}")
        print(json.dumps({"command": name, "status": status, "said": said.getvalue()}), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
