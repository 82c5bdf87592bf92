"""Objectives as PyTorch modules: what each asks of a step, and what a step gives it.

Each file in `objectives/` holds one objective. To add one, add a file there, or register a module of your own by
`@create_objective.register(YourObjective)`.

Shapes: `B` images, `M` masks of an image, `C` channels, `H W` pixels, `p` patch side, `h w` feature-map cells, `n`
hidden ones of an image, `D` features, `V` views.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, singledispatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.errors import UserError
from simmim.method.objectives import Objective
from simmim.method.views import View
from simmim.torch_engine.models.masked import Encoder
from simmim.torch_engine.models.savings import Chosen

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep
    from simmim.torch_engine.train.distributed import World


@dataclass(frozen=True, kw_only=True)
class ObjectiveBatch:
    """What a step gives its objectives of a batch. The encoder has seen the masked images once, for all objectives.

    With M masks an image, masked images come in M rounds of the batch: rows 0 to B - 1 have the first mask.
    """

    encoder: Encoder
    images: Tensor
    """(B, C, H, W), normalised and mirrored, not masked."""
    mask: Tensor | None
    """(M·B, H/p, W/p), True = hidden; `None` where no objective needs masked images."""
    hidden: Chosen | None = None
    """The hidden feature-map cells, n of each masked image; `None` in a plain step, which computes all cells."""
    masked: Tensor | None = None
    """The encoder's features of the masked images: all cells, (M·B, h, w, D), or, where no objective needs them all,
    the hidden cells, (M·B, n, D). `None` where no objective has `needs_masked`."""
    views: Mapping[str, Tensor] = field(default_factory=dict)
    """Images (B, C, height, width) of each view by its name, normalised."""
    drop_path: Tensor | None = None
    """What decides which layers an image skips, (B, layers)."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars by name that objectives add, to be logged beside the losses."""
    cell_losses: dict[str, Tensor] | None = None
    """Mean losses of feature-map cells, (M·B, h, w), 0 where nothing is hidden, that objectives add by name for a mask
    guide that learns; `None` without one."""
    _encoded: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    @property
    def features(self) -> Tensor:
        assert self.masked is not None, "an objective that reads features has needs_masked"
        return self.masked

    def of_hidden(self) -> Tensor:
        """Return the features of the hidden cells, (M·B, n, D), or of all, (M·B, h, w, D), where `hidden` is `None`."""
        if self.hidden is None or self.features.ndim == 3:
            return self.features
        return self.hidden.of(self.features.flatten(1, 2))

    def predict(self, head: nn.Module, *, all_cells: bool) -> Tensor:
        """Return what a head predicts of the hidden cells, (M·B, n, P), or of all where `hidden` is `None`.

        A head that mixes cells needs them all (`all_cells`).
        """
        if not all_cells:
            return head(self.of_hidden())
        prediction = head(self.features)
        return prediction if self.hidden is None else self.hidden.of(prediction.flatten(1, 2))

    def hidden_of(self, values: Tensor) -> Tensor:
        """Choose the hidden cells of each mask: values of images (B, h, w, K) → (M·B, n, K), or all, (M·B, h, w, K).

        Where the encoder's map of masked images is finer, a value stands for all cells that it covers.
        """
        finer = self.images.shape[2] // self.encoder.stride // values.shape[1]
        if finer > 1:
            values = values.repeat_interleave(finer, dim=1).repeat_interleave(finer, dim=2)
        if self.hidden is None:
            return self.again(values)
        # The cells of all masks of an image at once, since to repeat the values for each mask would cost memory.
        places = self.hidden.places.unflatten(0, (-1, len(values)))  # (M, B, n)
        chosen = Chosen(places.transpose(0, 1).flatten(1)).of(values.flatten(1, 2))
        return chosen.unflatten(1, (len(places), -1)).transpose(0, 1).flatten(0, 1)

    def again(self, values: Tensor) -> Tensor:
        """Repeat what belongs to the images, (B, …), for each of their masks: (M·B, …)."""
        masks = 1 if self.mask is None else len(self.mask) // len(values)
        return values if masks == 1 else values.repeat(masks, *[1] * (values.ndim - 1))

    def hidden_share(self) -> Tensor:
        """Return the share of each feature-map cell that is hidden: (M·B, h, w) in fp32."""
        assert self.mask is not None
        return F.avg_pool2d(self.mask.float().unsqueeze(1), self.encoder.stride // self.encoder.patch_size)[:, 0]

    def mean_over_hidden(self, error: Tensor) -> Tensor:
        """Average errors of the hidden cells, (M·B, n), or of all, (M·B, h, w) weighted by their hidden share."""
        if error.ndim == 2:
            return error.mean()
        share = self.hidden_share()
        return (error * share).sum() / share.sum()

    def pooled(self) -> Tensor:
        """Return the mean features of each masked image over its visible cells: (M·B, D) in fp32."""
        seen = (1 - self.hidden_share()).unsqueeze(-1)
        return (self.features.float() * seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2))

    def whole(self) -> Tensor:
        """Return the encoder's features of the images without masks: (B, h, w, D), computed once."""
        if () not in self._encoded:
            self.encoder.drop_path_draws.uniform = self.drop_path
            self._encoded[()] = self.encoder(self.images)
        return self._encoded[()]

    def encode(self, *names: str) -> Tensor:
        """Return the encoder's features of views of one size, without masks: (V, B, h, w, D), computed once.

        Views of another size than the images need `encoder.allow(size)` when the objective is created.
        """
        if names not in self._encoded:
            images = torch.cat([self.views[name] for name in names])
            if self.drop_path is not None:
                self.encoder.drop_path_draws.uniform = self.drop_path.repeat(len(names), 1)
            encode = self.encoder if images.shape[2:] == self.images.shape[2:] else self.encoder.at_size
            self._encoded[names] = encode(images).unflatten(0, (len(names), -1))
        return self._encoded[names]


