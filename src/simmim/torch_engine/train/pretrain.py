"""Pretraining with the PyTorch engine: from a configuration to a run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from simmim.config.training import PretrainConfig, validated
from simmim.method.masks import upsample_mask
from simmim.torch_engine.models.encoders import default_image_size, sketch_encoder
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.tasks.probe import KnnCheck
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.jpegs import JpegDecoder, open_decoder, read_batches
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, full_state, initialize, save_hub
from simmim.torch_engine.train.trainer import TorchTrainer
from simmim.torch_engine.train.update import Update
from simmim.training.loop import Event, Loop, Outcome
from simmim.training.pictures import reconstruction_panel
from simmim.training.plan import Batch, Plan, draw_masks, open_images
from simmim.training.run_directory import Run, open_run, written_whole


def pretrain(config: PretrainConfig) -> tuple[Run, Outcome]:
    """Pretrain, or resume; see `simmim.pretrain`. One-line `ValueError` for what a user can mend."""
    config = validated(config)
    find_family(config.model)
    device = distributed.choose_device(config.device)
    image_size = config.image_size or default_image_size(config.model)
    patch = sketch_encoder(config.model, image_size, config.model_args).patch_size
    images = open_images(config)
    check = KnnCheck(config) if config.probe else None
    with distributed.join(device) as world:
        distributed.check_world(config, world)
        plan = Plan.complete(
            config,
            images,
            patch=patch,
            image_size=image_size,
            device=device,
            precision=distributed.choose_precision(config.precision, device),
            compile=device != "cpu" if config.compile is None else config.compile,
        )
        decoder = open_decoder(plan, world.device)
        torch.manual_seed(config.seed)
        step = build_step(plan.config)  # before the run directory is made, since sizes may not fit
        started_from = initialize(step.model, config.init_from, config.model) if config.init_from else None
        if world.is_main:
            open_run(plan.config)
        world.barrier()
        session = Session(plan, world, step, check, decoder)
        session.loop.introduce(session.introduce(started_from))
        outcome = session.loop.fit()
        bad_images = len(plan.bad_images(session.run))
        session.loop.conclude(outcome, bad_images, lambda: [f"the encoder is {session.run.encoder}"])
        return session.run, outcome


class Session:
    """One process's part in a pretraining: the model, and what happens as training goes."""

    def __init__(
        self,
        plan: Plan,
        world: distributed.World,
        step: PretrainStep,
        check: KnnCheck | None,
        decoder: JpegDecoder | None,
    ):
        config = plan.config
        assert config.out is not None
        self.plan, self.config, self.world, self.check, self.decoder = plan, config, world, check, decoder
        self.run = Run(Path(config.out))
        self.step = step
        distributed.place(step, world.device)
        if config.checkpoint_activations:
            step.model.encoder.backbone.set_grad_checkpointing(True)
        if config.compile:
            step.compile(dynamic=False)
        self.model = distributed.spread(step, world, shard=config.shard)
        optimizer = create_optimizer(
            self.model, weight_decay=config.weight_decay, betas=config.betas, device=world.device
        )
        self.trainer = TorchTrainer(
            Update(self.model, optimizer, plan.schedule, config=config, world=world),
            self.batches,
            run=self.run,
            config=config,
            world=world,
            on_save=self._save_encoder,
        )
        self.loop = Loop(
            self.trainer,
            self.run,
            config,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            save_every_steps=plan.save_every_steps,
            events=self._events(),
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        bad_images = self.plan.bad_images(self.run)
        reading = self.plan.reading(bad_images, start_step=start_step, rank=self.world.rank, world=self.world.size)
        return read_batches(self.plan, reading, self.step.model.encoder, self.decoder)

    def _events(self) -> list[Event]:
        events = []
        if self.config.val_images:
            events.append(Event(every_steps=self.plan.picture_every_steps, call=self._show))
        if self.check is not None:
            every = max(1, round(self.config.probe_every_epochs * self.plan.steps_per_epoch))
            events.append(Event(every_steps=every, call=self._probe))
        return events

    def _show(self, done: int) -> dict[str, float]:
        """A reconstruction picture of the images kept aside, and their loss. The masks are always the same."""
        step = self._whole_step()
        if step is None:
            return {}
        loss, panel = judge_and_draw(step, self.config, self.plan.val_pixels())
        if panel is not None:
            with written_whole(self.run.reconstructions / f"step-{done:08d}.png") as path:
                save_png(panel, path)
            self.loop.picture(done, "reconstruction", panel)
        return {"val_loss": loss}

    def _probe(self, done: int) -> dict[str, float]:
        """Accuracy of a k-NN vote on the encoder's features of the labelled images."""
        step = self._whole_step()
        if step is None or self.check is None:
            return {}
        return self.check(step, self.config)

    def _whole_step(self) -> PretrainStep | None:
        """The model to look at on the main process: the one that trains or, if sharded, a copy."""
        if not self.config.shard:
            return self.step if self.world.is_main else None
        state = full_state(self.model, sharded=True)
        if not self.world.is_main:
            return None
        copy = build_step(self.config)
        copy.load_state_dict(state)
        return copy.to(self.world.device)

    def _save_encoder(self) -> None:
        state = full_state(self.model, sharded=self.config.shard)
        if self.world.is_main:
            prefix = "model.encoder.backbone."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            save_hub(self.run.encoder, self.step.model.encoder.backbone, weights, self.config)

    def introduce(self, started_from: str | None) -> Iterator[str]:
        """What will be done, for a person."""
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.step.parameters())
        yield f"model      {config.model}, {parameters / 1e6:.1f} M parameters"
        if started_from:
            yield f"start      {started_from} from {config.init_from}"
        yield (
            f"device     {distributed.device_name(self.world.device)}, {config.precision}"
            f"{', compiled' if config.compile else ''}, {self.world.size} process{'es' * (self.world.size > 1)}"
            f"{', JPEGs by nvJPEG' if self.decoder else ''}"
        )
        yield from self.plan.describe()
        if self.check is not None:
            yield f"probe      {self.check.describe()}"


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
