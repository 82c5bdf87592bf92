"""Resizing on load: against scipy, timm, and what must not change."""

import re

import numpy as np
import pytest
import torch
from timm.models._manipulate import adapt_input_conv

from simmim.method.targets import unpatchify
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.models.resize import (
    adapt_input_channels,
    adapt_output_channels,
    fit_backbone,
    resize_relative_table,
)

from . import tiny


def official_geometric_axis(old, new):
    """The spacing in words: steps grow by a factor, sought between 1.01 and 1.5, so that the ends meet."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        middle = (low + high) / 2
        reach = (1 - middle ** (old // 2)) / (1 - middle)
        low, high = (low, middle) if reach > new // 2 else (middle, high)
    half = [(1 - middle**k) / (1 - middle) for k in range(1, old // 2 + 1)]
    return np.array([-x for x in reversed(half)] + [0] + half)


@pytest.mark.parametrize(("old", "new"), [(6, (7, 7)), (12, (14, 14)), (7, (6, 6)), (4, (8, 8)), (6, (7, 12))])
def test_relative_tables_are_resized_as_scipy_does(old, new):
    interpolate = pytest.importorskip("scipy.interpolate")
    torch.manual_seed(0)
    side = 2 * old - 1
    table = torch.randn(side * side, 3)
    y, x = (official_geometric_axis(side, 2 * n - 1) for n in new)
    at_y, at_x = (np.arange(-(n - 1.0), n) for n in new)
    expected = [
        interpolate.RectBivariateSpline(y, x, table[:, head].double().reshape(side, side).numpy())(at_y, at_x)
        for head in range(3)
    ]
    resized = resize_relative_table(table, new).numpy()
    np.testing.assert_allclose(resized, np.stack(expected, -1).reshape(-1, 3), atol=1e-5)


def test_rows_of_the_class_token_are_kept():
    table = torch.randn(11 * 11 + 3, 2)
    assert torch.equal(resize_relative_table(table, (7, 7))[-3:], table[-3:])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_small_windows_keep_a_constant_table_constant(window):
    table = torch.full(((2 * window - 1) ** 2, 2), 0.25)
    assert resize_relative_table(table, (5, 5)) == pytest.approx(0.25 * torch.ones(81, 2))


def test_a_table_of_no_square_window_is_refused():
    with pytest.raises(ValueError, match="table of 77 entries is not of a square window"):
        resize_relative_table(torch.zeros(77, 2), (7, 7))


def backbone(kind, **settings):
    return create_backbone(tiny.KINDS[kind].model, model_args=tiny.KINDS[kind].arguments, **settings)


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "swinv2"])
def test_weights_of_another_size_and_channels_fit(kind):
    old, new = backbone(kind, image_size=(64, 64)), backbone(kind, image_size=(96, 160), channels=5)
    new.load_state_dict(fit_backbone(old.state_dict(), new)[0])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_that_fit_are_not_touched(kind):
    weights = backbone(kind, image_size=(64, 64)).state_dict()
    fitted, notes = fit_backbone(weights, backbone(kind, image_size=(64, 64)))
    assert notes == []
    tiny.assert_same(fitted, weights)


def test_prefix_rows_of_position_embeddings_are_kept():
    old, new = (backbone("vit with class and register tokens", image_size=(n, n)) for n in (64, 96))
    fitted, notes = fit_backbone(old.state_dict(), new)
    prefix = old.pos_embed.shape[1] - 16
    assert torch.equal(fitted["pos_embed"][:, :prefix], old.pos_embed[:, :prefix])
    assert notes == [f"position embeddings {16 + prefix} → {36 + prefix} tokens, bicubic"]


def test_a_shared_bias_is_copied_to_every_block():
    old = backbone("beit with a shared bias", image_size=(64, 64))
    shared = torch.randn_like(old.rel_pos_bias.relative_position_bias_table)
    weights = old.state_dict() | {"rel_pos_bias.relative_position_bias_table": shared}
    arguments = tiny.KINDS["beit with a shared bias"].arguments
    arguments = arguments | {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    new = create_backbone("beit_base_patch16_224", image_size=(64, 64), model_args=arguments)
    fitted, notes = fit_backbone(weights, new)
    assert all(torch.equal(fitted[f"blocks.{i}.attn.relative_position_bias_table"], shared) for i in range(2))
    assert notes == ["the shared relative bias copied to 2 blocks"]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6])
def test_input_channels_follow_timms_rule(channels):
    weight = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(adapt_input_channels(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_head_for_other_channels_predicts_the_same_colours_in_turn(channels):
    weight, features = torch.randn(3 * 4 * 4, 8), torch.randn(2, 3, 3, 8)
    before = unpatchify(torch, features @ weight.T, 4)
    after = unpatchify(torch, features @ adapt_output_channels(weight, 3, channels).T, 4)
    expected = before.mean(-1, keepdim=True) if channels == 1 else before[..., [c % 3 for c in range(channels)]]
    torch.testing.assert_close(after, expected)


def test_a_missing_weight_is_named():
    weights = backbone("vit", image_size=(64, 64)).state_dict()
    del weights["norm.bias"]
    with pytest.raises(ValueError, match=re.escape("the checkpoint lacks 'norm.bias' (1 such names)")):
        fit_backbone(weights, backbone("vit", image_size=(64, 64)))


def test_a_weight_of_another_shape_is_named_with_both_shapes():
    weights = backbone("vit", image_size=(64, 64)).state_dict()
    weights["norm.bias"] = torch.zeros(47)
    with pytest.raises(ValueError, match=re.escape("norm.bias is (47,) instead of (48,)")):
        fit_backbone(weights, backbone("vit", image_size=(64, 64)))
