"""One optimiser step: what it equals, what it leaves alone, and what it never asks the device for."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.method.losses import CrossEntropyLoss
from simmim.method.targets import ClusterTarget
from simmim.torch_engine.train import update as update_module
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.update import Update

from . import tiny


def losses(update: Update, settings: Any, steps: int = 4) -> list[float]:
    return [float(update(step, tiny.batch(settings, seed=step))[1][0]) for step in range(steps)]


def test_a_step_is_forward_backward_clip_and_adamw() -> None:
    settings = tiny.config(clip_grad=0.1)
    update = tiny.update(settings)
    plain: Any = copy.deepcopy(update.model)
    optimizer = create_optimizer(plain, weight_decay=0.05, betas=(0.9, 0.999), device=torch.device("cpu"))
    for step in range(3):
        batch = tiny.batch(settings, seed=step)
        _, figures = update(step, batch)
        loss = plain(**{name: torch.from_numpy(array) for name, array in batch.items()})["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(figures, torch.stack((loss.detach(), norm, torch.tensor(0.0))))
        assert norm > 0.1
    for (name, mine), theirs in zip(update.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_the_learning_rate_is_the_schedules_times_that_of_the_group() -> None:
    update = tiny.update(tiny.config(), lr=2e-3)
    update.optimizer.param_groups[1]["lr_scale"] = 0.25
    lr, _ = update(0, tiny.batch(tiny.config()))
    assert lr == 2e-3
    assert [group["lr"] for group in update.optimizer.param_groups] == [2e-3, 5e-4]


def test_a_learning_rate_on_the_device_is_changed_there() -> None:
    """As on a TPU, and with the same weights as from numbers."""
    numbers, tensors = tiny.update(tiny.config(), lr=2e-3), tiny.update(tiny.config(), lr=2e-3)
    tensors.optimizer.param_groups[1]["lr_scale"] = numbers.optimizer.param_groups[1]["lr_scale"] = 0.25
    rates = [torch.zeros(()) for _ in tensors.optimizer.param_groups]
    for group, rate in zip(tensors.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for step in range(2):
        for update in (numbers, tensors):
            update(step, tiny.batch(tiny.config(), seed=step))
    assert [group["lr"] for group in tensors.optimizer.param_groups] == rates
    torch.testing.assert_close(torch.stack(rates), torch.tensor([2e-3, 5e-4]))
    for mine, theirs in zip(tensors.model.parameters(), numbers.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_equals_the_large_batch(pieces: int) -> None:
    settings = tiny.config(drop_path=0.3)
    whole, parts = tiny.update(settings), tiny.update(dataclasses.replace(settings, accumulate_steps=pieces))
    for step in range(4):
        batch = tiny.batch(settings, seed=step)
        torch.testing.assert_close(parts(step, batch)[1], whole(step, batch)[1], rtol=1e-5, atol=1e-6)


def test_drop_path_is_drawn_by_the_batch() -> None:
    settings = tiny.config(drop_path=0.5)
    batch = tiny.batch(settings)
    other = batch | {"drop_path": 1 - batch["drop_path"]}
    first, again, changed = (tiny.update(settings)(0, each)[1][0] for each in (batch, batch, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)


def test_what_a_layer_draws_itself_depends_on_the_step_alone() -> None:
    settings = tiny.config(model_args=tiny.KINDS["vit"].arguments | {"proj_drop_rate": 0.5})
    batch, found = tiny.batch(settings), []
    for step, noise in ((3, 0), (3, 5), (4, 0)):
        update = tiny.update(settings)
        torch.randn(noise)
        found.append(float(update(step, batch)[1][0]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet18"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind: str, precision: str) -> None:
    settings = tiny.config(kind, precision=precision)
    update = tiny.update(settings)
    update(0, tiny.batch(settings))
    before = tiny.state(update)
    bad = [float(update(step, tiny.batch(settings, broken=True))[1][2]) for step in (1, 2)]
    tiny.assert_same(tiny.state(update), before)
    assert bad == [1.0, 2.0]
    _, figures = update(3, tiny.batch(settings))
    assert float(figures[2]) == 0.0
    assert torch.isfinite(figures).all()


def test_an_infinite_loss_whose_gradients_are_finite_changes_nothing() -> None:
    settings = tiny.config()
    update, batch = tiny.update(settings), tiny.batch(settings)
    update(0, batch)
    before = tiny.state(update)
    row, column = np.argwhere(batch["mask"][0])[0] * 16
    batch["image"][0, row : row + 16, column : column + 16] = 3e38  # finite, as its gradients are; their sum is not
    batch["flip"][:] = False
    _, figures = update(1, batch)
    assert torch.isinf(figures[0])
    tiny.assert_same(tiny.state(update), before)


def test_the_count_of_bad_steps_outlives_a_checkpoint() -> None:
    settings = tiny.config()
    first, second = tiny.update(settings), tiny.update(settings)
    for step in range(3):
        first(step, tiny.batch(settings, broken=True))
    second.load_state(first.state())
    assert float(second(3, tiny.batch(settings, broken=True))[1][2]) == 4.0


class NoHostReads(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, or where a shape depends on one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in function.tags, function
        if function is torch.ops.aten.index.Tensor:  # a gather, or a selection
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "selection by a mask"
        else:
            assert torch.Tag.dynamic_output_shape not in function.tags, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["vit", "beit with a shared bias", "swin", "swinv2", "resnet18", "convnext"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_nothing_from_the_device(kind: str, precision: str) -> None:
    settings = tiny.config(kind, precision=precision, accumulate_steps=2, drop_path=0.2)
    update, batch = tiny.update(settings), tiny.batch(settings)
    with NoHostReads():
        for step in range(2):
            update(step, batch)


def test_the_watch_over_host_reads_sees_one() -> None:
    x = torch.ones(3)
    for read in (lambda: x[0].item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.any())):
        with NoHostReads(), pytest.raises(AssertionError):
            read()


def test_colour_clusters_are_on_the_device_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.config(target=ClusterTarget(centres=((0.0,) * 3, (1.0,) * 3)), loss=CrossEntropyLoss())
    update, batch = tiny.update(settings), tiny.batch(settings)
    on_device = torch.asarray

    def fail_on_numbers(value: Any, **options: Any) -> torch.Tensor:
        assert isinstance(value, torch.Tensor), "numbers of the host's"
        return on_device(value, **options)

    monkeypatch.setattr(torch, "asarray", fail_on_numbers)
    update(0, batch)
    assert not [name for name in update.model.state_dict() if "centres" in name]


@pytest.mark.parametrize(
    "kind",
    [
        "vit",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("beit with a shared bias", "swin", "swinv2", "resnet18", "convnext", "regnet")
        ),
    ],
)
def test_the_step_is_one_graph_for_the_compiler_and_gives_the_same_losses(kind: str) -> None:
    settings = tiny.config(kind, drop_path=0.2)
    compiled = tiny.update(settings)
    compiled.model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(losses(compiled, settings), losses(tiny.update(settings), settings), rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_step_gives_the_losses_of_the_eager_one(precision: str) -> None:
    settings = tiny.config(precision=precision, drop_path=0.2)
    compiled = tiny.update(settings)
    compiled.model.compile(dynamic=False)
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    np.testing.assert_allclose(losses(compiled, settings), losses(tiny.update(settings), settings), rtol=tolerance)
    torch.compiler.reset()


def test_activation_checkpointing_gives_the_same_losses() -> None:
    settings = tiny.config(drop_path=0.2)
    again = dataclasses.replace(settings, checkpoint_activations=True)
    np.testing.assert_allclose(losses(tiny.update(again), again), losses(tiny.update(settings), settings), rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["vit", "swin", "resnet18"])
def test_mixed_precision_follows_the_fp32_losses_and_keeps_fp32_weights(kind: str, precision: str) -> None:
    settings = tiny.config(kind)
    mixed = tiny.update(dataclasses.replace(settings, precision=precision))
    np.testing.assert_allclose(losses(mixed, settings), losses(tiny.update(settings), settings), rtol=1e-2)
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}


def test_fp16_reports_the_gradient_norm_without_its_loss_scale() -> None:
    settings = tiny.config()
    batch = tiny.batch(settings)
    norms = [float(tiny.update(dataclasses.replace(settings, precision=p))(0, batch)[1][1]) for p in ("fp32", "fp16")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_fp16_halves_the_loss_scale_until_gradients_are_finite() -> None:
    settings = tiny.config(precision="fp16")
    update = tiny.update(settings)
    update.load_state({"good": 0.0, "bad": 0.0, "scale": 2.0**30})
    bad = [float(update(step, tiny.batch(settings))[1][2]) for step in range(16)]
    tries = int(max(bad))
    assert 2 < tries < update.bad_limit
    assert bad == [*range(1, tries + 1), *[0.0] * (16 - tries)]
    assert update.state()["scale"] == 2.0 ** (30 - tries)


def test_fp16_doubles_the_loss_scale_after_enough_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "_GROW_EVERY", 3)
    settings = tiny.config(precision="fp16")
    update = tiny.update(settings)
    update.load_state({"good": 0.0, "bad": 0.0, "scale": 256.0})
    scales = []
    for step in range(7):
        update(step, tiny.batch(settings))
        scales.append(update.state()["scale"])
    assert scales == [256, 256, 512, 512, 512, 1024, 1024]


def test_other_precisions_have_no_loss_scale() -> None:
    update = tiny.update(tiny.config(precision="bf16"))
    update(0, tiny.batch(tiny.config(), broken=True))
    assert update.state()["scale"] == 1.0
