"""`--accumulate-steps auto`; `tests/nullgpu` tries it on a device whose memory is bounded."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simmim import pretrain
from simmim.config.toml import parse_toml
from simmim.config.training import TrainingConfig
from simmim.errors import TrainingFailedError, UserError
from simmim.torch_engine.accelerators import ACCELERATORS
from simmim.torch_engine.perf import pieces
from simmim.torch_engine.train.distributed import World

from . import tiny

VIT = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 48, "num_heads": 2}}


def test_auto_is_one_on_a_cpu_and_gives_the_bits_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("auto", "auto"), ("one", 1)):
        settings: dict[str, Any] = {"data": "demo", "out": str(tmp_path / name), "steps": 2, "batch_size": 4, **VIT}
        pretrain(
            **settings,
            image_size=32,
            mask={"kind": "random", "cell": 16},
            accumulate_steps=steps,
            device="cpu",
            val_images=0,
        )
    auto, one = ((tmp_path / name / "encoder/model.safetensors").read_bytes() for name in ("auto", "one"))
    assert auto == one
    assert "accumulate_steps = 1\n" in (tmp_path / "auto" / "config.toml").read_text()
    assert (
        "memory     1 accumulation step of 4 images a process: only a GPU's memory is tried" in capsys.readouterr().err
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "auto" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2


def test_a_file_of_settings_may_say_auto() -> None:
    assert parse_toml('format = 2\naccumulate_steps = "auto"', type(tiny.config())).accumulate_steps is None


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Try on a device that takes so many images at a time; returns the pieces that were tried, in order."""
    row = dataclasses.replace(ACCELERATORS["cpu"], total_memory=lambda device: 2**20)
    monkeypatch.setitem(ACCELERATORS, "cpu", row)
    monkeypatch.setattr(torch, "get_device_module", lambda device: _NoCache)

    def find(images: int, config: TrainingConfig, error: type[Exception] = torch.OutOfMemoryError) -> list[int]:
        tried = []

        def attempt(pieces: int) -> Any:
            tried.append(pieces)
            if config.batch_size // pieces > images:
                raise error
            return _Update(), {}

        tried.append(pieces.find_pieces(config, World(device=torch.device("cpu")), attempt))
        return tried

    return find


class _NoCache:
    @staticmethod
    def empty_cache() -> None: ...
    @staticmethod
    def reset_peak_memory_stats() -> None: ...


class _Update:
    model = nn.Linear(1, 1)

    def __call__(self, step: int, batch: Any) -> None: ...


def test_the_fewest_pieces_are_taken_that_divide_the_batch_and_fit(small_gpu: Callable[..., list[int]]) -> None:
    assert small_gpu(5, tiny.config(batch_size=12, accumulate_steps="auto")) == [1, 2, 3, 3]


def test_a_batch_of_which_no_image_fits_is_one_line(small_gpu: Callable[..., list[int]]) -> None:
    with pytest.raises(TrainingFailedError, match="one image at a time is too much"):
        small_gpu(0, tiny.config(batch_size=4, accumulate_steps="auto"))


def test_settings_that_do_not_work_are_no_lack_of_memory(small_gpu: Callable[..., list[int]]) -> None:
    with pytest.raises(UserError):
        small_gpu(1, tiny.config(batch_size=4, accumulate_steps="auto"), UserError)


def test_a_resumed_run_keeps_its_number(small_gpu: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tiny.config(batch_size=12, accumulate_steps=6)
    monkeypatch.setattr(pieces, "recall", lambda config: begun)
    assert small_gpu(5, tiny.config(batch_size=12, accumulate_steps="auto")) == [6]


def test_a_run_that_goes_on_on_fewer_devices_is_tried_anew(
    small_gpu: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pieces, "recall", lambda config: tiny.config(batch_size=12, accumulate_steps=1))
    (tmp_path / "machine.json").write_text('{"begun": [{"step": 0, "device": "a GPU", "devices": 4}]}')
    assert small_gpu(5, tiny.config(batch_size=12, accumulate_steps="auto", out=str(tmp_path))) == [1, 2, 3, 3]


def test_a_number_is_not_tried(small_gpu: Callable[..., list[int]]) -> None:
    assert small_gpu(5, tiny.config(batch_size=12, accumulate_steps=2)) == [2]
