"""A training from its complete plan to its end, the same for every engine and task."""

import dataclasses
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.data.bad_images import count_listed
from simmim.data.pages import say_pages
from simmim.data.pipeline import Reading
from simmim.data.sources import ImageSource
from simmim.data.video.notes import describe_frames, warn_of_clips
from simmim.errors import UserError
from simmim.training.data_record import check_data
from simmim.training.loop import Event, Loop, Outcome
from simmim.training.pictures import save_png
from simmim.training.plan import Batch, TrainingPlan
from simmim.training.pretrain_plan import Plan
from simmim.training.resume import open_run, recall
from simmim.training.run_directory import Run
from simmim.training.trainer import Trainer, World
from simmim.training.whole_files import write_json

Watch = Callable[[Run, Callable[[str], None]], None]
"""What is called after each checkpoint, on the main process: the run, and what shows a line to the user."""


class Session(ABC):
    """One process's part in a training. A subclass builds the model and its `trainer`, and gives the parts that differ.

    `start` is the number of steps that a checkpoint holds already (`simmim.training.trainer.find_start`).
    """

    trainer: Trainer
    loop: Loop

    def __init__(
        self,
        plan: TrainingPlan,
        world: World,
        start: int,
        data: Mapping[str, ImageSource],
        asked: TrainingConfig | None = None,
    ):
        """Open the run directory, for a plan that completes the configuration `asked`.

        Raises `UserError` where it holds another run, or one of other images than `data`."""
        assert plan.config.out is not None
        self.warnings: list[str] = []
        self.plan, self.config, self.world, self.start = plan, plan.config, world, start
        self._frames = describe_frames(data["train"])
        if world.rank == 0:
            if plan.config.extend:
                self.warnings += _describe_extension(plan, start)
            self.warnings += filter(None, (say_pages(data["train"]), warn_of_clips(data["train"])))
            run = open_run(plan.config, asked)
            if change := check_data(run, data, accept=plan.config.accept_changed_data):
                self.warnings.append(f"the images changed since the run began: {change}")
        world.main_says(0)  # no process goes on before the directory is there
        self.run = Run(Path(plan.config.out))

    @abstractmethod
    def read(self, reading: Reading) -> Iterator[Batch]:
        """Yield the batches of this process."""

    @abstractmethod
    def hardware(self) -> tuple[str, int]:
        """Return the name of the hardware, and how many devices of it train."""

    @abstractmethod
    def introduce(self) -> Iterator[str]:
        """Yield lines that tell the user what will be done."""

    @abstractmethod
    def result(self) -> Iterable[str]:
        """Return lines that tell the user what a finished training gave."""

    def events(self) -> list[Event]:
        """Return the work to do between steps."""
        return []

    def train(self, watch: Watch | None = None) -> tuple[Run, Outcome]:
        """Resume, train to the end or to a signal, and tell the user about it."""
        self.trainer.resume(self.start)
        plan = self.plan
        self.loop = Loop(
            self.trainer,
            self.run,
            self.config,
            start=self.start,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            save_every_steps=plan.save_every_steps,
            batches=self.batches,
            events=self.events(),
            after_save=lambda: watch(self.run, self.loop.console.say) if watch else None,
        )
        if self.world.rank == 0 and self.start < plan.total_steps:
            self._note_hardware()
        for line in self.introduce():
            self.loop.console.say(line)
        if self._frames:
            self.loop.console.say(f"frames     {self._frames}")
        if 0 < self.start < plan.total_steps:
            self.loop.console.say(f"resumes    after step {self.start}")
        for warning in self.warnings:
            self.loop.console.say(f"warning    {warning}")
        outcome = dataclasses.replace(self.loop.fit(), is_main=self.world.rank == 0)
        for line in self._conclude(outcome) if self.world.rank == 0 else ():
            self.loop.console.say(line)
        return self.run, outcome

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield a batch for each step from `start_step` on."""
        bad_images, world = self.plan.bad_images(self.run), self.world
        return self.read(self.plan.reading(bad_images, start_step=start_step, rank=world.rank, world=world.size))

    def _note_hardware(self) -> None:
        name, devices = self.hardware()
        facts = self.run.machine_facts()
        begun = [each for each in facts.get("begun", []) if each["step"] < self.start]
        begun.append({"step": self.start, "device": name, "devices": devices})
        write_json(self.run.machine, facts | {"begun": begun})

    def _conclude(self, outcome: Outcome) -> Iterator[str]:
        bad_images, total = count_listed(self.run.bad_images), self.plan.total_steps
        if bad_images:
            yield f"{bad_images} image{'s' * (bad_images > 1)} could not be read; {self.run.bad_images} lists them"
        if outcome.stopped_by is not None:
            why = ", as its time was up" if outcome.stopped_by == signal.SIGUSR1 else ""
            yield f"stopped at step {outcome.step} of {total}{why}; simmim resume {self.run.path} goes on"
            return
        if outcome.start >= total:
            yield f"finished already: {self.run.path} holds all {total} steps; --fresh starts again"
        else:
            yield f"done: {total} steps"
        yield from self.result()


def _describe_extension(plan: TrainingPlan, start: int) -> list[str]:
    """Say what another length does to the schedule of a run. Raises `UserError` for fewer steps than are done."""
    if start > plan.total_steps:
        raise UserError(f"{plan.config.out} holds {start} steps, more than {plan.total_steps}; give more steps")
    old = recall(plan.config)
    if old is None or (old.steps, old.epochs) == (plan.config.steps, plan.config.epochs):
        return []
    return [
        f"the {plan.config.schedule} schedule now spans {plan.total_steps} steps: the next step's rate is "
        f"{plan.schedule.at_update(min(start, plan.total_steps - 1)):.2e}, and the result is not that of a run of this "
        "length from the start"
    ]


def parts(count: int, config: PretrainConfig) -> list[slice]:
    """Split `count` validation images into parts that fit in memory wherever a training step does.

    Forward passes keep no activations, so a part may be larger than a piece of a step.
    """
    size = min(max(config.batch_size // config.pieces, 8), 64)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class PretrainSession(Session):
    """A pretraining: reconstruction pictures and validation loss on the images kept aside."""

    plan: Plan

    @abstractmethod
    def judge(self) -> tuple[float, NDArray[np.uint8] | None] | None:
        """Return the loss of the validation images and their panel, if the target shows one.

        Every process calls it; `None` where another process has the answer.
        """

    def events(self) -> list[Event]:
        images, drawn = self.plan.config.val_images, self.drawn()
        if not images or not drawn:
            return []
        # Rank 0 decides: a read error of one rank must not keep it out of an evaluation that all ranks take part in.
        able = self.world.rank != 0 or self.plan.can_validate(self.plan.bad_images(self.run))
        if not self.world.main_says(int(able)):
            self.warnings.append(f"none of the {images} images kept aside can be read: no pictures, no val_loss")
            return []
        return drawn

    def drawn(self) -> list[Event]:
        """Return what is judged and drawn by the images kept aside."""
        if not self.plan.config.reconstructs:
            return []
        return [Event(every_steps=self.plan.picture_every_steps, call=self._validate)]

    def val_pixels(self, most: int | None = None) -> NDArray[Any]:
        return self.plan.val_pixels(self.plan.bad_images(self.run), most)

    def result(self) -> Iterable[str]:
        return [f"the encoder is {self.run.encoder}"]

    def _validate(self, done: int) -> dict[str, float]:
        found: Any = self.judge()
        if found is None:
            return {}
        loss, panel = found
        if panel is not None and self.world.rank == 0:
            save_png(panel, self.run.reconstructions / f"step-{done:08d}.png")
            self.loop.picture(done, "reconstruction", panel)
        return {"val_loss": loss}
