"""Pretraining with the Keras engine: from a configuration to a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from simmim.config.training import PretrainConfig, validated
from simmim.errors import UserError
from simmim.keras_engine.machine import Machine, Stepper, open_machine
from simmim.keras_engine.model import MaskedImageModel, architecture_of, build_model
from simmim.keras_engine.optim import State
from simmim.keras_engine.storage import initialize, save_encoder
from simmim.keras_engine.trainer import KerasTrainer
from simmim.method.masks import upsample_mask
from simmim.training.loop import Event, Loop, Outcome
from simmim.training.pictures import reconstruction_panel
from simmim.training.plan import Batch, Plan, draw_masks, open_images
from simmim.training.run_directory import Run, open_run, written_whole


def pretrain(config: PretrainConfig) -> tuple[Run, Outcome]:
    """Pretrain, or resume; see `simmim.keras_engine.pretrain`, which chooses Keras's backend first."""
    config = validated(config)
    backend = keras.config.backend()
    architecture = architecture_of(config)
    check_options(config, backend, architecture.family)
    images = open_images(config)
    machine = open_machine(backend, config)
    check_batch(config, machine.devices)
    plan = Plan.complete(
        config,
        images,
        patch=architecture.arguments.get("patch_size", 1),  # a convolutional net has none
        backend=backend,
        image_size=config.image_size or architecture.image_size,
        device=machine.device,
        precision=choose_precision(config.precision, machine.device),
        compile=True if config.compile is None else config.compile,
    )
    with machine.building():
        model = build_model(plan.config)  # before the run directory is made, since sizes may not fit
        started_from = initialize(model, config.init_from) if config.init_from else None
    if machine.rank == 0:
        open_run(plan.config)
    machine.main_says(0)
    session = Session(plan, machine, model)
    session.loop.introduce(session.introduce(started_from))
    outcome = session.loop.fit()
    bad_images = len(plan.bad_images(session.run))
    session.loop.conclude(outcome, bad_images, lambda: [f"the encoder is {session.run.encoder}"])
    return session.run, outcome


def check_options(config: PretrainConfig, backend: str, family: str) -> None:
    """One-line `ValueError` for an option that this engine does not honour."""
    refused = {
        "--precision fp16": (config.precision == "fp16", "use bf16, which needs no loss scale"),
        "--encode visible": (config.encode != "all", "use --engine torch"),
        "--decoder-depth": (config.decoder_depth != PretrainConfig.decoder_depth, "use 2, or --engine torch"),
        "--decoder-width": (config.decoder_width != PretrainConfig.decoder_width, "use 256, or --engine torch"),
        "--decode gpu": (config.decode != "cpu", "use --decode cpu, or --engine torch"),
        "--probe": (config.probe is not None, "use simmim probe on the run, or --engine torch"),
        "--plain-step": (config.plain_step, "leave it out: a step of this engine is always the plain one"),
        "--no-compile": (config.compile is False and backend == "jax", "leave it out: JAX's step is always compiled"),
        "--shard": (config.shard and backend != "jax", "use --backend jax"),
        "--checkpoint-activations": (
            config.checkpoint_activations and (backend != "jax" or family == "resnet"),
            "use --accumulate-steps to save memory, or a transformer on --backend jax",
        ),
    }
    for option, (given, remedy) in refused.items():
        if given:
            raise UserError(f"{option} is not for --engine keras --backend {backend}; {remedy}")


def check_batch(config: PretrainConfig, devices: int) -> None:
    parts = devices * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch size {config.batch_size} does not divide among {devices} devices × "
            f"{config.accumulate_steps} accumulation steps; use a multiple of {parts}"
        )


def choose_precision(wanted: str, device: str) -> str:
    """`auto` → bf16 on accelerators; XLA's CPU code gains nothing from it."""
    if wanted != "auto":
        return wanted
    return "fp32" if device == "cpu" else "bf16"


class Session:
    """One process's part in a pretraining: the model, and what happens as training goes."""

    def __init__(self, plan: Plan, machine: Machine, model: MaskedImageModel):
        config = plan.config
        assert config.out is not None
        self.plan, self.config, self.machine, self.model = plan, config, machine, model
        self.run = Run(Path(config.out))
        self.stepper = machine.start(model, config)
        self.trainer = KerasTrainer(
            model,
            self.stepper,
            machine,
            plan.schedule,
            self.batches,
            run=self.run,
            config=config,
            on_save=self._save_encoder,
        )
        self.loop = Loop(
            self.trainer,
            self.run,
            config,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            save_every_steps=plan.save_every_steps,
            events=[Event(every_steps=plan.picture_every_steps, call=self._show)] if config.val_images else [],
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        encoder = self.model.encoder
        bad_images, machine = self.plan.bad_images(self.run), self.machine
        reading = self.plan.reading(bad_images, start_step=start_step, rank=machine.rank, world=machine.processes)
        return self.plan.batches(reading, patch=encoder.patch_size, drop_path_layers=encoder.drop_paths.layers)

    def _show(self, done: int) -> dict[str, float]:
        """A reconstruction picture of the images kept aside, and their loss. The masks are always the same."""
        loss, panel = judge_and_draw(self.stepper, self.model, self.config, self.plan.val_pixels())
        if panel is not None and self.machine.rank == 0:
            with written_whole(self.run.reconstructions / f"step-{done:08d}.png") as path:
                save_png(panel, path)
            self.loop.picture(done, "reconstruction", panel)
        return {"val_loss": loss}

    def _save_encoder(self, state: State) -> None:
        save_encoder(self.run.encoder, self.model, state, self.config)

    def introduce(self, started_from: str | None) -> Iterator[str]:
        """What will be done, for a person."""
        config, machine = self.config, self.machine
        yield f"model      {config.model}, {self.model.count_params() / 1e6:.1f} M parameters"
        if started_from:
            yield f"start      {started_from} from {config.init_from}"
        yield (
            f"device     {machine.name}, {config.precision}, Keras on {config.backend}, {machine.processes} "
            f"process{'es' * (machine.processes > 1)}"
        )
        yield from self.plan.describe()


def judge_and_draw(
    stepper: Stepper, model: MaskedImageModel, config: PretrainConfig, pixels: NDArray[Any], epoch: int = 0
) -> tuple[float, NDArray[np.uint8] | None]:
    """Loss of images (B, H, W, C) in 0..255 under the masks of `epoch`, and their panel where the target shows one."""
    patch = model.encoder.patch_size
    mask = draw_masks(config, epoch, np.arange(len(pixels)), patch)
    loss, prediction = stepper.judge({"image": pixels, "flip": np.zeros(len(pixels), bool), "mask": mask})
    images = (pixels.astype(np.float32) - model.mean) * model.scale
    shown = model.target.to_pixels(np, prediction, images, model.encoder.stride)
    if shown is None:
        return loss, None
    colours = (shown / model.scale + model.mean) / 255
    return loss, reconstruction_panel(pixels / np.float32(255), colours, upsample_mask(mask, patch))


def save_png(pixels: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")
