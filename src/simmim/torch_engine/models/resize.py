"""Resize weights: positions, relative-bias tables, channels.

Shapes: `O` outputs, `C` channels, `N` tokens, `D` features, `P` predicted values of a cell, `T` entries of a
relative-bias table (rows × columns of distances, then the rows of the class token), `A` attention heads.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from simmim.errors import UserError

_TABLE = "relative_position_bias_table"
SHARED_BIAS = f"rel_pos_bias.{_TABLE}"
_CLASS_ROWS = 3  # rows of a table: from the class token, to it, and to itself


def fit_backbone(weights: Mapping[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Resize a timm module's weights for `backbone`, of the same kind with another image size, window or channels.

    A relative bias shared by all blocks of the checkpoint is copied to each if `backbone` does not share one. Returns
    the weights and a line for each kind of change. Raises `UserError` for a missing or extra weight, or a shape that no
    rule resizes; the caller adds the remedy.
    """
    own: dict[str, Tensor] = backbone.state_dict()
    fitted, notes = _one_bias_a_block(weights, own)
    if odd := sorted(set(own) ^ set(fitted)):
        where = "the checkpoint lacks" if odd[0] in own else "the model has no"
        raise UserError(f"{where} {odd[0]!r} ({len(odd)} such names)")
    stem = f"{backbone.pretrained_cfg['first_conv']}.weight"  # type: ignore[index]
    for name, target in own.items():
        old = fitted[name]
        if old.shape == target.shape:
            continue
        if name == "pos_embed":
            fitted[name] = _resize_positions(old, backbone)
            notes["position embeddings"] = f"{old.shape[1]} → {target.shape[1]} tokens, bicubic"
        elif name.endswith(_TABLE) and old.shape[1] == target.shape[1]:
            window = backbone.get_submodule(name.rpartition(".")[0]).window_size
            fitted[name] = resize_relative_table(old, window)  # type: ignore[arg-type]
            notes[f"relative-bias tables of {len(old)} entries"] = f"→ {len(target)}, geometric spacing, cubic"
        elif name == stem:
            fitted[name] = adapt_input_channels(old, target.shape[1])
            notes["input channels"] = f"{old.shape[1]} → {target.shape[1]}"
        if fitted[name].shape != target.shape:
            raise UserError(f"{name} is {tuple(old.shape)} instead of {tuple(target.shape)}")
    return fitted, [f"{what} {how}" for what, how in notes.items()]


def _one_bias_a_block(
    weights: Mapping[str, Tensor], own: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy the shared relative bias to each block, as official fine-tuning does (SimMIM's code for ViT)."""
    fitted = dict(weights)
    if SHARED_BIAS not in fitted or SHARED_BIAS in own:
        return fitted, {}
    shared = fitted.pop(SHARED_BIAS)
    tables = [name for name in own if name.endswith(f".attn.{_TABLE}")]
    fitted.update({name: weights[name] + shared if name in weights else shared.clone() for name in tables})
    return fitted, {"the shared relative bias": f"copied to {len(tables)} blocks"}


def _resize_positions(positions: Tensor, backbone: Any) -> Tensor:
    """Resize (1, N, D) to the backbone's grid, bicubic; rows of class and register tokens stay unchanged."""
    prefix = backbone.pos_embed.shape[1] - math.prod(backbone.patch_embed.grid_size)
    if math.isqrt(positions.shape[1] - prefix) ** 2 != positions.shape[1] - prefix:
        raise UserError(
            f"position embeddings of {positions.shape[1]} tokens are not of a square image; use its own size"
        )
    return resample_abs_pos_embed(positions, backbone.patch_embed.grid_size, num_prefix_tokens=prefix)


def resize_relative_table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Resize a table (T, A) of a square window to `window` (height, width in cells), as the official code does.

    Old entries are placed at geometrically growing distances up to the ends of the new table, and joined by a cubic
    spline. Rows of a class token are kept.
    """
    new = (2 * window[0] - 1, 2 * window[1] - 1)
    side = math.isqrt(len(table))
    rows = 0 if side % 2 and side**2 == len(table) else _CLASS_ROWS
    side = math.isqrt(len(table) - rows)
    if side**2 != len(table) - rows:
        raise UserError(f"a relative-bias table of {len(table)} entries is not of a square window")
    grid = table[: side**2].double().numpy().reshape(side, side, -1)
    down, across = (_spline(_geometric_positions(side, n), np.arange(n) - n // 2) for n in new)
    resized = np.einsum("ys,xt,sta->yxa", down, across, grid).reshape(math.prod(new), -1)
    return torch.cat((torch.from_numpy(resized).to(table.dtype), table[side**2 :]))


def _geometric_positions(old: int, new: int) -> NDArray[Any]:
    """Place `old` entries on the axis of `new` ones: steps from the middle grow geometrically."""
    low, high = 1.01, 1.5  # the official search for the factor, and its bounds
    factor = low
    while high - low > 1e-6:
        factor = (low + high) / 2
        if sum(factor**i for i in range(old // 2)) > new // 2:
            high = factor
        else:
            low = factor
    half = np.cumsum(factor ** np.arange(old // 2))
    return np.concatenate((-half[::-1], [0.0], half))


def _spline(x: NDArray[Any], points: NDArray[Any]) -> NDArray[Any]:
    """Return the matrix (points, x) of a not-a-knot cubic spline through values at `x`.

    Points beyond the ends take the end's value, as in the Fortran code of scipy's `interp2d`. Fewer than four values
    are joined by one polynomial.
    """
    n, at = len(x), np.clip(points, x[0], x[-1])
    if n < 4:
        return np.vander(at, n) @ np.linalg.inv(np.vander(x, n))
    h = np.diff(x)
    # Second derivatives m of the spline through values y: left @ m = right @ y.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    left[0, :3] = h[1], -h[0] - h[1], h[0]  # the third derivative is continuous at the second value
    left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]  # and at the second to last
    second = np.linalg.solve(left, right)
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, n - 2)
    step = h[piece][:, None]
    a, b = (x[piece + 1] - at)[:, None] / step, (at - x[piece])[:, None] / step
    values = np.eye(n)
    curved = (a**3 - a) * second[piece] + (b**3 - b) * second[piece + 1]
    return a * values[piece] + b * values[piece + 1] + curved * step**2 / 6


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt (O, C, k, k) to another number of channels: summed to one, else cycled and scaled (timm's rule).

    Images with equal channels give the same sums as before.
    """
    C = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(channels) % C] * (C / channels)


def adapt_output_channels(weight: Tensor, old: int, new: int) -> Tensor:
    """Adapt rows (P, …) of a linear head from `old` to `new` channels: their mean for one, else cycled.

    Rows are in PixelShuffle order, grouped by channel.
    """
    rows = weight.unflatten(0, (old, -1))
    return (rows.mean(dim=0, keepdim=True) if new == 1 else rows[torch.arange(new) % old]).flatten(0, 1)
