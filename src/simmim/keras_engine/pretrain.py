"""Pretraining with the Keras engine: from a configuration to a run."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import Gpu, Kernels
from simmim.config.validation import validated
from simmim.data.pipeline import Reading
from simmim.errors import UserError
from simmim.keras_engine.machine import Machine, Stepper
from simmim.keras_engine.model import MaskedImageModel, architecture_of, build_model
from simmim.keras_engine.optim import State
from simmim.keras_engine.storage import initialize, save_encoder
from simmim.keras_engine.trainer import KerasTrainer
from simmim.method.heads import TransformerHead
from simmim.method.masks import upsample_mask
from simmim.training.loop import Outcome
from simmim.training.masks import draw_masks
from simmim.training.pictures import PICTURED, reconstruction_panel
from simmim.training.plan import Batch
from simmim.training.pretrain_images import open_images
from simmim.training.pretrain_plan import Plan
from simmim.training.resume import asked_precision, hold_run
from simmim.training.run_directory import Run
from simmim.training.session import PretrainSession, Watch, parts
from simmim.training.trainer import find_start


def pretrain(config: PretrainConfig, watch: Watch | None = None) -> tuple[Run, Outcome]:
    """Pretrain or resume; see `simmim.pretrain`. Choose Keras's backend first (`use_backend`)."""
    config = validated(config)
    backend = keras.config.backend()
    architecture = architecture_of(config)
    check_options(config, backend, architecture.family)
    images = open_images(config, architecture.image_size)
    machine = open_machine(backend, config)
    check_batch(config, machine.devices)
    with hold_run(config, is_main=machine.rank == 0):
        plan = Plan.complete(
            config,
            images,
            patch=architecture.arguments.get("patch_size", 1),  # a convolutional net has none
            width=architecture.width,
            world=machine,
            backend=backend,
            image_size=config.image_size or architecture.image_size,
            device=machine.device,
            precision=choose_precision(asked_precision(config), machine.device),
            compile=True if config.compile is None else config.compile,
        )
        start = find_start(plan.config, machine)
        with machine.building():
            model = build_model(plan.config)  # before the run directory is made, since sizes may not fit
            # A checkpoint holds all weights, so a resumed run does not need those that it began from.
            origin = initialize(model, config.init_from) if config.init_from and not start else None
        return KerasPretrainSession(plan, machine, start, model, origin, config).train(watch)


def open_machine(backend: str, config: PretrainConfig) -> Machine:
    """Open the machine of a backend. Raises `UserError` for a device that is not here."""
    if backend == "jax":
        from simmim.keras_engine.jax_machine import JaxMachine

        return JaxMachine.find(config.device)
    from simmim.keras_engine.tensorflow_machine import TensorFlowMachine

    return TensorFlowMachine.find(config.device)


