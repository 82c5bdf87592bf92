"""FLOP against counts by hand; memory against what the profiler saw allocated; time lines against another batch."""

import functools

import numpy as np
import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from simmim.config.pretraining import PretrainConfig
from simmim.hardware.roofline import StepWork
from simmim.torch_engine.perf.cost import _record, measure_work

from . import tiny

SLOW = pytest.mark.slow


def config(model: str, size: int = 224, **settings) -> PretrainConfig:
    complete = {"image_size": (size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "device": "cpu", "precision": "fp32"}
    return PretrainConfig(model=model, **(complete | settings))


@functools.cache
def work_of(kind: str, precision: str = "fp32", *, checkpoint: bool = False) -> StepWork:
    """Of images of 96 pixels."""
    settings = tiny.config(kind, image_size=(96, 96), precision=precision, checkpoint_activations=checkpoint)
    return measure_work(settings)


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        # Patch embedding and head 0.231e9 each; a layer 2 × 197 × 12 × 768² for its weights and 4 × 197² × 768 for
        # attention.
        pytest.param({"model": "vit_base_patch16_224"}, 2 * 0.231e9 + 12 * (2.789e9 + 0.119e9), id="ViT-B/16"),
        pytest.param({"model": "vit_large_patch16_224"}, 123.4e9, id="ViT-L/16", marks=SLOW),
        pytest.param(
            {"model": "swin_base_patch4_window7_224", "size": 192, "model_args": {"window_size": 6}},
            22.8e9,
            id="Swin-B",
            marks=SLOW,
        ),
        pytest.param({"model": "resnet50"}, 8.8e9, id="ResNet-50", marks=SLOW),
    ],
)
def test_the_forward_pass_has_the_flops_counted_by_hand(settings, by_hand):
    assert measure_work(config(**settings, plain_step=True)).forward_flops == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize(
    "kind", ["vit", "swin", *(pytest.param(kind, marks=SLOW) for kind in ("beit", "resnet18", "convnext", "regnet"))]
)
def test_backward_takes_about_twice_the_forward(kind):
    work = work_of(kind)
    # Less for the first layer, which passes no gradient on; more for fused attention, which finds its scores again.
    assert 1.2 < work.flops_per_image / work.forward_flops - 1 < 2.5


def profiled_peak(settings: PretrainConfig) -> int:
    """Bytes allocated at once, at most, during a second update, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update, batch = tiny.update(settings), tiny.batch(settings)
        update(0, batch)
        with record_function("second"):
            update(1, batch)
    assert profiler.profiler is not None
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    allocations, begin = [], 0
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.typed[1].alloc_size))
        elif event.name == "second":
            begin = event.start_time_ns
    times, sizes = np.array(sorted(allocations)).T
    return int(np.cumsum(sizes)[times >= begin].max())


CASES = [
    ("vit", "bf16", True, 16),
    ("swin", "bf16", False, 16),
    ("resnet18", "fp32", False, 16),
    ("beit", "bf16", False, 8),
    pytest.param("vit", "fp32", False, 16, marks=SLOW),
    pytest.param("vit", "bf16", False, 8, marks=SLOW),
    pytest.param("swin", "fp32", False, 8, marks=SLOW),
    pytest.param("convnext", "fp32", False, 8, marks=SLOW),
]


@pytest.mark.parametrize(("kind", "precision", "checkpoint", "images"), CASES)
def test_memory_is_what_the_profiler_sees(kind, precision, checkpoint, images):
    settings = tiny.config(
        kind,
        image_size=(96, 96),
        batch_size=images,
        precision=precision,
        checkpoint_activations=checkpoint,
    )
    expected = pytest.approx(profiled_peak(settings), rel=0.1)
    assert work_of(kind, precision, checkpoint=checkpoint).peak_bytes(images) == expected


def test_a_batch_that_was_not_measured_lies_on_the_line():
    settings = tiny.config("swin", image_size=(96, 96), precision="bf16")
    work, seven = work_of("swin", "bf16"), _record(settings, 7)
    assert work.peak_bytes(7) == max(seven.live)
    assert (work.flops[0] + 7 * work.flops[1]).sum() == sum(seven.flops)


def test_checkpointing_takes_less_memory_and_more_arithmetic():
    depth = {**tiny.KINDS["vit"].arguments, "depth": 8}
    plain = measure_work(tiny.config("vit", model_args=depth))
    saving = measure_work(tiny.config("vit", model_args=depth, checkpoint_activations=True))
    assert saving.peak_bytes(64) < plain.peak_bytes(64) / 2
    assert 1.1 < saving.flops_per_image / plain.flops_per_image < 1.34  # at most the forward pass again


def test_cuda_never_holds_the_scores_of_attention_with_a_bias():
    cpu = measure_work(tiny.config("beit", image_size=(192, 192), precision="bf16"))
    cuda = measure_work(tiny.config("beit", image_size=(192, 192), precision="bf16", device="cuda"))
    assert cuda.live[1].max() < cpu.live[1].max()


def test_norms_are_fp32_under_cudas_autocast():
    cpu = work_of("convnext", "bf16")
    cuda = measure_work(tiny.config("convnext", image_size=(96, 96), precision="bf16", device="cuda"))
    assert cuda.traffic[1].sum() > cpu.traffic[1].sum()


def test_a_model_of_a_hundred_billion_parameters_takes_no_memory():
    settings = tiny.config("vit", model_args={"embed_dim": 65536, "depth": 2, "num_heads": 64})
    assert measure_work(settings).state_bytes > 1e12


def test_the_optimiser_starts_after_the_last_gradient():
    work = measure_work(tiny.config("vit"))
    assert work.gradients[work.update_starts] == work.gradient_bytes
    assert work.gradients[0] == 0


def test_a_model_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="is not a multiple of the mask cell"):
        measure_work(config("vit_base_patch16_224", size=200))


def test_measuring_leaves_autocast_as_it_was():
    measure_work(tiny.config("vit", precision="bf16"))
    assert not torch.is_autocast_enabled("cpu")


@SLOW
def test_a_tpu_is_given_no_less_memory_than_its_compiler_takes():
    small, large = 10.45 * 2**30, 12.14 * 2**30  # ViT-B/16, 128 images, v5e and v6e: docs/tpu.md
    work = measure_work(config("vit_base_patch16_224", precision="bf16", device="tpu"))
    assert small <= work.peak_bytes(128) < 1.2 * small
    assert work.peak_bytes(128) + 0.08 * 32 * 2**30 > large  # with what `advise` keeps free of a v6e's memory
    biased = measure_work(config("beit_base_patch16_224", precision="bf16", device="tpu"))
    assert biased.peak_bytes(128) > 1.2 * work.peak_bytes(128)  # which the kernel does not take


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_recomputed_attention_is_the_same_on_a_tpu(precision: str):
    work = measure_work(tiny.config("vit", precision=precision, device="tpu", checkpoint_activations=True))
    plain = measure_work(tiny.config("vit", precision=precision, device="tpu"))
    assert plain.flops_per_image < work.flops_per_image < 1.4 * plain.flops_per_image
