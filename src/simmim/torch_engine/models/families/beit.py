"""BEiT and BEiT v2 (arXiv 2106.08254). The ViT of SimMIM's authors is a BEiT for timm."""

from typing import Any

from timm.models.beit import Block
from torch import Tensor

from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import TokenEncoder
from simmim.torch_engine.models.savings import Chosen, LastBlock


class LastBeitBlock(LastBlock, Block):
    """A block that computes what follows the attention for the chosen tokens only."""

    def forward_chosen(self, x: Tensor, chosen: Chosen, **settings: Any) -> Tensor:
        mixed = chosen.of(self.attn(self.norm1(x), **settings))
        gamma_1, gamma_2 = (1.0, 1.0) if self.gamma_1 is None else (self.gamma_1, self.gamma_2)
        x = chosen.of(x) + self.drop_path1(gamma_1 * mixed)
        return x + self.drop_path2(gamma_2 * self.mlp(self.norm2(x)))


FAMILY = Family(
    name="beit*",
    modules=("timm.models.beit",),
    encoder=TokenEncoder,
    needs_all_patches="has its positions in a bias between all patches, and none in the tokens",
    arguments={"use_fc_norm": False},  # as for ViT
    blocks=(Block,),
    last_blocks={Block: LastBeitBlock},
    layer_decay=0.65,
)
