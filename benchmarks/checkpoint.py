"""How long does a checkpoint keep training waiting, at once and in the background (`--async-save`)?

    python benchmarks/checkpoint.py --work DIR

The state of a ViT-B/16 and its AdamW, saved three times each way, in two rounds. Seconds until `save` returns, and
until the checkpoint has its name.
"""

import argparse
import tempfile
import time
from pathlib import Path

import timm
import torch
from results import machine, save

from simmim.torch_engine.train.checkpoint import CheckpointSaver
from simmim.torch_engine.train.distributed import World


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="a directory on the disk to measure")
    options = parser.parse_args()
    model = timm.create_model("vit_base_patch16_224", num_classes=0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found: dict[str, list[tuple[float, float]]] = {"at once": [], "background": []}
    for _ in range(2):
        for way, times in found.items():
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                world = World(device=torch.device("cpu"))
                saver = CheckpointSaver(Path(folder), world, keep=1, background=way == "background")
                for step in range(3):
                    begun = time.monotonic()
                    saver.save(step, model, optimizer, {})
                    waited = time.monotonic() - begun
                    saver.settle()
                    times.append((round(waited, 2), round(time.monotonic() - begun, 2)))
            print(way, times[-3:], flush=True)
    save("checkpoint", {**machine(), "seconds until it returns, and until it is written": found})


if __name__ == "__main__":
    main()
