"""Pretraining with the PyTorch engine: from a configuration to a run."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmim.accelerators import cpu_cores
from simmim.clusters import fit_colour_clusters
from simmim.config import PretrainConfig, validated
from simmim.data.augment import RandomResizedCrop
from simmim.data.pipeline import BadImages, eval_images, train_batches
from simmim.data.sources import ImageSource, Subset, open_source, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure_mean_std
from simmim.keys import sample_keys, uniforms
from simmim.masking import upsample_mask
from simmim.panels import reconstruction_panel
from simmim.run import Run, open_run, written_whole
from simmim.schedules import CosineSchedule, MultiStepSchedule, Schedule, scale_lr
from simmim.targets import block_means
from simmim.torch_engine import distributed
from simmim.torch_engine.encoders import default_image_size, find_family
from simmim.torch_engine.model import PretrainStep
from simmim.torch_engine.optim import create_optimizer
from simmim.torch_engine.storage import build_step, full_state, initialize, save_encoder
from simmim.torch_engine.trainer import Event, Outcome, Trainer
from simmim.torch_engine.update import Batch, Update


@dataclass(frozen=True)
class Data:
    """The images of a run: those to train on, those kept aside, and how they are stored."""

    train: ImageSource
    val: ImageSource
    dtype: np.dtype


def pretrain(config: PretrainConfig) -> tuple[Run, Outcome]:
    """Pretrain, or resume; see `simmim.pretrain`. One-line `ValueError` for what a user can mend."""
    config = validated(config)
    find_family(config.model)
    assert config.data is not None
    device = distributed.choose_device(config.device)
    source = open_source(config.data)
    dtype = sniff(source, channels=config.channels)
    with distributed.join(device) as world:
        distributed.check_world(config, world)
        data = split(source, dtype, config)
        config = resolve(config, data, device)
        torch.manual_seed(config.seed)
        step = build_step(config)
        create_schedule(config, data)  # says what is wrong before a run directory is made
        if world.is_main:
            open_run(config)
        world.barrier()
        session = Session(config, data, world, step)
        session.introduce()
        outcome = session.trainer.fit()
        session.conclude(outcome)
        return session.run, outcome


def split(source: ImageSource, dtype: np.dtype, config: PretrainConfig) -> Data:
    """Keep `val_images` aside, drawn by the seed."""
    order = np.random.default_rng([config.seed, 0]).permutation(len(source))
    val, train = np.sort(order[: config.val_images]), np.sort(order[config.val_images :])
    if len(train) < config.batch_size:
        raise ValueError(
            f"batch size {config.batch_size} is more than the {len(train)} images to train on; "
            f"use --batch-size {max(len(train), 1)} or less"
        )
    return Data(Subset(source, train), Subset(source, val), dtype)


def resolve(config: PretrainConfig, data: Data, device: str) -> PretrainConfig:
    """The configuration with nothing left open, as `RUN/config.toml` records it."""
    changes: dict[str, Any] = {
        "image_size": config.image_size or default_image_size(config.model),
        "device": device,
        "precision": distributed.choose_precision(config.precision, device),
        "compile": device != "cpu" if config.compile is None else config.compile,
        "workers": config.workers or cpu_cores(),
    }
    if config.mean is None and config.channels == 3 and data.dtype == np.uint8:
        changes |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    elif not (isinstance(config.mean, tuple) and isinstance(config.std, tuple)):
        mean, std = measure_mean_std(data.train, channels=config.channels, dtype=data.dtype, seed=config.seed)
        changes |= {"mean": mean, "std": std}
    if config.warmup_epochs is None:
        changes["warmup_epochs"] = min(10.0, epochs(config, data) / 10)
    config = dataclasses.replace(config, **changes)
    if config.target == "clusters" and config.cluster_centres is None:
        config = dataclasses.replace(config, cluster_centres=find_clusters(config, data))
    return config


def find_clusters(
    config: PretrainConfig, data: Data, *, images: int = 500, block: int = 4
) -> tuple[tuple[float, ...], ...]:
    assert config.image_size is not None
    indices = np.random.default_rng([config.seed, 1]).permutation(len(data.train))[:images]
    pixels = eval_images(data.train, indices, size=config.image_size, channels=config.channels, dtype=data.dtype)
    normal = (pixels / np.float32(255) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    colours = block_means(np, normal, block).reshape(-1, config.channels)
    chosen = np.random.default_rng([config.seed, 2]).permutation(len(colours))[:100_000]
    return fit_colour_clusters(colours[chosen], clusters=config.clusters, seed=config.seed)


def steps_per_epoch(config: PretrainConfig, data: Data) -> int:
    return len(data.train) // config.batch_size


def total_steps(config: PretrainConfig, data: Data) -> int:
    return config.steps or math.ceil(config.epochs * steps_per_epoch(config, data))


def epochs(config: PretrainConfig, data: Data) -> float:
    return total_steps(config, data) / steps_per_epoch(config, data)


def create_schedule(config: PretrainConfig, data: Data) -> Schedule:
    assert config.warmup_epochs is not None
    per_epoch, total = steps_per_epoch(config, data), total_steps(config, data)
    warmup_steps = round(config.warmup_epochs * per_epoch)
    if warmup_steps > total:
        raise ValueError(
            f"warm-up of {config.warmup_epochs:g} epochs is longer than the run of {total / per_epoch:.3g}; "
            f"use --warmup-epochs {total / per_epoch / 10:.3g}"
        )
    common = {
        "peak_lr": scale_lr(config.lr, config.batch_size),
        "warmup_lr": scale_lr(config.warmup_lr, config.batch_size),
        "warmup_steps": warmup_steps,
    }
    if config.schedule == "cosine":
        return CosineSchedule(**common, min_lr=scale_lr(config.min_lr, config.batch_size), total_steps=total)
    return MultiStepSchedule(**common, milestones=tuple(round(epoch * per_epoch) for epoch in config.milestones))


class Session:
    """One process's part in a pretraining: model, data and what happens as training goes."""

    def __init__(self, config: PretrainConfig, data: Data, world: distributed.World, step: PretrainStep):
        assert config.out is not None and config.image_size is not None and config.workers is not None
        assert config.precision != "auto"
        self.config, self.data, self.world = config, data, world
        self.run = Run(Path(config.out))
        self.masks = config.mask_strategy()
        self.total, self.per_epoch = total_steps(config, data), steps_per_epoch(config, data)

        self.step = step
        self.initialized = initialize(step.model, config.init_from) if config.init_from else None
        self.step.to(world.device)
        if config.checkpoint_activations:
            self.step.model.encoder.backbone.set_grad_checkpointing(True)
        self.backbone = self.step.model.encoder.backbone
        self.bad_images = BadImages(self.run.bad_images, total=len(data.train), max_fraction=config.max_bad_fraction)
        save_every = config.save_every_steps or max(self.per_epoch, 100)
        if config.compile:
            self.step.compile(dynamic=False)
        model = distributed.spread(self.step, world, shard=config.shard)
        self.trainer = Trainer(
            config=config,
            world=world,
            run=self.run,
            update=Update(
                model,
                create_optimizer(model, weight_decay=config.weight_decay, betas=config.betas, device=world.device),
                create_schedule(config, data),
                config=config,
                world=world,
            ),
            total_steps=self.total,
            steps_per_epoch=self.per_epoch,
            batches=self.batches,
            save_every_steps=save_every,
            events=self._events(config.picture_every_steps or save_every),
            on_save=self._save_encoder,
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This process's batches from `start_step` on, with the masks and drop-path numbers of their images."""
        config = self.config
        assert config.image_size is not None and config.workers is not None
        patch, layers = self.step.model.encoder.patch_size, self.step.model.encoder.drop_path_draws.layers
        for images in train_batches(
            self.data.train,
            crop=RandomResizedCrop(size=config.image_size),
            channels=config.channels,
            dtype=self.data.dtype,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            total_steps=self.total,
            rank=self.world.rank,
            world=self.world.size,
            threads=config.workers,
            bad_images=self.bad_images,
        ):
            epoch, index = images["epoch"], images["index"]
            batch: Batch = {
                "image": images["image"],
                "flip": images["flip"],
                "mask": draw_masks(config, epoch, index, patch),
            }
            if layers:
                keys = sample_keys(config.seed, epoch, index, stream="drop_path")
                batch["drop_path"] = uniforms(keys, layers).astype(np.float32)
            yield batch

    def _events(self, every_steps: int) -> list[Event]:
        if not self.config.val_images:
            return []
        return [Event(every_steps=every_steps, call=self._show)]

    def _show(self, done: int) -> dict[str, float]:
        """A reconstruction picture of the images kept aside, and their loss. The masks are always the same."""
        model = self._whole_model()
        if not self.world.is_main or model is None:
            return {}
        config = self.config
        assert config.image_size is not None
        pixels = eval_images(
            self.data.val,
            range(len(self.data.val)),
            size=config.image_size,
            channels=config.channels,
            dtype=self.data.dtype,
        )
        loss, panel = judge_and_draw(model, config, pixels)
        if panel is not None:
            with written_whole(self.run.reconstructions / f"step-{done:08d}.png") as path:
                save_png(panel, path)
            self.trainer.picture(done, "reconstruction", panel)
        return {"val_loss": loss}

    def _whole_model(self) -> PretrainStep | None:
        """The model to look at between steps: the one that trains or, if sharded, a copy on the main process."""
        if not self.config.shard:
            return self.step
        state = full_state(self.trainer.update.model, sharded=True)
        if not self.world.is_main:
            return None
        copy = build_step(self.config)
        copy.load_state_dict(state)
        return copy.to(self.world.device)

    def _save_encoder(self) -> None:
        state = full_state(self.trainer.update.model, sharded=self.config.shard)
        if self.world.is_main:
            prefix = "model.encoder.backbone."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            save_encoder(self.run.encoder, self.backbone, weights, self.config)

    def introduce(self) -> None:
        """Say what will be done, before the first step."""
        config, say = self.config, self.trainer.console.say
        assert config.image_size is not None
        parameters = sum(parameter.numel() for parameter in self.step.parameters())
        height, width = config.image_size
        rows, columns = self.masks.grid(config.image_size)
        hidden = self.masks.masked_cells(config.image_size)
        say(f"model      {config.model}, {parameters / 1e6:.1f} M parameters")
        say(f"images     {height}x{width} pixels, {config.channels} channels")
        if self.initialized:
            say(f"start      {self.initialized} from {config.init_from}")
        say(f"data       {config.data}: {len(self.data.train)} images to train on, {len(self.data.val)} kept aside")
        say(
            f"device     {distributed.device_name(self.world.device)}, {config.precision}"
            f"{', compiled' if config.compile else ''}, {self.world.size} process{'es' * (self.world.size > 1)}"
        )
        say(f"masks      {config.mask}: {hidden} of {rows * columns} cells of {config.mask_cell} pixels hidden")
        peak = scale_lr(config.lr, config.batch_size)
        say(f"learning   {config.target} by {config.loss}, learning rate {peak:.2e}, {config.schedule}")
        say(
            f"steps      {self.total} of {config.batch_size} images, {self.per_epoch} an epoch"
            + (f", from step {self.trainer.start}" if self.trainer.start else "")
        )
        say(f"writes     {self.run.path}")

    def conclude(self, outcome: Outcome) -> None:
        say = self.trainer.console.say
        if bad := len(self.bad_images):
            say(f"{bad} images could not be read; they are listed in {self.run.bad_images}")
        if outcome.stopped_by is not None:
            say(f"stopped at step {outcome.step} of {self.total}; run the same command again to resume")
        elif self.trainer.start >= self.total:
            say(f"finished already: {self.run.path} holds all {self.total} steps; --fresh starts again")
        else:
            say(f"done: {outcome.step} steps; the encoder is {self.run.encoder}")


def draw_masks(config: PretrainConfig, epoch: Any, index: np.ndarray, patch: int) -> np.ndarray:
    """The masks (B, H/patch, W/patch) of images (B,) in epochs (B,) or one epoch."""
    assert config.image_size is not None
    masks = config.mask_strategy()
    cells = masks(sample_keys(config.seed, epoch, index, stream="mask"), config.image_size)
    return upsample_mask(cells, masks.cell // patch)


@torch.no_grad()
def judge_and_draw(
    step: PretrainStep, config: PretrainConfig, pixels: np.ndarray, epoch: int = 0
) -> tuple[float, np.ndarray | None]:
    """Loss of images (B, H, W, C) in 0..255 under the masks of `epoch`, and their panel where the target shows one."""
    model, training = step.model.eval(), step.training
    patch = model.encoder.patch_size
    mask = draw_masks(config, epoch, np.arange(len(pixels)), patch)
    images = step.normalize(torch.from_numpy(pixels).to(step.mean.device))
    hidden = torch.from_numpy(mask).to(images.device)
    prediction = model.predict(images, hidden)
    loss = float(model.judge(prediction, images, hidden))
    shown = model.target.to_pixels(torch, prediction.float(), images.permute(0, 2, 3, 1), model.encoder.stride)
    step.train(training)
    if shown is None:
        return loss, None
    colours = (shown / step.scale.view(-1) + step.mean.view(-1)) / 255
    return loss, reconstruction_panel(pixels / np.float32(255), colours.cpu().numpy(), upsample_mask(mask, patch))


def save_png(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")
