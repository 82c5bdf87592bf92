"""Fine-tuning with the PyTorch engine: one session for every task, on the loop that pretraining uses."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from timm.optim._param_groups import param_groups_layer_decay

from simmim.config.tasks import FinetuneConfig
from simmim.config.validation import validated
from simmim.data.bad_images import BadImages
from simmim.data.pipeline import Reading
from simmim.hardware.host import reading_cores
from simmim.torch_engine.accelerators import choose_device, choose_precision, describe_device, find_accelerator
from simmim.torch_engine.models.attention import asked_gpu, attention_kernels, check_attention, set_attention
from simmim.torch_engine.models.encoders import sketch_encoder
from simmim.torch_engine.models.kernels import set_kernels
from simmim.torch_engine.perf.kernel_choice import choose_kernels
from simmim.torch_engine.perf.pieces import find_pieces
from simmim.torch_engine.tasks.backbones import Origin, find_origin, with_encoder_facts
from simmim.torch_engine.tasks.base import Task, TaskData, TaskPlan, TaskSpec, TaskStep, evaluate, find_spec
from simmim.torch_engine.tasks.sounds import with_sounds
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.optim import create_adamw
from simmim.torch_engine.train.trainer import TorchTrainer
from simmim.torch_engine.train.update import Update
from simmim.training.loop import Event, Outcome
from simmim.training.plan import Batch
from simmim.training.resume import asked_precision, hold_run
from simmim.training.run_directory import Run, mark_task
from simmim.training.session import Session, Watch
from simmim.training.trainer import find_start
from simmim.training.whole_files import read_json, write_json


def finetune(config: FinetuneConfig, watch: Watch | None = None) -> tuple[Run, Outcome]:
    """Fine-tune, or resume; see `simmim.finetune`. Raises `UserError` for settings that cannot work."""
    config = validated(config)
    spec = find_spec(config.task)
    device = choose_device(config.device)
    asked = config = dataclasses.replace(config, gpu=asked_gpu(config, device))
    precision = choose_precision(asked_precision(config), device)
    origin = find_origin(config)
    config, data = with_sounds(config, origin.sound, spec.open_data(config))
    held = attention_kernels(config.gpu.attention)
    with distributed.join(device, precision) as world, hold_run(config, is_main=world.is_main), held:
        distributed.check_world(config, world)
        config = with_encoder_facts(
            config,
            origin,
            data.train,
            world,
            device=device,
            precision=precision,
            compile=find_accelerator(device).compiles if config.compile is None else config.compile,
            workers=config.workers or reading_cores(),
            classes=tuple(data.classes),
        )
        config = dataclasses.replace(config, kernels=choose_kernels(config, world.main_says, world.rank))
        if config.gpu.attention != "auto":
            assert config.image_size is not None
            check_attention(config, sketch_encoder(config.model, config.image_size, config.model_args).backbone)
        task = spec.create(config, data, origin.weights)
        plan = TaskPlan.complete(config, task.train_count)
        if config.accumulate_steps is None:
            pieces = find_pieces(plan.config, world, lambda pieces: _attempt(pieces, plan, spec, data, origin, world))
            plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, accumulate_steps=pieces))
            task = spec.create(plan.config, data, origin.weights)
        torch.manual_seed(plan.config.seed)
        start = find_start(plan.config, world)
        step = task.build()  # before the run directory is made, since sizes may not fit
        return FinetuneSession(task, plan, world, start, step, asked).train(watch)


def _attempt(
    pieces: int, plan: TaskPlan, spec: TaskSpec, data: TaskData, origin: Origin, world: distributed.World
) -> tuple[Update, Batch]:
    """Build an update that this process does alone, and the rank's first batch for it."""
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, accumulate_steps=pieces))
    task = spec.create(plan.config, data, origin.weights)
    step = task.build()
    update = build_update(step, plan, distributed.World(device=world.device))
    bad_images = BadImages(None, total=plan.total_images, max_fraction=plan.config.max_bad_fraction)
    reading = plan.reading(bad_images, start_step=0, rank=world.rank, world=world.size)
    with contextlib.closing(task.batches(reading, step)) as batches:  # type: ignore[type-var]
        return update, next(batches)


