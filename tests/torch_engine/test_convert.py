"""`simmim convert`: others' checkpoints against the numbers that others compute from them."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import ClassifyConfig
from simmim.data.sources import open_source
from simmim.interop.checkpoints import read_checkpoint
from simmim.interop.pickles import read_pickle
from simmim.interop.weight_names import to_official_simmim, to_transformers
from simmim.method.losses import L1Loss
from simmim.method.masks import RandomMask
from simmim.method.targets import LocallyNormalizedTarget, PixelTarget
from simmim.torch_engine.interop.convert import ConvertConfig, convert
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.tasks import backbones
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, load_encoder, load_model, save_hub
from simmim.training.run_directory import Run

from . import tiny
from .test_resize import official_geometric_axis

needs_reference = pytest.mark.skipif(not tiny.REFERENCE.is_dir(), reason=f"{tiny.REFERENCE} is not there")


def converted(checkpoint: Path, out: Path, **settings: Any) -> Path:
    convert(ConvertConfig(checkpoint=str(checkpoint), out=str(out), **settings))
    return out


def numpy_state(run: Path) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in load_model(run).state_dict().items()}


# Official SimMIM


@pytest.fixture(scope="module", params=["vit", "swin"])
def official(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The reference and the run that was made of it."""
    if not tiny.REFERENCE.is_dir():
        pytest.skip(f"{tiny.REFERENCE} is not there")
    folder = tiny.REFERENCE / request.param
    return folder, converted(folder / "official_pretrain.pth", tmp_path_factory.mktemp("official") / "run")


