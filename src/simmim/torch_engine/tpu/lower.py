"""Lower a training step to StableHLO for the TPU compiler: forward, backward, clipping and AdamW in one module.

The real `Update` runs on TorchTPU's tensors without data (`torchtpu`). TorchTPU runs one process per device,
so this is one device's step on its share of the batch. DDP's gradient exchange is missing, because TorchTPU
creates collectives on real devices only.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.hardware.tpu_compiler import CompilerReport, StepFacts, compile_stablehlo, report_of, topology_devices
from simmim.method.schedules import CosineSchedule
from simmim.torch_engine.models.encoders import default_image_size, sketch_encoder
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.tpu.device import exact_fp32, fit_for_tpu
from simmim.torch_engine.tpu.torchtpu import Trace, tracing
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step
from simmim.torch_engine.train.update import Update

_NO_EXCHANGE = "the exchange of gradients between devices, which TorchTPU does not compile without a TPU"


@dataclass(frozen=True)
class Lowered:
    """StableHLO module with the ordered names of its inputs and outputs.

    Parameters and buffers are named as in the step; exp_avg, exp_avg_sq and step of a parameter belong to AdamW;
    `lr` counts the optimiser's groups; `figures` is what `Update` returns.
    """

    stablehlo: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def compile_step(config: PretrainConfig, topology: str) -> CompilerReport:
    """Compile one device's step of a training over all devices of `topology`. Raises `UserError` if that is impossible.

    Mean, std, precision and cluster centres must be set.
    """
    devices = len(topology_devices(topology))
    config = with_model_sizes(config)
    assert config.image_size is not None
    if config.batch_size % (devices * config.pieces):
        raise UserError(
            f"batch size {config.batch_size} does not divide among the {devices} devices of {topology} × "
            f"{config.pieces} accumulation steps; use a multiple of {devices * config.pieces}"
        )
    facts = StepFacts(
        engine="torch",
        backend=None,
        model=config.model,
        image_size=config.image_size,
        precision=config.precision,
        topology=topology,
        devices=devices,
        batch_size=config.batch_size,
        notes=(_NO_EXCHANGE,) if devices > 1 else (),
    )
    try:
        module = lower(dataclasses.replace(config, batch_size=facts.batch_a_device)).stablehlo
    except (RuntimeError, TypeError, NotImplementedError) as error:  # TorchTPU's own errors about an operation
        raise UserError(
            f"the step of {config.model} in {config.precision} cannot be lowered by TorchTPU; change what it names: "
            f"{' '.join(str(error).split())}"
        ) from error
    return report_of(lambda: compile_stablehlo(module, topology), facts)


def with_model_sizes(config: PretrainConfig) -> PretrainConfig:
    """Fill in the sizes that follow from the model."""
    size = config.image_size or default_image_size(config.model)
    patch = sketch_encoder(config.model, size, config.model_args).patch_size
    return dataclasses.replace(config, image_size=size, mask=config.mask.for_patch(patch), device="tpu")


def lower(config: PretrainConfig) -> Lowered:
    """Lower the whole update of a complete configuration on one device."""
    with torch.device("meta"):
        step = build_step(config)
    if config.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    with tracing() as trace:
        device = torch.device("tpu")
        exact_fp32()
        _place(step, trace)
        fit_for_tpu(step)
        optimizer = create_optimizer(step, weight_decay=config.weight_decay, betas=config.betas, device=device)
        names = {id(parameter): name for name, parameter in step.named_parameters()}
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = trace.input(f"lr {number}", torch.empty((), device="meta"))
            for parameter in group["params"]:
                name = names[id(parameter)]
                optimizer.state[parameter] = {
                    "step": trace.input(f"step {name}", torch.empty((), device="meta")),
                    "exp_avg": trace.input(f"exp_avg {name}", parameter),
                    "exp_avg_sq": trace.input(f"exp_avg_sq {name}", parameter),
                }
        schedule = CosineSchedule(peak_lr=1e-4, warmup_lr=0, warmup_steps=0, min_lr=0, total_steps=100)
        update = Update(step, optimizer, schedule, config=config, world=World(device=device), after=step.after_update)
        arrays = random_batch(config, config.batch_size, step)
        batch = {name: trace.input(name, torch.from_numpy(array)) for name, array in arrays.items()}
        figures = update.advance(batch)
        outputs: dict[str, Tensor] = {name: tensor.detach() for name, tensor in _tensors(step).items()}
        for parameter, state in optimizer.state.items():
            outputs |= {f"{kind} {names[id(parameter)]}": tensor for kind, tensor in state.items()}
        outputs["figures"] = figures
        text = trace.stablehlo(list(outputs.values()))
    return Lowered(text, tuple(trace.names), tuple(outputs))


def _tensors(step: nn.Module) -> dict[str, Tensor]:
    return dict(step.named_parameters()) | dict(step.named_buffers())


def _place(step: nn.Module, trace: Trace) -> None:
    """Replace parameters and buffers without data by module inputs."""
    names = {id(tensor): name for name, tensor in _tensors(step).items()}
    step._apply(lambda tensor: trace.input(names[id(tensor)], tensor))
