"""Choose CPU kernels by a short measurement on this machine.

Layers of the user's own encoder are timed alone, forward and backward, with each kernel in turn. The times are kept in
the user's cache directory. Rank 0 decides for all ranks.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import Kernels, TrainingConfig
from simmim.errors import UserError
from simmim.hardware.host import cpu_has_bf16, cpu_name, user_cache
from simmim.torch_engine.models.encoders import sketch_encoder
from simmim.torch_engine.models.family import find_blocks
from simmim.torch_engine.models.kernels import (
    allowed_kernels,
    fill_kernels,
    fused_attention,
    has_onednn,
    kernels_of_rules,
    linear_layers,
    set_kernels,
)
from simmim.training.resume import recall
from simmim.training.whole_files import write_json

_IMAGES = 2  # measured at once, at most
_ROWS = 512  # of a linear layer, at most
_FLOP = 8e9  # of all linear layers, forward and backward, about
_SECONDS, _MOST_SECONDS = 2.0, 8.0  # for each kind of kernel; the latter on a busy machine
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_GAIN = 1.05  # by which a kernel must be faster than PyTorch's usual one

_WAYS = {name: get_args(kind) for name, kind in get_type_hints(Kernels).items()}
_ALL = [Kernels(**dict(zip(_WAYS, values, strict=True))) for values in itertools.product(*_WAYS.values())]

KINDS = {"linear": "linear layers", "attention": "attention", "memory_format": "convolutions"}
"""Names of the fields of `Kernels` for people."""

Seconds = dict[str, float]
"""Time of the measured layers, forward and backward, by kernel; PyTorch's usual kernel first."""


def choose_kernels(config: TrainingConfig, main_says: Callable[[int], int], rank: int = 0) -> Kernels:
    """Choose the kernels of a complete configuration, the same on every rank.

    In this order: kernels that the user names; those that the run has recorded; for a run that recorded none, those of
    version 0.1; else the faster ones. Only rank 0 chooses; `main_says` broadcasts a number from it. Only the CPU has a
    choice.

    With `SIMMIM_KERNELS=rules` in the environment nothing is measured, and the rules of version 0.1 decide.
    """
    kernels = config.kernels
    if config.device != "cpu":
        return kernels
    if kernels.linear == "onednn" and not has_onednn():
        raise UserError("kernels linear 'onednn' is not in this PyTorch; use default")
    begun = recall(config)  # on every rank, so that each reports a configuration that cannot be read
    return _ALL[main_says(_ALL.index(_choose(config, begun and begun.kernels)) if rank == 0 else 0)]


def _choose(config: TrainingConfig, recorded: Kernels | None) -> Kernels:
    kernels, backbone = config.kernels, _sketch(config)
    if recorded is not None:
        kernels = fill_kernels(kernels, dataclasses.asdict(recorded))
        if kernels.linear == "onednn" and not has_onednn():  # the run comes from another machine
            kernels = dataclasses.replace(kernels, linear="default")
    elif os.environ.get("SIMMIM_KERNELS") != "rules":
        usual = {name: ways[0] for name, ways in allowed_kernels(backbone, config.precision).items()}
        found = {name: faster(seconds) for name, seconds in measure_kernels(config, backbone).items()}
        return fill_kernels(kernels, usual | found)
    return kernels_of_rules(kernels, backbone, config.precision, pretraining=isinstance(config, PretrainConfig))


def faster(seconds: Seconds) -> str:
    """Return the kernel to use: the fastest one if it is clearly faster than the usual one."""
    usual, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[usual] >= _GAIN * seconds[best] else usual


def _sketch(config: TrainingConfig) -> Any:
    assert config.image_size is not None
    return sketch_encoder(config.model, config.image_size, config.model_args).backbone


def measure_kernels(config: TrainingConfig, backbone: Any = None) -> dict[str, Seconds]:
    """Time each kind of kernel that has a choice for a complete configuration, or read the times from the cache.

    `backbone` is the configuration's encoder without memory, where the caller has it already.
    """
    if config.device != "cpu":
        return {}
    found, backbone = {}, backbone or _sketch(config)
    for name, ways in allowed_kernels(backbone, config.precision).items():
        if len(ways) == 1 or (name == "linear" and config.compile):  # a compiled step has linear layers of its own
            continue
        if layers := _layers(config, backbone, name):  # a ConvNeXt's only ones may be in its head, which is not used
            found[name] = _cached(config, layers, name, ways)
    return found


def describe_times(seconds: Seconds, chosen: str) -> str:
    """Format the times of a kind of kernel and the choice."""
    return f"{', '.join(f'{way} {1000 * value:.1f} ms' for way, value in seconds.items())}; {chosen} is used"


def try_kernels() -> dict[str, str]:
    """Measure the kernels of two usual models on this machine, for `simmim doctor`."""
    precisions = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    found = {}
    for model, precision in itertools.product(("vit_small_patch16_224", "resnet50"), precisions):
        config = PretrainConfig(model=model, image_size=(224, 224), batch_size=8, device="cpu", precision=precision)
        for name, seconds in measure_kernels(config).items():
            found[f"{KINDS[name]} of {model} in {precision}"] = describe_times(seconds, faster(seconds))
    return found


