"""Pretrain with a peer, for `features_vs_peers.py`, which runs this file with the Python of the peer's environment.

    PYTHON benchmarks/peer_training.py SETTINGS.json

It needs torch, timm and one peer: lightly-train or stable-pretraining, through their public interfaces. It writes the
encoder's weights (weights.safetensors) and what training took (report.json) to the folder `out` of the settings.

Processor time counts from the end of step `SKIPPED` to the end of the last step, in all threads and with the reading
of images, which this process does itself. So imports, building and the first, slow steps are not charged for; nor are
checkpoints and loggers, which are off.
"""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

SKIPPED = 3


def processor_seconds() -> float:
    """Return the seconds that this process, its threads and its finished children have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Clock:
    """Count the steps of any optimiser from now on, and their processor time."""

    def __init__(self) -> None:
        self.steps = 0
        self.begun = self.ended = math.nan
        register_optimizer_step_post_hook(self.count)

    def count(self, *_: Any) -> None:
        self.steps += 1
        self.ended = processor_seconds()
        if self.steps == SKIPPED:
            self.begun = self.ended

    def report(self) -> dict[str, Any]:
        seconds = self.ended - self.begun
        return {
            "steps": self.steps,
            "processor_seconds": seconds,
            "seconds_per_step": seconds / (self.steps - SKIPPED),
        }


def create_encoder(settings: dict[str, Any]) -> nn.Module:
    """Create the timm encoder with random weights, which depend on the seed."""
    torch.manual_seed(settings["seed"])
    return timm.create_model(**settings["encoder"], num_classes=0)


def epochs_for(settings: dict[str, Any], batch_size: int) -> int:
    return math.ceil(settings["steps"] / (settings["images"] // batch_size))


def train_lightly(settings: dict[str, Any]) -> nn.Module:
    """Pretrain by `lightly_train.pretrain`, whose arguments are in the settings.

    The encoder that it exports is the one that it was given: DINO's teacher, SimCLR's only one.
    """
    import lightly_train  # type: ignore[import-not-found]

    encoder = create_encoder(settings)
    arguments = {"batch_size": 128, **settings["arguments"]}  # 128 is its default
    lightly_train.pretrain(
        out=str(Path(settings["out"]) / "lightly"),
        data=settings["folder"],
        model=encoder,
        epochs=epochs_for(settings, arguments["batch_size"]),
        num_workers=0,
        devices=1,
        accelerator="cpu",
        seed=settings["seed"],
        overwrite=True,
        loggers={"jsonl": None, "tensorboard": None},
        callbacks={"learning_rate_monitor": None, "model_export": None, "model_checkpoint": None},
        trainer_args={"max_steps": settings["steps"], "enable_checkpointing": False},
        **arguments,
    )
    return encoder


def train_stable(settings: dict[str, Any]) -> nn.Module:
    """Pretrain by a `stable_pretraining.Module` with the package's SimCLR."""
    import lightning  # type: ignore[import-not-found]
    import stable_pretraining as spt  # type: ignore[import-not-found]
    from stable_pretraining.forward import simclr  # type: ignore[import-not-found]
    from torchvision.datasets import ImageFolder

    chosen = settings["arguments"]
    encoder = create_encoder(settings)
    module = spt.Module(
        backbone=encoder,
        projector=spt.backbone.MLP(encoder.num_features, **chosen["projector"]),
        forward=simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=chosen["temperature"]),
        **({"optim": chosen["optim"]} if "optim" in chosen else {}),  # its own default: AdamW at 1e-3, cosine
    )
    data = spt.data.FromTorchDataset(
        ImageFolder(settings["folder"]),
        names=["image", "label"],
        transform=stable_views(spt, settings["image_size"], **chosen["augmentation"]),
    )
    torch.manual_seed(settings["seed"])
    batches = torch.utils.data.DataLoader(data, batch_size=chosen["batch_size"], shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_steps=settings["steps"],
        max_epochs=epochs_for(settings, chosen["batch_size"]),
        accelerator="cpu",
        devices=1,
        precision=chosen["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=settings["out"],
    )
    trainer.fit(module, datamodule=spt.data.DataModule(train=batches))
    return encoder


def stable_views(spt: Any, size: int, *, scale: list[float], jitter: list[float], blur: float) -> Any:
    """Create two views of an image, one image at a time: the transforms of the package's README."""
    transforms = spt.data.transforms
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=tuple(scale)),
        transforms.ColorJitter(*jitter, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *([transforms.PILGaussianBlur(p=blur)] if blur else []),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ToImage(**spt.data.static.ImageNet),
    )
    return transforms.MultiViewTransform([view, view])


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    encoder = {"lightly": train_lightly, "stable": train_stable}[settings["peer"]](settings)
    save_file(
        {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}, out / "weights.safetensors"
    )
    (out / "report.json").write_text(json.dumps(clock.report()), encoding="utf-8")


if __name__ == "__main__":
    main()
