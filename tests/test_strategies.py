"""Every setting of a mask, target, loss or head can be reached from the command line, TOML and Python."""

import shlex
from typing import Any

import pytest

from simmim import cli, subcommands
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml, to_toml
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.method.masks import BlockMask, GridMask

SETTINGS: dict[str, dict[str, Any]] = {
    "--mask block --mask.min-cells 4": {"mask": {"kind": "block", "min_cells": 4}},
    "--mask square --mask.position centre": {"mask": {"kind": "square", "position": "centre"}},
    "--mask inverse-block --mask.block 2 --mask.adjust 0.1": {
        "mask": {"kind": "inverse-block", "block": 2, "adjust": 0.1}
    },
    "--mask noise --mask.colour red --mask.coarse 2": {"mask": {"kind": "noise", "colour": "red", "coarse": 2.0}},
    "--mask hard --mask.share 0.3 --mask.steps 10": {"mask": {"kind": "hard", "share": 0.3, "steps": 10}},
    "--mask grid --mask.cell 8": {"mask": {"kind": "grid", "cell": 8}},
    "--target normalized --target.patch 8": {"target": {"kind": "normalized", "patch": 8}},
    "--target local_normalized --target.window 9": {"target": {"kind": "local_normalized", "window": 9}},
    "--target hog --target.bins 6": {"target": {"kind": "hog", "bins": 6}},
    "--target clusters --target.block 8 --loss cross_entropy": {
        "target": {"kind": "clusters", "block": 8},
        "loss": "cross_entropy",
    },
    "--loss smooth_l1 --loss.beta 0.5": {"loss": {"kind": "smooth_l1", "beta": 0.5}},
    "--head transformer --head.depth 3 --head.width 64": {"head": {"kind": "transformer", "depth": 3, "width": 64}},
}


@pytest.fixture
def asked(monkeypatch):
    """Run `simmim pretrain` with options, and return the configuration it would train."""
    configs: list[PretrainConfig] = []
    monkeypatch.setattr(subcommands, "_pretrain", lambda config: configs.append(config) or 0)

    def ask(options: str) -> PretrainConfig:
        assert cli.main(["pretrain", "--objective", "pixels", *shlex.split(options)]) == 0
        return configs.pop()

    return ask


@pytest.mark.parametrize("options", SETTINGS)
def test_a_setting_is_reached_from_the_command_line_toml_and_python(options, asked, tmp_path):
    config = asked(options)
    for family, table in SETTINGS[options].items():
        found = getattr(config, family).as_table()
        assert found | ({"kind": table} if isinstance(table, str) else table) == found
    assert from_settings(PretrainConfig, SETTINGS[options]) == config
    (tmp_path / "a.toml").write_text(to_toml(config))
    assert read_toml(tmp_path / "a.toml", PretrainConfig) == config


def test_another_kind_keeps_the_settings_of_a_file_that_both_kinds_have(asked, tmp_path):
    (tmp_path / "a.toml").write_text('[mask]\nkind = "block"\nratio = 0.3\nmin_cells = 4\n')
    assert asked(f"--config {tmp_path}/a.toml --mask grid").mask == GridMask(ratio=0.3)
    assert asked(f"--config {tmp_path}/a.toml --mask.ratio 0.5").mask == BlockMask(ratio=0.5, min_cells=4)


def test_auto_leaves_a_setting_of_a_file_open_again(asked, tmp_path):
    (tmp_path / "a.toml").write_text('[mask]\nkind = "block"\ncell = 16\n')
    assert asked(f"--config {tmp_path}/a.toml --mask.cell auto").mask == BlockMask()


def test_a_setting_of_another_kind_is_refused_in_one_line(capsys):
    assert cli.main(shlex.split("pretrain --mask random --mask.min-cells 4")) == 2
    assert capsys.readouterr().err == (
        "simmim: --mask.min-cells is not a setting of the mask in use; name the kind that has it by --mask, "
        "or leave it out\n"
    )


def test_the_rule_of_a_strategy_is_the_line_that_the_user_reads(capsys):
    assert cli.main(shlex.split("pretrain --mask.ratio 7")) == 2
    assert capsys.readouterr().err == "simmim: mask ratio 7.0 is not between 0 and 1; use for example 0.6\n"


def test_the_help_shows_the_settings_of_the_chosen_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(shlex.split("pretrain --mask block --head transformer --help"))
    text = capsys.readouterr().out
    assert "--mask.min-cells INT" in text
    assert "--head.width INT" in text
    assert "None" not in text


def test_a_file_with_a_kind_of_a_users_own_says_to_import_it_first(tmp_path):
    (tmp_path / "a.toml").write_text('[mask]\nkind = "mine"\n')
    with pytest.raises(
        UserError, match=r"a\.toml: mask 'mine' is not known; .*import the module that defines it first"
    ):
        read_toml(tmp_path / "a.toml", PretrainConfig)
