"""The step on an NVIDIA GPU: pytest -m gpu."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.train import distributed, jpegs
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.pretrain import pretrain

from . import pictures, tiny, worker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is seen")]
GPU = World(device=torch.device("cuda", 0))
KINDS = ["vit", "beit with a shared bias", "swin", "swinv2", "resnet18", "convnext"]


def losses(settings: PretrainConfig, world: World, *, compiled: bool = False) -> list[float]:
    update = tiny.update(settings, world=world)
    if compiled:
        update.model.compile(dynamic=False)
    return [float(update(step, tiny.batch(settings, seed=step))[1][0]) for step in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_losses_are_those_of_the_cpu(kind: str) -> None:
    settings = tiny.config(kind, drop_path=0.2)
    np.testing.assert_allclose(losses(settings, GPU), losses(settings, tiny.CPU), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_the_fp32_losses(kind: str, precision: str) -> None:
    settings = tiny.config(kind, drop_path=0.2)
    mixed = dataclasses.replace(settings, precision=precision)
    np.testing.assert_allclose(losses(mixed, GPU), losses(settings, GPU), rtol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_step_gives_the_losses_of_the_eager_one(kind: str, precision: str) -> None:
    settings = tiny.config(kind, precision=precision, drop_path=0.2)
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    np.testing.assert_allclose(losses(settings, GPU, compiled=True), losses(settings, GPU), rtol=tolerance)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(kind: str, precision: str) -> None:
    settings = tiny.config(kind, precision=precision, accumulate_steps=2, drop_path=0.2)
    update, batch = tiny.update(settings, world=GPU), tiny.batch(settings)
    update(0, batch)  # the first allocates, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(1, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(precision: str) -> None:
    settings = tiny.config("resnet18", precision=precision)
    update = tiny.update(settings, world=GPU)
    update(0, tiny.batch(settings))
    before = tiny.state(update)
    update(1, tiny.batch(settings, broken=True))
    tiny.assert_same(tiny.state(update), before)


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet18"])
def test_memory_does_not_grow(kind: str) -> None:
    settings = tiny.config(kind, precision="bf16", accumulate_steps=2)
    update, batch = tiny.update(settings, world=GPU), tiny.batch(settings)
    in_use = []
    for step in range(200):
        update(step, batch)
        if step in (9, 199):
            torch.cuda.synchronize()
            in_use.append(torch.cuda.memory_allocated())
    assert in_use[1] < 1.02 * in_use[0]


@pytest.mark.parametrize("kind", ["resnet18", "regnet"])
def test_convolutions_work_with_channels_last(kind: str) -> None:
    settings = tiny.config(kind, precision="bf16")
    update = tiny.update(settings, world=GPU)
    assert tiny.convolutions_not_channels_last(update, tiny.batch(settings)) == []


def test_a_process_alone_trains_on_the_first_gpu() -> None:
    with distributed.join("cuda") as world:
        assert world.device == torch.device("cuda", 0)


def test_a_whole_training_resumes(tmp_path: Path) -> None:
    settings = worker.settings(tmp_path / "run")
    on_gpu = dataclasses.replace(settings, device="cuda", precision="bf16", steps=4, save_every_steps=2)
    pretrain(on_gpu)
    _, outcome = pretrain(on_gpu)
    assert outcome.start == 4


def test_a_training_that_was_broken_off_goes_on_with_the_losses_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(worker.settings(tmp_path / "whole"), device="cuda", steps=8, log_every_steps=1)
    broken = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    pretrain(settings)
    worker.break_off(broken, 5, monkeypatch)
    _, outcome = pretrain(broken)
    assert outcome.start == 3
    whole, parts = ([row["loss"] for row in worker.rows(config)] for config in (settings, broken))
    np.testing.assert_allclose(parts, whole, rtol=1e-3)


def test_nvjpeg_gives_close_to_the_pixels_of_the_threads(tmp_path: Path) -> None:
    turned = pictures.Image.Exif()
    turned[274] = 6
    progressive = pictures.encode(pictures.picture(9), progressive=True)
    source = pictures.Files(
        *pictures.jpegs(9),
        progressive,
        pictures.encode(pictures.picture(10).convert("L")),
        pictures.encode(pictures.picture(11), exif=turned),
    )
    for channels in (1, 3):
        found, expected = (pictures.read(source, tmp_path, where, channels=channels) for where in ("cuda", None))
        pictures.assert_alike(found, expected, levels=3)


def test_broken_jpegs_are_listed_and_replaced_as_by_the_threads(tmp_path: Path) -> None:
    files = pictures.jpegs(8)
    files[2], files[5] = pictures.without_tables(files[2]), files[5][: len(files[5]) // 2]
    source, listed = pictures.Files(*files), []
    for where in ("cuda", None):
        folder = tmp_path / str(where)
        folder.mkdir()
        listed.append((pictures.read(source, folder, where), (folder / "bad_images.txt").read_text().split()[::2]))
    pictures.assert_alike(listed[0][0], listed[1][0], levels=3)
    assert sorted(listed[0][1]) == sorted(listed[1][1])


def test_decoding_beside_other_work_and_in_used_memory_gives_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures.Files(*pictures.jpegs(9))
    expected = pictures.read(source, tmp_path, "cuda", batch_size=8)
    monkeypatch.setattr(jpegs, "_AT_ONCE", 1)  # so that each takes the memory of the one before
    left = torch.ones(4096, 4096, device="cuda")
    products = [left @ left for _ in range(50)]  # for seconds
    found = pictures.read(source, tmp_path, "cuda", batch_size=8)
    pictures.assert_alike(found, expected, levels=0)
    assert all(bool((product == 4096).all()) for product in products)


def test_a_training_on_images_that_nvjpeg_decodes_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(pictures.jpegs(12)):
        (folder / f"{number:02}.jpg").write_bytes(file)
    settings = dataclasses.replace(
        worker.settings(tmp_path / "whole"), data=str(folder), device="cuda", decode="gpu", steps=8, log_every_steps=1
    )
    broken = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    pretrain(settings)
    worker.break_off(broken, 5, monkeypatch)
    _, outcome = pretrain(broken)
    assert outcome.start == 3
    whole, parts = ([row["loss"] for row in worker.rows(config)] for config in (settings, broken))
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
