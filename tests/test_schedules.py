import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler

from simmim.method.schedules import CosineSchedule, MultiStepSchedule, finetune_lr, scale_lr


def _optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def _lrs(optimizer: torch.optim.Optimizer, scheduler: Scheduler, steps: int) -> list[float]:
    rates = []
    for step in range(steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("warmup_steps", [0, 7, 40])
def test_cosine_equals_timm_at_every_step(warmup_steps: int) -> None:
    optimizer = _optimizer(8e-4)
    timm = CosineLRScheduler(
        optimizer, t_initial=40, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=warmup_steps, t_in_epochs=False
    )
    ours = CosineSchedule(peak_lr=8e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=warmup_steps, total_steps=40)
    assert [ours(step) for step in range(60)] == pytest.approx(_lrs(optimizer, timm, 60), rel=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_multistep_equals_timm_at_every_step(warmup_steps: int) -> None:
    optimizer = _optimizer(4e-4)
    timm = MultiStepLRScheduler(
        optimizer,
        decay_t=[31, 51],  # timm drops one step early; official SimMIM has its own class, which does not
        decay_rate=0.1,
        warmup_t=warmup_steps,
        warmup_lr_init=5e-7,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    ours = MultiStepSchedule(peak_lr=4e-4, warmup_lr=5e-7, warmup_steps=warmup_steps, milestones=(30, 50), gamma=0.1)
    assert [ours(step) for step in range(60)] == pytest.approx(_lrs(optimizer, timm, 60), rel=1e-12)


def test_multistep_drops_where_torch_drops() -> None:
    optimizer = _optimizer(4e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.1)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = MultiStepSchedule(peak_lr=4e-4, warmup_lr=0.0, warmup_steps=0, milestones=(3, 5), gamma=0.1)
    assert [ours(step) for step in range(8)] == pytest.approx(rates, rel=1e-12)


def test_at_update_gives_the_rates_of_the_official_loop() -> None:
    optimizer = _optimizer(8e-4)
    timm = CosineLRScheduler(optimizer, t_initial=20, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5, t_in_epochs=False)
    used = []
    for update in range(20):  # main_simmim.py: optimizer.step(), then lr_scheduler.step_update(update)
        used.append(optimizer.param_groups[0]["lr"])
        timm.step_update(update)
    ours = CosineSchedule(peak_lr=8e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5, total_steps=20)
    assert [ours.at_update(update) for update in range(20)] == pytest.approx(used, rel=1e-12)


def test_scale_lr_gives_the_papers_rate_for_its_batch() -> None:
    assert scale_lr(1e-4, 2048) == pytest.approx(4e-4)  # SimMIM §4.1: base 1e-4 at 512, 2048 images


def test_the_rate_of_fine_tuning_is_near_the_papers_and_grows_with_the_root_of_the_batch() -> None:
    def peak(batch: int, width: int | None) -> float:
        return scale_lr(finetune_lr(batch, width), batch)

    assert peak(2048, 768) == pytest.approx(scale_lr(1.25e-3, 2048), rel=0.1)  # SimMIM, appendix A: 1.25e-3 at 512
    for width in (128, 768, None):
        assert peak(16, width) == pytest.approx(peak(64, width) / 2)
        assert peak(8192, width) == 5e-3
    assert peak(64, 128) == peak(64, None) == pytest.approx(2 * peak(64, 512))


def test_a_cosine_whose_warm_up_outlasts_the_run_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^warm-up of 30 steps is longer than the run of 20; use at most 20 warm-up steps$"
    ):
        CosineSchedule(peak_lr=1e-3, min_lr=0.0, warmup_lr=0.0, warmup_steps=30, total_steps=20)


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ((20, 40), "warm-up of 30 steps passes the first milestone 20; use at most 20 warm-up steps"),
        ((60, 40), r"milestones \(60, 40\) are not in ascending order; sort them"),
    ],
)
def test_milestones_that_cannot_be_followed_are_refused(milestones: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MultiStepSchedule(peak_lr=1e-3, warmup_lr=0.0, warmup_steps=30, milestones=milestones)
