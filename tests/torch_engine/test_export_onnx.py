"""An ONNX file is enough: images prepared by its metadata alone, with Pillow, give what `simmim predict` gives."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import simmim
from simmim.commands.export import export
from simmim.config.tasks import SegmentConfig
from simmim.config.validation import from_settings
from simmim.errors import UserError
from simmim.torch_engine.interop.export import open_exported
from simmim.torch_engine.interop.export_onnx import _facts, _Outputs
from simmim.torch_engine.tasks.base import save_model
from simmim.torch_engine.tasks.segment import _BUILT_FROM
from simmim.torch_engine.tasks.segmenter import build_segment_step
from simmim.torch_engine.train.storage import save_hub
from simmim.training.run_directory import Run, mark_task

from . import tiny
from .pictures import picture

KIND = tiny.KINDS["vit"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{seed}.png" for seed in range(8)]
    for seed, file in enumerate(files):
        picture(seed, 100 + 7 * seed, 160 - 5 * seed).save(file)
    return files


@torch.no_grad()
def balance(model: Any, last: Any, photos: list[Path], size: tuple[int, int]) -> None:
    """Let the last layer's bias give every class its share of the images."""
    pixels = [np.asarray(Image.open(file).resize(size[::-1]), np.float32) / 255 for file in photos]
    normal = (np.stack(pixels) - np.float32(tiny.MEAN)) / np.float32(tiny.STD)
    logits = model.eval()(torch.from_numpy(normal).permute(0, 3, 1, 2))
    last.bias -= logits.transpose(0, 1).flatten(1).mean(1)


class User:
    """Someone who has the file only; or, since writing it takes long, the graph and the metadata that go into it."""

    def __init__(self, run: Path, file: Path | None):
        if file is None:
            source = open_exported(run, "onnx")
            graph, told = _Outputs(source.backbone, source.task, source.hears), json.loads(json.dumps(_facts(source)))
            self.run = lambda images: graph(torch.from_numpy(images))[0].numpy()
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            told = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
            self.run = lambda images: session.run(["logits"], {"images": images})[0]
        self.facts: dict[str, Any] = told

    @torch.no_grad()
    def logits(self, file: Path) -> np.ndarray:
        facts = self.facts
        channels, height, width = facts["input_size"]
        assert (facts["interpolation"], facts["antialias"], channels) == ("bilinear", True, facts["channels"])
        with Image.open(file) as opened:
            image = opened.convert({1: "L", 3: "RGB"}[channels])
        box = (0.0, 0.0, *map(float, image.size))
        if facts["crop"] == "centre":
            unit = facts["crop_fraction"] * min(image.width / width, image.height / height)
            left, top = (image.width - unit * width) / 2, (image.height - unit * height) / 2
            box = (left, top, left + unit * width, top + unit * height)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box), np.float32) / 255
        normal = (pixels.reshape(height, width, channels) - np.float32(facts["mean"])) / np.float32(facts["std"])
        return self.run(normal.transpose(2, 0, 1)[None].astype(np.float32))[0]


@pytest.fixture(params=["graph", pytest.param("file", marks=pytest.mark.slow)])
def user(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], User]:
    def of(run: Path) -> User:
        if request.param == "graph":
            return User(run, None)
        export(run, format="onnx", out=tmp_path / "out")
        return User(run, tmp_path / "out/model.onnx")

    return of


def test_a_classifiers_metadata_prepare_images_as_predict_does(
    tmp_path: Path, photos: list[Path], user: Callable[[Path], User]
) -> None:
    torch.manual_seed(2)
    backbone = timm.create_model(KIND.model, img_size=(64, 64), num_classes=3, **KIND.arguments)
    torch.nn.init.normal_(backbone.head.weight, std=0.5)
    balance(backbone, backbone.head, photos, (64, 64))
    config = dataclasses.replace(tiny.config(), image_size=(64, 64))
    save_hub(tmp_path / "run/model", backbone, backbone.state_dict(), config, classes=("cat", "dog", "owl"), crop=0.6)
    mark_task(tmp_path / "run/model", "classify")
    file_user = user(tmp_path / "run")
    found = simmim.predict(tmp_path / "run", photos, device="cpu")["images"]
    assert len({prediction["label"] for prediction in found}) > 1
    for file, prediction in zip(photos, found, strict=True):
        logits = file_user.logits(file)
        shares = np.exp(logits) / np.exp(logits).sum()
        expected = dict(prediction["top"])
        if prediction["probability"] - prediction["top"][1][1] > 0.1:  # else the last bit of a pixel decides
            assert file_user.facts["classes"][int(shares.argmax())] == prediction["label"]
        np.testing.assert_allclose(shares, [expected[name] for name in file_user.facts["classes"]], atol=0.05)


def save_segmenter(out: Path, photos: list[Path], **settings: Any) -> Path:
    complete: dict[str, Any] = {
        "model": KIND.model,
        "model_args": KIND.arguments,
        "image_size": (64, 96),
        "channels": 3,
        "mean": tiny.MEAN,
        "std": tiny.STD,
        "decoder_channels": 8,
        "precision": "fp32",
    }
    config = from_settings(SegmentConfig, complete | settings)
    torch.manual_seed(0)
    step = build_segment_step(config, None, 3)
    torch.nn.init.normal_(step.model.decoder.classifier.weight, std=1.0)
    balance(step.model, step.model.decoder.classifier, photos, (64, 96))
    facts = {name: getattr(config, name) for name in _BUILT_FROM}
    save_model(Run(out).model, step.model, facts | {"dtype": "uint8", "label_names": ["a", "b", "c"]})
    mark_task(Run(out).model, "segment")
    return out


def test_a_segmenters_logits_are_predicts_masks(
    tmp_path: Path, photos: list[Path], user: Callable[[Path], User]
) -> None:
    run = save_segmenter(tmp_path / "run", photos)
    file_user = user(run)
    assert (file_user.facts["task"], file_user.facts["crop"], file_user.facts["classes"]) == (
        "segment",
        "whole",
        ["a", "b", "c"],
    )
    found = simmim.predict(run, photos, device="cpu", out=str(tmp_path / "found"))["images"]
    agreed, shares = [], []
    for file, prediction in zip(photos, found, strict=True):
        logits = torch.from_numpy(file_user.logits(file))[None]
        assert logits.shape == (1, 3, 64, 96)
        with Image.open(file) as image:
            size = (image.height, image.width)
        mask = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        expected = np.asarray(Image.open(tmp_path / "found" / prediction["mask"]))
        agreed.append((mask.numpy() == expected).mean())
        shares.append((expected == np.bincount(expected.ravel()).argmax()).mean())
    assert np.mean(agreed) > 0.97 > np.mean(shares)


def test_a_segmenter_of_sliding_windows_has_no_onnx(tmp_path: Path, photos: list[Path]) -> None:
    run = save_segmenter(tmp_path / "run", photos, evaluation="slide")
    with pytest.raises(UserError, match="is evaluated by sliding windows, and an ONNX file sees one image"):
        export(run, format="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoders_metadata_tell_the_crop_of_embed(tmp_path: Path) -> None:
    run = simmim.pretrain(
        data="demo", out=str(tmp_path / "run"), model=KIND.model, model_args=KIND.arguments, image_size=(64, 64),
        steps=1, batch_size=4, device="cpu", val_images=0,
    )  # fmt: skip
    facts = _facts(open_exported(run.path))
    assert (facts["crop"], facts["crop_fraction"]) == ("centre", 0.875)
    assert "the box in the middle with 0.875 of the sides of the largest one of shape 64:64" in facts["preparation"]