def build_update(step: TaskStep, plan: TaskPlan, world: distributed.World) -> Update:
    """Move a step to the device, spread it over the processes and give it an optimiser."""
    config = plan.config
    distributed.place(step, world.device)
    if world.device.type == "cpu":
        set_kernels(step, step.backbone, config.kernels)
    elif world.device.type == "cuda":
        set_attention(step.backbone, config.gpu.attention)
    if config.checkpoint_activations:
        step.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.compile:
        step.compile(dynamic=False)
    model = distributed.spread(step, world, shard=False)  # each process evaluates with the whole model
    optimizer = create_adamw(parameter_groups(step, config), betas=config.betas, device=world.device)
    return Update(model, optimizer, plan.schedule, config=config, world=world, after=step.after_update)


class FinetuneSession(Session):
    """A fine-tuning for any task."""

    plan: TaskPlan
    world: distributed.World

    def __init__(
        self,
        task: Task,
        plan: TaskPlan,
        world: distributed.World,
        start: int,
        step: TaskStep,
        asked: FinetuneConfig | None = None,
    ):
        super().__init__(plan, world, start, {"train": task.data.train, "val": task.data.val}, asked)
        self.task, self.step = task, step
        update = build_update(step, plan, world)
        self.trainer = TorchTrainer(update, run=self.run, config=plan.config, world=world)

    def read(self, reading: Reading) -> Iterator[Batch]:
        return self.task.batches(reading, self.step)

    def events(self) -> list[Event]:
        every = max(1, round(self.plan.config.eval_every_epochs * self.plan.steps_per_epoch))
        return [Event(every_steps=every, call=self._evaluate)]

    def _evaluate(self, done: int) -> dict[str, float]:
        """Return figures on the evaluation images; keep the best model so far."""
        figures = evaluate(self.task, self.step, self.run.path, self.world)
        if not self.world.is_main:
            return {}
        best = read_figures(self.run).get("best", {})
        name = self.task.best_figure
        # `not <=` and not `>`: a resumed run comes past the step of its best figure again, and keeps the first.
        latest = self.run.latest_evaluation
        if not best or best["step"] > done or not figures[name] <= best[name]:
            best = {"step": done, **figures}
            self.task.save(self.step, self.run.model)
            mark_task(self.run.model, self.plan.config.task)
            if latest.exists():  # a task of your own need not write one
                latest.replace(self.run.evaluation)
        latest.unlink(missing_ok=True)
        write_json(self.run.path / "metrics.json", {**figures, "step": done, "best": best})
        return figures

    def hardware(self) -> tuple[str, int]:
        return describe_device(self.world.device), self.world.size

    def introduce(self) -> Iterator[str]:
        config, device = self.plan.config, describe_device(self.world.device)
        parameters = sum(parameter.numel() for parameter in self.step.backbone.parameters())
        yield f"model      {config.model}, {parameters / 1e6:.1f} M parameters, from {config.init}"
        yield f"device     {device}, {config.precision}, {self.world.size} process{'es' * (self.world.size > 1)}"
        yield from self.task.describe()
        yield from self.plan.describe()

    def result(self) -> Iterator[str]:
        figures, name = read_figures(self.run), self.task.best_figure
        best = figures["best"]
        yield f"{name} {figures[name]:.4f} at the end, {best[name]:.4f} at best (step {best['step']})"
        yield f"the best model is {self.run.model}"


def read_figures(run: Run) -> dict[str, Any]:
    """Return the figures of the last evaluation, and under `best` those of the model that is kept; `{}` before."""
    return read_json(run.path / "metrics.json")


def parameter_groups(step: TaskStep, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Group parameters: layer decay over the encoder (timm's and the official grouping), full rate for the rest."""
    assert config.layer_decay is not None
    backbone: Any = step.backbone
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    groups = param_groups_layer_decay(
        backbone, weight_decay=config.weight_decay, no_weight_decay_list=exempt, layer_decay=config.layer_decay
    )
    taken = {id(parameter) for parameter in backbone.parameters()}
    rest = [p for p in step.parameters() if p.requires_grad and id(p) not in taken]
    decay, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    # timm takes what comes last in the encoder for the head: where a decoder follows, that is one layer below it.
    last = config.layer_decay if rest else 1.0
    kept = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"] * last}
        for group in groups
    ]
    kept += [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in kept if group["params"]]
