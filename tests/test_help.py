import re

import pytest

from simmim.advise.request import Request
from simmim.cli import COMMANDS, main
from simmim.commands.pack import PackConfig
from simmim.commands.search import SearchConfig
from simmim.commands.tpu_check import TpuCheckConfig
from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import TASK_CONFIGS
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.report.page import ReportConfig
from simmim.torch_engine.interop.convert import ConvertConfig
from simmim.torch_engine.perf.bench import BenchConfig
from simmim.torch_engine.tasks.embed import EmbedConfig
from simmim.torch_engine.tasks.predict import PredictConfig
from simmim.torch_engine.tasks.probe import ProbeConfig


@pytest.fixture
def groups(capsys, monkeypatch):
    """Options by group of a command's help."""

    def read(command: str) -> dict[str, list[str]]:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        parts = re.split(r"^([\w-]+):$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
        lists = [re.findall(r"^  (?:-h, )?--([\w.-]+)", text, flags=re.MULTILINE) for text in parts[1::2]]
        return dict(zip(parts[::2], lists, strict=True))

    return read


def test_the_common_options_of_a_pretraining_come_first(groups):
    name, options = next(iter(groups("pretrain").items()))
    assert name == "common"
    assert options == [
        "data",
        "out",
        "recipe",
        "model",
        "image-size",
        "epochs",
        "batch-size",
        "lr",
        "objective",
        "mask",
        "target",
    ]


def test_every_option_of_a_pretraining_has_a_group(groups):
    """An option that is missing here belongs in `config/option_groups.py`."""
    assert list(groups("pretrain")) == ["common", "data", "model", "method", "optimisation", "hardware", "run"]


@pytest.mark.parametrize(
    ("task", "option"), [("classify", "mixup"), ("segment", "decoder-channels"), ("detect", "detector")]
)
def test_a_tasks_own_options_follow_the_common_ones(task, option, groups):
    found = groups(f"finetune {task}")
    assert list(found)[:2] == ["common", task]
    assert option in found[task]


def test_finetuning_has_no_option_to_shard(groups, capsys):
    assert all("shard" not in options for options in groups("finetune classify").values())
    assert main(["finetune", "classify", "--shard"]) == 2
    assert "--shard is not known" in capsys.readouterr().err


def test_tpu_check_does_not_list_the_options_that_it_ignores(groups):
    listed = {option.replace("-", "_") for options in groups("tpu-check").values() for option in options}
    assert not listed & TpuCheckConfig.unlisted
    assert {"topology", "batch_size", "image_size"} <= listed


def test_the_help_says_the_same_at_any_width_of_the_terminal(capsys, monkeypatch):
    texts = []
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            main(["pretrain", "--help"])
        texts.append(capsys.readouterr().out)
    assert len({" ".join(text.split()) for text in texts}) == 1
    assert max(map(len, texts[1].splitlines())) <= 80


@pytest.mark.parametrize(
    "kind",
    [
        PretrainConfig, *TASK_CONFIGS.values(), TpuCheckConfig, Request, PackConfig, ProbeConfig, PredictConfig,
        EmbedConfig, ReportConfig, SearchConfig, BenchConfig, ConvertConfig,
    ],
)  # fmt: skip
def test_an_unknown_setting_points_to_the_help_of_its_own_command(kind):
    assert kind.command.split()[0] in COMMANDS
    with pytest.raises(
        UserError, match=f"^setting 'zzz' is not known; see `simmim {kind.command} --help` for the names$"
    ):
        from_settings(kind, {"zzz": 1})


def test_an_unknown_setting_of_a_file_points_to_the_help_of_the_command_that_reads_it(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("zzz = 1\n")
    assert main(["finetune", "segment", "--config", f"{tmp_path}/a.toml"]) == 2
    assert "see `simmim finetune segment --help` for the names" in capsys.readouterr().err
