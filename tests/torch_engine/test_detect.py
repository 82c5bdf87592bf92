"""Fine-tuning for detection: the session, its detectors, what they sample, and what they find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.cli import main
from simmim.config.tasks import DetectConfig
from simmim.data.bad_images import BadImages
from simmim.data.labelled.detection import decode_masks, open_detection
from simmim.errors import UserError
from simmim.metrics.coco import average_precision
from simmim.torch_engine.tasks.base import TaskPlan
from simmim.torch_engine.tasks.detect import DetectTask, draw_predicted, load_predictor
from simmim.torch_engine.tasks.detect_step import DetectStep, load_detector, save_detector
from simmim.training.plan import Batch

from . import tiny

COLOURS = {"red": (220, 60, 60), "blue": (60, 60, 220)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("detection"))


def draw_data(root: Path, val: int = 4) -> Path:
    """Eight images to train on and four to evaluate on, 40x56 pixels, with coloured squares; the last has none."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", val)):
        (root / part / "images").mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = np.full((40, 56, 3), 30, np.uint8)
            for category, colour in enumerate(COLOURS.values(), 5):
                if number == count - 1:
                    break
                top, left = (int(value) for value in (random.integers(0, 20), random.integers(0, 36)))
                pixels[top : top + 16, left : left + 18] = colour
                box = [left, top, 18, 16]
                corners = [left, top, left + 18, top, left + 18, top + 16, left, top + 16]
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": 288,
                        "iscrowd": 0,
                        "segmentation": [corners],
                    }
                )
            Image.fromarray(pixels).save(root / part / "images" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 56})
        categories = [{"id": number, "name": name} for number, name in enumerate(COLOURS, 5)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / part / "annotations.json").write_text(json.dumps(content))
    return root


def config(data: Path, kind: str = "resnet18", **settings: Any) -> DetectConfig:
    complete: dict[str, Any] = {
        "data": str(data),
        "out": "unused",
        "init": "scratch",
        "model": tiny.KINDS[kind].model,
        "model_args": tiny.KINDS[kind].arguments,
        "image_size": (64, 64),
        "channels": 3,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "batch_size": 4,
        "steps": 2,
        "lr": 3.2e-3,
        "warmup_epochs": 0.0,
        "layer_decay": 1.0,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "workers": 1,
        "pyramid_channels": 32,
    }
    return DetectConfig(**(complete | settings))


def task(settings: DetectConfig) -> DetectTask:
    assert settings.data
    return DetectTask(settings, open_detection(settings.data, masks=settings.detector == "mask_rcnn"), None)


def read_steps(made: DetectTask, step: DetectStep, tmp: Path, **place: Any) -> list[Batch]:
    plan = TaskPlan.complete(made.config, made.train_count)
    options: dict[str, Any] = {"start_step": 0, "rank": 0, "world": 1} | place
    return list(made.batches(plan.reading(BadImages(tmp / "bad.txt", total=8), **options), step))


def command(data: Path, out: Path, *more: str) -> list[str]:
    words = f"finetune detect --from scratch --data {data} --out {out} --model resnet18 --detector faster_rcnn"
    words += " --model-args channels=[8,16,32,64] --image-size 64 --batch-size 4 --pyramid-channels 16 --steps 4"
    words += " --precision fp32 --device cpu --workers 1 --eval-every-epochs 1 --save-every-steps 1"
    return [*words.split(), *more]


def test_a_run_holds_figures_a_picture_and_a_model_that_finds_what_they_judge(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(data, run, "--detector", "mask_rcnn", "--eval-every-epochs", "2")) == 0
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["step"] == 4
    assert {"map", "map50", "map75", "map_small", "segm_map", "segm_map50"} <= set(figures)
    assert set(json.loads((run / "per_class.json").read_text())) == set(COLOURS)
    assert Image.open(run / "detections.png").size == (4 * 390 - 6, 18 + 2 * 390 - 6)

    predictor = load_predictor(run / "model", "cpu")
    opened = open_detection(str(data))
    images = [np.asarray(Image.open(opened.val.name(index))) for index in range(4)]
    found = predictor.predict(images)
    results = [
        {"image_id": number, "category_id": opened.classes.index(box["label"]) + 1, "bbox": box["box"]}
        | {"score": box["score"], "segmentation": box["rle"]}
        for number, prediction in enumerate(found, 1)
        for box in prediction["boxes"]
    ]
    again = average_precision(opened.truth, results)[0]
    assert again["map"] == pytest.approx(figures["best"]["map"], abs=1e-6)
    json.dumps(found)
    picture = predictor.draw(images[0], found[0])
    assert picture.shape == (280, 392, 3)


