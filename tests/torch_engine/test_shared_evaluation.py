"""Evaluation by several processes, each of its share of the images, against one process."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simmim.config.tasks import ClassifyConfig
from simmim.data.labelled.classes import open_labelled
from simmim.errors import TrainingFailedError, UserError
from simmim.torch_engine.tasks.base import Task, TaskStep, evaluate
from simmim.torch_engine.tasks.classify import ClassifyTask
from simmim.torch_engine.train import distributed
from simmim.training.run_directory import Run

from . import test_detect, test_segment, tiny, worker

slow = pytest.mark.slow


def draw_classes(root: Path, val: int) -> Path:
    """Noise of two classes, of which the second has half as many images to evaluate on; the second image is broken."""
    random = np.random.default_rng(0)
    for name, counts in {"a": (4, val), "b": (4, val // 2)}.items():
        for part, count in zip(("train", "val"), counts, strict=True):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    (root / "val" / "a" / "1.png").write_bytes(b"no image")
    return root


DRAW: dict[str, Callable[[Path, int], Path]] = {
    "classify": draw_classes,
    "segment": test_segment.draw_data,
    "detect": test_detect.draw_data,
}


def open_task(name: str, data: Path) -> Any:
    if name == "segment":
        return test_segment.task(test_segment.config(data))
    if name == "detect":
        return test_detect.task(test_detect.config(data, detector="mask_rcnn"))
    kind = tiny.KINDS["resnet18"]
    settings: dict[str, Any] = {"init": "scratch", "model": kind.model, "model_args": kind.arguments, "channels": 3}
    settings |= {"image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "layer_decay": 1.0, "workers": 1}
    settings |= {"data": str(data), "out": "unused", "device": "cpu", "precision": "fp32", "max_bad_fraction": 0.5}
    return ClassifyTask(ClassifyConfig(**settings), open_labelled(str(data)), None)


def build(task: Task, seed: int) -> TaskStep:
    """Build a step whose batch norms have statistics by the seed, as after steps on other images."""
    torch.manual_seed(0)
    step = task.build()
    torch.manual_seed(seed)
    for module in step.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
    return step


def have_little_memory(step: TaskStep) -> None:
    def check(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError

    step.backbone.register_forward_pre_hook(check)


def judge_together(root: Path, name: str, *, little_memory: bool = False) -> None:
    """Run by each process: evaluate with the others, then alone on rank 0."""
    with distributed.join("cpu") as world:
        task = open_task(name, root / "data")
        step = build(task, seed=world.rank)
        if little_memory and not world.is_main:
            have_little_memory(step)
        found = evaluate(task, step, root / "together", world)
        if not world.is_main:
            assert found == {}
            return
        expected = evaluate(task, step, root / "alone", distributed.World(device=world.device))
        print("together", found, "alone", expected)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def assert_the_same_is_written(root: Path) -> None:
    alone, together = (sorted(file.relative_to(root / each) for file in (root / each).rglob("*"))
                       for each in ("alone", "together"))  # fmt: skip
    assert alone == together
    for file in (Path("per_class.json"), Run(Path()).latest_evaluation):
        one, two = (json.loads((root / each / file).read_text()) for each in ("alone", "together"))
        assert rounded(one) == rounded(two)


def rounded(value: Any) -> Any:
    """JSON with its floating-point numbers to 4 digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("name", "images", "processes", "others"),
    [
        ("classify", 6, 2, {"little_memory": True}),
        *(pytest.param(*case, marks=slow) for case in (
            ("classify", 7, 2, {}),
            ("classify", 2, 4, {}),
            ("segment", 3, 2, {}),
            ("segment", 3, 2, {"little_memory": True}),
            ("segment", 2, 3, {}),
            ("detect", 5, 2, {}),
            ("detect", 5, 2, {"little_memory": True}),
            ("detect", 2, 3, {}),
        )),
    ],
)  # fmt: skip
def test_processes_that_share_the_images_find_what_one_finds(
    name: str, images: int, processes: int, others: dict[str, Any], tmp_path: Path
) -> None:
    DRAW[name](tmp_path / "data", images)
    for each in ("alone", "together"):
        (tmp_path / each).mkdir()
    worker.run_together(partial(judge_together, **others), tmp_path, name, log=tmp_path / "log", processes=processes)
    assert_the_same_is_written(tmp_path)


@slow
def test_what_a_process_cannot_judge_is_an_error_on_all(tmp_path: Path) -> None:
    worker.run_together(fail_on_one, log=tmp_path / "log")


def fail_on_one() -> None:
    with distributed.join("cpu") as world:
        for raised, on_others in ((UserError, UserError), (torch.OutOfMemoryError, TrainingFailedError)):

            def compute(raised: type[Exception] = raised) -> int:
                if world.rank == 1:
                    raise raised("it is broken")
                return 0

            with pytest.raises(raised if world.rank == 1 else on_others) as error:
                world.collect(compute)
            assert str(error.value) == ("it is broken" if world.rank == 1 else "rank 1: it is broken")
        assert world.collect(lambda: 10 + world.rank) == [10, 11]
