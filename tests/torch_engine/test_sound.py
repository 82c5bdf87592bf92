"""Sounds from files to an encoder: the loss against a plain implementation, runs, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import simmim
from simmim.cli import main
from simmim.config.pretrain_recipes import find_recipe, first_config
from simmim.config.pretraining import PretrainConfig
from simmim.config.sound import Sound
from simmim.config.validation import from_settings
from simmim.data.files import names_sounds
from simmim.data.labelled.classes import open_labelled
from simmim.data.sources import open_source
from simmim.errors import UserError
from simmim.method.heads import TransformerHead
from simmim.method.losses import MSELoss
from simmim.method.masks import RandomMask
from simmim.method.objectives import DescriptorRegression
from simmim.method.targets import NormalizedTarget
from simmim.report.gallery import thumbnails_of
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.tasks.spec_augment import draw_strips, hide_strips
from simmim.torch_engine.train.pretrain import pretrain
from simmim.torch_engine.train.storage import build_step
from simmim.training.masks import draw_masks
from simmim.training.pretrain_images import open_images
from simmim.training.run_directory import Run

from . import tiny, worker

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

SIZE = (64, 32)  # frames and mel bands


def settings(**others: object) -> PretrainConfig:
    """AudioMAE's method at a small size; fp32 on the CPU."""
    usual = {
        "input": "sounds",
        "image_size": SIZE,
        "channels": 1,
        "flip": "none",
        "mean": (-6.0,),
        "std": (5.0,),
        "mask": RandomMask(ratio=0.6, cell=16),
        "encode": "visible",
        "target": NormalizedTarget(),
        "loss": MSELoss(),
        "head": TransformerHead(depth=1, width=64),
        "sound": Sound(rate=8000, low_hz=100.0),
    }
    return tiny.config(**(usual | others))


def write_sounds(folder: Path, count: int = 24) -> Path:
    """Two classes of sounds of all lengths, rates and channels: steady tones, and rising ones."""
    draw = np.random.default_rng(0)
    for number in range(count):
        rate, channels = ((8000, 1), (16000, 2), (11025, 1))[number % 3]
        time = np.arange(round(rate * draw.uniform(0.3, 1.5))) / rate
        rising = number % 2
        phase = 2 * np.pi * (draw.uniform(300, 600) * time + rising * 900 * time**2)
        samples = 0.3 * np.sin(phase) + 0.01 * draw.standard_normal(len(time))
        path = folder / ("rising" if rising else "steady") / f"{number:02}.{('wav', 'flac', 'ogg')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.stack([samples] * channels, axis=1), rate)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def run(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 16 steps."""
    return pretrain(run_settings(sounds, tmp_path_factory.mktemp("run") / "run"))[0]


def run_settings(sounds: Path, out: Path, **others: object) -> PretrainConfig:
    usual = settings(data=str(sounds), mean=None, std=None, sound=Sound(rate=8000, gain_db=3), channels=3)
    small = {"steps": 16, "save_every_steps": 3, "picture_every_steps": 8, "log_every_steps": 2, "val_images": 2}
    return dataclasses.replace(usual, out=str(out), warmup_epochs=None, **(small | others))


