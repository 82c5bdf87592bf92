"""Feature maps of several strides from any encoder, for segmentation and detection.

The last four stages of a Swin or a convolutional net are such maps. A plain ViT or BEiT has one map, from which
ViTDet's simple feature pyramid (arXiv 2203.16527) makes four.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` cells of the encoder's last map, `D` its features.
"""

from typing import Any

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from simmim.config.tasks import FinetuneConfig
from simmim.errors import UserError
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.tasks.backbones import create_task_backbone
from simmim.training.plan import check_stride


class Pyramid(nn.Module):
    """Normalised images (B, C, H, W) → one map (B, channels[i], H / strides[i], W / strides[i]) a level, finest first.

    `backbone` is a timm module under timm's names. All other parameters are new to the task.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone: Any = backbone

    def drop_finest(self) -> None:
        """Remove the finest level and its parameters."""
        self.channels, self.strides = self.channels[1:], self.strides[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        raise AssertionError


class StagePyramid(Pyramid):
    """The last four stages of a Swin or a convolutional net.

    A stage that ends without a norm (`stage_norms`, from its family) gets one, as in Swin's and ConvNeXt's own
    segmentation and detection, because the sums of residual blocks grow from stage to stage.
    """

    def __init__(self, backbone: nn.Module, stage_norms: tuple[bool, ...]):
        super().__init__(backbone)
        stages = self.backbone.feature_info[-4:]
        self.channels = tuple(stage["num_chs"] for stage in stages)
        self.strides = tuple(stage["reduction"] for stage in stages)
        self.norms = nn.ModuleList(
            nn.Identity() if done else LayerNorm2d(width)
            for done, width in zip(stage_norms, self.channels, strict=True)
        )
        for name, parameter in backbone.named_parameters():
            if name.startswith("head."):  # DDP would wait for its gradient for ever
                parameter.requires_grad_(False)

    def drop_finest(self) -> None:
        super().drop_finest()
        self.norms = self.norms[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        wanted = len(self.norms)
        maps = self.backbone.forward_intermediates(images, indices=wanted, norm=True, intermediates_only=True)
        return [norm(level) for norm, level in zip(self.norms, maps, strict=True)]


class SimplePyramid(Pyramid):
    """ViTDet's simple feature pyramid: strides of a quarter, a half, one and two patches, all of `channels`."""

    def __init__(self, backbone: nn.Module, channels: int):
        super().__init__(backbone)
        patch = self.backbone.patch_embed.patch_size[0]
        self.channels = (channels,) * 4
        self.strides = (patch // 4, patch // 2, patch, patch * 2)
        D = self.backbone.num_features
        scales = (
            (_double(D), LayerNorm2d(D // 2), nn.GELU(), _double(D // 2)),
            (_double(D),),
            (),
            (nn.MaxPool2d(2, ceil_mode=True),),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(*scale, *_refine(width, channels))
            for scale, width in zip(scales, (D // 4, D // 2, D, D), strict=True)
        )

    def drop_finest(self) -> None:
        super().drop_finest()
        self.levels = self.levels[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        [cells] = self.backbone.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True)
        return [level(cells) for level in self.levels]  # from (B, D, h, w)


def _double(width: int) -> nn.Module:
    """Create a layer that doubles the map: (B, width, h, w) → (B, width / 2, 2 h, 2 w)."""
    return nn.ConvTranspose2d(width, width // 2, 2, stride=2)


def _refine(width: int, channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def create_pyramid(config: FinetuneConfig, weights: dict[str, Tensor] | None, *, channels: int = 256) -> Pyramid:
    """Create the pyramid of the configuration's encoder and load `weights` (timm's names).

    `channels` is the width of a plain transformer's levels; an encoder with stages keeps its own widths. A level's
    side is rounded up where an odd number of patches is halved.

    Raises:
        UserError: image size, patch or weights do not fit.
    """
    family = find_family(config.model)
    assert config.image_size is not None
    if weights is not None and "norm.weight" not in weights:
        # An encoder fine-tuned for classification has its last norm after pooling, the closest to one before it.
        weights = {name.replace("fc_norm.", "norm."): tensor for name, tensor in weights.items()}
    backbone: Any = create_task_backbone(config, weights, **dict(family.arguments) | {"num_classes": 0})
    if family.stage_norms is not None:
        check_stride(config.image_size, backbone.feature_info[-1]["reduction"], config.model)
        return StagePyramid(backbone, family.stage_norms)
    patch = backbone.patch_embed.patch_size[0]
    check_stride(config.image_size, patch, config.model)
    if patch % 4:
        raise UserError(
            f"patch {patch} of {config.model} cannot be divided into the four cells a side of the finest feature map; "
            "use a model with a patch of 4, 8, 16 or 32"
        )
    return SimplePyramid(backbone, channels)
