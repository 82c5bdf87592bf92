"""Prediction of a trained encoder's features (MaskDistill, FD, dBOT).

Shapes: `B` images, `M` masks of an image, `h w` feature-map cells, `n` hidden ones of an image, `D` features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.errors import UserError
from simmim.interop.checkpoints import read_checkpoint
from simmim.interop.weight_names import BACKBONE
from simmim.method.objectives import FrozenTeacher
from simmim.torch_engine.models.encoders import create_backbone, default_image_size, load_timm
from simmim.torch_engine.models.heads import create_head
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.models.resize import fit_backbone
from simmim.torch_engine.models.views import cut_view
from simmim.training.origins import is_timms
from simmim.training.resume import recall
from simmim.training.run_directory import Run
from simmim.training.whole_files import read_json

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep

KEPT = "teacher"
"""Folder of a run that holds its teacher, so that a resume does not need the source."""


class Teacher(nn.Module):
    """Compute the target of a frozen timm encoder: the LayerNorm of the features of one layer, (B, h, w, D).

    Images (B, C, H, W) in 0..1 are resized to the size that the encoder was trained at, and normalised as it was. It
    computes in the precision of the training, but for the last LayerNorm.
    """

    mean: Tensor
    std: Tensor
    whole: Tensor

    def __init__(self, backbone: nn.Module, layer: int):
        super().__init__()
        self.backbone: Any = backbone.requires_grad_(False).eval()
        facts = self.backbone.pretrained_cfg
        self.channels, *self.size = facts["input_size"]
        self.register_buffer("whole", torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), persistent=False)  # a view: all of it
        self.register_buffer("mean", torch.tensor(facts["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(facts["std"]).view(1, -1, 1, 1), persistent=False)
        layers = self.backbone.feature_info
        if not -len(layers) <= layer < len(layers):
            raise UserError(
                f"layer {layer} is not among the teacher's {len(layers)}; use --teacher.layer {-len(layers)} to "
                f"{len(layers) - 1}"
            )
        self.layer = layer
        self.num_features = layers[layer]["num_chs"] if isinstance(layers[layer], dict) else layers.channels()[layer]

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = self.resample(images, self.size)
        wanted: dict[str, Any] = {"indices": [self.layer], "norm": True, "stop_early": True, "intermediates_only": True}
        [cells] = self.backbone.forward_intermediates((images - self.mean) / self.std, **wanted)  # (B, D, h, w)
        with torch.autocast(images.device.type, enabled=False):
            return F.layer_norm(cells.permute(0, 2, 3, 1).float(), cells.shape[1:2])

    def resample(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Resize images or feature maps (B, C, H, W) to `size`, bilinear with antialiasing."""
        return maps if list(maps.shape[2:]) == list(size) else cut_view(maps, self.whole, (size[0], size[1]))

    def on_grid(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the target of images (B, C, H, W) for a student with another feature map: (B, *grid, D)."""
        return self.resample(self(images).permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


class TeacherObjective(ObjectiveModule):
    """Distance of the predicted features to the teacher's, at hidden cells (MaskDistill) or at all (FD).

    Smooth L1 has β = 1, PyTorch's default. FD's code has 2.
    """

    trains_latents = False

    def __init__(self, objective: FrozenTeacher, model: "MaskedImageModel", config: "PretrainConfig", teacher: Teacher):
        super().__init__()
        self.on_all = objective.on == "all"
        self.by = objective.by
        self.all_cells = self.on_all or not config.head.cell_by_cell
        self.head = create_head(config.head, model.encoder.num_features, teacher.num_features)
        self.teacher = teacher

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        if self.on_all:
            prediction, choose = self.head(batch.features), batch.again
        else:
            prediction, choose = batch.predict(self.head, all_cells=self.all_cells), batch.hidden_of
        grid = (batch.images.shape[2] // batch.encoder.stride, batch.images.shape[3] // batch.encoder.stride)
        target = choose(self.teacher.on_grid((batch.images / step.scale + step.mean) / 255, grid))
        with torch.autocast(batch.images.device.type, enabled=False):
            prediction = prediction.float()
            agreement = F.cosine_similarity(prediction, target, dim=-1)  # (M·B, n) or (M·B, h, w)
            error = 1 - agreement if self.by == "cosine" else smooth_l1(prediction, target)
            mean = torch.mean if self.on_all else batch.mean_over_hidden
            batch.figures["teacher_agreement"] = mean(agreement)
            return {"teacher": mean(error)}

    def keep(self, run: Path) -> None:
        from simmim.torch_engine.train.storage import save_backbone

        if not (run / KEPT / "config.json").exists():
            save_backbone(run / KEPT, self.teacher.backbone)


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean smooth L1 error (β = 1) of vectors (…, D): (…). TorchTPU lacks PyTorch's."""
    distance = (prediction - target).abs()
    short = distance.clamp(max=1)
    return (short * (distance - short / 2)).mean(dim=-1)


def load_teacher(source: str, *, weights: bool = True) -> nn.Module:
    """Load the timm encoder that `source` names: a run, an encoder directory, timm:NAME or a checkpoint.

    Without `weights` its architecture alone is needed, with random numbers. Raises `UserError` where there is none.
    """
    from simmim.torch_engine.train.storage import load_encoder, untrained_encoder

    if not source:
        raise UserError("objective teacher needs a teacher; add --teacher RUN, timm:NAME or a checkpoint file")
    if is_timms(source):
        return load_timm(source, option="--teacher", weights=weights)
    path = Path(source)
    if not path.exists():
        raise UserError(f"--teacher {source} is not there; give a run, timm:NAME or a checkpoint file")
    if (path / "config.toml").is_file() or "architecture" in read_json(path / "config.json"):
        return load_encoder(path) if weights else untrained_encoder(path)
    try:
        return _from_checkpoint(path, weights=weights)
    except UserError as error:
        raise UserError(f"--teacher {error}") from None


def _from_checkpoint(path: Path, *, weights: bool) -> nn.Module:
    """Build the encoder of a checkpoint of another package, and load its weights."""
    from simmim.torch_engine.train.storage import as_tensors

    checkpoint = read_checkpoint(path)
    found = checkpoint.architecture
    if found is None:
        raise UserError(f"{path} does not tell its model; convert it first: simmim convert --model NAME")
    size = found.image_size or default_image_size(found.model)
    state = {
        name.removeprefix(BACKBONE): array
        for name, array in checkpoint.mapped.state.items()
        if name.startswith(BACKBONE)
    }
    stem = f"{timm.get_pretrained_cfg(found.model).first_conv}.weight"  # type: ignore[union-attr]
    channels = state[stem].shape[1] if stem in state else 3
    backbone = create_backbone(found.model, image_size=size, channels=channels, model_args=dict(found.model_args))
    facts: dict[str, Any] = {**backbone.pretrained_cfg, **checkpoint.settings, "input_size": (channels, *size)}  # type: ignore[dict-item]
    if len(facts["mean"]) != channels:
        raise UserError(f"{path} does not tell the mean of its {channels} channels; convert it first: simmim convert")
    backbone.pretrained_cfg = facts  # type: ignore[assignment]
    if weights:
        backbone.load_state_dict(fit_backbone(as_tensors(state), backbone)[0])
    return backbone


@create_objective.register(FrozenTeacher)
def _(objective: FrozenTeacher, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    kept = Run(Path(config.out)).path / KEPT if config.out and recall(config) else None
    source = str(kept) if kept and (kept / "config.json").exists() else objective.source
    # A sketch on the meta device needs no numbers.
    teacher = Teacher(load_teacher(source, weights=torch.get_default_device().type != "meta"), objective.layer)
    if teacher.channels != config.channels:
        raise UserError(
            f"the teacher takes {teacher.channels} channels, and the images have {config.channels}; "
            f"use --channels {teacher.channels}"
        )
    return TeacherObjective(objective, model, config, teacher)
