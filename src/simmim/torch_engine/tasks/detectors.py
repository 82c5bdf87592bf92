"""torchvision's detectors over the feature pyramid of any encoder.

Shapes: `B` images, `C` channels, `H W` pixels, `n` objects of an image, `K` classes.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from simmim.config.tasks import DetectConfig
from simmim.errors import UserError
from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.tasks.pyramid import Pyramid, SimplePyramid

TWO_STAGES = ("faster_rcnn", "mask_rcnn")

# ViTDet's anchors are of 32 to 512 pixels in images of 1024; those of other sizes have them in proportion, though none
# of less than two cells, which would leave gaps between neighbours.
_FINEST_ANCHOR = 32 / 1024
_LEAST_CELLS = 2
# FCOS and RetinaNet look from stride 8 on, as in their papers, but in images of fewer pixels a side at stride 4 too. At
# 128, with objects of 20 pixels and more, that took twice the time and found less (docs/detection.md).
_SMALL = 128
_LEAST_STRIDE = 2  # of RetinaNet's finest map, which at stride 1 would be as large as the image
_GROUP = 32  # channels of a group norm in FCOS's heads
# FCOS predicts, after a ReLU, how far the sides of a box are from a point, in strides. Where all are 0, the boxes' loss
# has no gradient, and never falls again (tianzhi0549/FCOS, issue 310). So they begin at 2, and in training none is less
# than a tenth.
_FIRST_SIDE, _LEAST_SIDE = 2.0, 0.1


class Levels(nn.Module):
    """Normalised images (B, C, H, W) → maps of one width by name, finest first: what a detector of torchvision takes.

    Stages of an encoder pass through a feature pyramid network (arXiv 1612.03144); the levels that a plain transformer
    has are used as they are (arXiv 2203.16527). One coarser level is added by pooling for detectors of two stages, two
    by convolutions for those of one.
    """

    def __init__(self, pyramid: Pyramid, channels: int, *, two_stages: bool):
        super().__init__()
        self.pyramid = pyramid
        self.out_channels = channels
        extra = LastLevelMaxPool() if two_stages else LastLevelP6P7(channels, channels)
        top = pyramid.strides[-1]
        self.strides = (*pyramid.strides, *((2 * top,) if two_stages else (2 * top, 4 * top)))
        if isinstance(pyramid, SimplePyramid):
            self.network, self.extra = None, extra
        else:
            self.network, self.extra = FeaturePyramidNetwork(list(pyramid.channels), channels, extra), None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(images)
        names = [str(number) for number in range(len(maps))]
        if self.network is not None:
            levels = self.network(OrderedDict(zip(names, maps, strict=True)))
        else:
            assert self.extra is not None
            maps, names = self.extra(maps, maps, names)
            levels = dict(zip(names, maps, strict=True))
        # torchvision computes boxes in the precision of the maps, and bf16 knows no odd number of pixels above 256.
        return {name: level.float() for name, level in levels.items()}


class Prepared(nn.Module):
    """In place of torchvision's transform, for images that are normalised, of one size and of one batch already.

    Detections stay as they are: masks (n, 1, 28, 28) of their boxes.
    """

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(images, [(images.shape[2], images.shape[3])] * len(images)), targets

    def postprocess(self, result: Any, *_sizes: Any) -> Any:
        return result


class SampleKeys:
    """A key for each image of a batch, from which it is drawn which of its anchors and proposals are judged."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


class KeyedSampler:
    """A random sampler of torchvision that draws by the images' keys.

    So an image's samples depend on the seed, the epoch and the image only: the same after a resume and on any number of
    processes.
    """

    def __init__(self, sampler: Any, keys: SampleKeys, stream: int):
        self.sampler, self.keys, self.stream = sampler, keys, stream

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive: list[Tensor] = []
        negative: list[Tensor] = []
        for number, match in zip(self.keys.numbers, matched, strict=True):
            kind = match.device.type
            with torch.random.fork_rng([match.device] if find_accelerator(kind).numbered else [], device_type=kind):
                torch.manual_seed(number + self.stream)
                chosen = self.sampler([match])
            positive += chosen[0]
            negative += chosen[1]
        return positive, negative


