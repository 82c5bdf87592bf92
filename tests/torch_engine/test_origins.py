"""Trainings that begin from a model of timm: the same names in every command and in Python."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

import simmim
from simmim.cli import main
from simmim.errors import UserError
from simmim.torch_engine.tasks.base import find_spec
from simmim.torch_engine.train.storage import load_encoder

from . import tiny

KIND = tiny.KINDS["vit"]
TRAINING: dict[str, Any] = {
    "steps": 1, "batch_size": 4, "lr": 1e-12, "warmup_lr": 0, "min_lr": 0, "warmup_epochs": 0, "weight_decay": 0,
    "device": "cpu", "precision": "fp32", "workers": 1,
}  # fmt: skip
MASKED = {"data": "demo", "model": KIND.model, "model_args": KIND.arguments, "image_size": (64, 64), "val_images": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that timm saved, with a classifier."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    model: Any = timm.create_model(KIND.model, **KIND.arguments, img_size=64, num_classes=5)
    facts = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.3,) * 3}
    save_for_hf(model, folder, data_config=facts, model_args={**KIND.arguments, "img_size": 64})
    return folder


def weights(source: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_encoder(source).state_dict().items() if "fc_norm" not in name}


@pytest.fixture
def has_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a timm model whose weights are on this machine."""
    create = timm.create_model

    def with_cache(name: str, pretrained: bool = False, **settings: Any) -> Any:
        return create(f"local-dir:{saved}" if pretrained else name, pretrained=pretrained, **settings)

    monkeypatch.setattr("simmim.torch_engine.models.encoders.timm.create_model", with_cache)
    return f"timm:{KIND.model}"


def test_a_pretraining_begins_from_a_model_that_timm_saved(saved: Path, tmp_path: Path) -> None:
    run = simmim.pretrain(**MASKED, **TRAINING, out=str(tmp_path / "run"), init_from=f"local-dir:{saved}")
    found, expected = weights(str(run.path)), weights(f"local-dir:{saved}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_pretraining_begins_from_timms_weights(has_weights: str, tmp_path: Path, saved: Path) -> None:
    run = simmim.pretrain(**MASKED, **TRAINING, out=str(tmp_path / "run"), init_from=has_weights)
    torch.testing.assert_close(
        weights(str(run.path))["blocks.0.attn.qkv.weight"], weights(f"local-dir:{saved}")["blocks.0.attn.qkv.weight"]
    )


def test_weights_of_another_model_are_refused(has_weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{has_weights} does not fit the encoder: .*; use the same --model"):
        simmim.pretrain(**MASKED | {"model_args": {}}, **TRAINING, out=str(tmp_path / "run"), init_from=has_weights)


def test_a_fine_tuning_begins_from_a_model_that_timm_saved(saved: Path, tmp_path: Path) -> None:
    run = simmim.finetune("classify", data="demo", init=f"local-dir:{saved}", out=str(tmp_path / "run"), **TRAINING)
    config = run.read_config(find_spec("classify").config)
    assert (config.model, config.image_size, config.mean) == (KIND.model, (64, 64), (0.5, 0.5, 0.5))
    own, theirs = weights(str(run.model)), weights(f"local-dir:{saved}")
    torch.testing.assert_close(own["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])


def test_what_a_run_resumes_with_needs_the_weights_no_more(saved: Path, tmp_path: Path) -> None:
    gone = tmp_path / "model"
    saved_again = {path.name: path.read_bytes() for path in saved.iterdir()}
    gone.mkdir()
    for name, content in saved_again.items():
        (gone / name).write_bytes(content)
    run = simmim.pretrain(**MASKED, **TRAINING, out=str(tmp_path / "run"), init_from=f"local-dir:{gone}")
    (gone / "config.json").unlink()
    assert main(["resume", str(run.path), "--steps", "2"]) == 0
