"""Modules that score the cells of images for guided masks, and hide those of highest score.

To add one, register a module by `@create_guide.register(YourMask)`.

Shapes: `B` images, `M` masks of an image, `C` channels, `H W` pixels, `p` patch side, `h w` feature-map cells,
`rows columns` mask cells, `n` hidden ones, `N` tokens, `D` features.
"""

from __future__ import annotations

from functools import partial, singledispatch
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.errors import UserError
from simmim.method.masks import AttentionMask, GuidedMask, HardMask, MaskStrategy
from simmim.torch_engine.models.moving_average import MovingAverage
from simmim.torch_engine.models.savings import choose

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked import Encoder
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep
    from simmim.torch_engine.models.objective import ObjectiveBatch


class MaskGuide(nn.Module):
    """Base of guides. A call scores the mask cells of whole images: (B, C, H, W) → (B, rows, columns).

    It owns parameters and buffers, which are trained and saved with the step.
    """

    learns: bool = False
    """Whether it needs the losses of cells (`ObjectiveBatch.cell_losses`)."""

    def __init__(self, mask: GuidedMask, encoder: Encoder, image_size: tuple[int, int]):
        super().__init__()
        assert mask.cell is not None
        self.grid, self.count, self.share = mask.grid(image_size), mask.masked_cells(image_size), mask.share
        self.patches = mask.cell // encoder.patch_size
        self.steps = mask.steps or 1
        self.teacher = MovingAverage(encoder, momentum=mask.momentum, momentum_end=mask.momentum_end, steps=mask.steps)

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError

    @torch.no_grad()
    def hide(self, score: Tensor, order: Tensor) -> Tensor:
        """Choose masks (M·B, H/p, W/p) that hide `count` cells each.

        Those of highest score (B, rows, columns) come first, as many as the share has risen to, and then the others in
        their `order` (M·B, rows, columns).
        """
        guided = self.share * self.count * (self.teacher.updates / self.steps).clamp(max=1)
        first = _ranks(-score.float()) + 1 <= guided
        order = order.flatten(1)
        order = order - order.shape[1] * first.repeat(len(order) // len(first), 1)
        hidden = (_ranks(order) < self.count).unflatten(1, self.grid)
        return hidden.repeat_interleave(self.patches, 1).repeat_interleave(self.patches, 2)

    def losses(self, score: Tensor, batch: ObjectiveBatch) -> dict[str, Tensor]:
        """Return what the guide learns by, by name, after the objectives."""
        return {}

    @torch.no_grad()
    def after_update(self, step: PretrainStep, finite: Tensor) -> None:
        """Move the teacher after an optimiser step; where `finite` is false, change nothing."""
        self.teacher.update(step.model.encoder, finite)

    def _pool(self, maps: Tensor) -> Tensor:
        """Average maps over mask cells: (B, h, w, D) → (B, rows, columns, D)."""
        return F.adaptive_avg_pool2d(maps.float().permute(0, 3, 1, 2), self.grid).permute(0, 2, 3, 1)


class AttentionGuide(MaskGuide):
    """Score a cell by the attention that the class token pays to it, or by its similarity to the image's mean."""

    def __init__(self, mask: GuidedMask, encoder: Encoder, image_size: tuple[int, int]):
        super().__init__(mask, encoder, image_size)
        backbone: Any = self.teacher.module.backbone
        self._attention: list[Tensor] | None = None
        if getattr(backbone, "cls_token", None) is not None and type(backbone.blocks[-1].attn) is Attention:
            self._attention = []
            keep = partial(_keep_attention, self._attention, backbone.num_prefix_tokens)
            backbone.blocks[-1].attn.register_forward_pre_hook(keep)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = self.teacher(images)
        if self._attention is not None:
            score = self._attention.pop().unflatten(1, features.shape[1:3])
        else:
            score = F.cosine_similarity(features.float(), features.float().mean(dim=(1, 2), keepdim=True), dim=-1)
        return self._pool(score.unsqueeze(-1))[..., 0]


def _keep_attention(kept: list[Tensor], prefix: int, attention: Attention, inputs: tuple[Tensor, ...]) -> None:
    """Keep the attention of the first token to the patches, the mean over heads, (B, N - prefix), as a pre-hook."""
    qkv = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1))  # (B, N, 3, heads, D/heads)
    query, keys = attention.q_norm(qkv[:, :1, 0].transpose(1, 2)), attention.k_norm(qkv[:, :, 1].transpose(1, 2))
    weights = (query * attention.scale @ keys.transpose(-2, -1)).float().softmax(-1)  # (B, heads, 1, N)
    kept.append(weights.mean(1)[:, 0, prefix:])


