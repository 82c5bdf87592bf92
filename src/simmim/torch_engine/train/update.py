"""One optimiser step: forward, backward, clip, update.

Nothing here asks the device for a value: a step that is not finite skips itself, and random numbers come in with the
batch. So an accelerator is never waited for, and a compiler can take the step whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.config.training import TrainingConfig
from simmim.method.random_keys import sample_keys
from simmim.method.schedules import Schedule
from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.train.distributed import World, full_tensor, gradient_sync, local_part
from simmim.training.trainer import FIGURES

Batch = dict[str, Any]
"""Arrays, and tensors that the device has already."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# fp16's loss scale, as in torch.amp.GradScaler: halved by a step that is not finite, doubled after so many that are.
_FIRST_SCALE = 2.0**16
_GROW_EVERY = 2000


class Update:
    """Train `model`, whose forward takes a batch's tensors by name and returns its losses by name, all scalars.

    `loss` is the one to minimise; others, called `loss/COMPONENT`, are reported beside it. `update(step, batch)`
    returns the learning rate and a tensor (F,) on the device, the figures that `names` lists: the loss, the gradient
    norm before clipping, the number of consecutive steps, up to this one, that were not finite, and the components. A
    step that is not finite changes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        config: TrainingConfig,
        world: World,
        after: Callable[[Tensor], None] = lambda finite: None,
    ):
        self.model, self.optimizer = model, optimizer
        self._schedule, self._config, self._world, self._after = schedule, config, world, after
        self._dtype = DTYPES[config.precision]
        self._pins = find_accelerator(world.device).pins
        fp16 = config.precision == "fp16"
        self._optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(_BATCH_NORM_STATISTICS)]
        self._scale = torch.full((), _FIRST_SCALE if fp16 else 1.0, device=world.device)
        self._good = torch.zeros((), device=world.device)  # steps in a row that were finite
        self._bad = torch.zeros((), device=world.device)  # … that were not
        self.names: tuple[str, ...] = FIGURES
        """Names of the figures, in order; those of components are known from the first update on."""
        # Finding fp16's loss scale may take a skip for each halving of the first one.
        self.bad_limit = 26 if fp16 else 10

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps besides model and optimiser. Waits for the device."""
        return {"good": float(self._good), "bad": float(self._bad), "scale": float(self._scale)}

    def load_state(self, state: dict[str, float]) -> None:
        self._good.fill_(state["good"])
        self._bad.fill_(state["bad"])
        self._scale.fill_(state["scale"])

    def __call__(self, step: int, batch: Batch) -> tuple[float, Tensor]:
        lr = self._schedule.at_update(step)
        for group in self.optimizer.param_groups:
            rate = lr * group.get("lr_scale", 1.0)  # layer decay
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(torch.tensor(rate))
            else:
                group["lr"] = rate
        # What a layer still draws itself (dropout) depends on the step alone, so nothing random need be saved.
        key = sample_keys(self._config.seed, step, self._world.rank, stream="torch")[0]
        torch.manual_seed(int(key >> np.uint64(1)))
        return lr, self.advance(self._to_device(batch))

    def advance(self, batch: dict[str, Tensor]) -> Tensor:
        """Do the device's part of a call, at the learning rate that is set: a batch there → the figures."""
        statistics = [buffer.clone() for buffer in self._statistics]
        loss, *components = self._backward(batch)
        norm = self._clip()
        finite = torch.isfinite(norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW skips itself
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for now, before in zip(self._statistics, statistics, strict=True):
            now.copy_(torch.where(finite, now, before))
        self._after(finite)
        self._good = torch.where(finite, self._good + 1, 0.0)
        self._bad = torch.where(finite, 0.0, self._bad + 1)
        if self._dtype == torch.float16:
            grown = torch.where(self._good % _GROW_EVERY == 0, self._scale * 2, self._scale)
            self._scale = torch.where(finite, grown, self._scale / 2)
        return torch.stack((loss, norm, self._bad, *components))

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        device = self._world.device

        def send(value: NDArray[Any] | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            return (tensor.pin_memory() if self._pins else tensor).to(device, non_blocking=True)

        return {name: send(value) for name, value in batch.items()}

    def _backward(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Compute gradients of the mean loss over the batch, in `accumulate_steps` pieces.

        Returns the mean loss and the means of its components.
        """
        pieces = self._config.pieces
        split = {name: tensor.chunk(pieces) for name, tensor in batch.items()}
        totals: dict[str, Tensor] = {}
        for piece in range(pieces):
            with gradient_sync(self.model, enabled=piece == pieces - 1):
                with torch.autocast(self._world.device.type, self._dtype, enabled=self._dtype != torch.float32):
                    losses = self.model(**{name: parts[piece] for name, parts in split.items()})
                    loss = losses["loss"] / pieces
                # An infinite L1 loss has finite gradients: poison them, so that every process skips this step.
                (loss * torch.where(torch.isfinite(loss.detach()), self._scale, torch.nan)).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / pieces
        components = [name for name in totals if name != "loss"]
        self.names = (*FIGURES, *components)
        return [totals[name] for name in ("loss", *components)]

    def _clip(self) -> Tensor:
        """Take the loss scale out of the gradients and clip them; returns their norm before."""
        if self._dtype == torch.float16:
            gradients = [local_part(parameter.grad) for parameter in self._optimized if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self._scale)  # pyright: ignore[reportPrivateImportUsage]
        limit = self._config.clip_grad
        return full_tensor(nn.utils.clip_grad_norm_(self._optimized, float("inf") if limit is None else limit))
