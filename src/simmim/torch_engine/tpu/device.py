"""A TPU as a PyTorch device by TorchTPU: find it, and fit a model to it."""

import importlib
import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simmim.errors import UserError


def find_tpu() -> str | None:
    """Load TorchTPU. Returns the reason if there is no TPU to train on, with the remedy; `None` if there is one."""
    if importlib.util.find_spec("torch_tpu") is None:
        return "needs TorchTPU: pip install 'simmim[tpu]' on a Cloud TPU machine"
    check_tpu_launch(os.environ)
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"  # without it, importing TorchTPU does not register the device
    importlib.import_module("torch_tpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != "tpu":
        return "is not here: TorchTPU sees no TPU; use --device cpu, or see `simmim doctor`"
    return None


def check_tpu_launch(environment: Mapping[str, str]) -> None:
    """Check that TorchTPU has one address for each process. Raises `UserError`.

    TorchTPU connects the devices of a slice by a list of addresses, one a process. Every process needs the list before
    it starts (`python -m torch.tpu.distributed` prints it).
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    addresses = [address for address in environment.get("TORCH_TPU_SLICEBUILDER_ADDRESSES", "").split(",") if address]
    if processes != max(len(addresses), 1):
        raise UserError(
            f"{processes} processes on TPUs have {len(addresses)} addresses in TORCH_TPU_SLICEBUILDER_ADDRESSES; start "
            "one for each TPU device, as docs/tpu.md shows"
        )


def exact_fp32() -> None:
    """Multiply fp32 numbers in fp32. By default TorchTPU rounds them to bf16 first."""
    torch.set_float32_matmul_precision("highest")


def fit_for_tpu(module: nn.Module) -> None:
    """Change the norms of a model to what TorchTPU 0.2.0 supports.

    Layer norms take and return fp32, as under CUDA's autocast: TorchTPU has no layer norm of bf16 inputs with fp32
    weights. Batch norms update their statistics in a hook: those that TorchTPU records as StableHLO do not.
    """
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):  # timm's too
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        elif isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.track_running_stats = False  # a training pass does not get the statistics; an evaluating one does
            norm.register_forward_pre_hook(_track_statistics)


@torch.no_grad()
def _track_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Update a batch norm's statistics as PyTorch does in training."""
    if norm.training:
        assert norm.momentum is not None and norm.num_batches_tracked is not None
        assert norm.running_mean is not None and norm.running_var is not None
        variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
        norm.num_batches_tracked.add_(1)