def test_an_interrupted_detection_ends_as_an_uninterrupted_one(data: Path, interrupt: Callable[..., None]) -> None:
    interrupt(lambda out: command(data, out), at=3)


def test_a_mask_that_reaches_beyond_its_image_keeps_its_shape(data: Path) -> None:
    step = task(config(data, detector="mask_rcnn")).build()
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., :14, :] = 1  # the upper half of a box of 64 pixels: 32 rows of the letterbox, and of the image
    found = {"boxes": torch.tensor([[0.0, 0, 64, 64]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    [shown] = [step._place(found | {"masks": mask}, 48, 64)]
    np.testing.assert_allclose(shown.boxes, [[0, 0, 64, 48]])
    assert shown.masks is not None
    assert abs(decode_masks(shown.masks, 48, 64).sum() - 32 * 64) <= 64 * 2


def test_of_boxes_in_one_place_the_best_is_seen() -> None:
    best = {"label": "a", "score": 0.9, "box": [40, 60, 90, 80]}
    worst = {"label": "b", "score": 0.4, "box": [40, 60, 90, 80]}

    def rim(*boxes: dict[str, Any]) -> list[int]:
        return draw_predicted(np.zeros((256, 256, 3), np.uint8), {"boxes": [*boxes]}, ("a", "b"))[130, 40].tolist()

    assert rim(best, worst) == rim(best) != rim(worst)


@pytest.mark.parametrize(("detector", "size", "finest"), [("fcos", 96, 4), ("fcos", 128, 8), ("retinanet", 128, 8)])
def test_a_detector_of_one_stage_looks_at_stride_4_in_the_smallest_images_only(
    data: Path, detector: str, size: int, finest: int
) -> None:
    step = task(config(data, detector=detector, image_size=(size, size))).build()
    assert step.detector.backbone.strides[0] == finest
    levels = step.detector.backbone(torch.zeros(2, 3, size, size))
    assert levels["0"].shape[2:] == (size // finest, size // finest)


@pytest.mark.parametrize(
    ("detector", "size", "strides"),
    [
        ("fcos", 128, (8, 16)),
        ("fcos", 64, (4, 8, 16)),
        ("retinanet", 128, (4, 8, 16)),  # these have an anchor of 32/1024 of the image on their finest level
        ("faster_rcnn", 128, (2, 4, 8, 16)),
    ],
)
def test_fcos_alone_leaves_out_the_fine_levels_of_a_small_patch(
    data: Path, detector: str, size: int, strides: tuple[int, ...]
) -> None:
    eight = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    step = task(config(data, "vit", model_args=eight, detector=detector, image_size=(size, size))).build()
    assert step.detector.backbone.pyramid.strides == strides


@pytest.mark.parametrize("kind", ["vit", "resnet18"])
def test_a_saved_detector_keeps_the_levels_that_it_has(data: Path, tmp_path: Path, kind: str) -> None:
    settings = config(data, kind, detector="fcos", image_size=(128, 128))
    step = DetectStep(settings, len(COLOURS), None, levels=4)  # as versions that left out none had them
    save_detector(step, settings, tuple(COLOURS), tmp_path)
    loaded = load_detector(tmp_path, "cpu")[0]
    assert loaded.detector.backbone.strides == step.detector.backbone.strides
    assert len(loaded.detector.backbone.strides) == 6  # two are added


def test_boxes_of_fcos_that_have_shrunk_to_nothing_are_learned_again(data: Path, tmp_path: Path) -> None:
    made = task(config(data, detector="fcos"))
    step = made.build()
    last = step.detector.head.regression_head.bbox_reg
    [batch, _] = read_steps(made, step, tmp_path)
    with torch.no_grad():
        last.bias.fill_(-5)
    step(**{name: torch.from_numpy(array) for name, array in batch.items()})["loss/bbox_regression"].backward()
    assert (last.bias.grad < -1e-4).all()  # sides grow
    assert (step.eval().detector.head.regression_head([torch.zeros(1, 32, 4, 4)])[0] == 0).all()  # torchvision's boxes


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "fcos", "retinanet"])
def test_every_parameter_of_every_detector_learns(data: Path, tmp_path: Path, detector: str, kind: str) -> None:
    made = task(config(data, kind, detector=detector, drop_path=0.1))
    step = made.build()
    [batch, _] = read_steps(made, step, tmp_path)
    loss = step(**{name: torch.from_numpy(array) for name, array in batch.items()})["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    # DDP would wait for ever for a gradient that never comes.
    assert [name for name, p in step.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "fcos", "retinanet"])
def test_a_batch_without_any_object_is_learned_from(data: Path, tmp_path: Path, detector: str) -> None:
    made = task(config(data, detector=detector))
    step = made.build()
    [batch, _] = read_steps(made, step, tmp_path)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    for name in ("boxes", "label", "mask"):
        if name in tensors:
            tensors[name] = tensors[name][:, :0]
    loss = step(**tensors)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0


def test_what_is_sampled_depends_on_an_images_key_alone(data: Path) -> None:
    step = task(config(data)).build()
    matched = [torch.zeros(1000), torch.ones(1000), torch.zeros(1000)]
    sampler = step.detector.rpn.fg_bg_sampler
    step.keys.numbers = [3, 4, 5]
    torch.manual_seed(0)
    _, first = sampler(matched)
    step.keys.numbers = [5, 3]
    torch.manual_seed(1)
    _, again = sampler([matched[2], matched[0]])
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[2], again[0])
    assert not torch.equal(first[0], first[2])
    assert first[0].sum() == 256
    assert torch.initial_seed() == 1  # the generator of everything else is where it was


def test_batches_are_the_same_after_a_resume_and_among_processes(data: Path, tmp_path: Path) -> None:
    made = task(config(data, detector="mask_rcnn", drop_path=0.1))
    step = made.build()
    whole = read_steps(made, step, tmp_path)
    assert set(whole[0]) == {"image", "flip", "boxes", "label", "mask", "key", "drop_path"}
    [later] = read_steps(made, step, tmp_path, start_step=1)
    assert all((later[name] == array).all() for name, array in whole[1].items())
    ranks = [read_steps(made, step, tmp_path, rank=rank, world=2)[0] for rank in range(2)]
    for name in ("image", "flip", "key", "drop_path"):
        together = np.stack([part[name] for part in ranks], axis=1).reshape(whole[0][name].shape)
        assert (together == whole[0][name]).all()


@pytest.mark.parametrize("flip", [[True, False], [False, True], [True, True]])
def test_flipping_turns_image_boxes_and_masks_together(data: Path, tmp_path: Path, flip: list[bool]) -> None:
    made = task(config(data, "swin", detector="mask_rcnn"))
    step = made.build()
    [batch, _] = read_steps(made, step, tmp_path)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    flipped = step(**tensors | {"flip": torch.tensor([flip] * 4)})
    left, top, right, bottom = tensors["boxes"].unbind(-1)
    if flip[0]:
        left, right = 64 - right, 64 - left
    if flip[1]:
        top, bottom = 64 - bottom, 64 - top
    axes = [axis for axis, turned in zip((-1, -2), flip, strict=True) if turned]
    turned = {
        "image": tensors["image"].flip([axis - 1 for axis in axes]),
        "mask": tensors["mask"].flip(axes),
        "boxes": torch.stack((left, top, right, bottom), dim=-1),
        "flip": torch.zeros(4, 0, dtype=torch.bool),
    }
    torch.testing.assert_close(flipped, step(**tensors | turned))


def test_jittered_colours_are_those_of_the_key_and_leave_boxes_alone(data: Path, tmp_path: Path) -> None:
    read = [read_steps(made, made.build(), tmp_path) for made in (task(config(data, jitter=j)) for j in (0, 1, 1))]
    plain, first, again = (steps[0] for steps in read)
    assert (first["image"] == again["image"]).all()
    assert (first["image"] != plain["image"]).any()
    assert (first["boxes"] == plain["boxes"]).all()


def test_colours_of_other_than_1_or_3_channels_are_not_jittered(data: Path) -> None:
    with pytest.raises(UserError, match=r"^--jitter needs images of 1 or 3 channels, not of 4; leave it out"):
        task(config(data, channels=4, mean=(0.5,) * 4, std=(0.5,) * 4, jitter=0.5))


def test_boxes_are_fp32_though_the_network_is_bf16(data: Path) -> None:
    step = task(config(data)).build().eval()
    seen: list[torch.dtype] = []
    step.detector.roi_heads.box_coder.decode = lambda codes, boxes: (
        seen.append(codes.dtype) or torch.zeros(len(codes), 3, 4)
    )
    with torch.autocast("cpu", torch.bfloat16):
        step.find(np.zeros((1, 64, 64, 3), np.uint8), [(64, 64)])
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--data nowhere", "nowhere does not exist; give a folder with train/images and train/annotations.json"),
        (
            "--detector fcos --pyramid-channels 40",
            "pyramid channels 40 do not divide into the groups of 32 of fcos; use a multiple of 32",
        ),
        ("--scale-jitter 2 1", "scale jitter (2.0, 1.0) is not a range of positive numbers; use 0.1 2.0"),
        ("--image-size 48", "image size 48 is not a multiple of the stride 32 of resnet18; use 32 or 64"),
    ],
)
def test_detection_refuses_in_one_line(
    words: str, line: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, tmp_path / "run", *words.split())) == 2
    assert capsys.readouterr().err == f"simmim: {line}\n"
