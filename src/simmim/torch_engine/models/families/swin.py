"""Swin (arXiv 2103.14030)."""

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from simmim.torch_engine.models.compact import CompactEncoder
from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import SwinEncoder
from simmim.torch_engine.models.savings import Chosen, LastBlock


class LastSwinBlock(LastBlock, SwinTransformerBlock):
    """A block that computes what follows the attention for the chosen tokens only."""

    def forward_chosen(self, x: Tensor, chosen: Chosen) -> Tensor:
        x = chosen.of((x + self.drop_path1(self._attn(self.norm1(x)))).flatten(1, 2))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


FAMILY = Family(
    name="swin_*",
    modules=("timm.models.swin_transformer",),
    encoder=SwinEncoder,
    visible_encoder=CompactEncoder,
    blocks=(SwinTransformerBlock,),
    last_blocks={SwinTransformerBlock: LastSwinBlock},
    layer_decay=0.8,
    stage_norms=(False, False, False, True),
)
