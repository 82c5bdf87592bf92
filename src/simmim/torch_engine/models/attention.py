"""Attention kernels of NVIDIA GPUs: set the one that a configuration names.

PyTorch chooses among several kernels for `F.scaled_dot_product_attention` of queries, keys and values
(B, heads, N, D): flash and cuDNN's, which take no learned bias; the memory-efficient one, which does; and plain
products. timm uses that function in ViT and BEiT, and plain products in Swin's windows unless it is told otherwise.

cuDNN's has given wrong results with a bias in bf16, and PyTorch prefers it from compute capability 9.0 on. So it is
off in every command (`accelerators.choose_device`) but a training that names it, whose model has no bias.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from simmim.config.training import Gpu, TrainingConfig
from simmim.errors import UserError
from simmim.training.resume import recall

_BIAS = "relative_position_bias_table"
_BACKENDS = {"efficient": "mem_efficient", "flash": "flash", "cudnn": "cudnn", "products": "math"}


def check_attention(config: TrainingConfig, backbone: nn.Module) -> None:
    """Raise `UserError` where `--gpu.attention` of a complete configuration cannot be honoured.

    `backbone` is the timm module, or one with all that attends in a step; it may be without memory.
    """
    wanted = config.gpu.attention
    if wanted == "auto":
        return
    option = f"--gpu.attention {wanted}"
    if config.device != "cuda":
        raise UserError(f"{option} is for --device cuda, not {config.device}; use auto")
    if not attention_layers(backbone):
        raise UserError(f"{option} has nothing to choose in {config.model}, whose kernels are fixed; use auto")
    if wanted not in ("flash", "cudnn"):
        return
    if has_bias(backbone):
        raise UserError(f"{option} takes no learned bias, which {config.model} has; use auto, efficient or products")
    if config.precision == "fp32":
        raise UserError(f"{option} is not for --precision fp32; use bf16 or fp16, or auto, efficient or products")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise UserError(f"{option} needs compute capability 8.0, this GPU has {major}.{minor}; use auto or efficient")


def attention_layers(backbone: nn.Module) -> list[Any]:
    """Return the layers of a timm module that can attend by a fused kernel or by products."""
    return [module for module in backbone.modules() if hasattr(module, "fused_attn")]


def has_bias(backbone: nn.Module) -> bool:
    """Return whether a timm module adds a learned bias to its attention scores, as BEiT and Swin do."""
    return any(_BIAS in name for name, _ in backbone.named_parameters())


def asked_gpu(config: TrainingConfig, device: str) -> Gpu:
    """Return the choices that a configuration names or, on a GPU, those of the run that it resumes."""
    begun = recall(config) if config.gpu == Gpu() and device == "cuda" else None
    return begun.gpu if begun else config.gpu


def set_attention(backbone: nn.Module, wanted: str) -> None:
    """Let the layers of a timm module attend by a fused kernel or by products; `auto` leaves timm's choice."""
    if wanted != "auto":
        for layer in attention_layers(backbone):
            layer.fused_attn = wanted != "products"


@contextlib.contextmanager
def attention_kernels(wanted: str) -> Iterator[None]:
    """Allow PyTorch the kernel that `wanted` names, and no other; `auto` leaves what is allowed."""
    backends: Any = torch.backends.cuda
    before = {name: getattr(backends, f"{name}_sdp_enabled")() for name in _BACKENDS.values()}
    try:
        for name in before if wanted != "auto" else ():
            getattr(backends, f"enable_{name}_sdp")(name == _BACKENDS[wanted])
        yield
    finally:
        for name, value in before.items():
            getattr(backends, f"enable_{name}_sdp")(value)
