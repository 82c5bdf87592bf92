"""A user's own network and its encoder family, in one file."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import simmim
from simmim.torch_engine.models import family
from simmim.torch_engine.models.family import Family, register_family
from simmim.torch_engine.models.masked import TokenEncoder


class MixBlock(nn.Module):
    """Mix tokens, then features."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Linear(tokens, tokens)
        self.features = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.features(x).relu()


class MixNet(nn.Module):
    def __init__(
        self, img_size: Any = 64, in_chans: int = 3, num_classes: int = 10, width: int = 16, **_unused: Any
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.num_prefix_tokens = num_classes, width, 0
        self.feature_info = [{"num_chs": width, "reduction": 16, "module": "blocks"}]
        self.patch_embed = PatchEmbed(img_size, 16, in_chans, width)
        self.blocks = nn.Sequential(*(MixBlock(self.patch_embed.num_patches, width) for _ in range(2)))
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean(1))


default_cfgs = generate_default_cfgs(
    {"mixnet_tiny": {"input_size": (3, 64, 64), "first_conv": "patch_embed.proj", "classifier": "head"}}
)


@register_model
def mixnet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(MixNet, "mixnet_tiny", pretrained, **kwargs)


@pytest.fixture
def own_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_registered", [])
    register_family(
        Family(name="mixnet*", modules=(__name__,), encoder=TokenEncoder, blocks=(MixBlock,), layer_decay=0.9)
    )


@pytest.mark.usefixtures("own_family")
def test_an_own_family_is_pretrained_and_fine_tuned(tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    short: dict[str, Any] = {"data": "demo", "steps": 2, "batch_size": 4, "workers": 1, "device": "cpu"}
    simmim.pretrain(out=str(run), model="mixnet_tiny", **short)
    assert "blocks.0.tokens.weight" in simmim.load_encoder(run).state_dict()
    simmim.finetune("classify", out=str(tuned), init=str(run), **short)
    assert "layer_decay = 0.9" in (tuned / "config.toml").read_text()
    model: Any = timm.create_model(f"local-dir:{tuned / 'model'}", pretrained=True)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.head.out_features)


def test_without_its_family_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model 'mixnet_tiny' cannot take a mask"):
        family.find_family("mixnet_tiny")
