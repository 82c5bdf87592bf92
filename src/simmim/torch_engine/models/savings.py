"""What a training step need not compute, since only hidden patches are judged and every mask hides as many.

Each saving leaves the loss and the gradients as they are, to rounding (`docs/speed.md` has what each gains). An encoder
of a kind that is not known here computes everything.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` cells, `N` tokens, `n` chosen ones of an image, `D` features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from simmim.hardware.host import cpu_name
from simmim.method.masks import MaskStrategy

# The CPU's fused attention is slow in bf16: forward and backward take twice as long as two products and a softmax for
# 197 tokens (ViT at 224), as long for about 2300. Beyond this many, N × N scores cost more memory than they save time.
_UNFUSED_TOKENS = 1100


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Which are made."""

    visible_patches: bool = True
    """Embed visible patches only: a mask token takes the place of the others."""
    hidden_cells: bool = True
    """Head and loss on the hidden cells of the feature map only."""
    last_block: bool = True
    """Of the last block what comes after its attention, and a ViT's queries, for these cells only."""
    attention: bool = True
    """The attention kernel that is fastest here."""
    products: bool = True
    """The library for products with weights that is fastest here."""


PLAIN = Savings(visible_patches=False, hidden_cells=False, last_block=False, attention=False, products=False)


@dataclass(frozen=True)
class Chosen:
    """Places of `n` tokens of each image, (B, n), among N."""

    places: Tensor

    def of(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, n, D)."""
        # Rows of one long list: many times as fast as `gather` on a CPU.
        return x.flatten(0, 1).index_select(0, self._rows(x.shape[1])).unflatten(0, self.places.shape)

    def put(self, x: Tensor, tokens: int) -> Tensor:
        """(B, n, D) → (B, N, D), zero elsewhere."""
        B, _, D = x.shape
        return x.new_zeros(B * tokens, D).index_copy(0, self._rows(tokens), x.flatten(0, 1)).unflatten(0, (B, tokens))

    def after(self, others: int) -> "Chosen":
        """The same tokens where as many others come first."""
        return Chosen(self.places + others)

    def _rows(self, tokens: int) -> Tensor:
        first = torch.arange(len(self.places), device=self.places.device) * tokens
        return (self.places + first.unsqueeze(1)).flatten()


@dataclass(frozen=True)
class Counts:
    """How many there are of each image; `None`: as many as there are cells, or not the same for every image."""

    visible_patches: int | None = None
    hidden_cells: int | None = None


def count(masks: MaskStrategy, size: tuple[int, int], *, patch: int, stride: int) -> Counts:
    """Visible patches, and hidden cells of a feature map of this stride, under every mask for images of `size`."""
    rows, columns = masks.grid(size)
    hidden = masks.masked_cells(size)
    return Counts(
        visible_patches=(rows * columns - hidden) * (masks.cell // patch) ** 2,
        # A mask's cell smaller than the map's would hide parts of more or fewer of these.
        hidden_cells=None if masks.cell % stride else hidden * (masks.cell // stride) ** 2,
    )


def choose(mask: Tensor, n: int, *, hidden: bool) -> Chosen:
    """The hidden (or the visible) cells of a mask (B, h, w) that has `n` of them in each image."""
    order = mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True, descending=hidden)
    return Chosen(order[:, :n])


@dataclass
class Choice:
    """What the encoder's parts are to compute in this step; `None` is everything."""

    patches: Chosen | None = None
    """The visible patches."""
    tokens: Chosen | None = None
    """Those that the last block is to give."""


def embed_visible(patch_embed: nn.Module, choice: Choice) -> bool:
    """From now on embed the patches of `choice` only, and give zeros for the others. False where that cannot be."""
    # Patches as small as Swin's are as quickly embedded as gathered.
    if type(patch_embed) is not PatchEmbed or patch_embed.proj.weight.shape[-1] < 8:
        return False
    _change_forward(patch_embed, _embed, choice)
    return True


def shorten_last_block(backbone: nn.Module, choice: Choice) -> bool:
    """From now on the last block gives (B, n, D) for the tokens of `choice`. False where its kind is not known."""
    blocks = [module for module in backbone.modules() if type(module) in _SHORT]
    if not blocks or type(backbone) not in _BACKBONES:
        return False
    _change_forward(blocks[-1], _last_block, choice)
    return True


