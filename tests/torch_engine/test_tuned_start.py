"""`--from` a detector or a segmenter: training starts with all weights that fit, and not with the encoder's alone."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from simmim.cli import main
from simmim.data.labelled.detection import open_detection
from simmim.data.labelled.segmentation import open_segmentation
from simmim.errors import UserError
from simmim.torch_engine.tasks.backbones import find_origin
from simmim.torch_engine.tasks.detect import DetectTask
from simmim.torch_engine.tasks.detect_step import DetectStep, save_detector
from simmim.torch_engine.tasks.segment import SegmentTask
from simmim.training.run_directory import mark_task

from . import test_detect, test_segment


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return test_detect.draw_data(tmp_path_factory.mktemp("boxes"))


@pytest.mark.parametrize(
    ("detector", "kind", "of_classes"),
    [
        ("fcos", "resnet18", "classification_head.cls_logits"),
        ("retinanet", "resnet18", "classification_head.cls_logits"),
        ("faster_rcnn", "swin", "box_predictor"),
        ("mask_rcnn", "vit", "_predictor"),
    ],
)
@pytest.mark.parametrize("saved", [("red", "blue"), ("red", "green"), ("red", "green", "blue")])
def test_a_detector_keeps_all_but_the_layers_of_other_classes(
    boxes: Path, tmp_path: Path, detector: str, kind: str, of_classes: str, saved: tuple[str, ...]
) -> None:
    settings = test_detect.config(boxes, kind, detector=detector, init=str(tmp_path), classes=("red", "blue"))
    torch.manual_seed(1)
    old = DetectStep(settings, len(saved), None)
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter)
    save_detector(old, settings, saved, tmp_path / "model")
    mark_task(tmp_path / "model", "detect")
    data = open_detection(str(boxes), masks=detector == "mask_rcnn")
    new = DetectTask(settings, data, find_origin(settings).weights).build()
    before = old.detector.state_dict()
    fresh = {
        name
        for name, tensor in new.detector.state_dict().items()
        if before[name].shape != tensor.shape or not torch.equal(before[name], tensor)
    }
    assert all(of_classes in name for name in fresh)
    assert bool(fresh) == (saved != ("red", "blue"))
    assert any(of_classes in name and name.endswith("weight") for name in fresh) == bool(fresh)


@pytest.mark.parametrize("kind", ["vit", "resnet18"])
@pytest.mark.parametrize(("before", "after"), [(96, 128), (128, 96), (64, 96)])
def test_levels_of_one_stride_belong_together_in_images_of_another_size(
    boxes: Path, tmp_path: Path, kind: str, before: int, after: int
) -> None:
    settings = test_detect.config(boxes, kind, detector="fcos", init=str(tmp_path), image_size=(before, before))
    old = DetectStep(settings, 2, None)
    save_detector(old, settings, ("red", "blue"), tmp_path / "model")
    mark_task(tmp_path / "model", "detect")
    other = dataclasses.replace(settings, image_size=(after, after), classes=("red", "blue"))
    new = DetectTask(other, open_detection(str(boxes)), find_origin(other).weights).build()
    shared = set(old.detector.backbone.strides) & set(new.detector.backbone.strides)
    assert len(shared) == 6 - (128 in (before, after))
    levels = [
        {
            stride: step.detector.backbone.pyramid.levels[number]
            if kind == "vit"
            else step.detector.backbone.network.layer_blocks[number]
            for number, stride in enumerate(step.detector.backbone.pyramid.strides)
        }
        for step in (old, new)
    ]
    for stride in levels[0].keys() & levels[1].keys():
        expected, found = (level[stride].state_dict() for level in levels)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected, found = (step.detector.head.state_dict() for step in (old, new))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected, found = (step.backbone.state_dict() for step in (old, new))
    changed = {name for name in found if expected[name].shape != found[name].shape}
    assert changed == ({"pos_embed"} if kind == "vit" else set())
    assert all(torch.equal(expected[name], found[name]) for name in expected if name not in changed)


@pytest.mark.parametrize(("option", "value"), [("detector", "faster_rcnn"), ("pyramid_channels", 64)])
def test_a_detector_with_another_head_is_refused(boxes: Path, tmp_path: Path, option: str, value: object) -> None:
    settings = test_detect.config(boxes, detector="fcos", init=str(tmp_path))
    save_detector(DetectStep(settings, 2, None), settings, ("red", "blue"), tmp_path / "model")
    mark_task(tmp_path / "model", "detect")
    name, old = f"--{option.replace('_', '-')}", getattr(settings, option)
    with pytest.raises(UserError, match=f"has {name} {old} and not {value}; use {name} {old}, or give the encoder"):
        find_origin(dataclasses.replace(settings, **{option: value}))


def test_a_segmenter_keeps_all_but_the_layer_of_other_classes(tmp_path: Path) -> None:
    data = test_segment.draw_data(tmp_path / "data")
    assert main([*test_segment.command(data, tmp_path / "a"), "--steps", "2"]) == 0
    names = (data / "classes.txt").read_text().splitlines()
    for given, kept in ((names, True), ([*names[:-1], "another"], False)):
        settings = test_segment.config(data, init=str(tmp_path / "a"), classes=tuple(given), decoder_channels=16)
        origin = find_origin(settings)
        assert origin.weights is not None
        new = SegmentTask(settings, open_segmentation(str(data)), origin.weights).build().model.state_dict()
        same = {name: torch.equal(tensor, origin.weights[name]) for name, tensor in new.items()}
        assert {name for name in same if not same[name]} <= {"decoder.classifier.weight", "decoder.classifier.bias"}
        assert same["decoder.classifier.weight"] is kept


def test_a_training_from_a_detector_starts_and_resumes_without_it(
    boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(test_detect.command(boxes, first)) == 0
    again = test_detect.command(boxes, second, "--from", str(first), "--keep", "9")
    assert main(again) == 0
    shutil.rmtree(first)
    shutil.rmtree(second / "checkpoints" / "step-00000004")
    capsys.readouterr()
    assert main(again) == 0
    assert "resumes    after step 3" in capsys.readouterr().err


def test_a_detector_that_is_not_saved_yet_and_one_of_another_task_are_refused(
    boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert main(test_detect.command(boxes, first, "--steps", "1")) == 0
    capsys.readouterr()
    data = test_segment.draw_data(tmp_path / "data")
    assert main([*test_segment.command(data, tmp_path / "b"), "--from", str(first)]) == 2
    assert "is fine-tuned for detect, and no encoder; give it to simmim finetune detect" in capsys.readouterr().err
    assert main([*test_segment.command(data, tmp_path / "b"), "--from", str(first / "model")]) == 2
    assert "is fine-tuned for detect, and no encoder" in capsys.readouterr().err
    shutil.rmtree(first / "model")
    assert main(test_detect.command(boxes, tmp_path / "c", "--from", str(first))) == 2
    assert "has no model yet" in capsys.readouterr().err
