"""What every objective must do, for the tests of each: train, resume to the same bits, and agree over processes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.distributed import spread
from simmim.torch_engine.train.pretrain import pretrain
from simmim.torch_engine.train.storage import build_step, load_run

from . import tiny, worker


def losses_and_gradients(config: PretrainConfig, world: distributed.World) -> dict[str, Tensor]:
    """A forward and a backward pass of this rank's part of a batch; the same numbers on every rank."""
    torch.manual_seed(0)
    step = build_step(config)
    assert isinstance(step, nn.Module)
    batch = random_batch(config, config.batch_size, step)
    rows = slice(world.rank * config.batch_size // world.size, (world.rank + 1) * config.batch_size // world.size)
    model = spread(step, world, shard=config.shard)
    found: dict[str, Tensor] = model(**{name: torch.from_numpy(value[rows]) for name, value in batch.items()})
    found["loss"].backward()
    found = {name: world.mean(value.detach().clone()) for name, value in found.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("module.")] = distributed.full_tensor(parameter.grad)
    return found


def _save(config: PretrainConfig, path: Path) -> None:
    with distributed.join("cpu") as world:
        found = losses_and_gradients(config, world)
        if world.is_main:
            torch.save(found, path)


def check_two_processes(config: PretrainConfig, folder: Path) -> None:
    """Two processes must give the losses, figures and gradients of one with the whole batch."""
    worker.run_together(_save, config, folder / "found", log=folder / "log")
    found, expected = torch.load(folder / "found"), losses_and_gradients(config, tiny.CPU)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_resume(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str = "vit",
    *,
    meanwhile: Callable[[], object] = lambda: None,
    **settings: Any,
) -> dict[str, Tensor]:
    """A run that is broken off after its checkpoint must end with the bits of one that is not; return them.

    `meanwhile` is called before it resumes. The resumed run is `folder`/parts.
    """
    usual: dict[str, Any] = {"steps": 4, "save_every_steps": 2, "log_every_steps": 1, "val_images": 0}
    whole = worker.settings(folder / "whole", kind, **(usual | settings))
    parts = dataclasses.replace(whole, out=str(folder / "parts"))
    pretrain(whole)
    worker.break_off(parts, 3, monkeypatch)
    meanwhile()
    pretrain(parts)
    assert whole.out and parts.out
    expected, found = (dict(load_run(each.out, objectives=True)[0].state_dict()) for each in (whole, parts))
    tiny.assert_same(expected, found)
    assert [row["loss"] for row in worker.rows(whole)] == [row["loss"] for row in worker.rows(parts)]
    return found


def check_two_process_runs(folder: Path, *, shard: bool = True, **settings: Any) -> None:
    """A run of two processes that share the model, or have a copy each, must have the losses of one process."""
    one = worker.settings(folder / "one", steps=4, log_every_steps=1, val_images=0, batch_size=8, **settings)
    two = dataclasses.replace(one, out=str(folder / "two"), shard=shard)
    pretrain(one)
    worker.run_together(worker.pretrain, two, log=folder / "log")
    found, expected = ([row["loss"] for row in worker.rows(each)] for each in (two, one))
    assert found == pytest.approx(expected, rel=1e-4)


def check_gradients(step: Any, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients must be those of central differences, in fp64, which stands for fp32 meanwhile.

    `step` is of 32 pixels and patches of 8; `head` is the prefix of a linear head.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    step.double().train()
    image = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)))
    mask = torch.arange(16).view(1, 4, 4).expand(3, 4, 4) % 2 == 0
    parameters = dict(step.named_parameters())

    def loss() -> Tensor:
        return step(image, torch.zeros(3, 1, dtype=torch.bool), mask)["loss"]

    loss().backward()
    for name in (f"{head}.weight", f"{head}.bias", "model.encoder.mask_token", "model.encoder.backbone.pos_embed"):
        parameter = parameters[name]
        assert parameter.grad is not None, name
        place = int(parameter.grad.abs().argmax())
        ends = []
        with torch.no_grad():
            for shift in (1e-5, -2e-5, 1e-5):
                parameter.view(-1)[place] += shift
                ends.append(float(loss()))
        assert float(parameter.grad.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6), name


def check_training(config: PretrainConfig, *names: str, steps: int = 12, lr: float = 1e-3) -> dict[str, list[float]]:
    """Train on one batch; the losses must fall. Returns figures by name, of each step."""
    update = tiny.update(config, lr=lr)
    batch = random_batch(config, config.batch_size, update.model)  # type: ignore[arg-type]
    figures = [update(step, batch)[1].tolist() for step in range(steps)]
    found = {name: [row[update.names.index(name)] for row in figures] for name in update.names}
    assert all(math.isfinite(value) for values in found.values() for value in values)
    for name in names:
        assert sum(found[name][-3:]) < sum(found[name][:3]), name
    return found
