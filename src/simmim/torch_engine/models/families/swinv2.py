"""SwinV2 (arXiv 2111.09883)."""

from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

from simmim.torch_engine.models.compact import CompactEncoder
from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import SwinEncoder
from simmim.torch_engine.models.savings import Chosen, LastBlock


class LastSwinV2Block(LastBlock, SwinTransformerV2Block):
    """A block that computes what follows the attention for the chosen tokens only."""

    def forward_chosen(self, x: Tensor, chosen: Chosen) -> Tensor:
        x = chosen.of((x + self.drop_path1(self.norm1(self._attn(x)))).flatten(1, 2))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


FAMILY = Family(
    name="swinv2_*",
    modules=("timm.models.swin_transformer_v2",),
    encoder=SwinEncoder,
    visible_encoder=CompactEncoder,
    blocks=(SwinTransformerV2Block,),
    last_blocks={SwinTransformerV2Block: LastSwinV2Block},
    layer_decay=0.8,
    stage_norms=(False, False, False, True),
)
