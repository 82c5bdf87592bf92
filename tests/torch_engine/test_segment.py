"""Fine-tuning for segmentation: the session, its labels, its decoder and its predictions.

Shapes: `B` images, `C` channels, `H W` pixels, `K` classes.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import simmim
from simmim.cli import main
from simmim.config.tasks import SegmentConfig
from simmim.data.bad_images import BadImages
from simmim.data.labelled.segmentation import open_segmentation
from simmim.data.sources import ArrayImages
from simmim.method.random_keys import sample_keys
from simmim.torch_engine.tasks.augment import ColourJitter
from simmim.torch_engine.tasks.base import TaskPlan
from simmim.torch_engine.tasks.segment import SegmentTask, load_predictor
from simmim.torch_engine.tasks.segmenter import SegmentPredictor, build_segment_step, dice_loss
from simmim.torch_engine.train.finetune import parameter_groups
from simmim.training.plan import Batch

from . import tiny

COLOURS = np.array([(30, 30, 30), (220, 60, 60), (60, 60, 220)], np.uint8)
NAMES = ("ground", "red", "blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("segmentation"))


def draw_data(root: Path, val: int = 3) -> Path:
    """Eight images to train on and three to evaluate on, 40x56 pixels, whose colours are their classes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", val)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((40, 56), np.uint8)
            for k in (1, 2):
                top, left = random.integers(0, 20), random.integers(0, 36)
                mask[top : top + 16, left : left + 16] = k
            image = COLOURS[mask]
            mask[:3] = 255
            Image.fromarray(image).save(root / part / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def config(data: Path, **settings: Any) -> SegmentConfig:
    """A complete configuration: fp32 on the CPU, a tiny ResNet."""
    kind = tiny.KINDS["resnet18"]
    complete: dict[str, Any] = {
        "data": str(data),
        "out": "unused",
        "init": "scratch",
        "model": kind.model,
        "model_args": kind.arguments,
        "image_size": (32, 32),
        "channels": 3,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "batch_size": 4,
        "steps": 3,
        "lr": 3.2e-3,
        "warmup_epochs": 0.0,
        "layer_decay": 1.0,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "workers": 1,
        "decoder_channels": 16,
    }
    return SegmentConfig(**(complete | settings))


def task(settings: SegmentConfig) -> SegmentTask:
    assert settings.data
    return SegmentTask(settings, open_segmentation(settings.data), None)


def command(data: Path, out: Path, *more: str) -> list[str]:
    words = (
        f"finetune segment --from scratch --data {data} --out {out} --model resnet18 --model-args channels=[8,16,32,64]"
    )
    words += " --image-size 32 --batch-size 4 --decoder-channels 16 --precision fp32 --device cpu --steps 6"
    return [*words.split(), "--eval-every-epochs", "1", "--save-every-steps", "1", *more]


def test_a_run_holds_figures_pictures_and_a_model_that_predicts_as_they_say(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(data, run)) == 0
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["step"] == 6
    assert 0 <= figures["miou"] <= figures["best"]["miou"] <= 1
    table = json.loads((run / "per_class.json").read_text())
    assert tuple(table) == NAMES
    pictures = [Image.open(run / "overlays" / f"{number}-{number}.png") for number in range(3)]
    assert {picture.size for picture in pictures} == {(3 * 56 + 8, 40 + 16)}

    opened = open_segmentation(str(data))
    predictor = load_predictor(run / "model", "cpu")
    images = [np.asarray(Image.open(opened.val.name(index))) for index in range(3)]
    found = predictor.predict(images)
    true = np.stack([opened.val_mask(index) for index in range(3)])
    masks = np.stack([prediction["mask"] for prediction in found])
    judged = true != 255
    assert (true == masks)[judged].mean() == pytest.approx(figures["best"]["pixel_accuracy"])
    assert sum(found[0]["shares"].values()) == pytest.approx(1)
    assert found[0]["shares"] == {name: share for k, name in enumerate(NAMES) if (share := (masks[0] == k).mean())}
    assert predictor.draw(images[0], found[0]).shape == (40, 56, 3)
    written = simmim.predict(run, data / "val/images", out=str(tmp_path / "out"))["images"]
    assert [row["shares"] for row in written] == [prediction["shares"] for prediction in found]
    assert (np.stack([Image.open(tmp_path / "out" / row["mask"]) for row in written]) == masks).all()


def test_the_weights_of_a_pretraining_are_where_segmentation_starts(data: Path, tmp_path: Path) -> None:
    pretrained = f"--data {data}/train/images --out {tmp_path / 'a'} --model resnet18 --image-size 32 --mask-cell 16"
    small = "--batch-size 4 --val-images 2 --steps 1 --precision fp32 --model-args channels=[8,16,32,64]"
    assert main(["pretrain", *pretrained.split(), *small.split()]) == 0
    kept = ["--lr", "1e-12", "--warmup-lr", "0", "--min-lr", "0", "--from", str(tmp_path / "a")]
    assert main(command(data, tmp_path / "b", *kept)) == 0
    import simmim

    encoder = dict(simmim.load_encoder(tmp_path / "a").named_parameters())
    tuned = dict(load_predictor(tmp_path / "b" / "model", "cpu").step.backbone.named_parameters())
    assert encoder.keys() == tuned.keys()
    for name, tensor in encoder.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-6)