def check_options(config: PretrainConfig, backend: str, family: str) -> None:
    """Raise `UserError` for an option that this engine does not honour."""
    refused = {
        f"--device {config.device}": (config.device not in ("auto", "cpu", "cuda", "tpu"), "use --engine torch"),
        "--precision fp16": (config.precision == "fp16", "use bf16, which needs no loss scale"),
        "--encode visible": (config.encode != "all", "use --engine torch"),
        "--head transformer with another depth or width": (
            isinstance(config.head, TransformerHead) and config.head != TransformerHead(),
            "use depth 2 and width 256, or --engine torch",
        ),
        f"--mask {config.mask.kind}": (
            config.mask.guided,
            "use one that needs no model, such as random, or --engine torch",
        ),
        "objectives": (
            config.objectives != PretrainConfig.objectives,
            "leave out all but pixels with weight 1, or use --engine torch",
        ),
        "--masks-per-image": (config.masks_per_image > 1, "use 1, or --engine torch"),
        "--positions sincos": (config.positions != "model", "leave it out, or use --engine torch"),
        "--decode gpu": (config.decode != "cpu", "use --decode cpu, or --engine torch"),
        "--probe": (config.probe is not None, "use simmim probe on the run, or --engine torch"),
        "--accumulate-steps auto": (config.accumulate_steps is None, "give a number, or use --engine torch"),
        "--plain-step": (config.plain_step, "leave it out: a step of this engine is always the plain one"),
        "--no-compile": (config.compile is False and backend == "jax", "leave it out: JAX's step is always compiled"),
        "--kernels": (config.kernels != Kernels(), "leave it out: XLA has kernels of its own"),
        "--gpu": (config.gpu != Gpu(), "leave it out: XLA has kernels of its own"),
        "--async-save": (bool(config.async_save), "leave it out, or use --engine torch"),
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
    parts = devices * config.pieces
    if config.batch_size % parts:
        raise UserError(
            f"batch size {config.batch_size} does not divide among {devices} devices × "
            f"{config.pieces} accumulation steps; use a multiple of {parts}"
        )


def choose_precision(wanted: str, device: str) -> str:
    """Resolve `auto` to bf16 on accelerators; XLA's CPU code gains nothing from it."""
    if wanted != "auto":
        return wanted
    return "fp32" if device == "cpu" else "bf16"


class KerasPretrainSession(PretrainSession):
    """A pretraining with Keras."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        start: int,
        model: MaskedImageModel,
        origin: str | None,
        asked: PretrainConfig,
    ):
        super().__init__(plan, machine, start, plan.images.parts, asked)
        config = plan.config
        self._machine, self._model, self._origin = machine, model, origin
        self._stepper = machine.start(model, config)
        self.trainer = KerasTrainer(
            model, self._stepper, machine, plan.schedule, run=self.run, config=config, on_save=self._save_encoder
        )

    def read(self, reading: Reading) -> Iterator[Batch]:
        encoder = self._model.encoder
        return self.plan.batches(reading, patch=encoder.patch_size, drop_path_layers=encoder.drop_paths.layers)

    def judge(self) -> tuple[float, NDArray[np.uint8] | None]:
        return judge_and_draw(self._stepper, self._model, self.plan.config, self.val_pixels())

    def _save_encoder(self, state: State) -> None:
        save_encoder(self.run.encoder, self._model, state, self.plan.config)

    def hardware(self) -> tuple[str, int]:
        return self._machine.name, self._machine.devices

    def introduce(self) -> Iterator[str]:
        config, machine = self.plan.config, self._machine
        yield f"model      {config.model}, {self._model.count_params() / 1e6:.1f} M parameters"
        if self._origin:
            yield f"start      {self._origin} from {config.init_from}"
        yield (
            f"device     {machine.name}, {config.precision}, Keras on {config.backend}, {machine.size} "
            f"process{'es' * (machine.size > 1)}"
        )
        yield from self.plan.describe()


def judge_and_draw(
    stepper: Stepper, model: MaskedImageModel, config: PretrainConfig, pixels: NDArray[Any], epoch: int = 0
) -> tuple[float, NDArray[np.uint8] | None]:
    """Return the loss of images (B, H, W, C) in 0..255 under the masks of `epoch`, and a panel of the first of them.

    The loss is the mean over the hidden positions of all images, which go through the model in parts. The panel is
    `None` where the target shows no picture.
    """
    patch = model.encoder.patch_size
    masks = draw_masks(config, epoch, np.arange(len(pixels)), patch)
    sums, panels = [], []
    for part in parts(len(pixels), config):
        batch = {"image": pixels[part], "flip": np.zeros((len(pixels[part]), 0), bool), "mask": masks[part]}
        found, prediction = stepper.judge(batch)
        sums.append(found)
        if part.start < PICTURED:
            images = (pixels[part].astype(np.float32) - model.mean) * model.scale
            panels.append(model.target.to_pixels(np, prediction, images, model.encoder.stride))
    loss = float(model.loss.mean(*np.sum(sums, axis=0)))
    if panels[0] is None:
        return loss, None
    colours = (np.concatenate(panels)[:PICTURED] / model.scale + model.mean) / 255
    originals, hidden = pixels[:PICTURED] / np.float32(255), upsample_mask(masks[:PICTURED], patch)
    return loss, reconstruction_panel(originals, colours, hidden)
