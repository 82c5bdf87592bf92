"""The blocks marked `<!-- tested -->` of README.md and docs/finetuning.md work, in their order, on a small model."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import simmim
from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import find_task
from simmim.config.validation import from_settings

README = Path(__file__).parents[1] / "README.md"
TESTED = [README, README.parent / "docs" / "finetuning.md"]
SMALL = {"image_size": 64, "batch_size": 4, "val_images": 2, "steps": 2, "device": "cpu"}
EXTRA = {
    "pretrain": " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALL.items())
    + " --model-args depth=1 embed_dim=48",
    "finetune": "--batch-size 4 --steps 2 --device cpu --image-size 64 --model-args depth=1 embed_dim=48",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with `images/`, and `labelled/` of two classes."""
    random = np.random.default_rng(0)
    for folder in ("images/deep/down", "labelled/cats", "labelled/dogs"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(15):
            pixels = random.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(text: str) -> None:
    for line in text.splitlines():
        program, command, *options = shlex.split(line, comments=True)
        assert program == "simmim"
        assert main([command, *options, *EXTRA.get(command, "").split()]) == 0, line


def run_python(text: str, monkeypatch) -> None:
    pretrain, finetune = simmim.pretrain, simmim.finetune

    def small_pretrain(**settings):
        from_settings(PretrainConfig, settings)  # the README's own settings are settings
        return pretrain(**(settings | SMALL))

    def small_finetune(task, **settings):
        from_settings(find_task(task), settings)
        return finetune(task, **(settings | {"batch_size": 4, "steps": 2, "device": "cpu"}))

    monkeypatch.setattr(simmim, "pretrain", small_pretrain)
    monkeypatch.setattr(simmim, "finetune", small_finetune)
    exec(text, {})


@pytest.mark.parametrize("document", TESTED, ids=lambda path: path.name)
def test_the_tested_blocks_work_in_their_order(document, here, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", text, re.DOTALL)
    for language, block in blocks:
        if language == "bash":
            run_shell(block)
        else:
            run_python(block, monkeypatch)
    assert {"bash", "python"} == {language for language, _ in blocks}
    written = re.findall(r"--out (\S+)", "".join(block for _, block in blocks))
    assert [name for name in written if not (here / name).exists()] == []


def test_every_command_is_named():
    text = README.read_text(encoding="utf-8")
    commands = set(re.findall(r"^\| `simmim (\w+)`", text, re.MULTILINE))
    assert commands <= set(simmim.cli.COMMANDS)
    assert {"pretrain", "reconstruct", "bench", "doctor", "recipes", "probe", "predict"} <= commands