def _cached(config: TrainingConfig, layers: "Counter[_Layer]", name: str, ways: tuple[str, ...]) -> Seconds:
    shapes = hashlib.sha256("\n".join(f"{count} {layer}" for layer, count in layers.items()).encode()).hexdigest()[:16]
    facts = (cpu_name(), f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", config.precision)
    key, path = ", ".join((*facts, name, shapes)), user_cache() / "kernels.json"
    known = _read(path)
    if set(known.get(key, ())) != set(ways):
        known = _read(path) | {key: _measure(layers, name, ways, config.precision)}
        with contextlib.suppress(OSError):  # a cache that cannot be written is no error
            write_json(path, known)
    return {way: known[key][way] for way in ways}


def _read(path: Path) -> dict[str, Seconds]:
    """Read the valid entries of the cache; a missing or corrupt file has none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: {way: float(value) for way, value in times.items()} for key, times in entries.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


@dataclass(frozen=True)
class _Layer:
    """A layer without memory, with the arguments that the encoder gives it. Layers of equal description are alike."""

    module: nn.Module = dataclasses.field(compare=False)
    arguments: tuple[Any, ...] = dataclasses.field(compare=False)
    settings: dict[str, Any] = dataclasses.field(compare=False)
    description: str

    def __str__(self) -> str:
        return self.description


def _layers(config: TrainingConfig, backbone: Any, name: str) -> Counter[_Layer]:
    """Find the layers of the encoder that a kind of kernel computes, each with its number of occurrences."""
    found = Counter[_Layer]()
    assert config.image_size is not None
    if name == "linear":
        modules = linear_layers(backbone)
    elif name == "attention":
        modules = fused_attention(backbone)
    else:
        modules = find_blocks(backbone)

    def note(module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], _output: Any) -> None:
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, (arguments, settings))
        weights = [tuple(parameter.shape) for parameter in module.parameters()]
        found[_Layer(module, arguments, settings, f"{type(module).__name__} {weights} {shapes}")] += 1

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    images = min(config.batch_size // config.pieces, _IMAGES if name != "linear" else _IMAGES * 2)
    with torch.no_grad():
        backbone.forward_features(torch.empty(images, 3, *config.image_size, device="meta"))
    for handle in handles:
        handle.remove()
    return found


def _measure(layers: Counter[_Layer], name: str, ways: tuple[str, ...], precision: str) -> Seconds:
    """Return the median seconds of each kernel over interleaved rounds."""
    with torch.random.fork_rng(devices=[]):
        rows = _rows(layers) if name == "linear" else None
        passes = {way: [(_prepare(layer, name, way, rows), n) for layer, n in layers.items()] for way in ways}

        # With one thread, processor time leaves out other work on the machine.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

        def run(way: str) -> float:
            total = 0.0
            with torch.autocast("cpu", enabled=precision != "fp32", dtype=_dtype(precision)):
                for work, count in passes[way]:
                    begun = clock()
                    work()
                    total += (clock() - begun) * count
            return total

        begun = time.perf_counter()
        for way in ways:  # warm up
            run(way)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(_MOST_ROUNDS):
            spent = time.perf_counter() - begun
            if spent > (_SECONDS if number >= _LEAST_ROUNDS else _MOST_SECONDS) and number:
                break
            for way in ways:
                seconds[way].append(run(way))
    return {way: statistics.median(times) for way, times in seconds.items()}


def _dtype(precision: str) -> torch.dtype:
    return torch.float16 if precision == "fp16" else torch.bfloat16


def _rows(layers: Counter[_Layer]) -> int:
    """Return how many rows linear layers are measured with, so that a pass takes about `_FLOP`."""
    flop = 6 * sum(layer.module.weight.numel() for layer in layers)  # type: ignore[operator, union-attr]
    return max(64, min(_ROWS, int(_FLOP / flop)))


def _prepare(layer: _Layer, name: str, way: str, rows: int | None) -> Callable[[], None]:
    """Return a call that runs a layer forward and backward with a kernel, on random weights and inputs."""
    module = copy.deepcopy(layer.module).to_empty(device="cpu").train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
        for buffer in module.buffers():
            buffer.zero_()
    if name != "memory_format":
        set_kernels(module, module, fill_kernels(Kernels(), {name: way}))
    order = torch.channels_last if way == "channels_last" else torch.contiguous_format

    def real(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype)
        shape = (min(x.shape[:-1].numel(), rows), x.shape[-1]) if rows else x.shape
        return torch.randn(shape).contiguous(memory_format=order).requires_grad_()

    arguments, settings = tree_map(real, (layer.arguments, layer.settings))

    def work() -> None:
        output = module(*arguments, **settings)
        torch.autograd.backward([leaf.sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])

    return work
