"""ConvNeXt (arXiv 2201.03545)."""

from timm.models.convnext import ConvNeXtBlock

from simmim.torch_engine.models.family import Family
from simmim.torch_engine.models.masked import NEEDS_WHOLE_MAPS, ConvEncoder

FAMILY = Family(
    name="convnext*",
    modules=("timm.models.convnext",),
    encoder=lambda net: ConvEncoder(net, "stages.2"),
    needs_all_patches=NEEDS_WHOLE_MAPS,
    takes_image_size=False,
    blocks=(ConvNeXtBlock,),
    stage_norms=(False, False, False, False),  # timm has the last norm in the classifier
)