@torch.no_grad()
def test_official_features_and_reconstruction_are_the_same(official: tuple[Path, Path]) -> None:
    numbers = np.load(official[0] / "reference.npz")
    images, mask = torch.from_numpy(numbers["images"]), torch.from_numpy(numbers["mask"]).bool()
    model = load_model(official[1])
    features = model.encoder(images, mask).permute(0, 3, 1, 2)
    np.testing.assert_allclose(features, numbers["features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(model(images, mask)[1], numbers["reconstruction"], atol=1e-5, rtol=0)


def test_official_losses_are_the_same_as_training_goes_on(official: tuple[Path, Path]) -> None:
    numbers = np.load(official[0] / "reference.npz")
    images, mask = torch.from_numpy(numbers["images"]), torch.from_numpy(numbers["mask"]).bool()
    model = load_model(official[1]).train()
    optimizer = create_optimizer(model, weight_decay=0.05, betas=(0.9, 0.999), device=torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    losses = []
    for _ in numbers["losses"]:
        optimizer.zero_grad()
        loss, _ = model(images, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, numbers["losses"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_official_fine_tuning_features_are_the_same(official: tuple[Path, Path]) -> None:
    numbers = np.load(official[0] / "reference.npz")
    config = ClassifyConfig(data="demo", out="unused", init=str(official[1]), drop_path=0.0)
    origin = backbones.find_origin(config)
    fresh = {"use_fc_norm": True} if origin.model.startswith("beit") else {}
    complete = backbones.with_encoder_facts(config, origin, open_source("demo"))
    backbone = backbones.create_task_backbone(complete, origin.weights, num_classes=0, global_pool="avg", **fresh)
    pooled = backbone.eval()(torch.from_numpy(numbers["ft_images"]))
    np.testing.assert_allclose(pooled, numbers["ft_features"], atol=1e-5, rtol=0)


def test_official_weights_come_back_bit_identical(official: tuple[Path, Path]) -> None:
    saved = read_pickle(official[0] / "official_pretrain.pth")["model"]
    back = to_official_simmim(numpy_state(official[1]))
    buffers = ("relative_position_index", "attn_mask")
    assert set(back) == {name for name in saved if not name.endswith(buffers)}
    assert all(np.array_equal(back[name], saved[name].array()) for name in back)


@needs_reference
def test_a_model_that_is_given_keeps_the_image_size_that_came_with_the_weights(tmp_path: Path) -> None:
    folder = tiny.REFERENCE / "swin"
    arguments = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
    run = converted(
        folder / "official_pretrain.pth",
        tmp_path / "run",
        model="swin_base_patch4_window7_224",
        model_args=arguments,
    )
    assert Run(run).read_config(PretrainConfig).image_size == (128, 128)


def test_official_method_is_in_the_configuration(official: tuple[Path, Path]) -> None:
    config = Run(official[1]).read_config(PretrainConfig)
    assert (config.mask, config.target, config.loss) == (RandomMask(ratio=0.6, cell=32), PixelTarget(), L1Loss())


def test_a_converted_run_is_reconstructed_started_from_and_not_resumed(
    official: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(official[1])
    assert main(["reconstruct", run, "demo", "--count", "1", "--out", str(tmp_path / "a.png")]) == 0
    common = ["pretrain", "--data", "demo", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--val-images", "0"]
    config = ["--config", f"{run}/config.toml"]
    assert main([*common, *config, "--init-from", run, "--out", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert main([*common, *config, "--out", run]) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err


@needs_reference
def test_an_official_file_starts_a_pretraining_at_another_size(tmp_path: Path) -> None:
    file = str(tiny.REFERENCE / "swin" / "official_pretrain.pth")
    model = converted(Path(file), tmp_path / "run")
    config = Run(model).read_config(PretrainConfig)
    arguments = [f"{name}={value}" for name, value in config.model_args.items() if name != "window_size"]
    command = ["pretrain", "--data", "demo", "--out", str(tmp_path / "new"), "--init-from", file, "--steps", "1"]
    command += ["--model", config.model, "--model-args", *arguments, "window_size=2", "--image-size", "64"]
    command += ["--batch-size", "2", "--device", "cpu", "--val-images", "0", "--workers", "1", "--lr", "1e-12"]
    assert main(command) == 0
    norm = load_model(model).encoder.backbone.norm.weight
    torch.testing.assert_close(load_model(tmp_path / "new").encoder.backbone.norm.weight, norm)


@torch.no_grad()
def test_a_wider_window_has_the_tables_that_scipy_computes(tmp_path: Path) -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    file = write_official_swin(tmp_path / "a.pth", window=6, size=192)
    old = load_model(converted(file, tmp_path / "old")).encoder.backbone
    new = load_model(converted(file, tmp_path / "new", window=7, image_size=(224, 224))).encoder.backbone
    axis = official_geometric_axis(11, 13)
    for (name, before), (_, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        if name.endswith("relative_position_bias_table"):
            assert (before.shape[0], after.shape[0]) == (121, 169)
            for head in range(before.shape[1]):
                grid = before[:, head].reshape(11, 11).numpy()
                expected = interpolate.RectBivariateSpline(axis, axis, grid)(np.arange(-6, 7), np.arange(-6, 7))
                np.testing.assert_allclose(after[:, head].reshape(13, 13), expected, atol=1e-5)


def write_official_swin(path: Path, *, window: int, size: int) -> Path:
    """An official SimMIM checkpoint without its configuration."""
    torch.manual_seed(0)
    config = tiny.config(
        "swin", image_size=(size, size), model_args=tiny.KINDS["swin"].arguments | {"window_size": window}
    )
    state = {name: tensor.numpy() for name, tensor in build_step(config).model.state_dict().items()}
    official = {name: torch.randn(array.shape) * 0.1 for name, array in to_official_simmim(state).items()}
    torch.save({"model": official, "epoch": 7}, path)
    return path


def test_an_official_swinv2_has_its_window_and_normalised_target(tmp_path: Path) -> None:
    config = tiny.config("swinv2", model_args=tiny.KINDS["swinv2"].arguments | {"window_size": 4})
    state = {name: tensor.numpy() for name, tensor in build_step(config).model.state_dict().items()}
    part = {"EMBED_DIM": 24, "DEPTHS": [1, 1, 2, 1], "NUM_HEADS": [1, 2, 4, 8], "WINDOW_SIZE": 4}
    model = {"TYPE": "swinv2", "DROP_PATH_RATE": 0.1, "SWINV2": part | {"PRETRAINED_WINDOW_SIZES": [0, 0, 0, 0]}}
    model["SIMMIM"] = {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": 47}}
    record = {"DATA": {"IMG_SIZE": 64, "MASK_PATCH_SIZE": 16, "MASK_RATIO": 0.5}, "MODEL": model}
    weights = {name: torch.from_numpy(array) for name, array in to_official_simmim(state).items()}
    weights["encoder.layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    torch.save({"model": weights, "config": record}, tmp_path / "a.pth")
    run = Run(converted(tmp_path / "a.pth", tmp_path / "run"))
    found = run.read_config(PretrainConfig)
    assert found.model_args["window_size"] == 4
    assert (found.target, found.mask, found.drop_path) == (
        LocallyNormalizedTarget(),
        RandomMask(cell=16, ratio=0.5),
        0.1,
    )
    tiny.assert_same(load_model(run.path).state_dict(), {k: torch.from_numpy(v) for k, v in state.items()})


# Transformers


def transformers_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    token = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    token |= {"image_size": 64, "patch_size": 16, "initializer_range": 0.2, "layer_norm_eps": 1e-6}
    stage = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    stage |= {"window_size": 4, "encoder_stride": 8, "initializer_range": 0.2}
    if kind == "vit":
        model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**token))
    elif kind == "swin":
        model = transformers.SwinForMaskedImageModeling(transformers.SwinConfig(**stage))
    elif kind == "swinv2":
        model = transformers.Swinv2ForMaskedImageModeling(transformers.Swinv2Config(**stage))
    else:
        bias = {"use_relative_position_bias": True, "use_mask_token": True, "use_mean_pooling": kind == "beit"}
        model = transformers.BeitModel(transformers.BeitConfig(**token, **bias))
    with torch.no_grad():  # tables, tokens and LayerScale are born constant
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "swin", "swinv2"])
def test_loss_and_reconstruction_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(converted(tmp_path / "theirs", tmp_path / "run"))
    images = torch.randn(3, 3, 64, 64)
    mask = torch.rand(3, 64 // model.encoder.patch_size, 64 // model.encoder.patch_size) < 0.6
    loss, reconstruction = model(images, mask)
    expected = theirs(images, bool_masked_pos=mask.flatten(1))
    torch.testing.assert_close(reconstruction, expected.reconstruction, atol=2e-5, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["beit", "beit with the norm on tokens"])
def test_masked_features_are_those_of_transformers_beit(kind: str, tmp_path: Path) -> None:
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(converted(tmp_path / "theirs", tmp_path / "run"))
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.6
    expected = theirs(images, bool_masked_pos=mask.flatten(1)).last_hidden_state[:, 1:]
    torch.testing.assert_close(model.encoder(images, mask).flatten(1, 2), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "swin", "swinv2", "beit"])
def test_transformers_weights_come_back_bit_identical(kind: str, tmp_path: Path) -> None:
    transformers_model(kind).save_pretrained(tmp_path / "theirs")
    state = numpy_state(converted(tmp_path / "theirs", tmp_path / "run"))
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    back = to_transformers(state, kind)
    assert set(saved) == {name for name in back if not (kind == "beit" and name.startswith("decoder."))}
    assert all(np.array_equal(back[name], saved[name].numpy()) for name in saved)


def test_another_epsilon_of_norms_is_told(tmp_path: Path) -> None:
    model = transformers_model("vit")
    model.config.layer_norm_eps = 1e-12
    model.save_pretrained(tmp_path / "theirs")
    report = convert(ConvertConfig(checkpoint=str(tmp_path / "theirs"), out=str(tmp_path / "run")))
    assert "note        norms add 1e-06 to variances, as timm's do, and not 1e-12" in report


def test_the_colours_of_a_processor_are_taken(tmp_path: Path) -> None:
    transformers_model("vit").save_pretrained(tmp_path / "theirs")
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(colours))
    config = Run(converted(tmp_path / "theirs", tmp_path / "run")).read_config(PretrainConfig)
    assert (config.mean, config.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# timm, official MAE and Swin


@pytest.mark.parametrize(
    "kind", ["vit", "vit with registers", "deit3", "beit", "swin", "swinv2", "resnet18", "convnext"]
)
def test_timm_weights_come_back_bit_identical(kind: str, tmp_path: Path) -> None:
    config = tiny.config(kind)
    encoder = build_step(config).model.encoder.backbone
    save_hub(tmp_path / "theirs", encoder, encoder.state_dict(), config)
    run = converted(tmp_path / "theirs", tmp_path / "run")
    tiny.assert_same(
        load_file(run / "encoder" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    )
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_encoder(run)(images), load_encoder(tmp_path / "theirs")(images))


def mae_state(**arguments: Any) -> dict[str, Tensor]:
    """As the official code names them: a ViT, and a decoder that the mask token belongs to."""
    torch.manual_seed(0)
    encoder = create_backbone("vit_tiny_patch16_224", image_size=(64, 64), model_args=arguments).state_dict()
    decoder = {"mask_token": (1, 1, 32), "decoder_pos_embed": (1, 17, 32), "decoder_embed.weight": (32, 192)}
    decoder |= {"decoder_blocks.0.norm1.weight": (32,), "decoder_norm.bias": (32,), "decoder_pred.bias": (768,)}
    return encoder | {name: torch.randn(shape) for name, shape in decoder.items()}


def test_an_official_mae_gives_its_encoder_and_leaves_its_decoder_out(tmp_path: Path) -> None:
    torch.save({"model": mae_state(), "epoch": 799}, tmp_path / "mae.pth")
    config = ConvertConfig(checkpoint=str(tmp_path / "mae.pth"), out=str(tmp_path / "run"))
    report = convert(config)
    assert report[0] == "recognised  official MAE"
    assert report[3] == "left out    mask_token and 5 more: MAE's decoder, which mask tokens enter only there"
    encoder = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    tiny.assert_same(encoder, {name: tensor for name, tensor in mae_state().items() if name in encoder})


def test_an_official_swin_gives_its_encoder_and_leaves_its_classifier_out(tmp_path: Path) -> None:
    file = write_official_swin(tmp_path / "simmim.pth", window=2, size=64)
    state = torch.load(file)["model"]
    inner = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    del inner["mask_token"]
    torch.save(
        {"model": inner | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}}, tmp_path / "a.pth"
    )
    report = convert(ConvertConfig(checkpoint=str(tmp_path / "a.pth"), out=str(tmp_path / "run")))
    assert report[0] == "recognised  official Swin"
    assert report[3] == "left out    head.weight and 1 more: a classifier"
    encoder = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert torch.equal(encoder["layers.1.downsample.norm.weight"], inner["layers.0.downsample.norm.weight"])


def test_weights_that_do_not_tell_their_model_need_it_given(tmp_path: Path) -> None:
    arguments = tiny.KINDS["resnet18"].arguments
    save_file(
        create_backbone("resnet18", image_size=(64, 64), model_args=arguments).state_dict(), tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="does not tell which model it is of; give --model"):
        converted(tmp_path / "a.safetensors", tmp_path / "run")
    converted(tmp_path / "a.safetensors", tmp_path / "run", model="resnet18", model_args=arguments, image_size=(64, 64))


def test_a_swinv2_with_another_window_knows_the_one_it_was_trained_with(tmp_path: Path) -> None:
    transformers_model("swinv2").save_pretrained(tmp_path / "theirs")
    config = Run(converted(tmp_path / "theirs", tmp_path / "run", window=8, image_size=(128, 128)))
    assert config.read_config(PretrainConfig).model_args["pretrained_window_sizes"] == [4, 4]


def test_other_channels_take_weights_in_turn(tmp_path: Path) -> None:
    transformers_model("swin").save_pretrained(tmp_path / "theirs")
    three = load_model(converted(tmp_path / "theirs", tmp_path / "three"))
    five = load_model(converted(tmp_path / "theirs", tmp_path / "five", channels=5))
    weight = three.encoder.backbone.patch_embed.proj.weight
    torch.testing.assert_close(five.encoder.backbone.patch_embed.proj.weight, weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    bias = three.get_parameter("head.bias").unflatten(0, (3, 64))
    torch.testing.assert_close(five.get_parameter("head.bias"), bias[[0, 1, 2, 0, 1]].flatten())


# What is refused


SMALL = tiny.KINDS["vit"].arguments
GIVEN = ("--model", "vit_tiny_patch16_224", "--model-args", *(f"{name}={value}" for name, value in SMALL.items()))


class WritesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def refusal(checkpoint: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line on stderr."""
    assert main(["convert", str(checkpoint), "--out", str(checkpoint.parent / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (checkpoint.parent / "run").exists()
    return error


def test_a_malicious_pickle_is_refused_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": mae_state(**SMALL), "config": WritesAFile(tmp_path / "victim")}, tmp_path / "a.pth")
    assert "a.pth is refused: it asks to run posix.system" in refusal(tmp_path / "a.pth", capsys)
    assert not (tmp_path / "victim").exists()


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(mae_state(**SMALL), tmp_path / "whole")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:-1000])
    assert "a.safetensors is damaged or not a safetensors file" in refusal(tmp_path / "a.safetensors", capsys)


def test_a_wrong_shape_is_refused_with_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mae_state(**SMALL) | {"blocks.1.norm1.bias": torch.zeros(7)}, tmp_path / "a.pth")
    assert "blocks.1.norm1.bias is (7,) instead of (48,)" in refusal(tmp_path / "a.pth", capsys, *GIVEN)


def test_a_missing_weight_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = mae_state(**SMALL)
    del state["blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "a.pth")
    assert "the checkpoint lacks 'blocks.1.norm1.bias' (1 such names)" in refusal(tmp_path / "a.pth", capsys, *GIVEN)


def test_an_unknown_checkpoint_is_refused_with_names_that_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lstm.weight": torch.zeros(2), "lstm.bias": torch.zeros(2)}, tmp_path / "a.pth")
    assert "is of no known kind: it holds lstm.weight, lstm.bias" in refusal(tmp_path / "a.pth", capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", {"model": {}}, "holds no weights: neither tensors nor model or state_dict or module, but nothing"),
        ("a.pth", {"weights": 1, "epoch": 2}, "holds no weights: neither tensors nor model or state_dict or module"),
        ("a.pth", [torch.zeros(1)], "holds no weights but a list"),
    ],
)
def test_a_file_without_weights_is_refused(
    name: str, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / name)
    assert message in refusal(tmp_path / name, capsys)


def test_a_window_is_refused_for_a_model_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mae_state(**SMALL), tmp_path / "a.pth")
    assert "--window is for Swin and SwinV2" in refusal(tmp_path / "a.pth", capsys, "--window", "7", *GIVEN)


def test_a_vit_of_unusual_width_does_not_tell_its_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", image_size=(64, 64), model_args=tiny.KINDS["vit"].arguments)
    torch.save(backbone.state_dict(), tmp_path / "a.pth")
    assert "a ViT of 48 features and 2 blocks does not tell its attention heads" in refusal(tmp_path / "a.pth", capsys)


def test_a_taken_directory_is_refused(tmp_path: Path) -> None:
    torch.save({"model": mae_state(**SMALL)}, tmp_path / "a.pth")
    converted(tmp_path / "a.pth", tmp_path / "run", model="vit_tiny_patch16_224", model_args=SMALL)
    with pytest.raises(ValueError, match="holds a run; give a new directory as --out"):
        converted(tmp_path / "a.pth", tmp_path / "run")


def test_a_full_disk_leaves_no_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": mae_state(**SMALL)}, tmp_path / "a.pth")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("simmim.torch_engine.interop.convert.save_checkpoint", full)
    with pytest.raises(OSError, match=r"run cannot be written: No space left on device; free space"):
        converted(tmp_path / "a.pth", tmp_path / "run", model="vit_tiny_patch16_224", model_args=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_run_is_not_converted(tmp_path: Path) -> None:
    torch.save({"model": mae_state(**SMALL)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=re.escape("is a run already; every command takes it as it is")):
        read_checkpoint(converted(tmp_path / "a.pth", tmp_path / "run", model="vit_tiny_patch16_224", model_args=SMALL))