class ObjectiveModule(nn.Module):
    """Base of an objective's module. It owns its parameters and buffers, which are trained and saved with the step.

    A call, `objective(step, batch)`, returns scalar losses by name, means over the batch's images. Names are unique in
    a training.
    """

    views: tuple[View, ...] = ()
    """Views that it needs beside the masked images."""
    needs_masked: bool = True
    """Whether it reads features of the masked images; as its settings say."""
    passes: Sequence[Sequence[str]] = ()
    """Further passes of the encoder that trains: the names of the views of each (`batch.encode`). An empty one is that
    of the whole images (`batch.whole`)."""
    all_cells: bool = False
    """Whether it needs features of all cells rather than of the hidden ones."""
    trains_latents: bool = True
    """Whether it trains towards features, which may collapse, rather than towards something fixed."""

    def forward(self, step: PretrainStep, batch: ObjectiveBatch) -> dict[str, Tensor]:
        raise AssertionError

    def prepare(self, sample: Callable[[int], Iterator[Tensor]], world: World) -> None:
        """Called on every rank before the first step of a new run, on the CPU.

        `sample(count)` yields up to `count` training images, drawn by the seed, as normalised (b, C, H, W). All ranks
        must end with equal values; `world.share` sends rank 0's.
        """

    def keep(self, run: Path) -> None:
        """Called on rank 0 when a new run directory is there, to write into it what a resume needs besides tensors."""

    def after_update(self, step: PretrainStep, finite: Tensor) -> None:
        """Called without gradients after each optimiser step, once whatever the accumulation.

        `finite` is a boolean on the device, false where the step was skipped: nothing may change then.
        """


@singledispatch
def create_objective(objective: Objective, model: MaskedImageModel, config: PretrainConfig) -> ObjectiveModule:
    """Build the module of an objective for a model of a complete configuration."""
    raise UserError(
        f"objective {objective.kind} has no PyTorch module; register one by "
        "simmim.torch_engine.models.objective.create_objective"
    )


def create_objectives(model: MaskedImageModel, config: PretrainConfig) -> dict[str, tuple[float, ObjectiveModule]]:
    """Build the modules of a complete configuration's objectives: (weight, module) by kind."""
    _load_own()
    found = {each.kind: (each.weight, create_objective(each, model, config)) for each in config.objectives}
    for objective in config.objectives:
        found[objective.kind][1].needs_masked = objective.needs_masked
    return found


@cache
def _load_own() -> None:
    from simmim.torch_engine.models import objectives

    for module in pkgutil.iter_modules(objectives.__path__, f"{objectives.__name__}."):
        importlib.import_module(module.name)
