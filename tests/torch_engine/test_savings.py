"""What a step leaves out changes neither the loss nor a gradient."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simmim.config.pretraining import PretrainConfig
from simmim.method.masks import RandomMask
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.models.savings import PLAIN, Chosen, Counts, Savings, choose, count
from simmim.torch_engine.train.pretrain import judge_and_draw
from simmim.torch_engine.train.storage import build_step

from . import tiny

ONE_BY_ONE = [
    {"visible_patches": True},
    {"hidden_cells": True},
    {"hidden_cells": True, "last_block": True},
    {"attention": True},
    {"products": True},
]
CENTRES = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (-1.0, 0.0, 1.0))


def outcome(settings: PretrainConfig, savings: Savings, *, compiled: bool = False) -> dict[str, torch.Tensor]:
    """Loss and gradients of one batch, weights and batch the same for all savings."""
    torch.manual_seed(0)
    step = build_step(settings, savings)
    if settings.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    with torch.no_grad():
        for parameter in step.parameters():  # some branches begin at zero
            parameter.add_(0.02 * torch.randn(parameter.shape))
    if compiled:
        step.compile(dynamic=False)
    batch = {name: torch.from_numpy(array) for name, array in tiny.batch(settings).items()}
    loss = step(**batch)["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in step.named_parameters() if p.grad is not None}


def assert_equal_but_for_rounding(mine: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == plain.keys()
    for name, expected in plain.items():
        # The scale of a whole tensor: gradients that should be zero (a key's bias) are noise.
        noise = 1e-5 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=noise, msg=name)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_savings_together_leave_loss_and_gradients_of_every_family(kind: str) -> None:
    settings = tiny.config(kind, drop_path=0.2)
    assert_equal_but_for_rounding(outcome(settings, Savings()), outcome(settings, PLAIN))


@pytest.mark.parametrize("which", ONE_BY_ONE, ids=lambda which: " ".join(which))
@pytest.mark.parametrize("kind", ["vit", "beit", "swin", "resnet18"])
def test_each_saving_leaves_loss_and_gradients(kind: str, which: dict[str, bool]) -> None:
    settings = tiny.config(kind)
    assert_equal_but_for_rounding(outcome(settings, dataclasses.replace(PLAIN, **which)), outcome(settings, PLAIN))


@pytest.mark.parametrize(
    "others",
    [
        {"head": "mlp"},
        {"head": "transformer"},
        {"target": "normalized", "loss": "mse"},
        {"target": "hog", "loss": "smooth_l1"},
        {"target": "clusters", "loss": "cross_entropy", "cluster_centres": CENTRES},
        {"mask": "block"},
        {"mask_cell": 16, "mask_ratio": 0.3},
        {"checkpoint_activations": True},
        {"image_size": (64, 96), "channels": 1, "mean": (0.5,), "std": (0.5,)},
    ],
    ids=lambda others: " ".join(f"{value}" for value in others.values()),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_savings_hold_under_every_setting(kind: str, others: dict[str, Any]) -> None:
    settings = tiny.config(kind, **others)
    assert_equal_but_for_rounding(outcome(settings, Savings()), outcome(settings, PLAIN))


@pytest.mark.parametrize("name", ["qk_norm", "scale_attn_norm"])
def test_queries_of_hidden_tokens_alone_suit_every_variant_of_attention(name: str) -> None:
    settings = tiny.config("vit", model_args=tiny.KINDS["vit"].arguments | {name: True})
    assert_equal_but_for_rounding(outcome(settings, Savings()), outcome(settings, PLAIN))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "swin", "resnet18"])
def test_savings_hold_when_compiled(kind: str) -> None:
    settings = tiny.config(kind)
    assert_equal_but_for_rounding(outcome(settings, Savings(), compiled=True), outcome(settings, PLAIN))


def flops(settings: PretrainConfig) -> int:
    step = build_step(settings)
    batch = {name: torch.from_numpy(array) for name, array in tiny.batch(settings).items()}
    with FlopCounterMode(display=False) as counter:
        step(**batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["vit", "deit3", "beit", "swin", "swinv2"])
def test_a_plain_step_takes_more_arithmetic(kind: str) -> None:
    settings = tiny.config(kind, mask_ratio=0.5)
    saved, plain = flops(settings), flops(dataclasses.replace(settings, plain_step=True))
    assert saved < 0.9 * plain


def test_the_model_of_a_saving_step_still_gives_every_feature_and_prediction() -> None:
    settings = tiny.config("vit")
    torch.manual_seed(0)
    step = build_step(settings)
    torch.manual_seed(0)
    plain = build_step(settings, PLAIN)
    step(**{name: torch.from_numpy(array) for name, array in tiny.batch(settings).items()})
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    images = step.normalize(pixels)
    torch.testing.assert_close(step.model.encoder(images), plain.model.encoder(images))
    mine, theirs = (judge_and_draw(each, settings, pixels.numpy()) for each in (step, plain))
    assert mine[0] == pytest.approx(theirs[0])


def test_a_copy_of_a_step_follows_its_own_mask() -> None:
    settings = tiny.config("vit")
    step: PretrainStep = build_step(settings)
    twin = copy.deepcopy(step)
    first, second = ({k: torch.from_numpy(v) for k, v in tiny.batch(settings, seed=s).items()} for s in (0, 1))
    expected = twin(**second)
    step(**first)
    assert torch.equal(twin(**second)["loss"], expected["loss"])


def test_counts_are_those_of_every_mask() -> None:
    masks = RandomMask(ratio=0.6, cell=32)
    assert count(masks, (224, 224), patch=16, stride=16) == Counts(visible_patches=4 * 19, hidden_cells=4 * 30)
    assert count(masks, (192, 192), patch=4, stride=32) == Counts(visible_patches=64 * 14, hidden_cells=22)


def test_a_map_whose_cells_are_larger_than_the_masks_has_no_count() -> None:
    assert count(RandomMask(cell=16), (64, 64), patch=4, stride=32).hidden_cells is None


def test_chosen_tokens_are_taken_and_put_back() -> None:
    mask = torch.tensor([[[True, False], [True, True]], [[False, True], [True, True]]])
    hidden, visible = choose(mask, 3, hidden=True), choose(mask, 1, hidden=False)
    assert hidden.places.tolist() == [[0, 2, 3], [1, 2, 3]]
    assert visible.places.tolist() == [[1], [0]]
    x = torch.arange(8.0).view(2, 4, 1)
    assert hidden.of(x).flatten(1).tolist() == [[0, 2, 3], [5, 6, 7]]
    assert visible.put(visible.of(x), 4).flatten(1).tolist() == [[0, 1, 0, 0], [4, 0, 0, 0]]
    assert isinstance(hidden.after(1), Chosen)
    assert hidden.after(1).places.tolist() == [[1, 3, 4], [2, 3, 4]]
