"""AdamW with the paper's exemptions from weight decay."""

from typing import Any

import torch
from torch import Tensor, nn

from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.models.masked import Encoder


def has_weight_decay(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Return whether a parameter decays: not if it is 1-D, a bias, or in the encoder's `without_decay`.

    As the official pretraining does in fact, which is not quite what it means to: it decays Swin's relative-bias tables
    and the ViT's mask token, since the names by which it would exempt them match nothing. Its fine-tuning exempts the
    tables.
    """
    if parameter.ndim == 1 or name.endswith(".bias"):
        return False
    for prefix, module in model.named_modules():
        if isinstance(module, Encoder) and name.removeprefix(f"{prefix}." if prefix else "") in module.without_decay:
            return False
    return True


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decay, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if has_weight_decay(model, name, parameter) else exempt).append(parameter)
    groups = ({"params": decay, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def create_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.AdamW:
    """Create AdamW for pretraining."""
    return create_adamw(parameter_groups(model, weight_decay), betas=betas, device=device)


def create_adamw(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], device: torch.device
) -> torch.optim.AdamW:
    """Create AdamW; the schedule sets its learning rate at every step.

    It is fused, so that a step can skip itself on the device; see `Update`.
    """
    if find_accelerator(device).rate_is_tensor:
        groups = [group | {"lr": torch.full((), 0.0, device=device)} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
