"""Count the cost of a pretraining step by running it on tensors without data.

The whole update of `simmim.torch_engine.train.update` (forward, backward, clip, AdamW) runs on PyTorch's fake tensors
and records every operation: its FLOP, the bytes that it reads and writes, and the memory in use after it. There is no
formula for a family of models, and neither an accelerator nor memory is needed: a model of any size takes seconds.

Memory is what tensors hold; an allocator's rounding and a kernel's workspace come on top. torch.compile, which fuses
operations and saves fewer activations, is not followed: its steps need less.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from simmim.config.pretraining import PretrainConfig
from simmim.hardware.roofline import StepWork
from simmim.method.schedules import CosineSchedule
from simmim.torch_engine.models.family import find_blocks
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step
from simmim.torch_engine.train.update import Update

aten = torch.ops.aten
# Two batches tell the line on which everything lies; a batch of 1 would be laid out differently.
_BATCHES = (2, 4)


def measure_work(config: PretrainConfig) -> StepWork:
    """Measure the work of a step of `config`, complete except for `batch_size`, which does not matter here.

    What autocast and attention do on its `device` is followed ("auto": on CUDA), since each saves other tensors.
    Raises `UserError` for a model that cannot be built.
    """
    first, second = (_record(config, images) for images in _BATCHES)
    assert first.names == second.names
    return StepWork(
        forward_flops=round(_line(first.flops, second.flops)[1, : first.forward_ends].sum()),
        update_starts=first.update_starts,
        parameters=first.parameters,
        trained=first.trained,
        largest_block=first.largest_block,
        flops=_line(first.flops, second.flops),
        traffic=_line(first.traffic, second.traffic),
        live=_line(first.live, second.live),
        gradients=np.array(first.gradients, np.float64),
    )


def count_flops(config: PretrainConfig) -> int:
    """Count FLOP of forward and backward for one image, with PyTorch's own counter on the real step.

    Attention runs unfused here: that counter does not know the CPU's fused kernel and would leave it out.
    """
    with torch.device("meta"):
        step = build_step(config)
    batch = random_batch(config, 1, step)
    with FakeTensorMode() as shapes:  # nothing is computed
        step._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # `to_empty` would mix the two kinds
        tensors = {name: shapes.from_tensor(torch.from_numpy(array)) for name, array in batch.items()}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(**tensors)["loss"].backward()
    return counter.get_total_flops()


def _line(first: list[int], second: list[int]) -> np.ndarray:
    """Fit lines through two points each: (2, operations), base and slope."""
    low, high = np.array(first, np.float64), np.array(second, np.float64)
    slope = (high - low) / (_BATCHES[1] - _BATCHES[0])
    return np.stack((low - slope * _BATCHES[0], slope))


def _record(config: PretrainConfig, images: int) -> "_Tape":
    """Record one update of `images` images, with AdamW's averages there from the start."""
    like = _LIKE.get(config.device, _LikeCuda)()
    with torch.device("meta"):
        step = build_step(config)
    config = dataclasses.replace(config, batch_size=images, accumulate_steps=1, device="cpu")
    if config.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    device = torch.device("cpu")
    tape = _Tape(step)
    with FakeTensorMode(), tape, like:
        step._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        optimizer = create_optimizer(step, weight_decay=config.weight_decay, betas=config.betas, device=device)
        schedule = CosineSchedule(peak_lr=1e-4, warmup_lr=0, warmup_steps=0, min_lr=0, total_steps=100)
        update = Update(step, optimizer, schedule, config=config, world=World(device=device), after=step.after_update)
        batch = random_batch(config, images, step)
        for parameter in step.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # creates AdamW's averages
        optimizer.zero_grad()
        tape.watch(step, optimizer)
        update(0, batch)
    return tape


