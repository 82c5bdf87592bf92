"""Kernels that compute the same in different ways: attention and linear layers on the CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from simmim.hardware.host import cpu_name
from simmim.torch_engine.models.savings import replace_class

# The CPU's fused attention is slow in bf16: forward and backward take twice as long as two products and a softmax for
# 197 tokens (ViT at 224), as long for about 2300. Beyond this many, N × N scores cost more memory than they save time.
_UNFUSED_TOKENS = 1100


def choose_attention(backbone: nn.Module, *, device: str, precision: str) -> None:
    """Take the attention kernel that is fastest on the device, of those that timm's modules know."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if device == "cpu" and precision != "fp32" and embed is not None and embed.num_patches <= _UNFUSED_TOKENS:
        for module in backbone.modules():
            if getattr(module, "fused_attn", False):
                module.fused_attn = False  # type: ignore[assignment]


def choose_products(model: nn.Module, *, device: str, precision: str) -> None:
    """On AMD's processors let oneDNN do the linear layers' products in fp32: PyTorch's usual choice, MKL, is slower."""
    if device == "cpu" and precision == "fp32" and _onednn_product() is not None:
        for module in model.modules():
            if type(module) is nn.Linear:
                replace_class(module, OneDnnLinear)


@cache
def _onednn_product() -> Callable[..., Tensor] | None:
    if "AMD" not in cpu_name() or not torch.backends.mkldnn.is_available():
        return None
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
    """`F.linear` of rows by oneDNN, but for the weight's gradient, in which MKL is as fast."""

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
    product = _onednn_product()
    assert product is not None
    return product(x, weight, bias, "none", [], "")
