"""RegNet (arXiv 2003.13678)."""

from timm.models.regnet import Bottleneck, PreBottleneck

from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import NEEDS_WHOLE_MAPS, ConvEncoder

FAMILY = Family(
    name="regnet*",
    modules=("timm.models.regnet",),
    encoder=lambda net: ConvEncoder(net, "s3"),
    needs_all_patches=NEEDS_WHOLE_MAPS,
    takes_image_size=False,
    blocks=(Bottleneck, PreBottleneck),
    stage_norms=(True, True, True, True),  # batch norms
)