def _change_forward(module: Any, forward: Callable[..., Tensor], choice: Choice) -> None:
    # On the object, so that hooks (FSDP's) still run; no closure, so that a copy of a model follows its own choice.
    module.choice = choice
    module.forward = MethodType(forward, module)


def _embed(module: Any, images: Tensor) -> Tensor:
    visible = module.choice.patches
    if visible is None:
        return PatchEmbed.forward(module, images)
    p, q = module.patch_size
    h, w = images.shape[2] // p, images.shape[3] // q
    patches = images.unflatten(3, (w, q)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, q)
    image = torch.arange(len(images), device=images.device).unsqueeze(1)
    some = patches[image, visible.places // w, visible.places % w].flatten(2)  # (B, n, C·p·q)
    tokens = visible.put(module.norm(F.linear(some, module.proj.weight.flatten(1), module.proj.bias)), h * w)
    return tokens if module.flatten else tokens.unflatten(1, (h, w))


def _last_block(block: Any, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    # A sharded block's class is FSDP's own, made of the block's.
    kind = next(each for each in type(block).__mro__ if each in _SHORT)
    tokens = block.choice.tokens
    if tokens is None:
        return kind.forward(block, x, *arguments, **settings)
    return _SHORT[kind](block, x, tokens, *arguments, **settings)


def _short_vit(block: Any, x: Tensor, chosen: Chosen, **settings: Any) -> Tensor:
    normal = block.norm1(x)
    if type(block.attn) is Attention and not any(settings.values()):
        mixed = _attend_from(block.attn, chosen.of(normal), normal)
    else:
        mixed = chosen.of(block.attn(normal, **settings))
    x = chosen.of(x) + block.drop_path1(block.ls1(mixed))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend_from(attention: Any, some: Tensor, tokens: Tensor) -> Tensor:
    """timm's attention for the queries of `some` (B, n, D) of the tokens (B, N, D): (B, n, D)."""
    width, heads = attention.attn_dim, attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = F.linear(some, weight[:width], None if bias is None else bias[:width])
    kv = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
    q = attention.q_norm(q.unflatten(2, (heads, -1)).transpose(1, 2))  # (B, heads, n, D/heads)
    k, v = kv.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    k = attention.k_norm(k)
    if attention.fused_attn:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=attention.attn_drop.p if attention.training else 0.0)
    else:
        x = attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    x = attention.norm(x.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        x = x * attention.gate(some).sigmoid()
    return attention.proj_drop(attention.proj(x))


def _short_beit(block: Any, x: Tensor, chosen: Chosen, **settings: Any) -> Tensor:
    mixed = chosen.of(block.attn(block.norm1(x), **settings))
    gamma_1, gamma_2 = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
    x = chosen.of(x) + block.drop_path1(gamma_1 * mixed)
    return x + block.drop_path2(gamma_2 * block.mlp(block.norm2(x)))


def _short_swin(block: Any, x: Tensor, chosen: Chosen) -> Tensor:
    x = chosen.of((x + block.drop_path1(block._attn(block.norm1(x)))).flatten(1, 2))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _short_swin_v2(block: Any, x: Tensor, chosen: Chosen) -> Tensor:
    x = chosen.of((x + block.drop_path1(block.norm1(block._attn(x)))).flatten(1, 2))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


_SHORT: dict[type[nn.Module], Callable[..., Tensor]] = {
    vision_transformer.Block: _short_vit,
    beit.Block: _short_beit,
    swin_transformer.SwinTransformerBlock: _short_swin,
    swin_transformer_v2.SwinTransformerV2Block: _short_swin_v2,
}
_BACKBONES = {
    vision_transformer.VisionTransformer,
    beit.Beit,
    swin_transformer.SwinTransformer,
    swin_transformer_v2.SwinTransformerV2,
}


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
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


@cache
def _onednn_product() -> Callable[..., Tensor] | None:
    if "AMD" not in cpu_name() or not torch.backends.mkldnn.is_available():
        return None
    product = torch.ops.mkldnn._linear_pointwise

    @register_flop_formula(product)
    def _(x: torch.Size, weight: torch.Size, *_others: Any, **_settings: Any) -> int:
        return 2 * x.numel() * weight[0]

    return product


def _linear(module: Any, x: Tensor) -> Tensor:
    # A tensor of a kind of its own (fake, sharded), of another device or type, and autocast are PyTorch's business.
    usual = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if not usual or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, module.weight, module.bias)
    rows = _Product.apply(x.flatten(0, -2), module.weight, module.bias)
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
