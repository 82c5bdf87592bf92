"""CPU kernels that compute the same result in different ways: set the ways that a configuration names."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from simmim.config.training import Kernels
from simmim.hardware.host import cpu_name
from simmim.torch_engine.models.savings import replace_class

# Beyond this many tokens, N × N scores cost more memory than two products save time.
_UNFUSED_TOKENS = 1100


def allowed_kernels(backbone: nn.Module, precision: str) -> dict[str, tuple[str, ...]]:
    """Return the kernels that suit a timm module on the CPU, by field of `Kernels`; PyTorch's usual kernel first."""
    ways: dict[str, tuple[str, ...]] = {"linear": ("default",), "attention": ("fused",)}
    if precision == "fp32" and has_onednn() and linear_layers(backbone):
        ways["linear"] = ("default", "onednn")
    embed: Any = getattr(backbone, "patch_embed", None)
    if embed is not None and embed.num_patches <= _UNFUSED_TOKENS and fused_attention(backbone):
        ways["attention"] = ("fused", "products")
    ways["memory_format"] = ("channels_last",) if embed is not None else ("channels_last", "contiguous")
    return ways


def kernels_of_rules(kernels: Kernels, backbone: nn.Module, precision: str, *, pretraining: bool) -> Kernels:
    """Return `kernels` with each `auto` replaced by the choice of version 0.1, which measured nothing.

    Runs that recorded no kernels resume with these, to the bit.
    """
    ways, fp32 = allowed_kernels(backbone, precision), precision == "fp32"
    wanted = {
        "linear": "onednn" if "AMD" in cpu_name() else "default",
        "attention": "fused" if fp32 else "products",
        # Batch norms sum less exactly in fp32 with channels last.
        "memory_format": "contiguous" if fp32 and pretraining else "channels_last",
    }
    found = {name: way if way in ways[name] else ways[name][0] for name, way in wanted.items()}
    return fill_kernels(kernels, found)


def fill_kernels(kernels: Kernels, found: Mapping[str, str]) -> Kernels:
    """Return `kernels` with the choices that were found in place of `auto`."""
    changes: dict[str, Any] = {name: way for name, way in found.items() if getattr(kernels, name) == "auto"}
    return dataclasses.replace(kernels, **changes)


def set_kernels(model: nn.Module, backbone: nn.Module, kernels: Kernels) -> None:
    """Let `model`, which contains the timm module `backbone`, use these kernels on the CPU; `auto` changes nothing."""
    if kernels.attention == "products":
        for module in fused_attention(backbone):
            module.fused_attn = False
    if kernels.linear == "onednn":
        for module in linear_layers(model):
            replace_class(module, OneDnnLinear)
    if kernels.memory_format == "contiguous":
        stem = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
        stem.register_forward_pre_hook(_make_contiguous)


def has_onednn() -> bool:
    """Return whether this PyTorch can compute linear layers by oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Return the plain linear layers of a model."""
    return [module for module in model.modules() if type(module) is nn.Linear]


def fused_attention(backbone: nn.Module) -> list[Any]:
    """Return the layers of a timm module that use fused attention."""
    return [module for module in backbone.modules() if getattr(module, "fused_attn", False)]


def _make_contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give images in the order channels, rows, columns in memory: a pre-hook."""
    return inputs[0].contiguous(), *inputs[1:]


@cache
def _onednn_product() -> Callable[..., Tensor]:
    product = torch.ops.mkldnn._linear_pointwise

    @register_flop_formula(product)
    def _(x: torch.Size, weight: torch.Size, *_others: Any, **_settings: Any) -> int:
        return 2 * x.numel() * weight[0]

    return product


class OneDnnLinear(nn.Linear):
    """A linear layer that oneDNN computes in fp32 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch handles tensors of other devices and types, subclasses (fake, sharded), and autocast.
        usual = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
        if not usual or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        rows = _Product.apply(x.flatten(0, -2), self.weight, self.bias)
        return rows.unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


class _Product(torch.autograd.Function):
    """`F.linear` of rows by oneDNN, except for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            _multiply(slope, weight.t(), None) if ctx.needs_input_grad[0] else None,
            slope.t() @ x if ctx.needs_input_grad[1] else None,
            slope.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn_product()(x, weight, bias, "none", [], "")
