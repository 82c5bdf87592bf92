"""What `simmim pretrain` and `simmim.pretrain` train where no recipe is named."""

import dataclasses
import shlex

import pytest
import timm

import simmim
from simmim import cli, subcommands
from simmim.config.pretrain_recipes import find_recipe, first_config
from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.torch_engine.models.family import find_family


@pytest.fixture
def asked(monkeypatch):
    """Ask for a pretraining by options and by settings; return both configurations, which must be one."""
    found: list[PretrainConfig] = []

    def keep(config: PretrainConfig, *_: object) -> int:
        found.append(config)
        raise UserError("enough")

    monkeypatch.setattr(subcommands, "_pretrain", keep)
    monkeypatch.setattr("simmim.engines.pretrain", keep)

    def ask(options: str, **settings: object) -> PretrainConfig:
        assert cli.main(["pretrain", *shlex.split(options)]) == 2
        with pytest.raises(UserError, match="enough"):
            simmim.pretrain(**settings)
        by_options, by_settings = found[-2:]
        assert by_options == by_settings
        return by_options

    return ask


def test_nothing_named_is_the_recipe_for_features(asked):
    assert asked("--data a --seed 3", data="a", seed=3) == dataclasses.replace(
        find_recipe("default-small"), data="a", seed=3
    )


def test_an_encoder_that_is_named_has_its_own_size(asked):
    small, whole = find_recipe("default-small"), find_recipe("default-small-resnet")
    vit, net = "deit_tiny_patch16_224", "convnext_tiny"
    assert asked(f"--model {vit}", model=vit) == dataclasses.replace(small, model=vit, image_size=None)
    assert asked(f"--model={net}", model=net) == dataclasses.replace(whole, model=net, image_size=None)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--objective pixels", {"objectives": ["pixels"]}),
        ("--target normalized", {"target": "normalized"}),
        ("--loss.beta 0.5 --loss smooth_l1", {"loss": {"kind": "smooth_l1", "beta": 0.5}}),
        ("--head.depth 3 --head transformer", {"head": {"kind": "transformer", "depth": 3}}),
        ("--plain-step", {"plain_step": True}),
        ("--engine keras", {"engine": "keras"}),
    ],
)
def test_what_belongs_to_simmim_begins_with_it(options, settings, asked):
    config = asked(options, **settings)
    usual = PretrainConfig()
    for name in ("objectives", "mask", "encode", "positions", "batch_size", "image_size", "crop_scale", "val_images"):
        assert getattr(config, name) == getattr(usual, name), name


def test_options_that_belong_to_no_objective_leave_the_choice(asked):
    mask = {"kind": "random", "ratio": 0.4}
    config = asked("--mask.ratio 0.4", mask=mask)
    assert config.objectives == find_recipe("default-small").objectives


def test_a_recipe_is_taken_by_name():
    with pytest.raises(UserError, match="recipe 'none' is not known"):
        simmim.pretrain(recipe="none")


def test_only_encoders_that_can_leave_patches_out_are_asked_to():
    """The rule goes by names, so that no model is loaded for it; here it is compared with what the families can do."""
    for name in timm.list_models():
        try:
            family = find_family(name)
        except UserError:
            continue
        if first_config((), name).encode == "visible":
            assert family.visible_encoder is not None
            assert not family.stage_norms, name