def test_an_interrupted_segmentation_ends_as_an_uninterrupted_one(data: Path, interrupt: Callable[..., None]) -> None:
    interrupt(lambda out: command(data, out), at=4)


def test_colours_that_are_classes_are_learned(data: Path, tmp_path: Path) -> None:
    plain = ["--jitter", "0", "--zoom", "1", "1", "--steps", "60", "--eval-every-epochs", "30", "--lr", "0.5"]
    assert main(command(data, tmp_path / "run", *plain, "--save-every-steps", "60")) == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["best"]["miou"] > 0.6  # ground alone would give 0.26


def read_steps(settings: SegmentConfig, tmp: Path, *, rank: int = 0, world: int = 1, first: int = 0) -> list[Batch]:
    made = task(settings)
    plan = TaskPlan.complete(settings, made.train_count)
    bad = BadImages(tmp / "bad.txt", total=8)
    return list(made.batches(plan.reading(bad, start_step=first, rank=rank, world=world), made.build()))


def test_labels_lie_on_their_images(data: Path, tmp_path: Path) -> None:
    for batch in read_steps(config(data, jitter=0.0), tmp_path):
        nearest = np.abs(batch["image"][..., None, :].astype(int) - COLOURS).sum(-1).argmin(-1)
        judged = batch["label"] != 255
        assert (nearest == batch["label"])[judged].mean() > 0.93  # edges are smoothed in the image only


def test_batches_are_the_same_after_a_resume_and_among_processes(data: Path, tmp_path: Path) -> None:
    settings = config(data, drop_path=0.1, model="vit_tiny_patch16_224", model_args={"depth": 2, "embed_dim": 48})
    whole = read_steps(settings, tmp_path)
    assert set(whole[0]) == {"image", "flip", "label", "drop_path"}
    shares = [read_steps(settings, tmp_path, rank=rank, world=2, first=1) for rank in range(2)]
    for step, parts in enumerate(zip(*shares, strict=True), start=1):
        for name, array in whole[step].items():
            together = np.stack([part[name] for part in parts], axis=1).reshape(array.shape)
            assert (together == array).all()


@pytest.mark.parametrize(("flip", "axes"), [([True, False], [2]), ([False, True], [1]), ([True, True], [1, 2])])
def test_flipping_turns_image_and_label_together(data: Path, flip: list[bool], axes: list[int]) -> None:
    step = task(config(data)).build().eval()
    image, label = torch.randint(0, 256, (2, 32, 32, 3)), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    flipped = step(image, torch.tensor([flip, flip]), label)
    torch.testing.assert_close(flipped, step(image.flip(axes), torch.zeros(2, 0, dtype=torch.bool), label.flip(axes)))


def test_the_loss_is_pytorchs_and_pixels_without_class_add_nothing(data: Path) -> None:
    step = task(config(data)).build().eval()
    image, label = torch.randint(0, 256, (2, 32, 32, 3)), torch.randint(0, 3, (2, 32, 32))
    stay = torch.tensor([[False], [False]])
    scores = functional.interpolate(step.model(step.normalize(image)), (32, 32), mode="bilinear")
    torch.testing.assert_close(step(image, stay, label)["loss"], functional.cross_entropy(scores, label))
    label[:, :16] = 255
    expected = functional.cross_entropy(scores[:, :, 16:], label[:, 16:]) / 2
    torch.testing.assert_close(step(image, stay, label)["loss"], expected)
    assert step(image, stay, torch.full_like(label, 255))["loss"] == 0


def test_the_dice_loss_is_that_of_each_images_classes_counted_one_by_one() -> None:
    labels = torch.tensor([[[0, 0, 2, 255]], [[1, 1, 1, 1]], [[255, 255, 255, 255]]])  # class 1 is in one image only
    scores = torch.randn(3, 3, 1, 4, requires_grad=True)
    losses = []
    for image, label in zip(scores.softmax(dim=1)[:2], labels, strict=False):
        judged = label != 255
        overlaps = [
            2 * image[k][label == k].sum() / (image[k][judged].sum() + (label == k).sum())
            for k in label[judged].unique()
        ]
        losses.append(1 - sum(overlaps) / len(overlaps))
    loss = dice_loss(scores, labels)
    torch.testing.assert_close(loss, torch.stack(losses).sum() / 3)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[2].any()


def test_dice_is_added_to_the_loss_with_its_weight(data: Path) -> None:
    torch.manual_seed(0)
    step = task(config(data, dice=0.5)).build().eval()
    image, label = torch.randint(0, 256, (2, 32, 32, 3)), torch.randint(0, 3, (2, 32, 32))
    stay = torch.tensor([[False], [False]])
    scores = functional.interpolate(step.model(step.normalize(image)), (32, 32), mode="bilinear")
    expected = functional.cross_entropy(scores, label) + 0.5 * dice_loss(scores, label)
    torch.testing.assert_close(step(image, stay, label)["loss"], expected)


