"""SIGReg against its formula, and LeJEPA as an objective."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.objectives import PixelReconstruction, SigReg
from simmim.torch_engine.models.masked import resize_positions
from simmim.torch_engine.models.objectives.sigreg import SigRegObjective, draw_directions, measure_normality
from simmim.torch_engine.models.projector import BatchNorm
from simmim.torch_engine.train.storage import build_step

from . import objectives, tiny

LEJEPA = (SigReg(slices=32, values=8),)
VALUES = np.random.default_rng(0).standard_normal((2, 10, 6)) * 1.3 + 0.2
DIRECTIONS = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0][:, :4]


def normality(values: NDArray[np.float64]) -> float:
    """The Epps-Pulley statistic of numbers (n,), by the closed form of its integral over all t."""
    n, pairs = len(values), values[:, None] - values
    ours, both = np.exp(-(pairs**2) / 2).sum() / n**2, np.exp(-(values**2) / 4).sum() / n
    return float(n * np.sqrt(2 * np.pi) * (ours - np.sqrt(2) * both + 1 / np.sqrt(3)))


def quadrature(values: NDArray[np.float64], knots: int) -> float:
    """The same by the definition: complex numbers, and knots in -5..5."""
    t = np.linspace(-5, 5, knots)
    found = np.exp(1j * values[:, None] * t).mean(axis=0)
    return float(len(values) * np.trapezoid(np.abs(found - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t))


def test_sigreg_is_the_epps_pulley_statistic_by_the_papers_quadrature() -> None:
    slices = (VALUES @ DIRECTIONS).transpose(0, 2, 1).reshape(-1, 10)
    found = float(measure_normality(torch.from_numpy(VALUES), torch.from_numpy(DIRECTIONS)))
    assert found == pytest.approx(np.mean([quadrature(each, 17) for each in slices]), rel=1e-12)
    assert found == pytest.approx(np.mean([quadrature(each, 20001) for each in slices]), rel=1e-4)
    assert found == pytest.approx(np.mean([normality(each) for each in slices]), rel=1e-4)


def test_sigreg_has_the_gradients_of_finite_differences() -> None:
    values = torch.from_numpy(VALUES[:, :4]).requires_grad_()
    torch.autograd.gradcheck(lambda x: measure_normality(x, torch.from_numpy(DIRECTIONS)), values)


def test_sigreg_is_small_for_normal_features_and_large_for_collapsed_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    normal, directions = torch.randn(1, 500, 8, generator=generator), draw_directions(torch.tensor(0), 8, 64)
    found = [float(measure_normality(each, directions)) for each in (normal, normal * 0.5, torch.zeros(1, 500, 8))]
    assert found[0] < 2 < 20 < found[1] < found[2]


def test_directions_are_uniform_unit_vectors_of_their_step_alone() -> None:
    found = torch.stack([draw_directions(torch.tensor(step), 6, 400) for step in range(20)])  # (20, 6, 400)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(20, 400))
    assert torch.equal(found[7], draw_directions(torch.tensor(7), 6, 400))
    assert len(found.transpose(1, 2).flatten(0, 1).unique(dim=0)) == 8000
    every = found.transpose(1, 2).flatten(0, 1).double()  # (8000, 6)
    torch.testing.assert_close(every.mean(dim=0), torch.zeros(6).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(every.T @ every / 8000, torch.eye(6).double() / 6, rtol=0, atol=0.01)
    torch.testing.assert_close((every**4).mean(dim=0), torch.full((6,), 3 / 48).double(), rtol=0, atol=0.005)
    neighbours = (every[1:] * every[:-1]).sum(dim=1)
    assert abs(neighbours.mean()) < 0.02


def test_the_projectors_batch_norm_is_pytorchs() -> None:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(BatchNorm(5)(x), torch.nn.BatchNorm1d(5)(x))


@pytest.mark.parametrize(
    ("kind", "size", "small"),
    [("vit", (64, 96), (32, 48)), ("deit", (96, 96), (48, 48)), ("resnet18", (96, 96), (32, 32))],
)
def test_small_views_have_half_the_side_in_whole_cells_where_the_encoder_takes_it(
    kind: str, size: tuple[int, int], small: tuple[int, int]
) -> None:
    objective = SigRegObjective(SigReg(local_views=3), tiny.encoder(kind, size=size), size)
    assert [view.size for view in objective.views] == [None, None, small, small, small]
    assert len(objective.passes) == 2


@pytest.mark.parametrize("kind", ["beit", "swin", "swinv2"])
def test_small_views_are_whole_images_where_the_encoder_takes_one_size(kind: str) -> None:
    size = (128, 128) if kind == "swinv2" else (96, 96)
    objective = SigRegObjective(SigReg(), tiny.encoder(kind, size=size), size)
    assert [view.size for view in objective.views] == [None] * 4
    assert len(objective.passes) == 1


@pytest.mark.parametrize("kind", ["vit", "vit with class and register tokens", "deit3"])
def test_an_encoder_sees_another_size_as_one_that_was_built_for_it(kind: str) -> None:
    encoder, other = tiny.encoder(kind, size=(96, 64)), tiny.encoder(kind, size=(48, 32))
    assert encoder.allow((48, 32))
    before = encoder.backbone.pos_embed.detach().clone()
    state = encoder.state_dict() | {"backbone.pos_embed": resize_positions(before, (6, 4), (3, 2))}
    other.load_state_dict(state)
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    found = encoder.at_size(images)
    torch.testing.assert_close(found, other(images))
    assert torch.equal(encoder.backbone.pos_embed, before) and encoder.backbone.patch_embed.grid_size == (6, 4)
    found.square().sum().backward()
    assert encoder.backbone.pos_embed.grad.abs().sum() > 0


def test_positions_are_resized_as_pytorch_resizes_images() -> None:
    table = torch.randn(1, 3 + 6 * 8, 5, generator=torch.Generator().manual_seed(0))
    grid = table[:, 3:].unflatten(1, (6, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (3, 4), mode="bilinear", antialias=True)
    found = resize_positions(table, (6, 8), (3, 4))
    torch.testing.assert_close(found[:, 3:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(found[:, :3], table[:, :3])
    torch.testing.assert_close(resize_positions(table, (6, 8), (6, 8)), table)


@pytest.mark.parametrize("kind", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_and_gradients_of_one(kind: str, tmp_path: Path) -> None:
    objectives.check_two_processes(tiny.config(kind, objectives=LEJEPA, batch_size=8), tmp_path)


@pytest.mark.slow
def test_two_processes_that_share_the_model_give_the_losses_and_gradients_of_one(tmp_path: Path) -> None:
    objectives.check_two_processes(tiny.config(objectives=LEJEPA, batch_size=8, shard=True), tmp_path)


@pytest.mark.slow
def test_a_run_of_two_processes_that_share_the_model_has_the_losses_of_one(tmp_path: Path) -> None:
    objectives.check_two_process_runs(tmp_path, objectives=LEJEPA)


@pytest.mark.parametrize("kind", ["vit", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_run_that_was_broken_off_resumes_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives.check_resume(tmp_path, monkeypatch, kind, objectives=LEJEPA)


def test_it_trains_beside_pixels_and_with_accumulation() -> None:
    both = (PixelReconstruction(), *LEJEPA)
    found = objectives.check_training(tiny.config(objectives=both, batch_size=8), "loss", "loss/sigreg_gauss")
    for step in range(12):
        parts = [found[f"loss/{name}"][step] for name in ("pixels", "sigreg_agreement", "sigreg_gauss")]
        assert found["loss"][step] == pytest.approx(sum(parts), rel=1e-5)
    objectives.check_training(tiny.config(objectives=LEJEPA, batch_size=8, accumulate_steps=2), "loss")


def test_directions_change_with_each_step_that_counts() -> None:
    step = build_step(tiny.config(objectives=LEJEPA))
    module = step.objectives["sigreg"]
    assert isinstance(module, SigRegObjective)
    for finite, expected in ((True, 1), (False, 1), (True, 2)):
        step.after_update(torch.tensor(finite))
        assert int(module.updates) == expected
    assert "objectives.sigreg.updates" in step.state_dict()


@pytest.mark.parametrize(
    ("setting", "value"), [("regularisation", 1.5), ("slices", 0), ("jitter", 2), ("local_views", -1)]
)
def test_settings_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{setting} {value} of objective sigreg"):
        SigReg(**{setting: value})
