"""Exports, read back by the tools that they are for."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file
from torch import Tensor

from simmim.cli import main
from simmim.commands.export import export
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import to_toml
from simmim.interop.pickles import read_pickle
from simmim.interop.weight_names import from_official_simmim, from_transformers
from simmim.torch_engine.models.masked_image_model import MaskedImageModel
from simmim.torch_engine.train.checkpoint import save_checkpoint
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, load_model, save_hub
from simmim.training.run_directory import Run, mark_task

from . import tiny

transformers = pytest.importorskip("transformers")

SIZES = {"swin": (128, 128), "swinv2": (128, 128)}
# A Swin whose stages are all at least as large as the window, as Transformers needs it.
SWIN = {"model_args": tiny.KINDS["swin"].arguments | {"window_size": 4}}


def save_run(out: Path, kind: str = "vit", **settings: Any) -> Path:
    """A run as a training leaves it, with random weights (mask token and biases too, which begin at or near 0)."""
    settings = {"image_size": SIZES.get(kind, (64, 64)), **(SWIN if kind == "swin" else {}), **settings}
    config = tiny.config(kind, out=str(out), **settings)
    torch.manual_seed(1)
    step = build_step(config).eval()
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    run = Run(out)
    out.mkdir(parents=True)
    run.config.write_text(to_toml(config), encoding="utf-8")
    optimizer = create_optimizer(step, weight_decay=0.05, betas=(0.9, 0.999), device=torch.device("cpu"))
    save_checkpoint(run.checkpoints, 1, step, optimizer, {}, world=tiny.CPU, keep=1)
    backbone = step.model.encoder.backbone
    save_hub(run.encoder, backbone, backbone.state_dict(), config)
    return out


def example(model: MaskedImageModel, size: tuple[int, int], channels: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(5))
    return images, tiny.masks(3, size, model.encoder.patch_size)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", ["vit", "beit with a shared bias", "swin", "swinv2", "resnet18", "convnext"])
def test_timm_loads_the_export_with_the_features_of_the_run(kind: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", kind)
    export(run, format="timm", out=tmp_path / "out")
    model = load_model(run)
    images = torch.randn(2, 3, *SIZES.get(kind, (64, 64)))
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        expected = model.encoder.backbone.forward_features(images)
        assert torch.equal(again.forward_features(images), expected)


@pytest.mark.parametrize("kind", ["swin", "swinv2", "resnet18", "convnext"])
def test_timm_gives_a_feature_pyramid_of_the_export(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(save_run(tmp_path / "run", kind), format="timm", out=out)
    pyramid = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True).eval()
    side = SIZES.get(kind, (64, 64))[0]
    with torch.no_grad():
        found = pyramid(torch.randn(1, 3, side, side))
    assert [found_map.shape[2] for found_map in found[-4:]] == [side // 4, side // 8, side // 16, side // 32]


def test_timm_gives_the_maps_of_a_plain_vit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(save_run(tmp_path / "run"), format="timm", out=out)
    maps = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True, out_indices=[0, 1]).eval()
    with torch.no_grad():
        assert [tuple(found.shape) for found in maps(torch.randn(1, 3, 64, 64))] == [(1, 48, 4, 4)] * 2


@pytest.mark.parametrize(
    ("kind", "see", "settings"),
    [("vit", "visible", {"encode": "visible"}), ("vit", "whole", {}), ("swin", "whole", {}), ("resnet18", "whole", {})],
)
def test_transformers_has_the_features_of_a_run_that_predicts_no_pixels(
    kind: str, see: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save_run(run, kind, objectives=[{"kind": "descriptor", "see": see}], **settings)
    export(run, format="transformers", out=out)
    images = torch.randn(2, 3, *SIZES.get(kind, (64, 64)))
    with torch.no_grad():
        found = transformers.AutoModel.from_pretrained(out).eval()(images).last_hidden_state
        torch.testing.assert_close(found, load_model(run).encoder.backbone.forward_features(images))
    assert not any("decoder" in name for name in load_file(out / "model.safetensors"))


def test_the_official_file_of_a_run_that_predicts_no_pixels_has_no_head(tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", "swin", objectives=[{"kind": "descriptor", "see": "whole"}]), tmp_path / "out"
    export(run, format="official", out=out)
    names = torch.load(out / "official_pretrain.pth", weights_only=True)["model"]
    assert any(name.startswith("encoder.") for name in names)
    assert not any(name.startswith("decoder.") for name in names)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vit", "ViTForMaskedImageModeling"),
        ("deit", "ViTForMaskedImageModeling"),
        ("swin", "SwinForMaskedImageModeling"),
        ("swinv2", "Swinv2ForMaskedImageModeling"),
    ],
)
def test_transformers_own_loss_and_reconstruction_are_the_run_s(kind: str, name: str, tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", kind), tmp_path / "out"
    export(run, format="transformers", out=out)
    model = load_model(run)
    theirs = getattr(transformers, name).from_pretrained(out).eval()
    images, mask = example(model, SIZES.get(kind, (64, 64)))
    with torch.no_grad():
        loss, prediction = model(images, mask)
        found = theirs(images, bool_masked_pos=mask.flatten(1))
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert torch.allclose(found.reconstruction, prediction, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "swin", "swinv2"])
def test_transformers_round_trip_is_bit_identical(kind: str, tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", kind), tmp_path / "out"
    export(run, format="transformers", out=out)
    back = from_transformers(load_file(out / "model.safetensors"), kind)
    assert_same_state(load_model(run), back.state)
    assert back.left_out == {}


def test_official_checkpoint_converted_and_exported_again_is_bit_identical(tmp_path: Path) -> None:
    if not tiny.REFERENCE.is_dir():
        pytest.skip(f"{tiny.REFERENCE} is not there")
    first = tiny.REFERENCE / "vit" / "official_pretrain.pth"
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["convert", str(first), "--out", str(run)]) == 0
    assert main(["export", str(run), "--format", "official", "--out", str(out)]) == 0
    before = read_pickle(first)["model"]
    after = torch.load(out / "official_pretrain.pth", weights_only=True)["model"]
    assert set(before) - set(after) == {"encoder.rel_pos_bias.relative_position_index"}  # computed again there
    assert [name for name in after if not np.array_equal(after[name].numpy(), before[name].array())] == []


def test_transformers_checkpoint_converted_and_exported_again_is_bit_identical(tmp_path: Path) -> None:
    settings = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    first, run, out = tmp_path / "first", tmp_path / "run", tmp_path / "out"
    model = transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**settings, encoder_stride=8))
    model.save_pretrained(first)
    assert main(["convert", str(first), "--out", str(run)]) == 0
    assert main(["export", str(run), "--format", "transformers", "--out", str(out)]) == 0
    before, after = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []


def test_five_channels_are_reconstructed_in_transformers(tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", channels=5, mean=(0.5,) * 5, std=(0.25,) * 5), tmp_path / "out"
    export(run, format="transformers", out=out)
    images, mask = example(load_model(run), (64, 64), channels=5)
    theirs = transformers.AutoModelForMaskedImageModeling.from_pretrained(out).eval()
    with torch.no_grad():
        found = theirs(images, bool_masked_pos=mask.flatten(1)).loss
        assert float(found) == pytest.approx(float(load_model(run)(images, mask)[0]), rel=1e-5)


def test_beit_keeps_features_and_mask_token_in_transformers(tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", "beit with a shared bias"), tmp_path / "out"
    export(run, format="transformers", out=out, allow_loss=True)
    model = load_model(run)
    images, mask = example(model, (64, 64))
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    assert type(theirs).__name__ == "BeitModel"
    with torch.no_grad():
        expected = model.encoder(images, mask).flatten(1, 2)
        found = theirs(images, bool_masked_pos=mask.flatten(1)).last_hidden_state[:, 1:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_image_processor_of_the_export_normalises_as_the_run(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    run, out = save_run(tmp_path / "run"), tmp_path / "out"
    export(run, format="transformers", out=out)
    found = transformers.AutoImageProcessor.from_pretrained(out)(images=pixels, return_tensors="np")["pixel_values"][0]
    expected = (pixels / 255 - tiny.MEAN) / tiny.STD
    assert np.allclose(found.transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "lost"),
    [
        (
            "beit with a shared bias",
            {},
            "Transformers' BeitModel has no place for all of {run}: the head would be lost",
        ),
        ("vit", {"head": "mlp"}, "the MLPDecoder (only a linear head has a place) would be lost"),
        ("vit", {"target": "hog"}, "the head for target hog (only one for pixels has a place) would be lost"),
        ("resnet18", {}, "(which has no ResNet) has no place for all of {run}: the mask token, the head would be lost"),
        ("vit", {"image_size": (64, 96)}, "whose models reconstruct square images"),
        ("deit3", {}, "whose vit is another model: "),
        ("vit with registers", {}, "whose vit is another model: "),
        ("swin", {"image_size": (64, 64)}, "one window in all stages"),
    ],
)
def test_lossy_export_to_transformers_is_refused_with_what_would_be_lost(
    kind: str, settings: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", kind, **settings)
    with pytest.raises(ValueError, match="--allow-loss") as error:
        export(run, format="transformers", out=tmp_path / "out")
    assert lost.format(run=run) in str(error.value)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("kind", "settings"), [("resnet18", {}), ("vit", {"head": "transformer"}), ("vit", {"image_size": (64, 96)})]
)
def test_allowed_loss_gives_transformers_the_encoder(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", kind, **settings)
    export(run, format="transformers", out=tmp_path / "out", allow_loss=True)
    model = load_model(run)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(1, 3, *settings.get("image_size", (64, 64)))
    with torch.no_grad():
        expected = model.encoder.backbone.forward_features(images)
        assert torch.allclose(theirs(images).last_hidden_state, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["beit with a shared bias", "swin", "swinv2"])
def test_official_round_trip_is_bit_identical(kind: str, tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", kind), tmp_path / "out"
    export(run, format="official", out=out)
    read = torch.load(out / "official_pretrain.pth", weights_only=True)["model"]
    back = from_official_simmim({name: tensor.numpy() for name, tensor in read.items()})
    assert_same_state(load_model(run), back.state)


@pytest.mark.parametrize(("kind", "folder"), [("beit with a shared bias", "vit"), ("swin", "swin")])
def test_official_export_has_the_official_names(kind: str, folder: str, tmp_path: Path) -> None:
    """All the names that the official optimizer lists as without decay, and the convolution of its decoder."""
    if not tiny.REFERENCE.is_dir():
        pytest.skip(f"{tiny.REFERENCE} is not there")
    listed = json.loads((tiny.REFERENCE / folder / "reference.json").read_text())["no_weight_decay"]
    depth = {"depths": (2, 2, 2, 2)} if folder == "swin" else {"depth": 3}
    arguments = (
        tiny.KINDS[kind].arguments | SWIN.get("model_args", {}) if folder == "swin" else tiny.KINDS[kind].arguments
    )
    run, out = save_run(tmp_path / "run", kind, model_args={**arguments, **depth}), tmp_path / "out"
    export(run, format="official", out=out)
    read = torch.load(out / "official_pretrain.pth", weights_only=True)["model"]
    assert set(listed) - set(read) == set()
    assert read["decoder.0.weight"].shape[2:] == (1, 1)


@pytest.mark.parametrize(
    ("setting", "lost"), [({"head": "mlp"}, "the MLPDecoder"), ({"target": "hog"}, "the head for target hog")]
)
def test_official_export_without_its_head_is_refused_unless_allowed(
    setting: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", "swin", **setting)
    with pytest.raises(ValueError, match=rf"{lost} .* would be lost; --allow-loss"):
        export(run, format="official", out=tmp_path / "out")
    export(run, format="official", out=tmp_path / "out", allow_loss=True)
    names = torch.load(tmp_path / "out" / "official_pretrain.pth", weights_only=True)["model"]
    assert "encoder.mask_token" in names
    assert not [name for name in names if name.startswith("decoder")]


def test_official_export_of_another_model_is_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "resnet18")
    with pytest.raises(ValueError, match="official SimMIM has no resnet18: its models are"):
        export(run, format="official", out=tmp_path / "out", allow_loss=True)


@pytest.mark.parametrize(
    "kind",
    [
        "vit",
        pytest.param("beit", marks=pytest.mark.slow),
        pytest.param("beit with a shared bias", marks=pytest.mark.slow),
        pytest.param("swin", marks=pytest.mark.slow),
        pytest.param("swinv2", marks=pytest.mark.slow),
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("convnext", marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_gives_the_features_of_the_run_at_any_batch(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    run, out = save_run(tmp_path / "run", kind), tmp_path / "out"
    export(run, format="onnx", out=out)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    backbone = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True, num_classes=0).eval()
    for batch in (1, 7):
        images = torch.randn(batch, 3, *SIZES.get(kind, (64, 64)))
        features, embedding = session.run(["features", "embedding"], {"images": images.numpy()})
        with torch.no_grad():
            assert np.abs(features - backbone.forward_features(images).numpy()).max() < 1e-4
            assert np.abs(embedding - backbone(images).numpy()).max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["mean"])) == tiny.MEAN


def test_fine_tuned_classifier_is_exported_for_timm_and_transformers(tmp_path: Path) -> None:
    run = save_classifier(tmp_path / "run")
    images = torch.randn(2, 3, 64, 64)
    ours = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    export(run, format="timm", out=tmp_path / "a")
    export(run, format="transformers", out=tmp_path / "b")
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(images), ours(images))
        assert torch.allclose(theirs(images).logits, ours(images), atol=1e-5)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.slow
def test_fine_tuned_classifier_is_exported_to_onnx_with_its_class_names(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = save_classifier(tmp_path / "run")
    export(run, format="onnx", out=tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    ours = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        assert np.abs(session.run(None, {"images": images.numpy()})[0] - ours(images).numpy()).max() < 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["cat", "dog", "owl"]


def test_fine_tuned_classifier_has_no_official_export(tmp_path: Path) -> None:
    run = save_classifier(tmp_path / "run")
    with pytest.raises(ValueError, match="is fine-tuned, and format official is of pretraining"):
        export(run, format="official", out=tmp_path / "out")


@pytest.mark.parametrize("format", ["timm", "official"])
def test_other_tasks_have_no_export(format: str, tmp_path: Path) -> None:
    mark_task(Run(tmp_path / "run").model, "segment")
    with pytest.raises(
        ValueError, match=f"is fine-tuned for segment, which format {format} has no place for; use --format onnx"
    ):
        export(tmp_path / "run", format=format, out=tmp_path / "out")


def test_export_that_comes_back_different_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import simmim.torch_engine.interop.export as module

    def broken(source: Any, out: Path) -> None:
        state = {name: tensor * 1.01 for name, tensor in source.backbone.state_dict().items()}
        save_hub(out, source.backbone, state, source.config)

    monkeypatch.setattr(module, "write_hub", broken)
    with pytest.raises(ValueError, match=r"timm gives another output than .* so nothing was written"):
        export(save_run(tmp_path / "run"), format="timm", out=tmp_path / "out")
    assert files(tmp_path) == ["run"]


def test_export_never_writes_into_a_directory_that_holds_something(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    with pytest.raises(ValueError, match="exists already; give a new directory"):
        export(run, format="timm", out=run)


@pytest.mark.parametrize("format", ["transformers", "onnx"])
def test_missing_package_is_named_with_its_extra(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run")
    if format == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--format \w+ needs .*: pip install 'simmim\[\w+\]'"):
        export(run, format=format, out=tmp_path / "out")


def test_command_writes_and_says_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run")
    assert main(["export", str(run), "--format", "transformers", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(
        "wrote ViTForMaskedImageModeling\nreloaded and compared, 2 images: reconstruction "
    )
    assert files(tmp_path / "out") == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_command_refuses_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--format", "timm", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "is not a run" in message
    assert message.count("\n") == 1


def save_classifier(out: Path) -> Path:
    """A fine-tuned run's model directory."""
    kind = tiny.KINDS["vit"]
    torch.manual_seed(2)
    backbone = timm.create_model(kind.model, img_size=(64, 64), num_classes=3, **kind.arguments)
    config: PretrainConfig = dataclasses.replace(tiny.config(), image_size=(64, 64))
    save_hub(out / "model", backbone, backbone.state_dict(), config, classes=("cat", "dog", "owl"))
    mark_task(out / "model", "classify")
    return out


def assert_same_state(model: MaskedImageModel, state: dict[str, Any]) -> None:
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert expected.keys() == state.keys()
    assert [name for name in expected if not np.array_equal(expected[name], state[name])] == []
