"""The roofline: time and memory of a training step, from the work of its operations.

An operation takes the longer of its arithmetic (FLOP over FLOP/s) and its memory traffic (bytes over bytes/s), after
Williams et al., "Roofline", CACM 2009. Two rates, `Rates`, say what a machine reaches; `fit_rates` finds them from
measured steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a machine: `flops` in FLOP/s of matrix products, `bandwidth` in bytes/s, and `launch`, the least seconds
    of any operation."""

    flops: float
    bandwidth: float
    launch: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The operations of one training step in fp32 or mixed precision, in order.

    Arrays of shape (2, operations) are lines in the number of images: row 0 + row 1 × images.
    """

    forward_flops: int
    """FLOP of the forward pass for an image, multiply and add counted apart."""
    parameters: int
    trained: int
    """Parameters that have a gradient and AdamW's two averages."""
    largest_block: int
    """Parameters of the largest block that sharding gathers at once."""
    update_starts: int
    """The first operation of the optimiser; those before run once for each accumulated piece."""
    flops: Floats
    traffic: Floats
    """Bytes read and written."""
    live: Floats
    """Bytes in use after each operation: parameters, averages, gradients, activations, temporaries."""
    gradients: Floats
    """Bytes of gradients in use after each operation, of shape (operations,); part of `live`."""

    @property
    def flops_per_image(self) -> float:
        """FLOP carried out for an image, forward and backward, recomputation for checkpointing included."""
        return float(self.flops[1].sum())

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients, in fp32."""
        return 4 * self.trained

    @property
    def state_bytes(self) -> int:
        """Of parameters and AdamW's averages, in fp32."""
        return 4 * self.parameters + 8 * self.trained

    def seconds(self, images: int, rates: Rates, *, pieces: int = 1) -> float:
        """Return the time on one device of a step that accumulates `pieces` times `images`, without exchanges."""
        flops, traffic = _at(self.flops, images) / rates.flops, _at(self.traffic, images) / rates.bandwidth
        longer = np.maximum(flops, traffic)
        taken = np.maximum(longer, np.where(longer > 0, rates.launch, 0.0))
        return float(pieces * taken[: self.update_starts].sum() + taken[self.update_starts :].sum())

    def arithmetic_share(self, images: int, rates: Rates) -> float:
        """Return the share of a step's time in operations that arithmetic limits, not memory traffic."""
        flops, traffic = _at(self.flops, images) / rates.flops, _at(self.traffic, images) / rates.bandwidth
        return float(flops[flops >= traffic].sum() / np.maximum(flops, traffic).sum())

    def peak_bytes(self, images: int, *, kept_gradients: bool = False, shards: int = 1) -> float:
        """Return the peak memory in use on a device during a step that takes `images` at a time.

        `kept_gradients`: they are there during the whole step, as with accumulation and with DDP, whose buckets are
        never freed. `shards`: devices among which FSDP2 divides parameters, averages and gradients; two blocks at a
        time are whole, one in use and the next on its way.
        """
        live = _at(self.live, images)
        gradients = np.full_like(self.gradients, self.gradient_bytes) if kept_gradients else self.gradients
        live = live - self.gradients + gradients
        if shards > 1:
            live = live - (self.state_bytes + gradients) * (1 - 1 / shards) + 8 * self.largest_block
        return float(live.max())

    def largest_batch(self, memory: float, *, kept_gradients: bool = False, shards: int = 1) -> int:
        """Find the most images at a time that fit into `memory` bytes, 0 if none does.

        Halves the interval, since memory grows with the images.
        """

        def fits(images: int) -> bool:
            return self.peak_bytes(images, kept_gradients=kept_gradients, shards=shards) <= memory

        low, high = 0, 1
        while fits(high) and high < 2**20:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def _at(line: Floats, images: int) -> Floats:
    return line[0] + line[1] * images


def fit_rates(measured: Sequence[tuple[StepWork, int, float]]) -> Rates:
    """Fit the rates that come closest, in ratio, to measured steps: (work, images, seconds) of two or more.

    For one ratio of the two rates the best scale is known in closed form, so the ratio alone is searched for.
    """
    if len(measured) < 2:
        raise UserError(
            f"{len(measured)} measured steps cannot tell arithmetic from memory traffic; measure at least two models, "
            "such as vit_base_patch16_224 and resnet50"
        )
    seconds = np.array([taken for _, _, taken in measured])
    tried = []
    for ratio in np.geomspace(0.1, 1e4, 501):  # FLOP for each byte at which the two limits meet
        unit = [work.seconds(images, Rates(flops=ratio, bandwidth=1.0)) for work, images, _ in measured]
        logs = np.log(np.array(unit) / seconds)
        scale = float(np.exp(logs.mean()))
        tried.append((float(logs.var()), Rates(flops=float(ratio) * scale, bandwidth=scale)))
    return min(tried, key=lambda fit: fit[0])[1]
