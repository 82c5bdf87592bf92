"""Runs that version 0.1 wrote and did not finish load, and are resumed to the end that they would have come to."""

import zipfile
from pathlib import Path

import pytest
import torch

import simmim

from . import record

HERE = Path(__file__).parent / "v0_1"


def unpack(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(HERE / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder / name


@pytest.mark.parametrize("name", ["pretrain", "classify"])
def test_a_run_is_resumed_to_the_end_of_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    run = unpack(name, tmp_path)
    before = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert before.count("\n") == 3
    record.train(run / "config.toml", run)
    assert record.differences(record.record(run), record.read(HERE / f"{name}.json")) == []
    after = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert after.startswith(before), "the first steps were done again"


def test_model_and_encoder_of_a_run_load_with_the_same_weights(tmp_path: Path) -> None:
    run = unpack("pretrain", tmp_path)
    whole, encoder = simmim.load_model(run).state_dict(), simmim.load_encoder(run).state_dict()
    for name, values in encoder.items():
        torch.testing.assert_close(whole[f"encoder.backbone.{name}"], values, rtol=0, atol=0)
