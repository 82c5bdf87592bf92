"""Prediction of a trained encoder's features (MaskDistill, FD, dBOT).

Shapes: `B` images, `M` masks of an image, `h w` feature-map cells, `n` hidden ones of an image, `D` features.
"""

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
from simmim.torch_engine.models.encoders import create_backbone, default_image_size
from simmim.torch_engine.models.heads import create_head
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.models.resize import fit_backbone
from simmim.training.run_directory import Run

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep

KEPT = "teacher"
"""Folder of a run that holds its teacher, so that a resume does not need the source."""


class Teacher(nn.Module):
    """Compute the target of a frozen timm encoder: the LayerNorm of the features of one layer, (B, h, w, D).

    Images (B, C, H, W) in 0..1 are resized to the size that the encoder was trained at, and normalised as it was.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, layer: int):
        super().__init__()
        self.backbone: Any = backbone.requires_grad_(False).eval()
        facts = self.backbone.pretrained_cfg
        _, *self.size = facts["input_size"]
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
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        wanted: dict[str, Any] = {"indices": [self.layer], "norm": True, "stop_early": True, "intermediates_only": True}
        [cells] = self.backbone.forward_intermediates((images - self.mean) / self.std, **wanted)  # (B, D, h, w)
        return F.layer_norm(cells.permute(0, 2, 3, 1).float(), cells.shape[1:2])


class TeacherObjective(ObjectiveModule):
    """Distance of the predicted features to the teacher's, at hidden cells or at all."""

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
        with torch.autocast(batch.images.device.type, enabled=False):
            seen = self.teacher((batch.images / step.scale + step.mean) / 255)
            grid = (batch.images.shape[2] // batch.encoder.stride, batch.images.shape[3] // batch.encoder.stride)
            target, prediction = choose(resample(seen, grid)), prediction.float()
            agreement = F.cosine_similarity(prediction, target, dim=-1)  # (M·B, n) or (M·B, h, w)
            if self.by == "cosine":
                error = 1 - agreement
            else:
                error = F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
        batch.figures["teacher_agreement"] = agreement.mean()
        return {"teacher": error.mean() if self.on_all else batch.mean_over_hidden(error)}

    def keep(self, run: Path) -> None:
        from simmim.torch_engine.train.storage import save_backbone

        if not (run / KEPT / "config.json").exists():
            save_backbone(run / KEPT, self.teacher.backbone)


def resample(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample features (B, h, w, D) to another grid, bilinear with antialiasing: (B, *grid, D)."""
    if cells.shape[1:3] == grid:
        return cells
    return F.interpolate(cells.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def load_teacher(source: str) -> nn.Module:
    """Load the timm encoder that `source` names: a run, an encoder directory, timm:NAME or a checkpoint file.

    Raises `UserError` where there is none.
    """
    from simmim.torch_engine.train.storage import as_tensors, load_encoder

    if not source:
        raise UserError("objective teacher has no teacher; add --teacher RUN, timm:NAME or a safetensors file")
    if source.startswith("timm:"):
        name = source.removeprefix("timm:")
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub passes on the errors of its back ends
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--teacher {source} has no weights here: {reason}") from error
    path = Path(source)
    if path.is_dir():
        return load_encoder(source)
    if not path.is_file():
        raise UserError(f"--teacher {source} is not there; give a run, timm:NAME or a checkpoint file")
    checkpoint = read_checkpoint(path)
    found = checkpoint.architecture
    if found is None:
        raise UserError(f"--teacher {source} does not tell which model it is of; run simmim convert with --model first")
    size = found.image_size or default_image_size(found.model)
    backbone = create_backbone(found.model, image_size=size, model_args=dict(found.model_args))
    weights = as_tensors(checkpoint.mapped.state)
    own = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    backbone.load_state_dict(fit_backbone(own, backbone)[0])
    cfg: Any = backbone.pretrained_cfg
    facts = {"input_size": (3, *size)} | {
        name: checkpoint.settings[name] for name in ("mean", "std") if name in checkpoint.settings
    }
    backbone.pretrained_cfg = {**cfg, **facts}  # type: ignore[assignment]
    return backbone


@create_objective.register(FrozenTeacher)
def _(objective: FrozenTeacher, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    kept = Run(Path(config.out)).path / KEPT if config.out else None
    with torch.device("cpu"):  # a sketch on the meta device reads the teacher's architecture from its file, too
        backbone = load_teacher(str(kept) if kept and (kept / "config.json").exists() else objective.source)
    teacher = Teacher(backbone, objective.layer)
    channels = teacher.mean.shape[1]
    if channels != config.channels:
        raise UserError(
            f"the teacher takes {channels} channels, and the images have {config.channels}; use --channels {channels}"
        )
    return TeacherObjective(objective, model, config, teacher)
