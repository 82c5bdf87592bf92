"""Trains the same small models with both engines from the same weights on the same batches, in one process.

`python parity.py BACKEND CASE…` prints, for each case, how far the keras engine is from the torch engine, as JSON.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.keras_engine import use_backend
from simmim.method.schedules import CosineSchedule
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step
from simmim.torch_engine.train.update import Update
from simmim.training.masks import draw_masks

STEPS, BATCH = 20, 4
BEIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": 0.1}
# What batch norms see of so small a net is nearly constant, the more so the more is hidden, and that enlarges rounding.
# TensorFlow's step compiled by XLA for a CPU rounds more than JAX's: running statistics differ by 1.3e-5 (JAX: 2e-7),
# and gradients by 1.3e-4 at most, of a bias whose largest gradient is 6e-6. XLA's optimisation level, fast-math, excess
# precision and algebraic simplifier, and PyTorch's own formula for the variance's gradient, make no difference (1.3 to
# 1.4e-4), so it is compared as TensorFlow runs it uncompiled.
RESNET = {
    "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
    "mask_ratio": 0.5,
    "compile": False,
}
SWIN = {"depths": [2, 1], "num_heads": [2, 4], "embed_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit_tiny_patch16_224", "model_args": {"depth": 2, "embed_dim": 48}},
    "vit in pieces": {
        "model": "vit_tiny_patch16_224",
        "model_args": {"depth": 1, "embed_dim": 48},
        "accumulate_steps": 2,
    },
    "vit, activations recomputed": {
        "model": "vit_tiny_patch16_224",
        "model_args": {"depth": 2, "embed_dim": 48},
        "checkpoint_activations": True,
    },
    "vit with hog": {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 48}, "target": "hog"},
    "beit, shared bias": {"model": "beit_base_patch16_224", "model_args": BEIT | SHARED},
    "beit, own biases": {
        "model": "beit_base_patch16_224",
        "model_args": BEIT | {"use_abs_pos_emb": True},
        "head": "transformer",
    },
    "swin": {"model": "swin_tiny_patch4_window7_224", "model_args": SWIN | {"window_size": 4}, "head": "mlp"},
    "swin, activations recomputed": {
        "model": "swin_tiny_patch4_window7_224",
        "model_args": SWIN | {"window_size": 4},
        "checkpoint_activations": True,
    },
    "swin, padded windows": {
        "model": "swin_tiny_patch4_window7_224",
        "model_args": SWIN | {"window_size": 5},
        "target": "normalized",
        "loss": "smooth_l1",
    },
    "resnet": {"model": "resnet18", **RESNET},
    "resnet, bottlenecks": {"model": "resnet50", **RESNET},
}


def config_of(case: str) -> PretrainConfig:
    return from_settings(
        PretrainConfig,
        dict(
            data="none",
            out="none",
            image_size=(64, 96),
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            batch_size=BATCH,
            drop_path=0.2,
            precision="fp32",
            device="cpu",
            clip_grad=1.0,
            **{"compile": True, **CASES[case]},
        ),
    )


def batches(config: PretrainConfig, patch: int, layers: int) -> list[dict[str, NDArray[Any]]]:
    assert config.image_size is not None
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, *config.image_size, 3), dtype=np.uint8),
            "flip": rng.random((BATCH, 1)) < 0.5,
            "mask": draw_masks(config, step, np.arange(BATCH), patch),
        }
        | ({"drop_path": rng.random((BATCH, layers), dtype=np.float32)} if layers else {})
        for step in range(STEPS)
    ]  # fmt: skip


def compare(backend: str, case: str) -> dict[str, Any]:
    from simmim.keras_engine import weights
    from simmim.keras_engine.model import build_model
    from simmim.keras_engine.pretrain import open_machine

    config = config_of(case)
    torch.manual_seed(0)
    theirs = build_step(config)
    machine = open_machine(backend, config)
    with machine.building():
        model = build_model(config)
    start = starting_weights(theirs)
    weights.assign(model, start)
    stepper = machine.start(model, config)
    encoder, other = model.encoder, theirs.model.encoder
    layers = encoder.drop_paths.layers
    feed = batches(config, encoder.patch_size, layers)
    schedule = CosineSchedule(peak_lr=1e-3, warmup_lr=1e-4, warmup_steps=5, min_lr=0, total_steps=STEPS)
    optimizer = create_optimizer(theirs, weight_decay=0.05, betas=config.betas, device=torch.device("cpu"))
    update = Update(theirs.train(), optimizer, schedule, config=config, world=World(device=torch.device("cpu")))
    rows, reference, gradients, expected = [], [], {}, {}
    for step, batch in enumerate(feed):
        reference.append(update(step, batch)[1].tolist())
        rows.append(stepper.step(batch, schedule.at_update(step)))
        if step == 0:  # the average of gradients after one step is a tenth of them, clipped
            gradients = weights.export(model.trainable_variables, stepper.read().means)
            expected = {
                name: optimizer.state[p]["exp_avg"].numpy().copy() for name, p in theirs.model.named_parameters()
            }
    figures = stepper.fetch(rows)
    state = stepper.read()
    statistics = weights.export(model.non_trainable_variables, state.statistics)
    held = theirs.model.state_dict()
    sizes = (encoder.patch_size, encoder.stride, encoder.num_features, layers)
    return {
        "names": sorted(set(start) ^ {weights.torch_name(v) for v in model.variables}),
        "sizes": sizes == (other.patch_size, other.stride, other.num_features, other.drop_path_draws.layers),
        "loss": abs(figures[0][0] - reference[0][0]),
        "grad_norm": abs(figures[0][1] / reference[0][1] - 1),
        "gradients": max(distance(gradients[name], expected[name]) for name in expected),
        "curve": float(np.abs(np.array(figures)[:, 0] - np.array(reference)[:, 0]).max()),
        "fell": reference[0][0] - reference[-1][0],
        "statistics": max((distance(statistics[name], held[name].numpy()) for name in statistics), default=0.0),
    }  # fmt: skip


def starting_weights(step: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Those that the torch engine begins with, each moved a little, so that nothing is zero; loaded into it too."""
    rng = np.random.default_rng(1)

    def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "running" in name or not tensor.is_floating_point():
            return tensor
        return tensor + torch.from_numpy(rng.normal(0, 0.02, tensor.shape).astype(np.float32))

    moved = {name: move(name, tensor) for name, tensor in step.state_dict().items()}
    step.load_state_dict(moved)
    return {
        name.removeprefix("model."): tensor.numpy().copy()
        for name, tensor in moved.items()
        if not name.endswith("num_batches_tracked")
    }


def distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, in units of the largest value expected; values below 1e-6 are rounding."""
    return float(np.abs(found - expected).max() / (np.abs(expected).max() + 1e-6))


if __name__ == "__main__":
    use_backend(sys.argv[1])
    print(json.dumps({case: compare(sys.argv[1], case) for case in sys.argv[2:] or CASES}))
