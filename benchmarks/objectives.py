"""What each objective costs beside SimMIM's pixels: FLOP and memory of a whole step, counted, not timed.

    python benchmarks/objectives.py

ViT-S/16 at 224 pixels, batch 64, fp32, as PyTorch runs the step on a CPU. The counts come from the operations of the
step (`simmim.torch_engine.perf.cost`), so that they are the same on every machine. A teacher is a ViT-S/16 too.
"""

import dataclasses
import tempfile
from pathlib import Path

from results import machine, save

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.method.masks import RandomMask
from simmim.method.objectives import (
    Contrast,
    DescriptorRegression,
    EmaTeacher,
    FrozenTeacher,
    LatentClusters,
    PixelReconstruction,
    SigReg,
)
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.perf.cost import measure_work
from simmim.torch_engine.train.storage import save_backbone

BATCH = 64
PLAIN = PretrainConfig(
    model="vit_small_patch16_224",
    image_size=(224, 224),
    mask=RandomMask(cell=32),
    batch_size=BATCH,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    device="cpu",
    precision="fp32",
)


def configurations(teacher: str) -> dict[str, PretrainConfig]:
    """Return the steps to count by name."""

    def of(*objectives: object, **others: object) -> PretrainConfig:
        return dataclasses.replace(PLAIN, objectives=objectives, **others)  # type: ignore[arg-type]

    half = {"mask": RandomMask(ratio=0.5, cell=16), "encode": "visible"}
    return {
        "pixels": PLAIN,
        "descriptor, visible patches": of(DescriptorRegression(), **half),
        "descriptor, whole image": of(DescriptorRegression(see="whole")),
        "teacher": of(FrozenTeacher(source=teacher)),
        "pixels + ema": of(PixelReconstruction(), EmaTeacher()),
        "clusters": of(LatentClusters()),
        "sigreg": of(SigReg()),
        "infonce": of(Contrast()),
    }


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(Path(folder), create_backbone(PLAIN.model, image_size=(224, 224)))
        for name, config in configurations(folder).items():
            work = measure_work(config)
            flops = work.flops[0].sum() + BATCH * work.flops[1].sum()
            memory = (work.live[0] + BATCH * work.live[1]).max()
            found[name] = {"gflop_per_image": flops / BATCH / 1e9, "memory_gib": memory / 2**30}
    plain = found["pixels"]
    print("| objective | FLOP of a step, of those for pixels | memory, of that for pixels |\n| --- | --- | --- |")
    for name, figures in found.items():
        ratios = (figures[key] / plain[key] for key in figures)
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    save("objectives", machine() | {"simmim": simmim.__version__, "batch": BATCH, "figures": found})


if __name__ == "__main__":
    main()