class LossGuide(MaskGuide):
    """Score a cell by a linear function of its feature, which learns to rank the losses of an image's hidden cells.

    Features are normalised over the cells of their image, since only differences between these say anything.
    """

    learns = True

    def __init__(self, mask: GuidedMask, encoder: Encoder, image_size: tuple[int, int]):
        super().__init__(mask, encoder, image_size)
        self.predictor = nn.Linear(encoder.num_features, 1, bias=False)  # no order depends on a bias
        nn.init.zeros_(self.predictor.weight)  # random weights would outweigh what few steps teach

    def forward(self, images: Tensor) -> Tensor:
        features = self._pool(self.teacher(images))
        with torch.autocast(images.device.type, enabled=False):
            centred = features - features.mean(dim=(1, 2), keepdim=True)
            scale = centred.square().mean(dim=(1, 2), keepdim=True).add(1e-6).rsqrt()
            return self.predictor(centred * scale)[..., 0]

    def losses(self, score: Tensor, batch: ObjectiveBatch) -> dict[str, Tensor]:
        assert batch.mask is not None and batch.cell_losses is not None
        hidden = choose(batch.mask[:, :: self.patches, :: self.patches], self.count, hidden=True)
        losses = self._pool(torch.stack(list(batch.cell_losses.values()), dim=-1)).sum(dim=-1)
        values = torch.stack((batch.again(score), losses), dim=-1)
        return {"ranking": ranking_loss(*hidden.of(values.flatten(1, 2)).unbind(-1))}


def ranking_loss(score: Tensor, losses: Tensor) -> Tensor:
    """Judge by scores (B, n) which of two cells of an image has the higher loss (B, n); HPM, equation 5.

    The binary cross-entropy of each pair of unequal losses, averaged over an image's pairs and over images.
    """
    higher = losses.unsqueeze(2) > losses.unsqueeze(1)  # (B, n, n)
    error = F.softplus(score.unsqueeze(1) - score.unsqueeze(2))
    return ((error * higher).sum(dim=(1, 2)) / higher.sum(dim=(1, 2)).clamp(min=1)).mean()


@singledispatch
def create_guide(mask: MaskStrategy, model: MaskedImageModel, config: PretrainConfig) -> MaskGuide | None:
    """Build the guide of a guided mask for a model of a complete configuration; other masks have none."""
    if not mask.guided:
        return None
    raise UserError(
        f"mask {mask.kind} has no guide in PyTorch; register one by simmim.torch_engine.models.mask_guides.create_guide"
    )


@create_guide.register(AttentionMask)
def _(mask: AttentionMask, model: MaskedImageModel, config: PretrainConfig) -> MaskGuide:
    assert config.image_size is not None
    return AttentionGuide(mask, model.encoder, config.image_size)


@create_guide.register(HardMask)
def _(mask: HardMask, model: MaskedImageModel, config: PretrainConfig) -> MaskGuide:
    assert config.image_size is not None
    if not config.reconstructs:
        raise UserError("--mask hard learns from the loss on pixels; add objective pixels, or use --mask attention")
    return LossGuide(mask, model.encoder, config.image_size)


def _ranks(values: Tensor) -> Tensor:
    """Return the places of values in their row's ascending order: (B, …) → (B, N), each of 0 to N - 1 once."""
    return values.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
