"""Pretraining with the PyTorch engine: from a configuration to a run."""

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.config.pretraining import PretrainConfig
from simmim.config.sound import SPECTROGRAM
from simmim.config.validation import validated
from simmim.data.pipeline import Reading
from simmim.errors import TrainingFailedError
from simmim.method.masks import upsample_mask
from simmim.torch_engine.accelerators import choose_device, choose_precision, describe_device, find_accelerator
from simmim.torch_engine.models.attention import asked_gpu, attention_kernels, check_attention
from simmim.torch_engine.models.encoders import default_image_size, sketch_encoder
from simmim.torch_engine.models.evaluating import by_halves, evaluating
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep
from simmim.torch_engine.models.objective import ObjectiveModule
from simmim.torch_engine.perf.kernel_choice import choose_kernels
from simmim.torch_engine.perf.pieces import find_pieces
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.tasks.feature_maps import feature_maps
from simmim.torch_engine.tasks.guard import CollapseGuard
from simmim.torch_engine.tasks.probe import KnnCheck
from simmim.torch_engine.tasks.sound_pictures import picture_sounds, sound_panel
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.jpegs import JpegDecoder, open_decoder, read_batches
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, full_state, initialize, save_hub
from simmim.torch_engine.train.trainer import TorchTrainer
from simmim.torch_engine.train.update import Batch as DeviceBatch
from simmim.torch_engine.train.update import Update
from simmim.training.feature_pictures import draw_features
from simmim.training.loop import Event, Outcome
from simmim.training.masks import draw_masks
from simmim.training.pictures import PICTURED, reconstruction_panel
from simmim.training.plan import Batch
from simmim.training.pretrain_images import open_images
from simmim.training.pretrain_plan import Plan
from simmim.training.resume import asked_precision, hold_run
from simmim.training.run_directory import Run
from simmim.training.session import PretrainSession, Watch, parts
from simmim.training.spectrogram_pictures import upright
from simmim.training.trainer import find_start


