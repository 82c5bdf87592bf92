"""Work that a training step can skip, since the loss covers hidden patches only and masks hide equal numbers.

Each saving keeps loss and gradients equal up to rounding (`docs/speed.md` lists the gains). An encoder whose family
names no `last_blocks` computes its last block in full.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` cells, `N` tokens, `n` chosen ones of an image, `D` features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.method.masks import MaskStrategy


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Savings to make."""

    visible_patches: bool = True
    """Embed visible patches only; the mask token takes the place of the others."""
    hidden_cells: bool = True
    """Compute head and loss for the hidden cells of the feature map only."""
    last_block: bool = True
    """Compute what follows the last block's attention, and a ViT's queries, for these cells only."""
    attention: bool = True
    """Use the fastest attention kernel of this machine."""
    products: bool = True
    """Use the fastest library of this machine for linear layers."""


PLAIN = Savings(visible_patches=False, hidden_cells=False, last_block=False, attention=False, products=False)


@dataclass(frozen=True)
class Chosen:
    """Places of `n` tokens of each image, (B, n), among N."""

    places: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Gather the chosen tokens: (B, N, D) → (B, n, D)."""
        # On a CPU, indexing rows of one long list is many times faster than `gather`.
        return x.flatten(0, 1).index_select(0, self._rows(x.shape[1])).unflatten(0, self.places.shape)

    def put(self, x: Tensor, tokens: int) -> Tensor:
        """Scatter chosen tokens: (B, n, D) → (B, N, D), zero elsewhere."""
        B, _, D = x.shape
        return x.new_zeros(B * tokens, D).index_copy(0, self._rows(tokens), x.flatten(0, 1)).unflatten(0, (B, tokens))

    def after(self, others: int) -> "Chosen":
        """Shift the places behind a number of other tokens."""
        return Chosen(self.places + others)

    def _rows(self, tokens: int) -> Tensor:
        first = torch.arange(len(self.places), device=self.places.device) * tokens
        return (self.places + first.unsqueeze(1)).flatten()


@dataclass(frozen=True)
class Counts:
    """Numbers per image. `None` means all cells, or a number that varies between images."""

    visible_patches: int | None = None
    hidden_cells: int | None = None


def count(masks: MaskStrategy, size: tuple[int, int], *, patch: int, stride: int) -> Counts:
    """Count visible patches, and hidden cells of a feature map of this stride, for images of `size`."""
    masks = masks.for_patch(patch)
    assert masks.cell is not None
    rows, columns = masks.grid(size)
    hidden = masks.masked_cells(size)
    return Counts(
        visible_patches=(rows * columns - hidden) * (masks.cell // patch) ** 2,
        # Mask cells smaller than the map's cells hide parts of a varying number of cells.
        hidden_cells=None if masks.cell % stride else hidden * (masks.cell // stride) ** 2,
    )


def choose(mask: Tensor, n: int, *, hidden: bool) -> Chosen:
    """Return the hidden or the visible cells of a mask (B, h, w) that has `n` of them in each image."""
    order = mask.flatten(1).to(torch.uint8).argsort(dim=1, stable=True, descending=hidden)
    return Chosen(order[:, :n])


@dataclass
class ForwardState:
    """Inputs of the current forward pass that parts of the backbone need. `None` means everything."""

    mask: Tensor | None = None
    """(B, h, w) in units of `patch_size`, True = hidden."""
    token_mask: Tensor | None = None
    """Places of the mask token, (B, h, w)."""
    mask_token: Tensor | None = None
    """(1, 1, D)."""
    patches: Chosen | None = None
    """Visible patches."""
    tokens: Chosen | None = None
    """Tokens to compute in the last block."""

    def clear(self) -> None:
        self.mask = self.token_mask = self.mask_token = self.patches = self.tokens = None


def replace_class(module: nn.Module, subclass: type[nn.Module]) -> None:
    """Turn a module into an instance of a subclass of its class.

    A method set on the module instead would refer to the module, and this cycle would keep its memory until the
    garbage collector runs.
    """
    assert issubclass(subclass, type(module))
    module.__class__ = subclass


class VisiblePatchEmbed(PatchEmbed):
    """Embed the patches of `state` only; others are zero."""

    state: ForwardState

    def forward(self, x: Tensor) -> Tensor:
        visible = self.state.patches
        if visible is None:
            return super().forward(x)
        p, q = self.proj.kernel_size
        h, w = x.shape[2] // p, x.shape[3] // q
        patches = x.unflatten(3, (w, q)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, q)
        image = torch.arange(len(x), device=x.device).unsqueeze(1)
        some = patches[image, visible.places // w, visible.places % w].flatten(2)  # (B, n, C·p·q)
        tokens = visible.put(self.norm(F.linear(some, self.proj.weight.flatten(1), self.proj.bias)), h * w)
        return tokens if self.flatten else tokens.unflatten(1, (h, w))


class LastBlock(nn.Module):
    """Base of blocks that can compute some tokens only. A family derives it together with the plain block."""

    state: ForwardState

    def forward(self, x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        tokens = self.state.tokens
        if tokens is None:
            return super().forward(x, *arguments, **settings)
        return self.forward_chosen(x, tokens, *arguments, **settings)

    def forward_chosen(self, x: Tensor, chosen: Chosen) -> Tensor:
        """Compute the chosen tokens: (B, N, D) or (B, h, w, D) → (B, n, D)."""
        raise AssertionError


def embed_visible(patch_embed: nn.Module, state: ForwardState) -> None:
    """Make a patch embedding embed the patches of `state` only, if that is faster."""
    # Small patches such as Swin's take as long to gather as to embed.
    if type(patch_embed) is PatchEmbed and patch_embed.proj.weight.shape[-1] >= 8:
        replace_class(patch_embed, VisiblePatchEmbed)
        patch_embed.state = state  # type: ignore[assignment]


def shorten_last_block(
    backbone: nn.Module, state: ForwardState, last_blocks: Mapping[type[nn.Module], type[LastBlock]]
) -> bool:
    """Let the last block compute the tokens of `state` only, (B, n, D). Return whether it can."""
    blocks: list[Any] = [module for module in backbone.modules() if type(module) in last_blocks]
    if not blocks:
        return False
    replace_class(blocks[-1], last_blocks[type(blocks[-1])])
    blocks[-1].state = state
    return True
