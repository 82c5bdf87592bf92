"""Guided masks: what is hidden, against NumPy; the scores; and trainings with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simmim
from simmim.errors import UserError
from simmim.method.masks import AttentionMask, GuidedMask, HardMask, RandomMask
from simmim.method.objectives import DescriptorRegression
from simmim.method.random_keys import sample_keys
from simmim.torch_engine.models.mask_guides import AttentionGuide, MaskGuide, create_guide, ranking_loss
from simmim.torch_engine.models.masked_image_model import PretrainStep, build_model
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.train.storage import build_step, load_run
from simmim.torch_engine.train.update import Update
from simmim.training.loop import Loop
from simmim.training.masks import draw_all_masks, draw_masks

from . import tiny
from .test_update import NoHostReads

BOTH = pytest.mark.parametrize("kind", [AttentionMask, HardMask])
ENCODER = tiny.encoder("vit", size=(32, 32))


def guide_of(mask: GuidedMask, size: tuple[int, int], done: float) -> MaskGuide:
    """A guide for cells of one patch whose share has risen for a part `done` of its steps."""
    guide = MaskGuide(mask.for_steps(100).for_patch(16), ENCODER, size)
    guide.teacher.updates.fill_(100 * done)
    return guide


def hidden(guide: MaskGuide, score: np.ndarray, order: np.ndarray) -> np.ndarray:
    return guide.hide(torch.from_numpy(score), torch.from_numpy(order)).numpy()


def trained(kind: type[GuidedMask], model: str = "vit", **others: Any) -> tuple[PretrainStep, Update, Any]:
    mask: Any = kind(cell=16, share=1.0, steps=1)
    config = tiny.config(model, mask=mask, image_size=(96, 64), **others)
    return *build_update(config, tiny.CPU), config


# What is hidden


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ratio=st.floats(0.01, 0.99),
    share=st.floats(0, 1),
    done=st.floats(0, 2),
)
def test_the_highest_scores_and_then_the_first_of_the_order_are_hidden(
    rows: int, columns: int, ratio: float, share: float, done: float
) -> None:
    mask, size = AttentionMask(ratio=ratio, cell=16, share=share), (16 * rows, 16 * columns)
    if int(np.ceil(rows * columns * ratio)) == rows * columns:
        return
    keys = sample_keys(0, 0, np.arange(4), stream="mask")
    score = np.random.default_rng(0).normal(size=(4, rows, columns)).astype(np.float32)
    order = mask.order(keys, size)
    found = hidden(guide_of(mask, size, done), score, order)
    count = mask.masked_cells(size)
    guided = int(np.floor(np.float32(share * count) * min(np.float32(100 * done) / np.float32(100), np.float32(1))))
    for image in range(4):
        first = np.argsort(-score[image].ravel())[:guided]
        rest = [cell for cell in np.argsort(order[image].ravel()) if cell not in first]
        expected = {*first, *rest[: count - guided]}
        assert set(np.flatnonzero(found[image])) == expected


def test_at_share_1_the_highest_scores_alone_are_hidden() -> None:
    mask, size = AttentionMask(cell=16, share=1), (112, 80)
    score = np.random.default_rng(0).normal(size=(8, 7, 5)).astype(np.float32)
    found = hidden(guide_of(mask, size, 1), score, mask.order(np.arange(8, dtype=np.uint64), size))
    lowest_hidden = np.where(found, score, np.inf).min(axis=(1, 2))
    assert (lowest_hidden > np.where(found, -np.inf, score).max(axis=(1, 2))).all()
    assert (found.sum(axis=(1, 2)) == mask.masked_cells(size)).all()


@pytest.mark.parametrize(("share", "done"), [(0.5, 0), (0, 1)])
def test_without_a_share_the_random_mask_stays(share: float, done: float) -> None:
    mask, size, keys = HardMask(cell=16, share=share), (112, 80), np.arange(8, dtype=np.uint64)
    score = np.random.default_rng(0).normal(size=(8, 7, 5)).astype(np.float32)
    found = hidden(guide_of(mask, size, done), score, mask.order(keys, size))
    assert (found == mask(keys, size)).all()
    assert (found == RandomMask(cell=16)(keys, size)).all()


def test_the_masks_of_an_image_share_the_guided_cells_only() -> None:
    mask, size = HardMask(cell=16), (112, 112)
    guide = guide_of(mask, size, 1)
    score = torch.randn(2, 7, 7)
    order = torch.from_numpy(mask.order(np.arange(6, dtype=np.uint64), size))
    masks = guide.hide(score, order).unflatten(0, (3, 2))
    assert (masks.all(dim=0).sum(dim=(1, 2)) >= guide.count // 2).all()
    assert (masks.any(dim=0).sum(dim=(1, 2)) > guide.count).all()


@pytest.mark.parametrize("model", ["vit", "beit", "swin", "resnet18", "convnext"])
@pytest.mark.parametrize("kind", [AttentionMask, HardMask])
def test_the_encoder_of_any_family_sees_the_guides_masks(kind: type[GuidedMask], model: str) -> None:
    cell = 32 if model in ("resnet18", "convnext") else 16
    settings = tiny.config(model, mask=kind(cell=cell, share=1.0, steps=1), image_size=(64, 96), masks_per_image=2)
    step, update = build_update(settings, tiny.CPU)
    seen: list[torch.Tensor] = []
    step.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    batch = random_batch(settings, 2, step)
    for number in range(2):
        update(number, batch)
    factor = cell // step.model.encoder.patch_size
    before, after = (mask[:, ::factor, ::factor] for mask in seen)
    count = settings.mask.masked_cells((64, 96))
    assert (before.sum(dim=(1, 2)) == count).all() and (after.sum(dim=(1, 2)) == count).all()
    drawn = torch.from_numpy(batch["mask"]).transpose(0, 1).flatten(0, 1)
    assert torch.equal(seen[0], drawn)  # no share yet
    assert torch.equal(after[:2], after[2:])  # the whole share, for both masks of an image


def test_the_validation_masks_are_random() -> None:
    guided, plain = (tiny.config(mask=kind(cell=16)) for kind in (AttentionMask, RandomMask))
    assert (draw_masks(guided, 0, np.arange(8), 16) == draw_masks(plain, 0, np.arange(8), 16)).all()
    assert draw_all_masks(guided, 0, np.arange(8), 16).keys() == {"mask", "mask_order"}


# Scores


def test_the_score_is_the_attention_of_the_class_token() -> None:
    step, _, _ = trained(AttentionMask)
    guide: Any = step.guide
    last: Any = guide.teacher.module.backbone.blocks[-1].attn
    last.fused_attn = False  # so that the attention weights can be seen
    seen: list[torch.Tensor] = []
    last.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(3, 3, 96, 64)
    score = guide(images)
    assert seen[0].shape == (3, 3, 25, 25)
    torch.testing.assert_close(score, seen[0].mean(dim=1)[:, 0, 1:].unflatten(1, (6, 4)))


@pytest.mark.parametrize("model", ["vit with registers", "beit", "swin", "convnext"])
def test_without_a_class_token_the_score_is_the_similarity_to_the_mean(model: str) -> None:
    encoder = tiny.encoder(model, size=(128, 64)).eval()
    guide = AttentionGuide(AttentionMask(cell=32), encoder, (128, 64))
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        features = encoder(images).numpy()
    mean = features.mean(axis=(1, 2), keepdims=True)
    length = np.linalg.norm(features, axis=-1) * np.linalg.norm(mean, axis=-1)
    expected = (features * mean).sum(axis=-1) / length
    cells = expected.reshape(2, 4, expected.shape[1] // 4, 2, expected.shape[2] // 2).mean(axis=(2, 4))
    np.testing.assert_allclose(guide(images).numpy(), cells, rtol=1e-4, atol=1e-5)


def test_the_ranking_loss_is_that_of_a_loop_over_pairs() -> None:
    score, losses = torch.randn(2, 5), torch.rand(2, 5)
    losses[:, 1] = losses[:, 2]  # a tie is no pair
    images = []
    for s, e in zip(score.double().numpy(), losses.double().numpy(), strict=True):
        pairs = [(i, j) for i in range(5) for j in range(5) if e[i] > e[j]]
        images.append(np.mean([-np.log(1 / (1 + np.exp(s[j] - s[i]))) for i, j in pairs]))
    assert float(ranking_loss(score, losses)) == pytest.approx(np.mean(images), rel=1e-5)


@pytest.mark.parametrize("head", ["linear", "transformer"])
def test_a_cell_has_the_loss_of_its_own_pixels(head: str) -> None:
    config = tiny.config(mask=HardMask(cell=32), image_size=(96, 64), head=head)
    torch.manual_seed(0)
    step = build_step(config)
    model, kept = step.model, []
    guide: Any = step.guide
    guide.losses = lambda score, batch: kept.append(batch) or {}
    loss = step(**{name: torch.from_numpy(array) for name, array in random_batch(config, 2, step).items()})["loss"]
    images, mask, losses = kept[0].images, kept[0].mask, kept[0].cell_losses["pixels"]
    with torch.no_grad():
        prediction = model(images, mask)[1]
    error = (prediction - images).abs().mean(dim=1).unflatten(2, (4, 16)).unflatten(1, (6, 16)).mean(dim=(2, 4))
    torch.testing.assert_close(losses, torch.where(mask, error, 0))
    assert float(losses[mask].mean()) == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_predictor_learns_which_cells_are_hard() -> None:
    mask = HardMask(cell=16, share=0.5, steps=40, momentum=0.9, momentum_end=0.9)
    settings = tiny.config(mask=mask, image_size=(96, 96), batch_size=8)
    step, update = build_update(settings, tiny.CPU)
    update._schedule = tiny.constant(3e-3)
    draw = np.random.default_rng(0)
    for number in range(60):
        batch = random_batch(settings, 8, step)
        hard = draw.random((8, 6, 6, 1)) < 0.5  # noise that nothing predicts, among grey
        noise = draw.integers(0, 256, (8, 96, 96, 3))
        batch["image"] = np.where(hard.repeat(16, 1).repeat(16, 2), noise, 128).astype(np.uint8)
        batch |= draw_all_masks(settings, number, np.arange(8), 16)
        _, figures = update(number, batch)
    assert float(figures[update.names.index("loss/ranking")]) < 0.6  # half of the pairs are of two alike: 0.69
    guide: Any = step.guide
    with torch.no_grad():
        score = guide(step.normalize(torch.from_numpy(batch["image"]))).numpy()
    noisy, grey = score[hard[..., 0]], score[~hard[..., 0]]
    assert (noisy[:, None] > grey).mean() > 0.95


# Trainings


@BOTH
def test_a_guided_step_reads_nothing_from_the_device(kind: type[GuidedMask]) -> None:
    for model in ("vit", "swin", "convnext"):
        settings = tiny.config(model, mask=kind(cell=32), image_size=(64, 96), accumulate_steps=2, precision="bf16")
        step, update = build_update(settings, tiny.CPU)
        batch = random_batch(settings, 4, step)
        with NoHostReads():
            for number in range(2):
                update(number, batch)


@BOTH
def test_the_same_seed_gives_the_same_bits_and_a_broken_step_changes_nothing(kind: type[GuidedMask]) -> None:
    first, second = trained(kind), trained(kind)
    batch = random_batch(first[2], 4, first[0])
    for number in range(3):
        for _, update, _ in (first, second):
            update(number, batch)
    tiny.assert_same(tiny.state(first[1]), tiny.state(second[1]))
    before = tiny.state(first[1])
    first[1](3, batch | {"image": np.full(batch["image"].shape, np.nan, np.float32)})
    tiny.assert_same(before, tiny.state(first[1]))


SETTINGS: dict[str, Any] = {
    "data": "demo",
    "objectives": ["pixels"],
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 1},
    "image_size": 64,
    "batch_size": 8,
    "val_images": 2,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "lr": 0.1,
    "warmup_epochs": 0,
    "log_every_steps": 1,
    "steps": 4,
    "save_every_steps": 2,
}


@BOTH
def test_a_run_that_was_broken_off_resumes_to_the_same_bits(
    kind: type[GuidedMask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str) -> Path:
        return simmim.pretrain(**SETTINGS, mask=kind(cell=16), out=str(tmp_path / name)).path

    step, config = load_run(train("whole"), objectives=True)
    log = Loop._log

    def break_off(self: Loop, done: int, *rest: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt
        log(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", break_off)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    tiny.assert_same(load_run(train("parts"), objectives=True)[0].state_dict(), step.state_dict())
    assert isinstance(config.mask, GuidedMask) and config.mask.steps == 4  # completed by the plan
    assert step.guide is not None and float(step.guide.teacher.updates) == 4
    assert load_run(tmp_path / "whole")[0].guide is None  # which is for training


# What is refused


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionMask, {"share": 1.5}, "share 1.5 of mask attention is not within 0..1"),
        (HardMask, {"momentum": -1}, "momentum -1 of mask hard is not within 0..1"),
        (HardMask, {"steps": 0}, "steps 0 of mask hard is below 1; use 1 or more, or leave it out"),
    ],
)
def test_a_setting_outside_its_range_is_refused(kind: type[GuidedMask], fields: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        kind(**fields)
    assert str(error.value) == message


def test_what_cannot_guide_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--mask hard learns from the loss on pixels; add objective pixels, or use"):
        build_step(tiny.config(mask=HardMask(), objectives=(DescriptorRegression(),)))
    with pytest.raises(UserError, match=r"^--encode visible of swin_tiny\w* takes masks that show at most one"):
        build_model(
            tiny.config("swin", mask=AttentionMask(), encode="visible", head="transformer", image_size=(64, 64))
        )

    class OwnMask(GuidedMask):
        pass

    OwnMask.kind, config = "own", tiny.config()
    with pytest.raises(UserError, match=r"^mask own has no guide in PyTorch; register one by"):
        create_guide(OwnMask(), build_model(config), config)
