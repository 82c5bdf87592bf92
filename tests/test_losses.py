from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from simmim.method.losses import CrossEntropyLoss, L1Loss, Loss, MSELoss, SmoothL1Loss, check_pair
from simmim.method.targets import ClusterTarget, PixelTarget, Target, patchify

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference" / "simmim_official"

REGRESSIONS = [
    (L1Loss(), functional.l1_loss),
    (MSELoss(), functional.mse_loss),
    (SmoothL1Loss(), functional.smooth_l1_loss),
    (SmoothL1Loss(beta=0.3), lambda *pair, reduction: functional.smooth_l1_loss(*pair, beta=0.3, reduction=reduction)),
]


def _case(loss: Loss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction (2, 3, 4, 5·4), target or class ids, and weights (2, 3, 4, 4) of which about half are 0."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 3, 4, 20, generator=generator)
    weights = (torch.rand(2, 3, 4, 4, generator=generator) < 0.5).float()
    if isinstance(loss, CrossEntropyLoss):
        return prediction, torch.randint(0, 5, (2, 3, 4, 4), generator=generator), weights
    return prediction, torch.randn(2, 3, 4, 20, generator=generator), weights


def test_l1_equals_the_official_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    images, reconstruction = torch.randn(2, 2, 3, 64, 96, generator=generator)
    mask = torch.rand(2, 4, 6, generator=generator) < 0.6
    m = mask.float().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    official = ((images - reconstruction).abs() * m).sum() / (m.sum() + 1e-5) / 3

    images, prediction = images.movedim(1, 3), patchify(torch, reconstruction.movedim(1, 3), 32)
    target = PixelTarget()
    ours = L1Loss()(torch, prediction, target(torch, images, 32), target.weights(torch, mask, 16, 32))
    torch.testing.assert_close(ours, official, rtol=5e-7, atol=0)


@pytest.mark.parametrize(("model", "patch", "stride"), [("vit", 16, 16), ("swin", 4, 32)])
def test_l1_equals_the_loss_that_the_official_code_wrote(model: str, patch: int, stride: int) -> None:
    if not (file := REFERENCE / model / "reference.npz").exists():
        pytest.skip("no ../shared/reference beside this checkout")
    reference = np.load(file)
    images = reference["images"].transpose(0, 2, 3, 1)
    prediction = patchify(np, reference["reconstruction"].transpose(0, 2, 3, 1), stride)
    target = PixelTarget()
    weights = target.weights(np, reference["mask"] == 1, patch, stride)
    loss = L1Loss()(np, prediction, target(np, images, stride), weights)
    assert loss == pytest.approx(reference["losses"][0], rel=1e-6)


@pytest.mark.parametrize(("loss", "torch_loss"), REGRESSIONS)
def test_regression_losses_equal_torch_over_the_masked_positions(loss: Loss, torch_loss) -> None:
    prediction, target, weights = _case(loss)
    masked = weights.bool()[:, :, :, None, :].expand(2, 3, 4, 5, 4).flatten(3)
    expected = torch_loss(prediction[masked], target[masked], reduction="mean")
    torch.testing.assert_close(loss(torch, prediction, target, weights), expected, rtol=1e-6, atol=0)


def test_cross_entropy_equals_torch_over_the_masked_positions() -> None:
    prediction, ids, weights = _case(CrossEntropyLoss())
    logits = prediction.reshape(2, 3, 4, 5, 4).movedim(3, 4)  # (B, h, w, n², V)
    expected = functional.cross_entropy(logits[weights.bool()], ids[weights.bool()])
    torch.testing.assert_close(CrossEntropyLoss()(torch, prediction, ids, weights), expected, rtol=1e-6, atol=0)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    prediction, ids, weights = _case(CrossEntropyLoss())
    assert torch.isfinite(CrossEntropyLoss()(torch, prediction * 1e30, ids, weights))


@pytest.mark.parametrize("loss", [kind() for kind in Loss.kinds.values()], ids=lambda loss: loss.kind)
def test_numpy_and_torch_give_the_same_loss(loss: Loss) -> None:
    case = _case(loss)
    ours = loss(np, *(array.numpy() for array in case))
    assert float(loss(torch, *case)) == pytest.approx(float(ours), rel=1e-6)


@pytest.mark.parametrize("loss", [kind() for kind in Loss.kinds.values()], ids=lambda loss: loss.kind)
def test_visible_positions_get_no_gradient(loss: Loss) -> None:
    prediction, target, weights = _case(loss)
    loss(torch, prediction.requires_grad_(), target, weights).backward()
    assert prediction.grad is not None
    gradient = prediction.grad.reshape(2, 3, 4, 5, 4).abs().sum(3)
    assert torch.equal(gradient > 0, weights > 0)


@pytest.mark.parametrize("loss", [kind() for kind in Loss.kinds.values()], ids=lambda loss: loss.kind)
def test_the_sums_of_two_halves_add_up_to_the_whole_batch(loss: Loss) -> None:
    case = _case(loss)
    whole = torch.stack(loss.sums(torch, *case))
    halves = [torch.stack(loss.sums(torch, *(array[i : i + 1] for array in case))) for i in range(2)]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-6, atol=0)


def test_a_batch_without_a_masked_position_has_loss_0() -> None:
    prediction, target, weights = _case(L1Loss())
    assert L1Loss()(torch, prediction, target, torch.zeros_like(weights)) == 0


@pytest.mark.parametrize("loss", [kind() for kind in Loss.kinds.values()], ids=lambda loss: loss.kind)
def test_losses_compile_into_one_graph_with_the_same_gradients(loss: Loss) -> None:
    prediction, target, weights = _case(loss)
    eager = torch.func.grad(lambda p: loss(torch, p, target, weights))(prediction)
    compiled = torch.compile(lambda p, t, w: loss(torch, p, t, w), fullgraph=True, backend="aot_eager")
    leaf = prediction.clone().requires_grad_()
    compiled(leaf, target, weights).backward()
    torch.testing.assert_close(leaf.grad, eager)


def test_every_target_takes_a_loss_that_exists() -> None:
    assert {target.classes for target in Target.kinds.values()} <= {loss.classes for loss in Loss.kinds.values()}


def test_check_pair_takes_the_default_pair() -> None:
    check_pair(PixelTarget(), L1Loss())


@pytest.mark.parametrize(
    ("target", "loss", "message"),
    [
        (ClusterTarget(), L1Loss(), "loss l1 is undefined for target clusters; use cross_entropy"),
        (
            PixelTarget(),
            CrossEntropyLoss(),
            "loss cross_entropy is undefined for target pixels; use l1 or mse or",
        ),
    ],
)
def test_check_pair_refuses_what_makes_no_sense(target: Target, loss: Loss, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_pair(target, loss)


def test_a_smooth_l1_without_a_smooth_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^beta 0 of the smooth L1 loss is not above 0; use 1\.0, or the l1 loss$"):
        SmoothL1Loss(beta=0)