def create_detector(
    config: DetectConfig, pyramid: Pyramid, classes: int, keys: SampleKeys, *, levels: int | None = None
) -> Any:
    """Create the detector of a configuration with torchvision's settings, which are those of its paper.

    It looks at so many `levels` of the pyramid, the coarsest (default: those of the usual strides).

    In training it takes normalised images (B, C, H, W) and for each image boxes (n, 4) and labels (n,), with Mask R-CNN
    masks (n, H, W), and returns its losses by name; else boxes, labels and scores of each image. Labels count from
    `first_label` on. Raises `UserError` for settings that do not fit.
    """
    assert config.image_size is not None
    two_stages, channels = config.detector in TWO_STAGES, config.pyramid_channels
    if config.detector == "fcos" and channels % _GROUP:
        raise UserError(
            f"pyramid channels {channels} do not divide into the groups of {_GROUP} of fcos; use a multiple of {_GROUP}"
        )
    side = max(config.image_size)
    for _ in range(len(pyramid.strides) - (levels or _usual_levels(config.detector, pyramid.strides, side))):
        pyramid.drop_finest()
    maps = Levels(pyramid, channels, two_stages=two_stages)
    finest = _FINEST_ANCHOR * side
    sides = [max(_LEAST_CELLS * stride, finest * 2**number) for number, stride in enumerate(maps.strides)]
    if two_stages:
        kind = MaskRCNN if config.detector == "mask_rcnn" else FasterRCNN
        anchors = _anchors([(side,) for side in sides], (0.5, 1.0, 2.0))
        detector: Any = kind(maps, classes + 1, rpn_anchor_generator=anchors)
        for stream, part in enumerate((detector.rpn, detector.roi_heads)):
            part.fg_bg_sampler = KeyedSampler(part.fg_bg_sampler, keys, stream)
        heads = [detector.rpn.head, detector.roi_heads.box_predictor, detector.roi_heads.mask_predictor]
    elif config.detector == "fcos":
        anchors = _anchors([(stride,) for stride in maps.strides], (1.0,))  # its points, which it calls anchors
        detector = FCOS(maps, classes, anchor_generator=anchors)
        heads = [detector.head]
        last = detector.head.regression_head.bbox_reg
        nn.init.constant_(last.bias, _FIRST_SIDE)
        last.register_forward_hook(_keep_gradients)
    else:
        octaves = [tuple(side * 2 ** (third / 3) for third in range(3)) for side in sides]
        detector = RetinaNet(maps, classes, anchor_generator=_anchors(octaves, (0.5, 1.0, 2.0)))
        heads = [detector.head]
    detector.transform = Prepared()
    for head in heads:
        if head is not None:
            head.register_forward_hook(_to_fp32)
    return detector


def _usual_levels(detector: str, strides: tuple[int, ...], side: int) -> int:
    """Count the levels, from the coarsest, that a detector looks at in images of `side` pixels."""
    if detector in TWO_STAGES:
        return len(strides)
    if detector == "fcos":  # has no anchors, of which each level left out would cost the largest
        least = 8 if side >= _SMALL else 4
        return max(1, sum(stride >= least for stride in strides))
    return len(strides) - (side >= _SMALL or strides[0] < _LEAST_STRIDE)


def first_label(detector: str) -> int:
    """Return the number of the first class: detectors of two stages have 0 for the background."""
    return 1 if detector in TWO_STAGES else 0


def _anchors(sides: list[tuple[float, ...]], ratios: tuple[float, ...]) -> AnchorGenerator:
    return AnchorGenerator(tuple(sides), (ratios,) * len(sides))


def _keep_gradients(layer: nn.Module, _inputs: Any, sides: Tensor) -> Tensor:
    """Raise sides below the least one to it in training, with the gradients that they would have there."""
    if not layer.training:
        return sides
    return torch.where(sides < _LEAST_SIDE, sides - sides.detach() + _LEAST_SIDE, sides)


def _to_fp32(_head: nn.Module, _inputs: Any, found: Any) -> Any:
    """Convert a head's output under autocast to fp32, from which boxes and losses are computed."""
    if isinstance(found, Tensor):
        return found.float()
    if isinstance(found, dict):
        return {name: _to_fp32(_head, None, part) for name, part in found.items()}
    return type(found)(_to_fp32(_head, None, part) for part in found)
