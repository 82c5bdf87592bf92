"""Two processes on gloo against one, and what depends on how many there are."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.accelerators import choose_device
from simmim.torch_engine.tpu.device import check_tpu_launch
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.distributed import World, check_world, spread
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, full_state, load_encoder
from simmim.torch_engine.train.update import Update

from . import tiny, worker
from .test_visible import UNIFORM, VISIBLE
from .worker import Finished, rows, weights

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"shard": True, "accumulate_steps": 2, "async_save": True},
        pytest.param({"accumulate_steps": 2}, marks=slow),
        pytest.param({"shard": True, "checkpoint_activations": True}, marks=slow),
        pytest.param({"checkpoint_activations": True}, marks=slow),
    ],
)
def test_two_processes_give_the_losses_of_one(whole: Finished, tmp_path: Path, others: dict[str, Any]) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"), **others)
    worker.run_together(worker.pretrain, config, log=tmp_path / "log")
    for key in ("loss", "grad_norm"):
        mine, theirs = ([row[key] for row in rows(each)] for each in (config, whole.config))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert_the_run_is_whole(config, whole.config)


def assert_the_run_is_whole(config: PretrainConfig, expected: PretrainConfig) -> None:
    """The model, the encoder and the pictures are those of one process."""
    mine, theirs = weights(config), weights(expected)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    assert config.out
    run = Path(config.out)
    prefix = "encoder.backbone."
    saved = {name.removeprefix(prefix): tensor for name, tensor in mine.items() if name.startswith(prefix)}
    tiny.assert_same(dict(load_encoder(run).state_dict()), saved)
    assert sorted(path.name for path in (run / "reconstructions").iterdir()) == [
        "step-00000008.png",
        "step-00000016.png",
    ]


@slow
@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("beit with a shared bias", {}),
        ("swin", {}),
        ("swinv2", {}),
        ("convnext", {}),
        # Without secondary masking the encoder's mask token is in no image.
        ("swin", VISIBLE | UNIFORM | {"mask_ratio": 0.75}),
    ],
)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_give_the_losses_of_one_for_every_family(
    kind: str, others: dict[str, Any], shard: bool, tmp_path: Path
) -> None:
    one = dataclasses.replace(worker.settings(tmp_path / "one", kind), steps=4, **others)
    two = dataclasses.replace(one, out=str(tmp_path / "two"), shard=shard)
    worker.finish(one, tmp_path / "log")
    worker.run_together(worker.pretrain, two, log=tmp_path / "log")
    np.testing.assert_allclose([row["loss"] for row in rows(two)], [row["loss"] for row in rows(one)], rtol=1e-5)


@pytest.mark.parametrize(
    ("shard", "together_first"),
    [(True, True), *(pytest.param(*case, marks=slow) for case in ((True, False), (False, True), (False, False)))],
)
def test_one_process_resumes_what_two_began_and_two_what_one_began(
    whole: Finished, tmp_path: Path, shard: bool, together_first: bool
) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"), keep=10)

    def train(together: bool) -> None:
        if together:
            two = dataclasses.replace(config, shard=shard, async_save=True)
            worker.run_together(worker.pretrain, two, log=tmp_path / "log")
        else:
            worker.finish(config, tmp_path / "log")

    train(together_first)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > "step-00000006":  # as if it had been cut off after this one
            path.rename(tmp_path / path.name)
    train(not together_first)
    mine, theirs = ([row["loss"] for row in rows(each)] for each in (config, whole.config))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@slow
@pytest.mark.parametrize("ways", [[(2, True), (2, False), (1, False)], [(4, False), (2, True), (4, True), (2, False)]])
def test_a_run_goes_on_by_other_numbers_of_processes_sharded_or_not(
    whole: Finished, tmp_path: Path, ways: list[tuple[int, bool]]
) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"), keep=10)
    for number, (processes, shard) in enumerate(ways, 1):
        if processes > 1:
            settings = dataclasses.replace(config, shard=shard)
            worker.run_together(worker.pretrain, settings, log=tmp_path / f"log {number}", processes=processes)
        else:
            worker.finish(config, tmp_path / f"log {number}")
        if number < len(ways):  # as if it had been cut off after its next checkpoint
            for path in (tmp_path / "run" / "checkpoints").iterdir():
                if path.name > f"step-{3 * number:08d}":
                    path.rename(tmp_path / f"{number} {path.name}")
    mine, theirs = ([row["loss"] for row in rows(each)] for each in (config, whole.config))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@slow
def test_a_fine_tuning_goes_on_by_another_number_of_processes(tmp_path: Path) -> None:
    words = (
        "finetune classify --data demo --from scratch --model vit_tiny_patch16_224 --model-args patch_size=16 depth=1"
    )
    words += " embed_dim=48 num_heads=2 --image-size 32 --batch-size 16 --labels-per-class 4 --steps 6 --workers 1"
    words += " --precision fp32 --device cpu --eval-every-epochs 2 --save-every-steps 1 --keep 9 --mixup 0 --cutmix 0"

    def train(name: str, processes: int) -> dict[str, Any]:
        argv = [*words.split(), "--out", str(tmp_path / name)]
        worker.run_together(worker.command, argv, log=tmp_path / "log", processes=processes)
        steps = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return {f"{each['step']} {key}": each[key] for each in steps for key in ("loss", "val_loss") if key in each}

    expected = train("one", 1)
    train("more", 2)
    for path in (tmp_path / "more" / "checkpoints").glob("step-*[3456]"):
        path.rename(tmp_path / path.name)
    assert train("more", 1) == pytest.approx(expected, rel=1e-4)
    for path in (tmp_path / "more" / "checkpoints").glob("step-*[456]"):
        path.rename(tmp_path / f"2 {path.name}")
    assert train("more", 4) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("shard", "precision"),
    [(False, "fp32"), (True, "fp16"), pytest.param(True, "fp32", marks=slow), pytest.param(False, "fp16", marks=slow)],
)
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(
    shard: bool, precision: str, tmp_path: Path
) -> None:
    settings = tiny.config(precision=precision, shard=shard)
    worker.run_together(skip_a_step, settings, log=tmp_path / "log")


def skip_a_step(settings: PretrainConfig) -> None:
    """Run by each process: the second of two steps is broken on the last process alone."""
    with distributed.join("cpu") as world:
        torch.manual_seed(0)
        model = spread(build_step(settings), world, shard=settings.shard)
        optimizer = create_optimizer(model, weight_decay=0.05, betas=(0.9, 0.999), device=world.device)
        update = Update(model, optimizer, tiny.constant(1e-3), config=settings, world=world)
        update(0, tiny.batch(settings, seed=world.rank))
        before = {name: tensor.clone() for name, tensor in full_state(model, sharded=settings.shard).items()}
        last = world.rank == world.size - 1
        figures = update(1, tiny.batch(settings, seed=world.rank, broken=last))[1]
        assert float(figures[2]) == 1.0
        tiny.assert_same(full_state(model, sharded=settings.shard), before)
        scale = 2.0**15 if settings.precision == "fp16" else 1.0
        assert update.state() == {"good": 0.0, "bad": 1.0, "scale": scale}
        update(2, tiny.batch(settings, seed=world.rank))
        after = full_state(model, sharded=settings.shard)
        if world.is_main or not settings.shard:
            assert not torch.equal(after["model.head.weight"], before["model.head.weight"])
        assert world.main_says(world.rank + 7) == 7
        assert world.largest(7 * last) == 7
        assert world.largest(0) == 0


def test_processes_that_the_batch_does_not_divide_among_are_refused() -> None:
    world = World(device=torch.device("cpu"), size=3)
    with pytest.raises(ValueError, match="batch size 8 does not divide among 3 processes × 2 ") as error:
        check_world(tiny.config(batch_size=8, accumulate_steps=2), world)
    assert "accumulation steps; use a multiple of 6, or to resume, processes and " in str(error.value)


def test_sharding_over_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--shard spreads a model over processes and there is one; start it with"):
        check_world(tiny.config(shard=True), tiny.CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device 'cuda' is not here: .*; use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(("processes", "told"), [("8", ""), ("1", "a:1,a:2"), ("2", "a:1,a:2,a:3")])
def test_more_or_fewer_processes_than_torchtpu_was_told_of_are_refused(processes: str, told: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{processes} processes on TPUs have {len(told) // 4 + bool(told)} addresses"
    ):
        check_tpu_launch({"WORLD_SIZE": processes, "TORCH_TPU_SLICEBUILDER_ADDRESSES": told})


def test_a_process_alone_and_as_many_as_torchtpu_was_told_of_are_not_refused() -> None:
    check_tpu_launch({})
    check_tpu_launch({"TORCH_TPU_SLICEBUILDER_ADDRESSES": "a:1"})
    check_tpu_launch({"WORLD_SIZE": "2", "TORCH_TPU_SLICEBUILDER_ADDRESSES": "a:1,a:2"})


@pytest.mark.skipif("WORLD_SIZE" in os.environ, reason="torchrun started these tests")
def test_without_torchrun_a_process_is_alone() -> None:
    with distributed.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()


def test_batch_norms_are_made_to_see_the_whole_batch_on_gpus_with_their_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **_: model)
    model = timm.create_model("regnety_002", num_classes=0).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    converted = spread(model, World(device=torch.device("cuda", 0), size=2), shard=False)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted(images), expected)
