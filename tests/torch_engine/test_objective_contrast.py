"""InfoNCE against its formula, and contrast as an objective."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmim.errors import UserError
from simmim.method.objectives import Contrast, PixelReconstruction
from simmim.torch_engine.models.objectives.infonce import ContrastObjective, contrast
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train.storage import build_step

from . import objectives, tiny
from .test_visible import UNIFORM, VISIBLE

INFONCE = (Contrast(values=16),)
DRAW = np.random.default_rng(0)
ONLINE, TARGET = DRAW.standard_normal((10, 6)), DRAW.standard_normal((5, 6))


def test_infonce_is_the_formula_of_its_paper() -> None:
    loss, agreement = contrast(torch.from_numpy(ONLINE), torch.from_numpy(TARGET), 0.2)
    expected, cosines = [], []
    for number, query in enumerate(ONLINE):  # two masks of five images
        own = number % 5
        scores = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in TARGET]
        expected.append(-math.log(math.exp(scores[own] / 0.2) / sum(math.exp(score / 0.2) for score in scores)))
        cosines.append(scores[own])
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(agreement) == pytest.approx(np.mean(cosines), rel=1e-12)


def test_infonce_has_the_gradients_of_finite_differences_and_none_for_targets() -> None:
    online, target = (torch.from_numpy(each).requires_grad_() for each in (ONLINE, TARGET))
    torch.autograd.gradcheck(lambda x: contrast(x, torch.from_numpy(TARGET), 0.2)[0], online)
    contrast(online, target, 0.2)[0].backward()
    assert target.grad is None


@pytest.mark.parametrize("others", [{}, {"masks_per_image": 2}, pytest.param({"shard": True}, marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_and_gradients_of_one(others: dict[str, Any], tmp_path: Path) -> None:
    objectives.check_two_processes(tiny.config(objectives=INFONCE, batch_size=8, **others), tmp_path)


@pytest.mark.slow
def test_a_run_of_two_processes_that_share_the_model_has_the_losses_of_one(tmp_path: Path) -> None:
    objectives.check_two_process_runs(tmp_path, objectives=INFONCE)


def test_a_run_that_was_broken_off_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives.check_resume(tmp_path, monkeypatch, objectives=INFONCE)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("vit", {"objectives": (PixelReconstruction(), *INFONCE), "masks_per_image": 2}),
        ("vit", {"accumulate_steps": 2}),
        ("vit", {"encode": "visible"}),
        ("resnet18", {}),
    ],
)
def test_it_trains(kind: str, others: dict[str, Any]) -> None:
    config = tiny.config(kind, **({"objectives": INFONCE, "batch_size": 8} | others))
    found = objectives.check_training(config, "loss")
    assert all(-1 <= value <= 1 for value in found["infonce_agreement"])


def test_the_teacher_and_its_projector_are_averages_without_gradients() -> None:
    step = build_step(tiny.config(objectives=INFONCE))
    module = step.objectives["infonce"]
    assert isinstance(module, ContrastObjective)
    first = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("teacher")}
    batch = random_batch(tiny.config(), 4, step)
    step(**{name: torch.from_numpy(value) for name, value in batch.items()})["loss"].backward()
    for part in (module.teacher, module.teacher_projector):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert all(parameter.grad is not None for parameter in module.projector.parameters())
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(parameter.requires_grad * 1.0)
    step.after_update(torch.tensor(True))
    after = module.state_dict()
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], after[name])}
    assert moved == {"teacher", "teacher_projector"}


def test_an_encoder_whose_masked_images_have_other_features_is_refused() -> None:
    with pytest.raises(UserError, match="objective infonce is not for --encode visible of Swin"):
        build_step(tiny.config("swin", objectives=INFONCE, **VISIBLE, **UNIFORM))
