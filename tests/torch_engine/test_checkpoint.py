"""Checkpoints: whole or not at all, and what is done about damage."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from simmim.disk import WriteError
from simmim.errors import TrainingFailedError, UserError
from simmim.torch_engine.train import checkpoint as checkpoint_module
from simmim.torch_engine.train.checkpoint import (
    EXTRA,
    CheckpointSaver,
    load_checkpoint,
    load_model_state,
    save_checkpoint,
)
from simmim.torch_engine.train.update import Update
from simmim.training import checkpoint_directory as checkpoints
from simmim.training.checkpoint_directory import MANIFEST, aside_path, checkpoint_path, newest_checkpoint

from . import tiny

SETTINGS = tiny.config("resnet18")


@pytest.fixture
def trained() -> Update:
    update = tiny.update(SETTINGS)
    update(0, tiny.batch(SETTINGS))
    return update


def save(directory: Path, step: int, update: Update, keep: int = 2) -> Path:
    return save_checkpoint(directory, step, update.model, update.optimizer, update.state(), world=tiny.CPU, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_restores_weights_statistics_optimiser_and_counts(trained: Update, tmp_path: Path) -> None:
    trained(1, tiny.batch(SETTINGS, broken=True))
    path = save(tmp_path, 2, trained)
    other = tiny.update(tiny.config("resnet18", seed=1))
    other.load_state(load_checkpoint(path, other.model, other.optimizer))
    tiny.assert_same(tiny.state(other), tiny.state(trained))
    assert other.state() == trained.state() == {"good": 0.0, "bad": 1.0, "scale": 1.0}


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(trained: Update, tmp_path: Path) -> None:
    other = tiny.update(SETTINGS)
    load_checkpoint(save(tmp_path, 1, trained), other.model, other.optimizer)
    for step in (1, 2):
        figures = [update(step, tiny.batch(SETTINGS, seed=step))[1] for update in (trained, other)]
        assert torch.equal(*figures)
    tiny.assert_same(tiny.state(other), tiny.state(trained))


def test_the_model_alone_can_be_loaded(trained: Update, tmp_path: Path) -> None:
    other = tiny.update(tiny.config("resnet18", seed=1)).model
    load_model_state(save(tmp_path, 1, trained), other)
    tiny.assert_same(other.state_dict(), trained.model.state_dict())


@pytest.mark.parametrize(
    ("model_args", "reason"),
    [({"channels": [8, 16, 32, 32]}, "Size mismatch"), ({"layers": [3, 2, 2, 2]}, "Missing key")],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    trained: Update, tmp_path: Path, model_args: dict[str, Any], reason: str
) -> None:
    arguments = tiny.KINDS["resnet18"].arguments | model_args
    other = tiny.update(tiny.config("resnet18", model_args=arguments))
    with pytest.raises(UserError, match=rf"step-00000001 is of another model \({reason}[^\n]*--fresh$"):
        load_checkpoint(save(tmp_path, 1, trained), other.model, other.optimizer)


def test_the_newest_are_kept(trained: Update, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, trained, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_good_one(trained: Update, tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step, trained, keep=1 if step == 5 else 2)
    flip_a_byte(checkpoint_path(tmp_path, 10) / EXTRA)
    save(tmp_path, 7, trained, keep=1)  # resumed after 5
    assert names(tmp_path) == ["step-00000007"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte in the weights": lambda path: flip_a_byte(next(path.glob("*.distcp"))),
    "a flipped byte in the metadata": lambda path: flip_a_byte(path / ".metadata"),
    "a flipped byte in what the host keeps": lambda path: flip_a_byte(path / EXTRA),
    "a file that is gone": lambda path: next(path.glob("*.distcp")).unlink(),
    "a manifest that is gone": lambda path: (path / MANIFEST).unlink(),
    "a manifest that is cut off": lambda path: (path / MANIFEST).write_text('{"extra.js'),
    "a manifest of something else": lambda path: (path / MANIFEST).write_text("[]"),
    "a manifest that is empty": lambda path: (path / MANIFEST).write_text(""),
    "a manifest that is no text": lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
    "nothing in it": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(trained: Update, tmp_path: Path, damage: str) -> None:
    good, bad = (save(tmp_path, step, trained) for step in (1, 2))
    DAMAGES[damage](bad)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged \([^\n]+\); trying the one before it$"):
        assert newest_checkpoint(tmp_path) == good


def test_damage_to_every_checkpoint_is_an_error_of_one_line(trained: Update, tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_byte(next(save(tmp_path, step, trained).glob("*.distcp")))
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="every") as error:
        newest_checkpoint(tmp_path)
    assert str(error.value) == f"every checkpoint in {tmp_path} is damaged; start again with --fresh"


def test_an_intact_checkpoint_gives_no_warning(trained: Update, tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path) == path


def test_a_save_in_the_background_holds_the_state_from_which_training_went_on(
    trained: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, may_write = tiny.state(trained), threading.Event()
    write = checkpoint_module.save
    monkeypatch.setattr(checkpoint_module, "save", lambda *a, **b: (may_write.wait(60), write(*a, **b))[1])
    saver = CheckpointSaver(tmp_path, tiny.CPU, keep=2, background=True)
    saver.save(1, trained.model, trained.optimizer, trained.state())
    trained(1, tiny.batch(SETTINGS, seed=1))
    assert newest_checkpoint(tmp_path) is None
    may_write.set()
    saver.settle()
    other = tiny.update(tiny.config("resnet18", seed=1))
    load_checkpoint(checkpoint_path(tmp_path, 1), other.model, other.optimizer)
    tiny.assert_same(tiny.state(other), expected)


def test_a_disk_that_is_full_in_the_background_is_told_and_leaves_the_checkpoint_before(
    trained: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(tmp_path, tiny.CPU, keep=2, background=True)
    saver.save(1, trained.model, trained.optimizer, trained.state())
    saver.settle()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoints, "to_disk", full)
    monkeypatch.setattr(checkpoint_module, "begin", lambda directory, step: aside_path(directory, step).mkdir())
    saver.save(2, trained.model, trained.optimizer, trained.state())
    with pytest.raises(WriteError, match=r"writing-00000002.* cannot be written: No space left"):
        saver.settle()
    assert names(tmp_path) == ["step-00000001"]


def test_ranks_that_have_parted_write_no_checkpoints_of_their_own(trained: Update, tmp_path: Path) -> None:
    two = dataclasses.replace(tiny.CPU, size=2)
    aside_path(tmp_path, 1).mkdir()
    saver = CheckpointSaver(tmp_path, two, keep=2)
    with pytest.raises(TrainingFailedError, match="the ranks have parted"):
        saver._write(1, {"model": trained.model.state_dict()}, {})
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("moment", ["_digest", "to_disk"])
def test_a_save_that_dies_half_way_leaves_the_checkpoint_before_and_no_rubbish(
    trained: Update, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1, trained)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, moment, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, trained)
    assert newest_checkpoint(tmp_path) == good
    save(tmp_path, 3, trained)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_no_directory_or_an_empty_one_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert newest_checkpoint(tmp_path) is None


def test_every_file_is_in_the_manifest(trained: Update, tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained)
    listed = json.loads((path / MANIFEST).read_text())
    assert {file.name for file in path.iterdir()} == {MANIFEST, *listed}


class Command:
    """Runs a command where it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.place}",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("place", ["description", "value"])
