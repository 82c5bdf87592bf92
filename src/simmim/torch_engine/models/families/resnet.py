"""ResNet (arXiv 1512.03385)."""

from timm.models.resnet import BasicBlock, Bottleneck

from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import NEEDS_WHOLE_MAPS, ConvEncoder

FAMILY = Family(
    name="resnet*",
    modules=("timm.models.resnet",),
    encoder=lambda net: ConvEncoder(net, "layer3"),
    needs_all_patches=NEEDS_WHOLE_MAPS,
    takes_image_size=False,
    blocks=(BasicBlock, Bottleneck),
    stage_norms=(True, True, True, True),  # batch norms
)
