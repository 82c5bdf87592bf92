"""Evaluations go on in smaller parts where memory runs out; `tests/nullgpu` lets it run out."""

import numpy as np
import pytest
import torch

from simmim.torch_engine.models.evaluating import by_halves
from simmim.torch_engine.train.pretrain import judge_and_draw
from simmim.torch_engine.train.storage import build_step

from . import tiny


def test_a_part_that_does_not_fit_is_halved_in_order() -> None:
    tried = []

    def compute(part: slice) -> list[int]:
        tried.append((part.start, part.stop))
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError
        return list(range(part.start, part.stop))

    found = list(by_halves(compute, [slice(0, 5), slice(5, 7)]))
    assert [item for part in found for item in part] == list(range(7))
    assert tried == [(0, 5), (0, 2), (2, 5), (2, 3), (3, 5), (5, 7)]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    def compute(part: slice) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(by_halves(compute, [slice(0, 2)]))


def test_the_loss_and_the_pictures_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("vit")
    step = build_step(config)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    loss, panel = judge_and_draw(step, config, pixels)
    predict = step.model.predict

    def little_memory(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return predict(images, mask)

    monkeypatch.setattr(step.model, "predict", little_memory)
    less, drawn = judge_and_draw(step, config, pixels)
    assert less == pytest.approx(loss, rel=1e-6)
    assert panel is not None and drawn is not None
    assert np.abs(panel.astype(int) - drawn).max() <= 1
