"""Settings of version 0.1."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import ClassifyConfig
from simmim.config.toml import parse_toml, to_toml
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.method.heads import LinearHead, TransformerHead
from simmim.method.masks import BlockMask, RandomMask
from simmim.method.targets import ClusterTarget, PixelTarget
from simmim.training.resume import open_run
from simmim.training.run_directory import Run

RUNS = Path(__file__).parent / "golden/v0_1"


@pytest.mark.parametrize(
    ("written", "strategies"),
    [
        ({"mask": "block", "mask_ratio": 0.4, "mask_cell": 16}, {"mask": BlockMask(ratio=0.4, cell=16)}),
        ({"mask_ratio": 0.4, "mask_cell": None}, {"mask": RandomMask(ratio=0.4)}),
        (
            {"head": "transformer", "decoder_depth": 1, "decoder_width": 64},
            {"head": TransformerHead(depth=1, width=64)},
        ),
        ({"head": "mlp", "decoder_depth": 2, "decoder_width": 256}, {"head": "mlp"}),
        (
            {"target": "clusters", "clusters": 2, "cluster_centres": [[0.0], [1.0]]},
            {"target": ClusterTarget(centres=((0.0,), (1.0,)))},
        ),
        ({"target": "pixels", "clusters": 64}, {"target": PixelTarget()}),  # version 0.1 ignored it
        ({"mask": BlockMask(min_cells=4), "mask_ratio": 0.4}, {"mask": BlockMask(min_cells=4, ratio=0.4)}),
    ],
)
def test_flat_settings_become_strategies(written, strategies):
    assert from_settings(PretrainConfig, written) == from_settings(PretrainConfig, strategies)


def test_a_decoder_for_a_head_without_one_is_refused_as_before():
    with pytest.raises(
        UserError, match=r"^decoder width 64 is for head transformer, not linear; set head to transformer"
    ):
        from_settings(PretrainConfig, {"head": LinearHead(), "decoder_width": 64})


def test_a_file_of_a_later_version_is_refused():
    with pytest.raises(UserError, match=r"^format 3 is newer than this simmim, which reads up to 2; upgrade it$"):
        parse_toml("format = 3", PretrainConfig)


@pytest.mark.parametrize(("name", "kind"), [("pretrain", PretrainConfig), ("classify", ClassifyConfig)])
def test_resuming_a_run_of_0_1_rewrites_its_configuration_in_the_new_form(name, kind, tmp_path):
    with zipfile.ZipFile(RUNS / f"{name}.zip") as archive:
        archive.extractall(tmp_path)
    file = tmp_path / name / "config.toml"
    old = file.read_text()
    config = replace(Run(tmp_path / name).read_config(kind), out=str(tmp_path / name))
    with pytest.raises(UserError, match="holds a run with another configuration"):
        open_run(replace(config, seed=7))
    assert file.read_text() == old
    open_run(config)
    assert file.read_text() == to_toml(config)
    assert file.read_text().startswith("format = 2\n")
