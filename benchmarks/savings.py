"""What each saving of the step gains, and what other methods do: predicted from the FLOP left out, and measured.

    python benchmarks/savings.py [--rounds 5] [--cases vit "methods swin"] [--tiny]

One thread and its processor time, rounds that alternate over all variants, and the fastest of each: what other work on
the machine disturbs least. A gain is the first variant's time (the plain step's, or SimMIM's as it is by default) over
that of another, less 1; so for FLOP. The cases `methods` are steps that learn something else.
"""

import argparse
import dataclasses
import time
from typing import Any

import torch
from results import machine, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.torch_engine.models.savings import PLAIN, Savings
from simmim.torch_engine.perf.trial import random_batch, update_of
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import build_step

CASES = {
    "vit fp32": ("vit_base_patch16_224", 224, "fp32", {}),
    "vit": ("vit_base_patch16_224", 224, "bf16", {}),
    "beit": ("beit_base_patch16_224", 224, "bf16", {}),
    "swin": ("swin_base_patch4_window7_224", 192, "bf16", {"window_size": 6}),
    "resnet": ("resnet50", 224, "bf16", {}),
}
TINY = {"vit": {"depth": 2, "embed_dim": 48, "num_heads": 3}, "swin": {"depths": (1, 1, 1, 1), "embed_dim": 24}}
VARIANTS = {
    "plain": PLAIN,
    "visible_patches": dataclasses.replace(PLAIN, visible_patches=True),
    "hidden_cells": dataclasses.replace(PLAIN, hidden_cells=True),
    "hidden_cells and last_block": dataclasses.replace(PLAIN, hidden_cells=True, last_block=True),
    "attention": dataclasses.replace(PLAIN, attention=True),
    "products": dataclasses.replace(PLAIN, products=True),
    "all": Savings(),
}
DECODER = {"encode": "visible", "head": "transformer"}
UNIFORM = DECODER | {"mask": "uniform", "mask_cell": 16, "mask_ratio": 0.8125}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "methods vit": {
        "simmim": {},
        "visible, decoder 2 x 256": DECODER,
        "visible, decoder 8 x 512": DECODER | {"decoder_depth": 8, "decoder_width": 512},
        "visible, 8 x 512, ratio 0.75": DECODER | {"decoder_depth": 8, "decoder_width": 512, "mask_ratio": 0.75},
        "128 pixels": {"image_size": (128, 128)},
    },
    "methods swin": {
        "simmim": {},
        "visible, decoder 2 x 256": UNIFORM,
        "visible, decoder 2 x 512": UNIFORM | {"decoder_width": 512},
    },
}


def settings(case: str, batch: int, *, tiny: bool) -> PretrainConfig:
    model, size, precision, arguments = CASES[case]
    return PretrainConfig(
        model=model,
        model_args=arguments | (TINY.get(case.split()[0], {}) if tiny else {}),
        image_size=(size, size),
        batch_size=batch,
        precision=precision,  # type: ignore[arg-type]
        device="cpu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def variants(case: str, batch: int, *, tiny: bool) -> dict[str, tuple[PretrainConfig, Savings]]:
    if case in CASES:
        config = settings(case, batch, tiny=tiny)
        return {name: (config, savings) for name, savings in VARIANTS.items()}
    config = settings(case.removeprefix("methods "), batch, tiny=tiny)
    changed = {name: from_settings(PretrainConfig, vars(config) | changes) for name, changes in METHODS[case].items()}
    return {name: (config, Savings()) for name, config in changed.items()}


def measure(steps: dict[str, tuple[PretrainConfig, Savings]], rounds: int) -> dict[str, dict[str, float]]:
    world = World(device=torch.device("cpu"))
    updates, batches, figures = {}, {}, {}
    for name, (config, savings) in steps.items():
        torch.manual_seed(0)
        step = build_step(config, savings)
        updates[name] = update_of(step, config, world)
        batches[name] = random_batch(config, config.batch_size, step)
        tensors = {key: torch.from_numpy(array) for key, array in batches[name].items()}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(**tensors)["loss"].backward()
        step.zero_grad()
        figures[name] = {"flops": counter.get_total_flops(), "seconds": float("inf")}
    for turn in range(rounds + 1):
        for name, update in updates.items():
            begun = time.process_time()
            loss = float(update(turn, batches[name])[1][0])
            if turn:  # the first warms up
                figures[name]["seconds"] = min(figures[name]["seconds"], time.process_time() - begun)
            figures[name].setdefault("first_loss", loss)
    plain = dict(next(iter(figures.values())))
    for name, row in figures.items():
        row["predicted_gain"] = plain["flops"] / row["flops"] - 1
        row["measured_gain"] = plain["seconds"] / row["seconds"] - 1
        print(
            f"  {name:30}{row['seconds']:8.3f} s  predicted {row['predicted_gain']:+7.1%}  "
            f"measured {row['measured_gain']:+7.1%}  loss {row['first_loss']:.6f}",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *METHODS], default=[*CASES, *METHODS])
    parser.add_argument("--name", default="savings", help="of the file in benchmarks/results (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="very small models, to see that this runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "savings_tiny" if arguments.tiny else arguments.name
    figures: dict[str, Any] = {}
    for case in arguments.cases:
        steps = variants(case, arguments.batch_size, tiny=arguments.tiny)
        config = next(iter(steps.values()))[0]
        print(f"{config.model} at {config.image_size[0]}, batch {config.batch_size}, {config.precision}")  # type: ignore[index]
        figures[case] = {"model": config.model, "precision": config.precision, "batch_size": config.batch_size}
        figures[case]["variants"] = measure(steps, arguments.rounds)
        save(name, {**machine(), "cases": figures}, quiet=True)
    save(name, {**machine(), "cases": figures})


if __name__ == "__main__":
    main()
