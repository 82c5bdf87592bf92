"""What a fine-tuning does with --model, --channels, --mean and deep images: honour them, or refuse in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import simmim
from simmim.data.statistics import IMAGENET_MEAN
from simmim.errors import UserError
from simmim.training.run_directory import Run

SMALL: dict[str, Any] = {
    "model_args": {"patch_size": 16, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "image_size": 32,
    "steps": 2,
    "batch_size": 4,
    "precision": "fp32",
    "device": "cpu",
    "workers": 1,
}
PLAIN: dict[str, Any] = {"rand_augment": 0.0, "mixup": 0.0, "cutmix": 0.0}


def folder(path: Path, channels: int, dtype: Any = np.uint8) -> Path:
    """Two classes of 6 images each, dark and bright."""
    layout: dict[str, Any] = {"planarconfig": "contig"} if channels > 1 else {}
    rng, top = np.random.default_rng(0), np.iinfo(dtype).max
    for number, label in enumerate(("dark", "bright")):
        (path / label).mkdir(parents=True)
        for image in range(6):
            pixels = rng.integers(number * top // 2, (number + 1) * top // 2, (40, 40, channels)).astype(dtype)
            if dtype == np.uint8 and channels in (1, 3):
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path / label / f"{image}.png")
            else:
                tifffile.imwrite(path / label / f"{image}.tif", pixels.squeeze(), photometric="minisblack", **layout)
    return path


def finetune(out: Path, data: Path, init: str, **more: Any) -> Run:
    return simmim.finetune("classify", out=str(out), data=str(data), init=init, **{**SMALL, **PLAIN, **more})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs") / "colour"
    simmim.pretrain(
        data="demo",
        out=str(out),
        model="vit_tiny_patch16_224",
        mask_cell=16,
        val_images=0,
        objectives=["pixels"],
        **SMALL,
    )
    return str(out)


def settings_of(run: Run) -> Any:
    from simmim.config.tasks import ClassifyConfig

    return run.read_config(ClassifyConfig)


def test_another_model_than_the_runs_is_refused(pretrained: str, tmp_path: Path) -> None:
    match = rf"--model vit_base_patch16_224 is not the encoder of --from {pretrained}, which is vit_tiny_patch16_224"
    with pytest.raises(UserError, match=match):
        finetune(tmp_path / "run", folder(tmp_path / "data", 3), pretrained, model="vit_base_patch16_224")


def test_channels_that_are_asked_for_adapt_the_runs_first_layer(pretrained: str, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", folder(tmp_path / "data", 1), pretrained, channels=1)
    config = settings_of(run)
    assert config.channels == 1
    assert config.mean == pytest.approx((0.5,), abs=0.05)  # the mean that the images have, not one of ImageNet's


def test_the_mean_that_is_asked_for_is_taken(pretrained: str, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 3)
    measured = settings_of(finetune(tmp_path / "a", data, pretrained, mean="measure", std="measure"))
    assert measured.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.05)
    own = settings_of(finetune(tmp_path / "b", data, pretrained))
    assert own.mean == IMAGENET_MEAN  # the run's


def test_a_resumed_fine_tuning_keeps_the_mean_that_it_measured(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "data", 3)
    asked: dict[str, Any] = {"mean": "measure", "std": "measure"}
    before = settings_of(finetune(tmp_path / "a", data, pretrained, **asked))
    other = ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))  # as on a machine that rounds otherwise
    monkeypatch.setattr("simmim.torch_engine.tasks.backbones.measure_mean_std", lambda *_, **__: other)
    assert settings_of(finetune(tmp_path / "a", data, pretrained, **asked)).mean == before.mean


def test_a_mean_for_other_channels_than_the_runs_is_refused(pretrained: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mean has 1 values for 3 channels"):
        finetune(tmp_path / "run", folder(tmp_path / "data", 3), pretrained, mean=(0.5,), std=(0.5,))


def test_scratch_takes_one_channel(tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", folder(tmp_path / "data", 1), "scratch", model="vit_tiny_patch16_224", channels=1)
    assert len(settings_of(run).mean) == 1


def test_an_encoder_of_16_bit_images_is_fine_tuned_and_predicts(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 5, np.uint16)
    out = str(tmp_path / "pretrained")
    settings = {**SMALL, "data": str(data), "channels": 5, "val_images": 0, "mask_cell": 16}
    simmim.pretrain(out=out, model="vit_tiny_patch16_224", **settings)
    run = finetune(tmp_path / "run", data, out)
    found = simmim.predict(run.path, str(data / "dark"), device="cpu", out=str(tmp_path / "found"))
    assert not found["bad_images"]
    assert simmim.probe(out, str(data), device="cpu", k=2)["val_images"] > 0
    picture = found["images"][0]
    assert 0 <= picture["probability"] <= 1


def test_randaugment_refuses_16_bit_images_in_one_line(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", 1, np.uint16)
    with pytest.raises(
        UserError, match="RandAugment needs 8-bit images, and these have more bits; use --rand-augment 0"
    ):
        finetune(tmp_path / "run", data, "scratch", model="vit_tiny_patch16_224", channels=1, rand_augment=9.0)
