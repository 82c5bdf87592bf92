"""The method on one page: hide patches, encode what is left, predict what was hidden, judge the hidden pixels only.

Shapes: `B` images, `C` channels, `H W` pixels, `p` patch side, `s` stride of the feature map (both in pixels),
`h w` = `H/s W/s` feature-map cells, `n` hidden ones of an image, `D` features, `P` predicted values a cell.
"""

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.method.losses import Loss
from simmim.method.spectrogram import Spectrogram
from simmim.method.targets import Target, unpatchify
from simmim.method.views import View
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.front_end import FrontEnd
from simmim.torch_engine.models.heads import create_head
from simmim.torch_engine.models.mask_guides import MaskGuide
from simmim.torch_engine.models.masked import Encoder
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule
from simmim.torch_engine.models.objectives.pixels import PixelObjective
from simmim.torch_engine.models.savings import Chosen, Counts, Savings, choose
from simmim.torch_engine.models.views import collect_views, cut_view, recolour
from simmim.training.masks import ORDER
from simmim.training.plan import check_sizes
from simmim.training.pretrain_plan import VIEW


class MaskedImageModel(nn.Module):
    """Encoder + head + target + loss (SimMIM §3).

    `model(images, mask)` takes normalised images (B, C, H, W) and a mask (B, H/p, W/p), True = hidden, p being
    `model.encoder.patch_size`; it returns the loss (a scalar) and the prediction: images (B, C, H, W) in normalised
    colours for targets that are pixels, else the raw prediction of each cell (B, h, w, P).
    """

    def __init__(self, encoder: Encoder, head: nn.Module, target: Target, loss: Loss, *, cell_by_cell: bool = False):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.cell_by_cell = cell_by_cell
        self.target = target
        self.loss = loss
        for name in target.arrays:  # on the device once, rather than copied there at each step
            self.register_buffer(f"target_{name}", torch.tensor(getattr(target, name)), persistent=False)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.predict(images, mask)
        loss = self.judge(prediction, images, mask)
        if self.target.pitch == 1:
            prediction = unpatchify(torch, prediction, self.encoder.stride).permute(0, 3, 1, 2)
        return loss, prediction

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W), (B, H/p, W/p) → (B, h, w, P)."""
        return self.head(self.encoder(images, mask))

    def judge(self, prediction: Tensor, images: Tensor, mask: Tensor, hidden: Chosen | None = None) -> Tensor:
        """Return the loss on hidden pixels, in fp32 whatever the prediction's precision.

        The prediction is of all cells, (B, h, w, P), or of the `hidden` ones, (B, n, P).
        """
        return self.loss.mean(*self.sums(prediction, images, mask, hidden))

    def sums(
        self, prediction: Tensor, images: Tensor, mask: Tensor, hidden: Chosen | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sums whose ratio is the loss, so that a batch can be judged in parts. Arguments as for `judge`."""
        weighted, weights = self.errors(prediction, images, mask, hidden)
        return weighted.sum(), weights.sum()

    def errors(
        self, prediction: Tensor, images: Tensor, mask: Tensor, hidden: Chosen | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return error · weight of each position, (B, h, w, n²) or (B, n, 1, n²), and the weights. As for `judge`."""
        stride = self.encoder.stride
        with torch.autocast(images.device.type, enabled=False):
            target = self._target_here()(torch, images.float().permute(0, 2, 3, 1), stride)
            weights = self.target.weights(torch, mask, self.encoder.patch_size, stride)
            if hidden is not None:  # a map of n × 1 cells
                prediction = prediction.unsqueeze(2)
                target, weights = (hidden.of(each.flatten(1, 2)).unsqueeze(2) for each in (target, weights))
            return self.loss.weighted_error(torch, prediction.float(), target, weights), weights

    def _target_here(self) -> Target:
        """Return the target with its arrays on the device."""
        if not self.target.arrays:
            return self.target
        return dataclasses.replace(
            self.target, **{name: getattr(self, f"target_{name}") for name in self.target.arrays}
        )

    def show(self, prediction: Tensor, images: Tensor) -> Tensor | None:
        """Return what a prediction (B, h, w, P) shows: (B, H, W, C) in normalised colours, or `None`."""
        return self._target_here().to_pixels(torch, prediction.float(), images.permute(0, 2, 3, 1), self.encoder.stride)


def mirror(values: Tensor, flip: Tensor) -> Tensor:
    """Mirror maps (B, …, H, W) left to right by the first column of `flip` (B, axes), upside down by the second."""
    for chosen, axis in zip(flip.unbind(1), (-1, -2), strict=False):
        values = torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), values.flip(axis), values)
    return values


class PixelStep(nn.Module):
    """What one step trains: a batch as the input pipeline delivers it → the loss.

    Flips, converts and normalises on the device, so that images cross to it as small integers. Sounds cross as
    samples, and the `spectrogram` of them is the image.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], spectrogram: Spectrogram | None = None):
        super().__init__()
        self.front_end = None if spectrogram is None else FrontEnd(spectrogram)
        white = 255 if spectrogram is None else 1
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * white, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(std).view(1, -1, 1, 1) * white), persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """(B, H, W, C) in 0..255 → (B, C, H, W) normalised; of samples (B, n, 1, 1) → (B, 1, frames, bands)."""
        if self.front_end is not None:
            return (self.front_end(image) - self.mean) * self.scale
        return (image.permute(0, 3, 1, 2).float() - self.mean) * self.scale

    def prepare(self, image: Tensor, flip: Tensor) -> Tensor:
        """Normalise images (B, H, W, C) and mirror them as `flip` (B, axes) says: (B, C, H, W)."""
        return mirror(self.normalize(image), flip)


