"""ViT and DeiT (arXiv 2010.11929, 2012.12877).

Shapes: `B` images, `N` tokens, `n` chosen ones of an image, `D` features.
"""

from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor
from torch.nn import functional as F

from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import TokenEncoder
from simmim.torch_engine.models.savings import Chosen, LastBlock
from simmim.torch_engine.models.visible import VisibleEncoder


class LastViTBlock(LastBlock, Block):
    """A block that computes queries, and what follows the attention, for the chosen tokens only."""

    def forward_chosen(self, x: Tensor, chosen: Chosen, **settings: Any) -> Tensor:
        normal = self.norm1(x)
        if type(self.attn) is Attention and not any(settings.values()):
            mixed = _attend_from(self.attn, chosen.of(normal), normal)
        else:
            mixed = chosen.of(self.attn(normal, **settings))
        x = chosen.of(x) + self.drop_path1(self.ls1(mixed))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _attend_from(attention: Any, some: Tensor, tokens: Tensor) -> Tensor:
    """Apply timm's attention with queries of `some` (B, n, D) to `tokens` (B, N, D); returns (B, n, D)."""
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


FAMILY = Family(
    name="vit_*, deit*",
    modules=("timm.models.vision_transformer", "timm.models.deit"),
    excludes=("distilled",),  # has a second class token
    encoder=TokenEncoder,
    visible_encoder=VisibleEncoder,
    # Every token is predicted from, so the final norm acts on each token and not on a pooled vector. Pooling takes the
    # mean, since pretraining never trains the class token. Parameter names stay the same.
    arguments={"global_pool": "avg", "fc_norm": False},
    blocks=(Block, ResPostBlock, ParallelScalingBlock, DiffParallelScalingBlock, ParallelThingsBlock),
    last_blocks={Block: LastViTBlock},
    layer_decay=0.65,
)