def test_the_decoder_learns_at_full_rate_and_the_encoder_at_decayed_ones(data: Path) -> None:
    settings = config(data, model="vit_tiny_patch16_224", model_args={"depth": 2, "embed_dim": 48}, layer_decay=0.5)
    step = build_segment_step(settings, None, 3)
    names = {id(parameter): name for name, parameter in step.model.named_parameters()}
    groups = parameter_groups(step, settings)
    scales = {names[id(p)]: group.get("lr_scale", 1) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    assert {scale for name, scale in scales.items() if ".backbone." not in name} == {1}
    assert scales["pyramid.backbone.blocks.1.attn.qkv.weight"] == 0.5
    assert scales["pyramid.backbone.patch_embed.proj.weight"] == 0.125


class Thresholds(nn.Module):
    """Normalised images (B, 1, H, W) → scores (B, 2, H / 4, W / 4) of dark and bright."""

    def forward(self, images: Tensor) -> Tensor:
        grey = functional.avg_pool2d(images, 4)
        return torch.cat((-grey, grey), dim=1)


@pytest.mark.parametrize("evaluation", ["resize", "slide"])
@pytest.mark.parametrize("size", [(32, 64), (100, 72), (20, 500), (16, 24)])
def test_a_mask_has_the_images_size_and_place_however_the_model_sees_it(
    data: Path, evaluation: str, size: tuple[int, int]
) -> None:
    settings = config(data, channels=1, mean=(0.5,), std=(0.25,), image_size=(32, 64), evaluation=evaluation)
    step = build_segment_step(settings, None, 2)
    step.model = Thresholds()  # type: ignore[assignment]
    predictor = SegmentPredictor(step, settings, ("dark", "bright"), np.dtype(np.uint8))
    true = np.zeros(size, np.uint8)
    true[: size[0] // 2, size[1] // 2 :] = 1
    [mask, other] = predictor.masks([true[..., None] * np.uint8(255), np.zeros((40, 40, 1), np.uint8)])
    assert mask.shape == size and mask.dtype == np.uint8
    assert (mask != true).mean() < 0.06
    assert other.shape == (40, 40) and not other.any()


def test_windows_give_finer_masks_of_large_images_than_the_whole(data: Path) -> None:
    true = np.indices((160, 160)).sum(0) // 12 % 2  # stripes that a fifth of the size does not show
    agreed = {}
    for evaluation in ("resize", "slide"):
        settings = config(data, channels=1, mean=(0.5,), std=(0.25,), evaluation=evaluation)
        step = build_segment_step(settings, None, 2)
        step.model = Thresholds()  # type: ignore[assignment]
        predictor = SegmentPredictor(step, settings, ("dark", "bright"), np.dtype(np.uint8))
        [mask] = predictor.masks([(true[..., None] * 255).astype(np.uint8)])
        agreed[evaluation] = (mask == true).mean()
    assert agreed["slide"] > 0.85 > 0.7 > agreed["resize"]


def test_jittered_colours_depend_on_the_key_and_leave_one_of_sixteen_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    keys = sample_keys(0, 0, np.arange(200), stream="augment")
    jitter = ColourJitter(strength=0.5)
    first = [jitter(image, keys[i : i + 1]) for i in range(200)]
    assert all((picture == jitter(image, keys[i : i + 1])).all() for i, picture in enumerate(first))
    assert 1 <= sum((picture == image).all() for picture in first) <= 30
    assert jitter(image[..., :1], keys[:1]).shape == (16, 16, 1)


def test_images_whose_colours_cannot_be_jittered_are_refused(data: Path) -> None:
    deep = ArrayImages(np.zeros((1, 8, 8), np.uint16), "deep")
    opened = dataclasses.replace(open_segmentation(str(data)), train=deep)
    with pytest.raises(ValueError, match=r"^--jitter changes 8-bit images of 1 or 3 channels only"):
        SegmentTask(config(data, channels=1, mean=(0.5,), std=(0.5,)), opened, None)


def test_one_image_at_a_time_is_refused_since_its_batch_norms_would_have_nothing_to_average(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, tmp_path / "run", "--accumulate-steps", "4")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "simmim: the decoder's batch norms need 2 images at a time, and a process has 1; use --batch-size 8, or fewer "
        "processes or --accumulate-steps"
    )


def test_a_missing_mask_is_said_in_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "images").symlink_to(data / "train" / "images")
    (tmp_path / "train" / "masks").mkdir()
    assert main(command(tmp_path, tmp_path / "run")) == 2
    assert capsys.readouterr().err == (
        f"simmim: image {tmp_path}/train/images/0.png has no mask; write its class numbers to "
        f"{tmp_path}/train/masks/0.png\n"
    )
