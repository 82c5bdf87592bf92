"""Small models of every family, small configurations and batches, for the tests of this folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.method.masks import RandomMask, upsample_mask
from simmim.method.schedules import MultiStepSchedule
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.masked import Encoder
from simmim.torch_engine.models.masked_image_model import build_model
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step
from simmim.torch_engine.train.update import Batch, Update

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference" / "simmim_official"
CPU = World(device=torch.device("cpu"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
_SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@dataclass(frozen=True)
class Kind:
    """A timm model and what makes it small."""

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "vit": Kind("vit_tiny_patch16_224", _VIT),
    "vit with registers": Kind("vit_wee_patch16_reg1_gap_256", _VIT),
    "vit with class and register tokens": Kind("vit_small_patch14_reg4_dinov2", _VIT | {"patch_size": 16}),
    "vit that pools by attention": Kind("vit_tiny_patch16_224", _VIT | {"global_pool": "map", "fc_norm": True}),
    "deit": Kind("deit_tiny_patch16_224", _VIT),
    "deit3": Kind("deit3_small_patch16_224", _VIT),
    "beit": Kind("beit_base_patch16_224", _VIT),
    "beit with a shared bias": Kind(
        "beit_base_patch16_224",
        _VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1},
    ),
    "swin": Kind("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": Kind("swinv2_tiny_window8_256", _SWIN),
    "resnet18": Kind("resnet18", {"channels": (8, 16, 32, 64)}),
    "convnext": Kind("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
    "regnet": Kind("regnety_002", {"depth": 6, "w0": 16, "wa": 16.0, "wm": 2.0}),
}


def encoder(kind: str, *, size: tuple[int, int] = (96, 96), channels: int = 3, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    model, arguments = KINDS[kind].model, KINDS[kind].arguments
    return create_encoder(model, image_size=size, channels=channels, model_args=arguments, **settings)


def masks(batch: int, size: tuple[int, int], patch: int, *, cell: int = 32, seed: int = 0) -> torch.Tensor:
    """(B, H/patch, W/patch) of a random mask."""
    keys = np.arange(batch, dtype=np.uint64) + np.uint64(1000 * seed)
    return torch.from_numpy(upsample_mask(RandomMask(ratio=0.6, cell=cell)(keys, size), cell // patch))


def config(kind: str = "vit", **settings: Any) -> PretrainConfig:
    """A complete configuration: fp32 on the CPU, 64 pixels."""
    complete: dict[str, Any] = {
        "data": "demo",
        "model": KINDS[kind].model,
        "model_args": KINDS[kind].arguments,
        "image_size": (64, 64),
        "mean": MEAN,
        "std": STD,
        "batch_size": 4,
        "warmup_epochs": 0.0,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "workers": 1,
    }
    return from_settings(PretrainConfig, complete | settings)


def update(settings: PretrainConfig, *, lr: float = 1e-3, world: World = CPU) -> Update:
    """An `Update` with a constant learning rate."""
    torch.manual_seed(settings.seed)
    step = build_step(settings).to(world.device)
    if settings.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    optimizer = create_optimizer(step, weight_decay=settings.weight_decay, betas=settings.betas, device=world.device)
    return Update(step, optimizer, constant(lr), config=settings, world=world)


def constant(lr: float) -> MultiStepSchedule:
    return MultiStepSchedule(peak_lr=lr, warmup_lr=lr, warmup_steps=0, milestones=())


def batch(settings: PretrainConfig, *, seed: int = 0, broken: bool = False) -> Batch:
    """Random smooth images with everything else that a step needs; `broken` has a pixel that is not a number."""
    assert settings.image_size is not None
    H, W = settings.image_size
    draw = np.random.default_rng(seed)
    B = settings.batch_size
    coarse = draw.uniform(0, 255, (B, H // 16, W // 16, settings.channels)).astype(np.float32)
    image = coarse.repeat(16, axis=1).repeat(16, axis=2)
    if broken:
        image[0, 0, 0, 0] = np.nan
    inside = build_model(settings).encoder
    numbers = {"image": image, "flip": draw.random((B, 1)) < 0.5}
    keys = np.arange(B, dtype=np.uint64) + np.uint64(1000 * seed)
    masks = settings.mask.for_patch(inside.patch_size)
    assert masks.cell is not None
    numbers["mask"] = upsample_mask(masks(keys, (H, W)), masks.cell // inside.patch_size)
    if layers := inside.drop_path_draws.layers:
        numbers["drop_path"] = draw.random((B, layers), dtype=np.float32)
    return numbers


def convolutions_not_channels_last(update: Update, batch: Batch) -> list[str]:
    """Those of the model that do not read and write channels last in memory in a step."""
    found = []

    def look(name: str, image: torch.Tensor, output: torch.Tensor) -> None:
        if not all(each.is_contiguous(memory_format=torch.channels_last) for each in (image, output)):
            found.append(name)

    for name, module in update.model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs[0], output))
    update(0, batch)
    return found


def state(update: Update) -> dict[str, torch.Tensor]:
    """A copy of all that a step may change: weights, batch-norm statistics, the optimiser's averages and counts."""
    found = {name: tensor.clone() for name, tensor in update.model.state_dict().items()}
    for number, slots in update.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": tensor.clone() for name, tensor in slots.items()}
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