class PretrainStep(PixelStep):
    """Masked image modelling of a batch, whose masks all hide as much as `counts` says.

    `objectives` are (weight, module) by kind. A call returns the loss, and where it has several terms each of them
    too, as `loss/NAME`, and the figures that objectives add. The encoder sees the masked images once, for all. A
    `guide` replaces the masks of a batch.
    """

    def __init__(
        self,
        model: MaskedImageModel,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        counts: Counts,
        savings: Savings,
        objectives: Mapping[str, tuple[float, ObjectiveModule]],
        guide: MaskGuide | None = None,
        spectrogram: Spectrogram | None = None,
    ):
        super().__init__(mean, std, spectrogram)
        self.model = model
        self.weights = {kind: weight for kind, (weight, _) in objectives.items()}
        modules = {kind: module for kind, (_, module) in objectives.items()}
        self.objectives = nn.ModuleDict(modules)
        self.guide = guide
        self.views = collect_views(modules)
        masked = [module for module in modules.values() if module.needs_masked]
        if not any(isinstance(module, PixelObjective) for module in masked):
            model.head.requires_grad_(False)  # without a gradient DDP would wait for it for ever
        if not masked:
            model.encoder.mask_token.requires_grad_(False)
        model.encoder.save_work(visible_patches=savings.visible_patches, last_block=savings.last_block)
        needed = savings.visible_patches or model.encoder.needs_visible
        self._visible = counts.visible_patches if needed else None
        self._hidden = counts.hidden_cells if savings.hidden_cells else None
        self._all_cells = any(module.all_cells for module in masked)
        # Pixels alone, by a head that mixes cells: nothing asks which cells are hidden.
        self._needs_no_choice = self._all_cells and all(isinstance(each, PixelObjective) for each in masked)

    def forward(
        self,
        image: Tensor,
        flip: Tensor,
        mask: Tensor | None = None,
        drop_path: Tensor | None = None,
        **draws: Tensor,
    ) -> dict[str, Tensor]:
        """Batch as `simmim.training.pretrain_plan.Plan.batches` gives it; `draws` are for views and guided masks."""
        encoder = self.model.encoder
        images = self.prepare(image, flip)
        hidden = features = score = None
        if mask is not None:
            mask = _in_rounds(mask)
            if self.guide is not None:
                score = self.guide(images)
                mask = self.guide.hide(score, _in_rounds(draws[ORDER]))
            rounds = len(mask) // len(images)
            encoder.drop_path_draws.uniform = drop_path if drop_path is None else drop_path.repeat(rounds, 1)
            features, hidden = self._encode(images if rounds == 1 else images.repeat(rounds, 1, 1, 1), mask)
        views = {name: self._view(view, images, draws[f"{VIEW}{name}"]) for name, view in self.views.items()}
        batch = ObjectiveBatch(
            encoder=encoder,
            images=images,
            mask=mask,
            hidden=hidden,
            masked=features,
            views=views,
            drop_path=drop_path,
            cell_losses={} if self.guide is not None and self.guide.learns else None,
        )
        return self._add_up(batch, score)

    @torch.no_grad()
    def _view(self, view: View, images: Tensor, draws: Tensor) -> Tensor:
        """Return a view (B, C, height, width) of normalised images (B, C, H, W)."""
        images = cut_view(images, draws, view.size or (images.shape[2], images.shape[3]))
        if not view.recolours:
            return images
        colours = recolour((images / self.scale + self.mean) / 255, draws)
        return (colours * 255 - self.mean) * self.scale

    def _encode(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Chosen | None]:
        """Encode masked images; return their features, of all cells or of the hidden ones, and the hidden cells."""
        encoder = self.model.encoder
        visible = hidden = None
        if self._visible is not None:
            visible = choose(mask, self._visible, hidden=False)
        if self._hidden is not None and not self._needs_no_choice:
            factor = encoder.stride // encoder.patch_size
            hidden = choose(mask[:, ::factor, ::factor], self._hidden, hidden=True)
        return encoder(images, mask, visible=visible, hidden=None if self._all_cells else hidden), hidden

    def _add_up(self, batch: ObjectiveBatch, score: Tensor | None) -> dict[str, Tensor]:
        total = torch.zeros((), device=batch.images.device)
        terms: dict[str, Tensor] = {}
        for kind, objective in self.objectives.items():
            found = objective(self, batch)
            if known := terms.keys() & found.keys():
                raise UserError(f"loss {min(known)!r} of objective {kind} has the name of another; rename it")
            terms |= found
            total = total + self.weights[kind] * torch.stack(list(found.values())).sum()
        if self.guide is not None and score is not None:
            for name, term in self.guide.losses(score, batch).items():
                terms[name], total = term, total + term
        named = {f"loss/{name}": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return {"loss": total, **named, **{name: value.detach() for name, value in batch.figures.items()}}

    @torch.no_grad()
    def after_update(self, finite: Tensor) -> None:
        """Call the `after_update` of every objective and of the guide."""
        for objective in self.objectives.values():
            cast(ObjectiveModule, objective).after_update(self, finite)
        if self.guide is not None:
            self.guide.after_update(self, finite)


def _in_rounds(masks: Tensor) -> Tensor:
    """Put several masks of an image, (B, M, …), in M rounds of the batch, (M·B, …); one is (B, …)."""
    return masks if masks.ndim == 3 else masks.transpose(0, 1).flatten(0, 1)


def build_model(config: PretrainConfig) -> MaskedImageModel:
    """The model of a complete configuration, with random weights."""
    assert config.image_size is not None
    encoder = create_encoder(
        config.model,
        image_size=config.image_size,
        channels=config.channels,
        drop_path=config.drop_path,
        model_args=config.model_args,
        encode=config.encode,
    )
    if config.positions == "sincos":
        encoder.set_sine_positions()
    check_sizes(config, encoder)
    if config.masks_images:
        encoder.check_masks(config.mask.for_patch(encoder.patch_size), config.model)
    outputs = config.target.channels(config.channels, encoder.stride)
    head = create_head(config.head, encoder.num_features, outputs)
    return MaskedImageModel(encoder, head, config.target, config.loss, cell_by_cell=config.head.cell_by_cell)
