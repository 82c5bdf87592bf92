import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.config.field_types import parse_image_size, parse_model_args
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import changed_fields, read_toml, to_toml
from simmim.config.validation import from_settings, validated
from simmim.method.heads import TransformerHead
from simmim.method.masks import BlockMask, RandomMask
from simmim.method.targets import ClusterTarget

SOURCES = Path(__file__).parents[1] / "src/simmim"


@pytest.mark.parametrize(
    ("written", "size"), [(224, (224, 224)), ("224", (224, 224)), ("96x160", (96, 160)), ([96, 160], (96, 160))]
)
def test_an_image_size_is_a_number_or_height_x_width(written, size):
    assert parse_image_size(written) == size


@pytest.mark.parametrize("written", ["", "x", "1x2x3", "-4", "0x8", [], 2.5, "2.5"])
def test_what_is_no_image_size_is_refused(written):
    with pytest.raises(ValueError, match="is not N or HxW in whole pixels"):
        parse_image_size(written)


def test_a_model_argument_that_is_no_toml_is_a_text():
    assert parse_model_args(["act_layer=gelu", "depth=2"]) == {"act_layer": "gelu", "depth": 2}


def test_a_configuration_survives_toml(tmp_path):
    config = PretrainConfig(
        data="a",
        out="b",
        model_args={"depth": 2, "embed_dims": [8, 16]},
        image_size=(96, 160),
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 1.0, 1.0),
        milestones=(3.0, 5.0),
        mask=BlockMask(ratio=0.4, min_cells=4),
        target=ClusterTarget(centres=((0.0, 1.0, 2.0), (3.0, 4.0, 5.0))),
        head=TransformerHead(width=64),
        clip_grad=None,
        compile=False,
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_toml(tmp_path / "config.toml", PretrainConfig) == config


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(0.001, 0.999), st.floats(1e-9, 1e3), st.integers(-(2**63), 2**63 - 1))
def test_numbers_survive_toml_exactly(tmp_path_factory, ratio, lr, seed):
    config = PretrainConfig(mask=RandomMask(ratio=ratio), lr=lr, seed=seed)
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config))
    assert read_toml(path, PretrainConfig) == config


def test_settings_of_python_are_converted_to_their_types():
    config = from_settings(PretrainConfig, {"image_size": "96x160", "lr": 1, "mean": [0.5], "std": [0.5]})
    assert (config.image_size, config.lr, config.mean) == ((96, 160), 1.0, (0.5,))


def test_tuples_among_the_models_arguments_are_lists_as_in_toml():
    config = from_settings(PretrainConfig, {"model_args": {"depths": (1, 2), "window_size": ((2, 4), 4)}})
    assert config.model_args == {"depths": [1, 2], "window_size": [[2, 4], 4]}


def test_a_frozen_configuration_is_checked_again_when_it_enters():
    broken = dataclasses.replace(PretrainConfig(data="a", out="b"), drop_path=2.0)
    with pytest.raises(ValueError, match=r"^drop path 2\.0 is not below 1; the default is 0\.0$"):
        validated(broken)


def test_what_is_learned_counts_as_a_change_and_how_it_runs_does_not():
    old = PretrainConfig(out="a", lr=1e-3, workers=1, device="cpu")
    new = PretrainConfig(out="b", lr=1e-4, workers=2, device="cuda", mask=BlockMask())
    assert changed_fields(old, new) == ["lr", "mask"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PretrainConfig)])
def test_every_field_is_read_somewhere(name):
    """An option that nothing reads would be ignored in silence."""
    texts = [path.read_text() for path in SOURCES.rglob("*.py")]
    assert any(re.search(rf"(config|training|self)\.{name}\b", text) for text in texts)
