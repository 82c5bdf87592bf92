"""Swin's encoder of visible cells against timm's Swin of half the size, on half images put together by hand."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from simmim.method.masks import UniformMask, upsample_mask
from simmim.torch_engine.models.compact import CompactEncoder
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.masked_image_model import build_model
from simmim.torch_engine.models.savings import Chosen, Savings

from . import tiny
from .test_savings import outcome
from .test_visible import config

SIZE = (128, 192)  # 8 × 12 cells; the last stage of the half image has 2 × 3 vectors


@dataclass(frozen=True)
class Case:
    """`windows` are those of the four stages for the whole image, which smaller maps cut."""

    kind: str
    window: int
    windows: tuple[tuple[int, int], ...]


CASES = [
    Case("swin", 2, ((2, 2),) * 4),
    Case("swin", 7, ((7, 7), (7, 7), (7, 7), (4, 6))),
    Case("swinv2", 2, ((2, 2),) * 4),
    Case("swinv2", 7, ((7, 7), (7, 7), (7, 7), (4, 6))),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind} {case.window}")


def arguments(case: Case) -> dict[str, Any]:
    # Every other block shifts its windows.
    return tiny.KINDS[case.kind].arguments | {"depths": (2, 2, 2, 1), "window_size": case.window}


def build(case: Case) -> CompactEncoder:
    torch.manual_seed(0)
    model = tiny.KINDS[case.kind].model
    encoder = create_encoder(model, encode="visible", image_size=SIZE, model_args=arguments(case)).eval()
    assert isinstance(encoder, CompactEncoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder


def build_half(case: Case, encoder: CompactEncoder) -> Any:
    """timm's model for half the image with the weights of `encoder`."""
    width, height = arguments(case), (SIZE[0] // 2, SIZE[1] // 2)
    if case.kind == "swinv2":  # its biases are a function of distances, in units of these windows
        width |= {"pretrained_window_sizes": case.windows}
    half: Any = timm.create_model(tiny.KINDS[case.kind].model, num_classes=0, img_size=height, **width).eval()
    state = encoder.backbone.state_dict()
    for name, table in half.state_dict().items():
        if name.endswith("relative_position_bias_table"):  # ((2 · rows - 1) · (2 · columns - 1), heads)
            stage = int(name.split(".")[1])
            rows, columns = case.windows[stage]
            whole = state[name].reshape(2 * rows - 1, 2 * columns - 1, -1)
            map_rows, map_columns = height[0] // 4 // 2**stage, height[1] // 4 // 2**stage
            few, fewer = rows - min(rows, map_rows), columns - min(columns, map_columns)
            state[name] = whole[few : len(whole) - few, fewer : whole.shape[1] - fewer].flatten(0, 1)
            assert state[name].shape == table.shape
    half.load_state_dict(state)
    return half


def masks(ratio: float) -> Tensor:
    """(2, 8, 12), True = hidden."""
    return torch.from_numpy(UniformMask(ratio=ratio, cell=16)(np.array([3, 8], np.uint64), SIZE))


def features_by_hand(case: Case, encoder: CompactEncoder, images: Tensor, cells: Tensor) -> Tensor:
    """What the encoder should give, cell by cell: (B, 8, 12, D / 2)."""
    half = build_half(case, encoder)
    B, rows, columns = cells.shape
    found = encoder.hidden_token.flatten().expand(B, rows, columns, -1).clone()
    small = torch.zeros(B, 3, SIZE[0] // 2, SIZE[1] // 2)
    places: dict[tuple[int, int, int], tuple[int, int]] = {}
    empty = []
    for b, i, j in np.ndindex(B, rows // 2, columns // 2):
        four = [(2 * i, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j), (2 * i + 1, 2 * j + 1)]
        visible = [place for place in four if not cells[b][place]]
        assert len(visible) <= 1
        if not visible:
            empty.append((b, i, j))
        places[b, i, j] = y, x = (visible or four)[0]
        if visible:
            cell = images[b, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
            small[b, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = cell
    patches = half.patch_embed(small)
    for b, i, j in empty:
        patches[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = encoder.mask_token.flatten()
    spread = encoder.expand(half.norm(half.layers(patches)))  # (B, 2, 3, 2 · D)
    for (b, i, j), (y, x) in places.items():
        part = 2 * (i % 2) + j % 2
        found[b, y, x] = spread[b, i // 2, j // 2].chunk(4)[part]
    return found


@every_case
@pytest.mark.parametrize("ratio", [0.75, 0.8125])
@torch.no_grad()
def test_features_are_those_of_timm_for_half_the_image(case: Case, ratio: float) -> None:
    encoder, images, cells = build(case), torch.randn(2, 3, *SIZE), masks(ratio)
    assert cells.float().mean() == ratio
    mask = torch.from_numpy(upsample_mask(cells.numpy(), 4))
    expected = features_by_hand(case, encoder, images, cells)
    torch.testing.assert_close(encoder(images, mask), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@every_case
@torch.no_grad()
def test_what_it_saves_is_timms_model_of_the_whole_image(case: Case) -> None:
    encoder, images = build(case), torch.randn(1, 3, *SIZE)
    encoder(images, torch.from_numpy(upsample_mask(masks(0.75)[:1].numpy(), 4)))
    plain: Any = timm.create_model(tiny.KINDS[case.kind].model, num_classes=0, img_size=SIZE, **arguments(case)).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    assert torch.equal(encoder(images), plain.forward_features(images))


def test_without_secondary_masking_every_weight_has_a_gradient_all_the_same() -> None:
    # Else DDP would wait for the mask token's.
    gradients = outcome(config("swin", mask_ratio=0.75), Savings())
    model = build_model(config("swin", mask_ratio=0.75))
    trained = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() - {"loss"} == trained
    assert [name for name in trained if not gradients[name].any()] == ["model.encoder.mask_token"]


@pytest.mark.parametrize("change", ["two of a 2x2", "part of a cell"])
def test_masks_that_show_more_are_refused(change: str) -> None:
    model = build_model(config("swin"))
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[0, :4, : 8 if change == "two of a 2x2" else 3] = False
    with pytest.raises(
        ValueError, match=r"masks show more than one 16-pixel cell of a 2x2, or parts of cells, .*; give masks of Uni"
    ):
        model.predict(torch.randn(1, 3, 64, 64), mask)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1::2], ids=lambda case: case.kind)
def test_it_is_compiled_whole(case: Case) -> None:
    encoder, images = build(case), torch.randn(2, 3, *SIZE)
    mask, told = torch.from_numpy(upsample_mask(masks(0.8125).numpy(), 4)), Chosen(torch.zeros(2, 1, dtype=torch.long))
    compiled: Any = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images, mask, visible=told), encoder(images, mask))