class _Tape(TorchDispatchMode):
    """Notes every operation. Memory is followed storage by storage, from its first sight until it is freed."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.parameters = sum(parameter.numel() for parameter in step.parameters())
        self.trained = sum(parameter.numel() for parameter in step.parameters() if parameter.requires_grad)
        sizes = (sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(step))
        self.largest_block = max(sizes, default=self.parameters)
        self._held: dict[int, int] = {}
        self._in_use = self._in_gradients = 0
        self.names: list[str] = []
        self.flops: list[int] = []
        self.traffic: list[int] = []
        self.live: list[int] = []
        self.gradients: list[int] = []
        self.forward_ends = self.update_starts = 0

    def watch(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Forget the operations so far, and from now on note the parts of the update too."""
        for notes in (self.names, self.flops, self.traffic, self.live, self.gradients):
            notes.clear()
        step.register_forward_hook(lambda *_: setattr(self, "forward_ends", len(self.names)))
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "update_starts", len(self.names)))
        for parameter in step.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, parameter: Tensor) -> None:
        self._in_gradients += parameter.numel() * parameter.itemsize

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a question about a tensor
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in (*inputs, *outputs):
            self._hold(tensor)
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        self.names.append(str(packet))
        self.flops.append(int(formula(*args, **kwargs, out_val=out)) if formula else 0)
        written = _written(func, args) or outputs
        self.traffic.append(0 if _is_view(func) else sum(map(_bytes, inputs)) + sum(map(_bytes, written)))
        self.live.append(self._in_use)
        self.gradients.append(self._in_gradients)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self._in_use += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._in_use -= self._held.pop(key)


def _is_view(func: Any) -> bool:
    """Return whether an operation only looks at its input differently."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns) or (
        func.overloadpacket is aten._unsafe_view
    )


def _written(func: Any, args: Any) -> list[Tensor]:
    """Return the inputs that an operation changes in place."""
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Count the bytes that a kernel reads or writes of a tensor; an expanded one is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _conv_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    """Count as much as the forward for each gradient asked for; PyTorch's own formula forgets groups."""
    wanted = args[-1]
    return conv_flop_count(x.shape, weight.shape, grad.shape) * (int(wanted[0]) + int(wanted[1]))  # type: ignore[arg-type]


_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.convolution_backward: _conv_backward_flops,
}

# Functions that CUDA's autocast runs in fp32 and the CPU's does not, as far as encoders and heads use them.
_FP32_ON_CUDA = {
    F.layer_norm, F.group_norm, F.softmax, F.normalize, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp,
    torch.pow, Tensor.pow, Tensor.norm, Tensor.sum, torch.sum, torch.rsqrt,
}  # fmt: skip


class _LikeDevice(TorchFunctionMode):
    """Follows what a device would do where the CPU does something else, in recomputed activations too."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            # A mode is off while it handles a call, and in this one checkpointing runs the forward pass again. So go
            # straight to the engine, since `torch.autograd.backward` would come back here.
            start = torch.ones_like(args[0])
            with self:
                torch.autograd.Variable._execution_engine.run_backward(
                    (args[0],), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            return None
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function of PyTorch as the device would."""
        raise AssertionError


class _LikeCuda(_LikeDevice):
    """Follows CUDA: autocast to fp32, and fused attention with a bias.

    Fake tensors of a CUDA device cannot run backward where PyTorch has no CUDA.
    """

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, Tensor) and arg.dtype.itemsize == 2 else arg for arg in args)
        if func is F.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        return func(*args, **kwargs)


class _LikeTpu(_LikeDevice):
    """Follows TorchTPU, which has a kernel for bf16 attention without a bias and computes the other by products.

    Its autocast leaves norms and softmax in the precision of their input, as the CPU's does.
    """

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mixed = torch.is_autocast_enabled("cpu")
        if mixed and kwargs.get("attn_mask") is None and len(args) < 4:
            return _TpuAttention.apply(*(each.bfloat16() for each in args))
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)


class _TpuAttention(torch.autograd.Function):
    """Attend, (B, heads, N, D), and keep for the backward pass what TorchTPU's kernel keeps: no N × N numbers."""

    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        q, k, v = map(_tiled, qkv)
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        out = _tiled(out)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(slope, *ctx.saved_tensors, 0.0, False)


def _tiled(x: Tensor) -> Tensor:
    """Copy (…, N, D) to where a TPU's kernel reads it: in tiles of 128 columns, so that heads of 64 take twice."""
    wide = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // _TPU_LANES) * _TPU_LANES)
    return wide[..., : x.shape[-1]].copy_(x)


_TPU_LANES = 128
# Devices that do not compute as CUDA does.
_LIKE: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "cpu": contextlib.nullcontext,
    "tpu": _LikeTpu,
}


def _cuda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend, (B, heads, N, D), by the kernel that takes a bias with a gradient and holds no other N × N numbers."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    scale = scale or 1 / math.sqrt(q.shape[-1])
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
