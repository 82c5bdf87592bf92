"""LeJEPA: views of an image agree, and the features of all images are a standard normal distribution.

Shapes: `V` views, `B` images, `D` features, `K` projected values, `S` slices, `T` knots.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simmim.method.objectives import SigReg
from simmim.method.views import View
from simmim.torch_engine.models.collectives import count_ranks, mean_over_ranks
from simmim.torch_engine.models.masked import Encoder
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.models.projector import Projector

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep

_WIDTH = 2048  # of the projector, as published
_LAST_KNOT = 5.0
_KNOTS = 9  # in 0..5; with their mirror images the paper's 17 in -5..5
_BITS = 2**32 - 1


def measure_normality(values: Tensor, directions: Tensor) -> Tensor:
    """Return SIGReg of features (V, B, K) along `directions` (K, S), each of length 1: a scalar.

    The mean over views and directions of the Epps-Pulley statistic (LeJEPA, arXiv 2511.08544, section 4; Epps and
    Pulley, Biometrika 1983): n ∫ |φ(t) - exp(-t²/2)|² exp(-t²/2) dt, where φ is the empirical characteristic function
    of the projected features of all n images of all ranks. The integral is a trapezoidal sum over the knots in -5..5,
    of which the negative ones repeat the positive ones.
    """
    knots = torch.linspace(0, _LAST_KNOT, _KNOTS, device=values.device, dtype=values.dtype)
    normal = (-0.5 * knots.square()).exp()
    angles = (values @ directions).unsqueeze(-1) * knots  # (V, B, S, T)
    real, imaginary = mean_over_ranks(torch.stack((angles.cos().mean(dim=1), angles.sin().mean(dim=1))))  # (V, S, T)
    error = ((real - normal).square() + imaginary.square()) * normal
    images = values.shape[1] * count_ranks()
    return 2 * images * torch.trapezoid(error, knots, dim=-1).mean()


def draw_directions(step: Tensor, values: int, slices: int) -> Tensor:
    """Draw unit vectors (`values`, `slices`), uniform on the sphere, from the number of a step, a scalar int64.

    They are a hash of the step and the position (lowbias32 by C. Wellons), turned into normal numbers by Box and
    Muller: equal on all ranks, the same after a resume, and without a random generator on the device.
    """
    place = torch.arange(2 * values * slices, device=step.device)
    uniform = ((_hash((place + _hash(step + 1)) & _BITS)) + 0.5) / 2**32
    first, second = uniform.view(2, values, slices).unbind(0)
    normal = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
    return normal / normal.norm(dim=0)


def _hash(x: Tensor) -> Tensor:
    """Hash 32-bit numbers, held as int64."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & _BITS
    x = ((x ^ x >> 15) * 0x846CA68B) & _BITS
    return x ^ x >> 16


class SigRegObjective(ObjectiveModule):
    """Squared distance of every view to the mean of the large views, and SIGReg of every view.

    With accumulation SIGReg judges each piece of the batch alone.
    """

    updates: Tensor

    def __init__(self, objective: SigReg, encoder: Encoder, size: tuple[int, int]):
        super().__init__()
        self.settings = objective
        height, width = (max(side // 2 // encoder.stride, 1) * encoder.stride for side in size)
        small = (height, width) if encoder.allow((height, width)) else None
        large = View(name="large", scale=(0.3, 1.0), jitter=objective.jitter, grey=objective.grey, blur=objective.blur)
        local = dataclasses.replace(large, size=small, scale=(0.05, 0.3))
        self.views = (
            *(dataclasses.replace(large, name=f"sigreg_large_{number}") for number in range(2)),
            *(dataclasses.replace(local, name=f"sigreg_small_{number}") for number in range(objective.local_views)),
        )
        names = [view.name for view in self.views]
        # Views of one size pass the encoder together.
        self.passes = [names] if small is None or len(names) == 2 else [names[:2], names[2:]]
        self.projector = Projector((encoder.backbone.num_features, _WIDTH, _WIDTH, objective.values))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        # (V, B, D)
        features = torch.cat([batch.encode(*names).float().mean(dim=(2, 3)) for names in self.passes])
        with torch.autocast(features.device.type, enabled=False):
            values = self.projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])
            directions = draw_directions(self.updates, self.settings.values, self.settings.slices)
            share = self.settings.regularisation
            return {
                "sigreg_agreement": (1 - share) * (values - values[:2].mean(dim=0)).square().mean(),
                "sigreg_gauss": share * measure_normality(values, directions),
            }

    def after_update(self, step: "PretrainStep", finite: Tensor) -> None:
        self.updates.add_(finite)


@create_objective.register(SigReg)
def _(objective: SigReg, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    assert config.image_size is not None
    return SigRegObjective(objective, model.encoder, config.image_size)