def plain_loss(spectrogram: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    """AudioMAE's loss written down anew: the mean over hidden patches of the error of patches of mean 0, variance 1."""
    losses = []
    for image, predicted, hidden in zip(spectrogram, prediction, mask, strict=True):
        for row in range(image.shape[0] // side):
            for column in range(image.shape[1] // side):
                if hidden[row, column]:
                    patch = image[row * side : (row + 1) * side, column * side : (column + 1) * side].flatten()
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                    losses.append(((predicted[row, column] - patch) ** 2).mean())
    return torch.stack(losses).mean()


def test_the_loss_of_a_step_is_audiomaes() -> None:
    config = settings()
    torch.manual_seed(0)
    step = build_step(config)
    assert isinstance(step, PretrainStep) and config.spectrogram
    draw = np.random.default_rng(0)
    samples = draw.integers(-9000, 9000, (4, config.spectrogram.samples, 1, 1)).astype(np.int16)
    mask = draw_masks(config, 0, np.arange(4), 16)
    assert mask.shape == (4, 4, 2) and mask.sum() == 4 * 5
    tensors = {"image": torch.from_numpy(samples), "flip": torch.zeros(4, 0, dtype=torch.bool)}
    loss = step(**tensors, mask=torch.from_numpy(mask))["loss"]
    spectrogram = torch.from_numpy(config.spectrogram(np, samples[..., 0, 0] / np.float32(32768)))
    normal = (spectrogram - -6.0) / 5.0
    prediction = step.model.predict(normal[:, None], torch.from_numpy(mask))
    torch.testing.assert_close(loss, plain_loss(normal, prediction, torch.from_numpy(mask), 16))


def test_the_recipe_has_audiomaes_settings() -> None:
    """From the authors' command and the defaults of their main_pretrain.py; rates are theirs for a batch of 256."""
    recipe = find_recipe("audiomae-vit-b")
    assert (recipe.image_size, recipe.channels, recipe.mask.ratio, recipe.mask.cell) == ((1024, 128), 1, 0.8, 16)
    assert (recipe.batch_size, recipe.epochs, recipe.warmup_epochs) == (8 * 8 * 8, 33, 3)
    assert (recipe.lr, recipe.weight_decay, recipe.betas) == (2 * 2e-4, 1e-4, (0.9, 0.95))
    assert (recipe.target.kind, recipe.loss.kind, recipe.encode) == ("normalized", "mse", "visible")
    assert recipe.mean == (-4.2677393,) and recipe.std == (9.1379948,)
    assert dataclasses.replace(recipe.sound) == Sound(rate=16000, window_ms=25, hop_ms=10, low_hz=20)
    assert recipe.spectrogram and recipe.spectrogram.samples == 16000 * 1023 // 100 + 400


def test_a_folder_of_sounds_begins_with_the_recipe_for_them(sounds: Path) -> None:
    assert first_config({"data", "out"}, sounds=True) == find_recipe("audio-small")


def test_a_run_of_sounds_measures_draws_and_saves(run: Run) -> None:
    config = run.read_config(PretrainConfig)
    assert (config.input, config.channels, config.flip) == ("sounds", 1, "none")
    assert isinstance(config.mean, tuple) and -16 < config.mean[0] < 0
    assert sorted(path.name for path in run.reconstructions.iterdir()) == ["step-00000008.png", "step-00000016.png"]
    assert "val_loss" in run.metrics.read_text()


def test_a_broken_training_of_sounds_resumes_to_the_same_weights(
    run: Run, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_settings(sounds, tmp_path / "run")
    worker.break_off(config, 8, monkeypatch)
    pretrain(config)
    tiny.assert_same(worker.weights(config), worker.weights(run.read_config(PretrainConfig)))


def test_a_descriptor_of_sounds_is_learnt_and_resumes_to_the_same_weights(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DescriptorRegression(shape_values=8, colour_values=8, words=8, texture_values=4)
    whole = run_settings(sounds, tmp_path / "whole", objectives=(small,), lr=0.1, batch_size=20)
    losses = [json.loads(line)["loss"] for line in pretrain(whole)[0].metrics.read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    worker.break_off(broken, 8, monkeypatch)
    pretrain(broken)
    tiny.assert_same(worker.weights(broken), worker.weights(whole))


def test_a_reconstruction_can_be_seen_and_heard(run: Run, sounds: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert main(["reconstruct", str(run.path), str(sounds), "--count", "2", "--wav", "--out", str(out)]) == 0
    assert out.is_file()
    names = [f"a-{number}-{part}.wav" for number in range(2) for part in ("masked", "original", "reconstruction")]
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == names
    for path in tmp_path.glob("*.wav"):
        samples, rate = soundfile.read(path)
        assert rate == 8000 and len(samples) == 200 + 63 * 80 and samples.std() > 0


def test_a_loaded_encoder_hears_files_by_its_front_end_as_embed_does(run: Run, sounds: Path) -> None:
    encoder: Any = simmim.load_encoder(str(run.path))
    names, features = simmim.embed(str(run.path), str(sounds), precision="fp32", device="cpu")
    with torch.no_grad():
        found = encoder.forward_features(encoder.front_end(encoder.front_end.read(names[7])))[:, 1:].mean(dim=1)
    np.testing.assert_allclose(found[0], features[7], atol=2e-3)  # read there in 16 bits
    again: Any = timm.create_model(f"local-dir:{run.encoder}", pretrained=True, num_classes=0)
    assert again.state_dict().keys() == encoder.state_dict().keys()


def test_encoders_are_not_given_what_they_were_not_trained_on(
    run: Run, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        ("embed", str(run.path), "--data", "demo", "--out", "a.npz"): "was trained on sounds, and these are not; give",
        ("reconstruct", str(run.path), "demo"): "was trained on sounds, and these are not; give sound files",
        (
            "finetune",
            "classify",
            "--from",
            str(run.path),
            "--data",
            "demo",
            "--out",
            "b",
        ): "is an encoder of sounds",
        ("finetune", "classify", "--from", str(run.path), "--data", str(sounds), "--out", "b", "--rand-augment", "3"): (
            f"--rand-augment is for images, and {sounds} holds sounds; leave it out"
        ),
    }
    for command, line in lines.items():
        assert main(list(command)) == 2
        assert line in capsys.readouterr().err


def test_spec_augment_hides_one_span_of_each_kind_by_the_sounds_key() -> None:
    strips = draw_strips(0, 3, np.arange(200), (64, 32), (16, 8))
    first, last, low, high = strips.T
    assert (last - first).min() == 0 and (last - first).max() == 16 and last.max() <= 64
    assert (high - low).min() == 0 and (high - low).max() == 8 and high.max() <= 32
    np.testing.assert_array_equal(draw_strips(0, 3, np.arange(100, 200), (64, 32), (16, 8)), strips[100:])
    hidden = hide_strips(torch.ones(200, 1, 64, 32), torch.from_numpy(strips))[:, 0] == 0
    for one, (begin, end, bottom, top) in zip(hidden, strips, strict=True):
        expected = np.zeros((64, 32), bool)
        expected[begin:end], expected[:, bottom:top] = True, True
        np.testing.assert_array_equal(one, expected)


@pytest.mark.slow
def test_a_classifier_of_sounds_is_fine_tuned_and_predicts(run: Run, sounds: Path, tmp_path: Path) -> None:
    settings = {"steps": 30, "batch_size": 8, "time_mask": 16, "band_mask": 8, "rand_augment": 9.0, "device": "cpu"}
    out = str(tmp_path / "classifier")
    trained = simmim.finetune("classify", init=str(run.path), data=str(sounds), out=out, **settings)
    assert json.loads((trained.model / "config.json").read_text())["sound"]["rate"] == 8000
    found = simmim.predict(out, str(sounds), out=str(tmp_path / "pictures"))
    assert len(found["images"]) == 24 and not found["bad_images"]
    assert len(list((tmp_path / "pictures" / "pictures").iterdir())) == 24


def test_a_linear_classifier_of_sounds_predicts(run: Run, sounds: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "classifier")
    found = simmim.probe(str(run.path), str(sounds), method="linear", out=out, device="cpu", baselines=False)
    predicted = simmim.predict(out, str(sounds), device="cpu")["images"]
    assert len(predicted) == 24 and {image["label"] for image in predicted} == {"rising", "steady"}
    images = open_labelled(str(sounds))
    labels = {images.val.name(index): images.classes[label] for index, label in enumerate(images.val_labels)}
    right = [image["label"] == labels[image["image"]] for image in predicted if image["image"] in labels]
    assert found["top1"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_a_probe_during_a_training_of_sounds_judges_spectrograms(sounds: Path, tmp_path: Path) -> None:
    config = run_settings(sounds, tmp_path / "run", probe=str(sounds), probe_every_epochs=1.0)
    assert "knn_raw_pixels" in pretrain(config)[0].metrics.read_text()


@pytest.mark.slow
def test_an_onnx_file_of_a_run_of_sounds_takes_samples(run: Run, sounds: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(run.path), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["rate"]) == 8000
    encoder: Any = simmim.load_encoder(str(run.path))
    files = sorted(sounds.rglob("*.*"))[:3]
    samples = torch.cat([encoder.front_end.read(file) for file in files])
    (found,) = session.run(["features"], {"samples": samples.numpy()})
    with torch.no_grad():
        expected = encoder.forward_features(encoder.front_end(samples))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_formats_without_a_place_for_a_front_end_are_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.path), "--format", "transformers", "--out", "x"]) == 2
    assert (
        "is of sounds, which format transformers has no place for; use --format timm or onnx" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_packed_sounds_train_to_the_weights_of_loose_ones(run: Run, sounds: Path, tmp_path: Path) -> None:
    assert main(["pack", str(sounds), "--out", str(tmp_path / "packed")]) == 0
    assert names_sounds(tmp_path / "packed")
    config = run_settings(tmp_path / "packed", tmp_path / "run")
    pretrain(config)
    tiny.assert_same(worker.weights(config), worker.weights(run.read_config(PretrainConfig)))


@pytest.mark.slow
def test_the_report_of_a_run_of_sounds_shows_spectrograms(run: Run, sounds: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    assert main(["report", str(run.path), "--data", str(sounds), "--out", str(out)]) == 0
    assert "Likely duplicates" in (text := out.read_text()) and "Blurred" not in text


def test_thumbnails_of_sounds_are_spectrograms(sounds: Path) -> None:
    read, pictures = thumbnails_of(open_source(str(sounds)))
    assert len(read) == 24 and pictures.shape == (24, 64, 64, 3)
    assert (pictures.std(axis=(1, 2, 3)) > 5).all()


REFUSED: dict[str, dict[str, Any]] = {
    "objective sigreg": {"objectives": [{"kind": "sigreg"}]},
    "--flip horizontal": {"flip": "horizontal"},
    "--crop-scale": {"crop_scale": (0.5, 1)},
    "--engine keras": {"engine": "keras"},
    "--channels 2": {"channels": 2},
    "--target clusters": {"target": "clusters", "loss": "cross_entropy"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_of_images_only_is_refused_for_sounds(option: str, sounds: Path, tmp_path: Path) -> None:
    given = {"data": str(sounds), "out": str(tmp_path / "a"), **REFUSED[option]}
    with pytest.raises(UserError, match=f"{option} is for images, and {sounds} holds sounds; "):
        open_images(from_settings(PretrainConfig, given))


def test_bench_refuses_sounds(sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--data", str(sounds)]) == 2
    assert f"simmim bench is for images, and {sounds} holds sounds; " in capsys.readouterr().err


def test_settings_of_sounds_are_refused_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a")
    assert main(["pretrain", "--data", "demo", "--out", out, "--sound.rate", "8000"]) == 2
    assert "--sound.* is for sounds, and demo holds images; leave it out" in capsys.readouterr().err
    assert main(["pretrain", "--data", "demo", "--out", out, "--recipe", "audio-small"]) == 2
    assert "these settings are for sounds, and demo holds none" in capsys.readouterr().err
