"""Sinkhorn and the clusters of CAPI against their formulas, and as an objective."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.method.objectives import LatentClusters, PixelReconstruction
from simmim.torch_engine.models.objective import ObjectiveBatch
from simmim.torch_engine.models.objectives.clusters import (
    ClusterObjective,
    balance,
    choose_prototypes,
    cross_entropy,
)
from simmim.torch_engine.models.savings import choose
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train.pretrain import pretrain
from simmim.torch_engine.train.storage import build_step, load_run

from . import objectives, tiny, worker
from .test_visible import UNIFORM, VISIBLE

CLUSTERS = (LatentClusters(prototypes=16),)
LOGITS = np.random.default_rng(0).standard_normal((6, 2, 3, 5)) * 0.3


def sinkhorn(logits: NDArray[np.float64], temperature: float, iterations: int) -> NDArray[np.float64]:
    """Sinkhorn-Knopp of one position, (B, K): divide columns, then rows, by their sums."""
    shares = np.exp(logits / temperature)
    for _ in range(iterations):
        shares /= shares.sum(axis=0)
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


@pytest.mark.parametrize("iterations", [1, 3])
def test_assignments_are_those_of_sinkhorn_at_each_position_apart(iterations: int) -> None:
    found = balance(torch.from_numpy(LOGITS), 0.1, iterations).numpy()
    for row in range(2):
        for column in range(3):
            expected = sinkhorn(LOGITS[:, row, column], 0.1, iterations)
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-10)


def test_every_prototype_is_used_equally_at_every_position() -> None:
    found = balance(torch.from_numpy(LOGITS), 0.1, 200)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(6, 2, 3).double())
    torch.testing.assert_close(found.sum(dim=0), torch.full((2, 3, 5), 6 / 5).double())


def test_shares_that_are_too_small_for_fp32_are_balanced_too() -> None:
    found = balance(torch.from_numpy(LOGITS).float() * 1000, 0.1, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(6, 2, 3))


def test_the_cross_entropy_is_its_formula_and_has_the_gradients_of_finite_differences() -> None:
    shares = np.random.default_rng(1).dirichlet(np.ones(5), size=(6, 2, 3))
    softmax = np.exp(LOGITS / 0.12) / np.exp(LOGITS / 0.12).sum(axis=-1, keepdims=True)
    found = cross_entropy(torch.from_numpy(shares), torch.from_numpy(LOGITS), 0.12)
    np.testing.assert_allclose(found.numpy(), -(shares * np.log(softmax)).sum(axis=-1), rtol=1e-12)
    logits = torch.from_numpy(LOGITS).requires_grad_()
    torch.autograd.gradcheck(lambda x: cross_entropy(torch.from_numpy(shares), x, 0.12), logits)


def test_the_number_of_prototypes_is_a_power_of_two_near_four_an_image() -> None:
    found = [choose_prototypes(batch) for batch in (4, 16, 64, 100, 128, 1024, 4096, 9999)]
    assert found == [64, 64, 256, 512, 512, 4096, 16384, 16384]


def test_hidden_cells_are_chosen_for_each_mask_of_their_image() -> None:
    encoder = tiny.encoder("vit")
    masks = torch.cat([tiny.masks(4, (96, 96), 16, seed=seed) for seed in range(2)])
    values = torch.rand(4, 6, 6, 5)
    batch = ObjectiveBatch(encoder=encoder, images=torch.zeros(4, 3, 96, 96), mask=masks)
    assert torch.equal(batch.hidden_of(values), values.repeat(2, 1, 1, 1))
    batch = ObjectiveBatch(
        encoder=encoder, images=batch.images, mask=masks, hidden=choose(masks, int(masks[0].sum()), hidden=True)
    )
    expected = [values[number % 4][mask] for number, mask in enumerate(masks)]
    assert torch.equal(batch.hidden_of(values), torch.stack(expected))
    small = torch.rand(4, 3, 3, 5)
    covered = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(batch.hidden_of(small), batch.hidden_of(covered))


def step_and_batch(**settings: Any) -> tuple[Any, ClusterObjective, dict[str, torch.Tensor]]:
    config = tiny.config(**({"objectives": CLUSTERS} | settings))
    torch.manual_seed(0)
    step = build_step(config)
    module = step.objectives["clusters"]
    assert isinstance(module, ClusterObjective)
    batch = {name: torch.from_numpy(value) for name, value in random_batch(config, 4, step).items()}
    return step, module, batch


def test_prototypes_learn_from_their_own_loss_and_nothing_else_does() -> None:
    step, module, batch = step_and_batch()
    losses: dict[str, torch.Tensor] = {}
    module.register_forward_hook(lambda _, inputs, output: losses.update(output))
    step(**batch)
    losses["clusters_prototypes"].backward(retain_graph=True)
    assert [name for name, each in step.named_parameters() if each.grad is not None] == [
        "objectives.clusters.prototypes.weight"
    ]
    before = module.prototypes.weight.grad.clone()  # type: ignore[union-attr]
    losses["clusters"].backward()
    assert torch.equal(module.prototypes.weight.grad, before)  # type: ignore[arg-type]
    assert step.model.encoder.mask_token.grad.abs().sum() > 0


def test_losses_and_figures_are_those_of_the_formulas() -> None:
    step, module, batch = step_and_batch(plain_step=True)
    found = step(**batch)
    images = step.prepare(batch["image"], batch["flip"])
    with torch.no_grad():
        seen = step.model.encoder(images).double().numpy()  # the teacher starts as the encoder
        student = module.head(step.model.encoder(images, batch["mask"])).double().numpy() / 0.12
    seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
    logits = seen @ module.prototypes.weight.detach().double().numpy().T
    shares = np.stack([[sinkhorn(logits[:, y, x], 0.06, 3) for x in range(4)] for y in range(4)]).transpose(2, 0, 1, 3)

    def entropy(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return -(shares * (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))).sum(axis=-1)

    mean = shares.mean(axis=(0, 1, 2))
    assert float(found["clusters_used"]) == pytest.approx(np.exp(-(mean * np.log(mean)).sum()), rel=1e-4)
    assert float(found["loss/clusters_prototypes"]) == pytest.approx(entropy(logits / 0.12).mean(), rel=1e-4)
    hidden = batch["mask"].numpy()
    assert float(found["loss/clusters"]) == pytest.approx(entropy(student)[hidden].mean(), rel=1e-4)


@pytest.mark.parametrize("head", ["linear", "transformer"])
def test_the_savings_of_the_step_change_nothing(head: str) -> None:
    plain, saving = (step_and_batch(plain_step=plain, head=head) for plain in (True, False))
    saving[0].load_state_dict(plain[0].state_dict())
    for name, value in plain[0](**plain[2]).items():
        torch.testing.assert_close(saving[0](**saving[2])[name], value, msg=name)


def test_the_teacher_runs_once_for_all_masks() -> None:
    step, module, batch = step_and_batch(masks_per_image=3)
    seen: list[int] = []
    module.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    step(**batch)
    assert seen == [4]


@pytest.mark.parametrize("others", [{}, {"masks_per_image": 2}, pytest.param({"shard": True}, marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_and_gradients_of_one(others: dict[str, Any], tmp_path: Path) -> None:
    objectives.check_two_processes(tiny.config(objectives=CLUSTERS, batch_size=8, **others), tmp_path)


@pytest.mark.slow
def test_a_run_of_two_processes_that_share_the_model_has_the_losses_of_one(tmp_path: Path) -> None:
    objectives.check_two_process_runs(tmp_path, objectives=CLUSTERS)


def test_a_run_that_was_broken_off_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives.check_resume(tmp_path, monkeypatch, objectives=CLUSTERS)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("vit", {"objectives": (PixelReconstruction(), *CLUSTERS), "masks_per_image": 2}),
        ("vit", {"accumulate_steps": 2}),
        ("vit", {"encode": "visible", "head": "transformer"}),
        ("swin", {**VISIBLE, **UNIFORM}),
        ("resnet18", {}),
    ],
)
def test_it_trains(kind: str, others: dict[str, Any]) -> None:
    config = tiny.config(kind, **({"objectives": CLUSTERS, "batch_size": 8} | others))
    found = objectives.check_training(config, "loss", "loss/clusters_prototypes")
    assert all(1 <= value <= 16.001 for value in found["clusters_used"])


def test_the_momentum_rises_over_the_run_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    given = LatentClusters(prototypes=16, momentum_steps=7)
    for name, objective, expected in (("usual", CLUSTERS[0], 3), ("given", given, 7)):
        run, _ = pretrain(worker.settings(tmp_path / name, steps=3, val_images=0, objectives=(objective,)))
        assert run.read_config(PretrainConfig).objectives == (dataclasses.replace(objective, momentum_steps=expected),)
        module: Any = load_run(run.path, objectives=True)[0].objectives["clusters"]
        assert (module.teacher.steps, float(module.teacher.updates)) == (expected, 3)


@pytest.mark.parametrize(("setting", "value"), [("prototypes", 1), ("iterations", 0), ("temperature", 0)])
def test_settings_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{setting} {value} of objective clusters"):
        LatentClusters(**{setting: value})