def pretrain(config: PretrainConfig, watch: Watch | None = None) -> tuple[Run, Outcome]:
    """Pretrain, or resume; see `simmim.pretrain`. Raises `UserError` for settings that cannot work."""
    config = validated(config)
    find_family(config.model)
    device = choose_device(config.device)
    config = dataclasses.replace(config, gpu=asked_gpu(config, device))
    precision = choose_precision(asked_precision(config), device)
    images = open_images(config, default_image_size(config.model))
    image_size = config.image_size or (SPECTROGRAM if images.sounds else default_image_size(config.model))
    encoder = sketch_encoder(config.model, image_size, config.model_args)
    check = KnnCheck(config) if config.probe else None
    held = attention_kernels(config.gpu.attention)
    with distributed.join(device, precision) as world, hold_run(config, is_main=world.is_main), held:
        distributed.check_world(config, world)
        plan = Plan.complete(
            config,
            images,
            patch=encoder.patch_size,
            width=encoder.width,
            world=world,
            image_size=image_size,
            device=device,
            precision=precision,
            compile=find_accelerator(device).compiles if config.compile is None else config.compile,
        )
        plan = plan.replace(kernels=choose_kernels(plan.config, world.main_says, world.rank))
        check_attention(plan.config, encoder.backbone)
        decoder = open_decoder(plan, world.device)

        def attempt(pieces: int) -> tuple[Update, DeviceBatch]:
            tried = dataclasses.replace(plan.config, accumulate_steps=pieces)
            step, update = build_update(tried, distributed.World(device=world.device))
            return update, random_batch(tried, tried.batch_size // world.size, step)

        plan = plan.replace(accumulate_steps=find_pieces(plan.config, world, attempt))
        start = find_start(plan.config, world)
        torch.manual_seed(config.seed)
        origin: list[str] = []

        def begin(model: MaskedImageModel) -> None:
            # A checkpoint holds all weights, so a resumed run does not need those that it began from.
            if config.init_from and not start:
                origin.append(initialize(model, config.init_from, config.model))

        step = build_step(plan.config, begin=begin)  # before the run directory is made, since sizes may not fit
        if not start:
            prepare(step, plan, world)
        check_attention(plan.config, step)  # a teacher may have a bias where the encoder has none
        try:
            return TorchPretrainSession(
                plan,
                world,
                start,
                step,
                asked=config,
                check=check,
                decoder=decoder,
                origin=origin[0] if origin else None,
            ).train(watch)
        except torch.OutOfMemoryError as error:
            from simmim.torch_engine.perf.fit import explain_out_of_memory

            if line := explain_out_of_memory(plan.config, world):
                raise TrainingFailedError(line) from error
            raise


def prepare(step: PretrainStep, plan: Plan, world: distributed.World) -> None:
    """Let the objectives of a new run look at training images, drawn by the seed."""

    def sample(count: int) -> Iterator[Tensor]:
        for images in plan.sample(count, part=64):
            yield step.normalize(torch.from_numpy(images))

    with torch.no_grad():
        for module in step.objectives.values():
            cast(ObjectiveModule, module).prepare(sample, world)


class TorchPretrainSession(PretrainSession):
    """A pretraining with PyTorch."""

    world: distributed.World

    def __init__(
        self,
        plan: Plan,
        world: distributed.World,
        start: int,
        step: PretrainStep,
        *,
        asked: PretrainConfig,
        check: KnnCheck | None,
        decoder: JpegDecoder | None,
        origin: str | None,
    ):
        super().__init__(plan, world, start, plan.images.parts, asked)
        config = plan.config
        self.step, self._check, self._decoder, self._origin = step, check, decoder, origin
        if world.is_main:
            for module in step.objectives.values():
                cast(ObjectiveModule, module).keep(self.run.path)
        self._guard: CollapseGuard | None = None
        self._pictured: NDArray[Any] | None = None  # images kept aside, read once
        distributed.place(step, world.device)
        if config.checkpoint_activations:
            step.model.encoder.backbone.set_grad_checkpointing(True)
        if config.compile:
            step.compile(dynamic=False)
        self._model = distributed.spread(step, world, shard=config.shard)
        optimizer = create_optimizer(
            self._model, weight_decay=config.weight_decay, betas=config.betas, device=world.device
        )
        update = Update(self._model, optimizer, plan.schedule, config=config, world=world, after=step.after_update)
        self.trainer = TorchTrainer(update, run=self.run, config=config, world=world, on_save=self._save_encoder)

    def read(self, reading: Reading) -> Iterator[Batch]:
        return read_batches(self.plan, reading, self.step.model.encoder, self._decoder, self.step.views.values())

    def events(self) -> list[Event]:
        events = super().events()
        if self._check is not None:
            every = max(1, round(self.plan.config.probe_every_epochs * self.plan.steps_per_epoch))
            events.append(Event(every_steps=every, call=self._probe))
        if any(cast(ObjectiveModule, module).trains_latents for module in self.step.objectives.values()):
            every = max(self.plan.config.log_every_steps, self.plan.total_steps // 50)
            events.append(Event(every_steps=every, call=self._watch))
        return events

    def drawn(self) -> list[Event]:
        features = Event(every_steps=self.plan.picture_every_steps, call=self._draw_features, before_training=True)
        return [*super().drawn(), features]

    def judge(self) -> tuple[float, NDArray[np.uint8] | None] | None:
        step = self._whole_step()
        return None if step is None else judge_and_draw(step, self.plan.config, self.val_pixels())

    def _draw_features(self, done: int) -> dict[str, float]:
        """Draw the features of images kept aside. It adds no figures."""
        step = self._whole_step()
        if step is not None:
            if self._pictured is None:
                self._pictured = self.val_pixels(PICTURED)
            pixels = self._pictured
            maps = feature_maps(step, self.plan.config, pixels)
            if step.front_end is not None:
                pixels, maps = picture_sounds(step, pixels), upright(maps)
            panel = draw_features(pixels, maps, self.run.feature_pictures, done)
            if panel is not None:
                self.loop.picture(done, "features", panel)
        return {}

    def _probe(self, done: int) -> dict[str, float]:
        """Return the accuracy of a k-NN vote on the features of the labelled images, which all ranks share."""
        step = self._whole_step(everywhere=True)
        assert step is not None and self._check is not None
        return self._check(step, self.plan.config, self.world)

    def _watch(self, done: int) -> dict[str, float]:
        """Return how far the features of training images are from a collapse, and warn of one."""
        step = self._whole_step()
        if step is None:
            return {}
        if self._guard is None:
            pixels = np.concatenate(list(self.plan.sample(256, part=64)))
            self._guard = CollapseGuard(pixels, lambda line: self.loop.console.say(line))
        return self._guard(done, step, self.plan.config.precision)

    def _whole_step(self, *, everywhere: bool = False) -> PretrainStep | None:
        """Return the model to look at: the one that trains or, if sharded, a copy.

        All ranks call it together, and have rank 0's statistics of batch norms. `None` on ranks other than 0, unless
        `everywhere`.
        """
        config, wanted = self.plan.config, everywhere or self.world.is_main
        if not config.shard:
            if everywhere:
                self.world.agree(self.step.buffers())
            return self.step if wanted else None
        state = full_state(self._model, sharded=True)  # rank 0's; empty on others
        if not wanted:
            return None
        copy = build_step(config, trains=False)
        if self.world.is_main:
            copy.load_state_dict({name: state[name] for name in copy.state_dict()})
        copy.to(self.world.device)
        if everywhere:
            self.world.agree(copy.state_dict().values())
        return copy

    def _save_encoder(self) -> None:
        state = full_state(self._model, sharded=self.plan.config.shard)
        if self.world.is_main:
            prefix = "model.encoder.backbone."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            save_hub(self.run.encoder, self.step.model.encoder.backbone, weights, self.plan.config)

    def hardware(self) -> tuple[str, int]:
        return describe_device(self.world.device), self.world.size

    def introduce(self) -> Iterator[str]:
        config, device = self.plan.config, describe_device(self.world.device)
        parameters = sum(parameter.numel() for parameter in self.step.model.parameters())
        yield f"model      {config.model}, {parameters / 1e6:.1f} M parameters"
        if self._origin:
            yield f"start      {self._origin} from {config.init_from}"
        yield (
            f"device     {device}, {config.precision}"
            f"{', compiled' if config.compile else ''}, {self.world.size} process{'es' * (self.world.size > 1)}"
            f"{', JPEGs by nvJPEG' if self._decoder else ''}"
        )
        yield from self.plan.describe()
        terms = " + ".join(f"{each.weight:g} × {each.kind}" for each in config.objectives)
        reasons = ", ".join(each.reason for each in config.objectives if each.reason)
        yield f"objective  {terms}" + (f": {reasons}" if reasons else "")
        if self._check is not None:
            yield f"probe      {self._check.describe()}"


@torch.no_grad()
def judge_and_draw(
    step: PretrainStep, config: PretrainConfig, pixels: NDArray[Any], epoch: int = 0, *, pictures: int = PICTURED
) -> tuple[float, NDArray[np.uint8] | None]:
    """Return the loss of images (B, H, W, C) in 0..255 under the masks of `epoch`, and a panel of the first `pictures`.

    The loss is the mean over the hidden positions of all images, which go through the model in parts. The panel is
    `None` where the target shows no picture.
    """
    model = step.model
    patch = model.encoder.patch_size
    masks = draw_masks(config, epoch, np.arange(len(pixels)), patch)

    def judge(part: slice) -> tuple[Tensor, Tensor | None]:
        images = step.normalize(torch.from_numpy(pixels[part]).to(step.mean.device))
        mask = torch.from_numpy(masks[part]).to(images.device)
        prediction = model.predict(images, mask)
        picture = model.show(prediction, images) if part.start < pictures else None
        return torch.stack(model.sums(prediction, images, mask)), picture

    with evaluating(step):
        sums, shown = zip(*by_halves(judge, parts(len(pixels), config)), strict=True)
    loss = float(model.loss.mean(*torch.stack(sums).sum(0)))
    shown = [picture for picture in shown if picture is not None]
    if not shown:
        return loss, None
    if step.front_end is not None:
        return loss, sound_panel(step, pixels[:pictures], torch.cat(shown)[:pictures, ..., 0], masks[:pictures])
    colours = (torch.cat(shown)[:pictures] / step.scale.view(-1) + step.mean.view(-1)) / 255
    originals, hidden = pixels[:pictures] / np.float32(255), upsample_mask(masks[:pictures], patch)
    return loss, reconstruction_panel(originals, colours.cpu().numpy(), hidden)
