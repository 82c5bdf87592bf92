"""`simmim pretrain --engine keras` as a user runs it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file

from simmim.data.bad_images import BadImages
from simmim.torch_engine.train.pretrain import judge_and_draw
from simmim.torch_engine.train.storage import load_run
from simmim.training.pretrain_images import open_images
from simmim.training.pretrain_plan import Plan

from .conftest import have, run_python

BACKENDS = [
    pytest.param("jax", marks=have("keras", "jax")),
    pytest.param("tensorflow", marks=[have("keras", "tensorflow"), pytest.mark.slow]),
]
TINY = {
    "data": "demo",
    "engine": "keras",
    "device": "cpu",
    "precision": "fp32",
    "model": "vit_tiny_patch16_224",
    "image-size": "32x64",
    "mask-cell": "16",
    "batch-size": "16",
    "val-images": "2",
    "drop-path": "0.1",
    "log-every-steps": "1",
    "warmup-epochs": "0",
}
COMMAND = ["-m", "simmim", "pretrain", *(word for name, value in TINY.items() for word in (f"--{name}", value))]
COMMAND += ["--model-args", "depth=2", "embed_dim=48"]


def pretrain(out: Path, *options: str) -> None:
    done = run_python(*COMMAND, "--out", str(out), *options)
    assert done.returncode == 0, done.stderr


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def state(out: Path, step: int) -> dict[str, Any]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


@pytest.fixture(scope="module", params=BACKENDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of six steps."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    pretrain(out, "--backend", request.param, "--steps", "6", "--save-every-steps", "3")
    return request.param, out


def test_a_run_that_is_resumed_ends_bit_identical(whole: tuple[str, Path], tmp_path: Path) -> None:
    """What a kill after step 4 leaves: the checkpoint of step 3, and later lines of metrics."""
    backend, out = whole
    resumed = tmp_path / "run"
    (resumed / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step-00000003").rename(resumed / "checkpoints" / "step-00000003")
    (resumed / "config.toml").write_text((out / "config.toml").read_text().replace(str(out), str(resumed)))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[:4]))
    pretrain(resumed, "--backend", backend, "--steps", "6", "--save-every-steps", "3")
    assert losses(resumed) == losses(out)
    expected, found = state(out, 6), state(resumed, 6)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-30)


def test_the_encoder_loads_in_timm_with_the_runs_weights(whole: tuple[str, Path]) -> None:
    _, out = whole
    backbone = timm.create_model(f"local-dir:{out}/encoder", pretrained=True, num_classes=0)
    trained = state(out, 6)
    for name, tensor in backbone.state_dict().items():
        assert np.array_equal(tensor.numpy(), trained[f"model.encoder.backbone.{name}"]), name
    assert backbone(torch.zeros(1, 3, 32, 64)).shape == (1, 48)


def test_a_picture_and_a_validation_loss_are_written(whole: tuple[str, Path]) -> None:
    _, out = whole
    assert (out / "reconstructions" / "step-00000006.png").is_file()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.3 < last["val_loss"] < 3


def test_the_torch_engine_loads_the_run_and_finds_the_same_validation_loss(whole: tuple[str, Path]) -> None:
    _, out = whole
    step, config = load_run(out)
    loss, _ = judge_and_draw(step, config, Plan(config, open_images(config)).val_pixels(BadImages(None, total=8)))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert loss == pytest.approx(last["val_loss"], abs=1e-5)


@pytest.mark.slow
@have("keras", "jax")
def test_it_starts_from_a_run_of_the_torch_engine(tmp_path: Path) -> None:
    pretrain(tmp_path / "torch", "--steps", "1", "--engine", "torch")
    pretrain(
        tmp_path / "keras", "--steps", "1", "--init-from", str(tmp_path / "torch"), "--lr", "1e-30", "--min-lr", "0"
    )
    expected, found = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("torch", "keras"))
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-30)


REFUSED = {
    "--precision fp16": "--precision fp16 is not for --engine keras --backend jax; use bf16",
    "--mask hard": "--mask hard is not for --engine keras --backend jax; use one that needs no model",
    "--masks-per-image 2": "--masks-per-image is not for --engine keras --backend jax; use 1",
    "--positions sincos": "--positions sincos is not for --engine keras --backend jax; leave it out",
    "--decode gpu": "--decode gpu is not for --engine keras --backend jax; use --decode cpu",
    "--no-compile": "--no-compile is not for --engine keras --backend jax; leave it out",
    "--encode visible --head transformer": "--encode visible is not for --engine keras",
    "--head transformer --head.depth 8": "--head transformer with another depth or width is not for --engine keras",
}
# All in one process, in which nothing is trained, and a head without a Keras layer, which is refused each time.
REFUSE = """
import contextlib, io, json, sys
from dataclasses import dataclass
import simmim
from simmim.cli import main
from simmim.method.heads import Head

@dataclass(frozen=True, kw_only=True)
class OwnHead(Head):
    kind = "own"

command = json.loads(sys.argv[1])
found = {}
for options in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([*command, *options.split()])
    found[options] = status, said.getvalue().splitlines()[-1]
found["own head"] = []
for attempt in range(2):
    try:
        simmim.pretrain(data="demo", out=command[-1], engine="keras", device="cpu", image_size=64, head=OwnHead())
    except simmim.UserError as error:
        found["own head"].append(str(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Exit status and last line by options, and the run that none of them may have made."""
    run = tmp_path_factory.mktemp("refused") / "run"
    done = run_python("-c", REFUSE, json.dumps([*COMMAND[2:], "--out", str(run)]), *REFUSED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), run


@pytest.mark.parametrize(("options", "message"), REFUSED.items())
@have("keras", "jax")
def test_an_option_that_it_does_not_honour_is_refused_in_one_line(
    refused: tuple[dict[str, Any], Path], options: str, message: str
) -> None:
    found, run = refused
    status, line = found[options]
    assert status == 2
    assert message in line
    assert not run.exists()


@have("keras", "jax")
def test_each_training_of_a_process_refuses_a_head_without_a_keras_layer(refused: tuple[dict[str, Any], Path]) -> None:
    found, _ = refused
    line = "head own has no Keras layer; use --engine torch, or register one by create_head.register"
    assert found["own head"] == [line, line]


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["local", "nowhere"])
@have("keras", "tensorflow")
def test_a_tpu_that_tensorflow_does_not_find_is_refused_in_one_line(tmp_path: Path, slice_name: str) -> None:
    """`nowhere` is looked up in Google's metadata, of which there is none here."""
    options = ["--backend", "tensorflow", "--device", "tpu"]
    done = run_python(*COMMAND, "--out", str(tmp_path / "run"), *options, TPU_NAME=slice_name)
    assert done.returncode == 2
    assert re.match(
        r"simmim: device 'tpu' is not here: TensorFlow says .+; use tensorflow-tpu on", done.stderr.splitlines()[-1]
    )