def test_a_checkpoint_that_would_run_code_is_refused(trained: Update, tmp_path: Path, place: str) -> None:
    ran, model = tmp_path / "ran", trained.model
    path = save(tmp_path, 1, trained)
    if place == "description":
        (path / ".metadata").write_bytes(pickle.dumps(Command(ran)))
    else:
        state = {"model": model.state_dict(), "optimizer": {"rate": Command(ran)}}
        save_state(state, checkpoint_id=path, no_dist=True)
    with contextlib.suppress(Exception, CheckpointException):
        load_state({"optimizer": {"rate": 0.0}}, checkpoint_id=path, no_dist=True)
    assert ran.exists()  # PyTorch alone runs it
    ran.unlink()
    with pytest.raises(UserError, match=r"^checkpoint \S+ is refused: .*; use runs of those whom you trust$"):
        load_model_state(path, model)
    assert not ran.exists()


class ByName(pickle.Pickler):
    """Writes an enumeration's members as Python before 3.11.4 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_python_before_3_11_4_is_read(trained: Update, tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained)
    description = pickle.loads((path / ".metadata").read_bytes())
    with (path / ".metadata").open("wb") as file:
        ByName(file).dump(description)
    assert b"getattr" in (path / ".metadata").read_bytes()
    load_model_state(path, trained.model)


class Attribute:
    """Asks for an attribute where it is read."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (TensorProperties, self.name)


def test_a_checkpoint_that_asks_for_other_attributes_is_refused(trained: Update, tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained)
    (path / ".metadata").write_bytes(pickle.dumps(Attribute("__init__")))
    with pytest.raises(UserError, match=r"is refused: it asks for __init__ of .*, which no checkpoint needs"):
        load_model_state(path, trained.model)
