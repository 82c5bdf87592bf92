"""What is done to a model for a TPU, on the CPU: it must change nothing but how norms come to their numbers."""

import copy
from typing import Any

import pytest
import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from simmim.torch_engine.tpu.device import fit_for_tpu


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), BatchNormAct2d(3)])
def test_a_batch_norm_keeps_its_statistics_and_evaluates_with_them(norm: nn.Module) -> None:
    plain: Any = copy.deepcopy(norm)
    fit_for_tpu(norm)
    images = torch.randn(2, 4, 3, 5, 5)
    for batch in images:
        torch.testing.assert_close(norm(batch), plain(batch))
    assert norm.state_dict().keys() == plain.state_dict().keys()
    assert plain.num_batches_tracked == 2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
    torch.testing.assert_close(norm.eval()(images[0]), plain.eval()(images[0]))
    assert norm.state_dict()["num_batches_tracked"] == 2


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), LayerNorm2d(3)])
def test_a_layer_norm_takes_and_gives_fp32_under_autocast(norm: nn.Module) -> None:
    images = torch.randn(4, 3, 3, 3, dtype=torch.bfloat16)
    expected = norm(images.float())
    fit_for_tpu(norm)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
