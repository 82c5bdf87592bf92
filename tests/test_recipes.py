"""Recipes against the papers' configurations (../shared/reference/README.md has the table of SimMIM's)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simmim.cli import main
from simmim.config.finetune_recipes import FINETUNE_RECIPES
from simmim.config.pretrain_recipes import RECIPES, find_recipe
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import parse_toml, to_toml
from simmim.config.validation import validated
from simmim.data.sources import open_source
from simmim.method.heads import LinearHead
from simmim.method.losses import L1Loss
from simmim.method.masks import RandomMask
from simmim.method.targets import LocallyNormalizedTarget, PixelTarget
from simmim.torch_engine.models.masked_image_model import build_model
from simmim.training.pretrain_images import Images
from simmim.training.pretrain_plan import Plan

# Typed off the table of the official configurations, not off the code. Rates are for a batch of 512.
ALL = {
    "mask": RandomMask(ratio=0.6, cell=32),
    "target": PixelTarget(),
    "loss": L1Loss(),
    "head": LinearHead(),
    "batch_size": 16 * 128,
    "betas": (0.9, 0.999),
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "warmup_epochs": 10.0,
    "drop_path": 0.0,
    "model_args": {},
    "val_images": 0,
    "channels": 3,
}
EPOCHS_800 = {
    "epochs": 800.0,
    "lr": 1e-4,
    "warmup_lr": 5e-7,
    "schedule": "multistep",
    "milestones": (700.0,),
    "image_size": (192, 192),
}
OFFICIAL: dict[str, dict[str, Any]] = {
    "simmim-swin-b-100ep": {
        "model": "swin_base_patch4_window7_224",
        "model_args": {"window_size": 6},
        "image_size": (192, 192),
        "epochs": 100.0,
        "lr": 2e-4,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "schedule": "cosine",
        "milestones": (),
    },
    "simmim-swin-b-800ep": EPOCHS_800 | {"model": "swin_base_patch4_window7_224", "model_args": {"window_size": 6}},
    "simmim-swin-l-800ep": EPOCHS_800 | {"model": "swin_large_patch4_window12_384"},
    "simmim-vit-b-800ep": EPOCHS_800
    | {
        "model": "beit_base_patch16_224",
        "model_args": {
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "init_values": 0.1,
        },
        "image_size": (224, 224),
        "drop_path": 0.1,
    },
    "simmim-swinv2-b-800ep": EPOCHS_800
    | {"model": "swinv2_base_window12_192", "target": LocallyNormalizedTarget(), "drop_path": 0.1},
}
# What a recipe leaves alone, since it does not change what is learned or is the user's: defaults.
FREE = {field.name for field in dataclasses.fields(PretrainConfig)} - set(ALL) - set(EPOCHS_800) - {"model", "min_lr"}

# Parameters of the encoder in millions, GFLOP forward an image (multiply and add counted apart), feature map.
# Parameters: the models' papers and timm say 86, 88, 197, 88 and 25.6 with a classifier for 1000 classes.
SIZES = {
    "simmim-vit-b-800ep": (85.7, 35.1, (14, 14, 768)),
    "simmim-swin-b-100ep": (86.7, 22.6, (6, 6, 1024)),
    "simmim-swin-b-800ep": (86.7, 22.6, (6, 6, 1024)),
    "simmim-swin-l-800ep": (195.2, 51.9, (6, 6, 1536)),
    "simmim-swinv2-b-800ep": (86.9, 23.7, (6, 6, 1024)),
    "a2mim-resnet50-300ep": (23.5, 8.2, (7, 7, 2048)),
    "mae-like-vit-b": (85.8, 35.1, (14, 14, 768)),
    "um-mae-swin-t": (27.5, 11.9, (8, 8, 768)),
    "fast-vit-b-128": (85.7, 11.3, (8, 8, 768)),
    "small": (21.7, 9.2, (14, 14, 384)),
    "small-data": (21.6, 2.9, (8, 8, 384)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_equals_the_official_configuration_field_by_field(name: str) -> None:
    expected = ALL | OFFICIAL[name]
    found = vars(find_recipe(name))
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipe_leaves_every_other_field_at_its_default(name: str) -> None:
    recipe, plain = find_recipe(name), PretrainConfig()
    assert {field: getattr(recipe, field) for field in FREE} == {field: getattr(plain, field) for field in FREE}


def test_learning_rates_at_batch_2048_are_four_times_the_base() -> None:
    recipe = find_recipe("simmim-swin-b-100ep")
    images = Images(_Nothing(1_281_167), _Nothing(0), np.dtype(np.uint8))  # type: ignore[arg-type]
    plan = Plan.complete(
        dataclasses.replace(recipe, data="x", out="x"), images, patch=4, device="cpu", precision="fp32", compile=False
    )
    assert plan.steps_per_epoch == 625
    assert plan.schedule.at_update(0) == pytest.approx(4e-6)
    assert plan.schedule.at_update(6250) == pytest.approx(8e-4, rel=1e-3)
    assert plan.schedule.at_update(62499) == pytest.approx(4e-5, rel=1e-3)


@pytest.mark.parametrize(("name", "masked", "cells"), [("simmim-swin-b-100ep", 22, 36), ("simmim-vit-b-800ep", 30, 49)])
def test_official_recipe_hides_the_paper_s_number_of_cells(name: str, masked: int, cells: int) -> None:
    recipe = find_recipe(name)
    assert recipe.image_size is not None
    rows, columns = recipe.mask.grid(recipe.image_size)
    assert (recipe.mask.masked_cells(recipe.image_size), rows * columns) == (masked, cells)


@pytest.mark.parametrize("name", SIZES)
def test_recipe_builds_the_model_of_its_paper(name: str) -> None:
    millions, gflops, features = SIZES[name]
    recipe = find_recipe(name)
    assert recipe.image_size is not None
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = build_model(recipe).encoder
        side = [pixels // encoder.patch_size for pixels in recipe.image_size]
        # An encoder of visible patches asks a mask how many it leaves, which has no answer here.
        mask = torch.zeros(1, *side, dtype=torch.bool) if recipe.encode == "all" else None
        found = encoder(torch.empty(1, 3, *recipe.image_size), mask)
    assert sum(parameter.numel() for parameter in encoder.backbone.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.1
    )
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.01)
    assert tuple(found.shape[1:]) == features


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_valid_configuration_that_toml_keeps(name: str) -> None:
    recipe = dataclasses.replace(find_recipe(name), data="demo", out="runs/x")
    assert validated(recipe) == recipe
    assert parse_toml(to_toml(recipe), PretrainConfig) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_its_paper_expectation_cost_command_and_whether_it_was_reproduced(name: str) -> None:
    text = RECIPES[name].__doc__ or ""
    for word in ("Paper:", "Expected:", f"--recipe {name}", "eproduced here"):
        assert word in text
    assert "Cost:" in text or "Accelerator-hours:" in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_in_the_documentation(name: str) -> None:
    assert f"`{name}`" in (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_recipes_command_lists_every_recipe_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*RECIPES, *FINETUNE_RECIPES]
    assert "SimMIM's Swin-L at 192" in lines[list(RECIPES).index("simmim-swin-l-800ep")]


def test_recipes_command_shows_a_recipe_as_toml_that_pretrain_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "simmim-vit-b-800ep"]) == 0
    shown = parse_toml(capsys.readouterr().out, PretrainConfig)
    assert shown == find_recipe("simmim-vit-b-800ep")


def test_unknown_recipe_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--recipe", "simmim-vit-g"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("simmim: recipe 'simmim-vit-g' is not known; choose from default-small")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("epochs", "warned"), [(4000.0, False), (4001.0, True)])
def test_plan_warns_of_more_views_of_an_image_than_helped_in_the_literature(epochs: float, warned: bool) -> None:
    source = open_source("demo")
    config = dataclasses.replace(find_recipe("demo"), out="x", epochs=epochs)
    plan = Plan.complete(
        config, Images(source, source, np.dtype(np.uint8)), patch=8, device="cpu", precision="fp32", compile=False
    )
    assert any("warning" in line and f"{epochs:.0f} times" in line for line in plan.describe()) == warned


class _Nothing:
    """Images that are only counted."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count
