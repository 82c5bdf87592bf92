"""Fine-tuning for classification: the session, its augmentations and its learning rates.

Shapes: `B` images, `C` channels, `H W` pixels, `K` classes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing as TimmErasing

import simmim
from simmim.cli import main
from simmim.config.tasks import TASK_CONFIGS, ClassifyConfig
from simmim.method.random_keys import sample_keys
from simmim.method.schedules import finetune_lr
from simmim.torch_engine.tasks.augment import Mix, RandAugment, RandomErasing, mix_images, soft_labels
from simmim.torch_engine.tasks.classifier import ClassifyStep
from simmim.training.run_directory import Run

TASKS = ", ".join(TASK_CONFIGS)
TINY = ["patch_size=16", "depth=2", "embed_dim=48", "num_heads=2"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    arguments = f"--data demo --out {out} --model vit_tiny_patch16_224 --image-size 32 --mask-cell 16 --steps 2"
    command = ["pretrain", *arguments.split(), "--batch-size", "8", "--precision", "fp32", "--model-args", *TINY]
    assert main(command) == 0
    return out


def command(source: object, out: Path, *more: str) -> list[str]:
    words = f"finetune classify --from {source} --data demo --out {out} --batch-size 16 --labels-per-class 4 --steps 6"
    return [*words.split(), "--precision", "fp32", "--eval-every-epochs", "2", "--save-every-steps", "1", *more]


def test_a_run_is_fine_tuned_and_its_best_model_loads_in_timm(pretrained: Path, tmp_path: Path) -> None:
    assert main(command(pretrained, tmp_path / "run")) == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["step"] == 6
    assert figures["best"]["top1"] >= figures["top1"]
    assert 0 <= figures["balanced_accuracy"] <= 1
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    labels = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["label_names"]
    assert labels[0] == "activities"
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((tmp_path / "run" / "per_class.json").read_text())) == set(labels)


def test_fine_tuning_starts_from_the_runs_weights(pretrained: Path, tmp_path: Path) -> None:
    assert main(command(pretrained, tmp_path / "run", "--lr", "1e-12", "--warmup-lr", "0", "--min-lr", "0")) == 0
    tuned = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True).state_dict()
    for name, tensor in simmim.load_encoder(pretrained).state_dict().items():
        if name.startswith("norm."):
            assert name not in tuned  # the mean of the tokens has a fresh norm instead
        else:
            torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-6)


def test_a_rate_that_is_left_open_is_chosen_and_a_resumed_run_keeps_its_own(pretrained: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert main(command(pretrained, run.path)) == 0
    begun = run.read_config(ClassifyConfig)
    assert begun.lr == finetune_lr(16, 48)
    shutil.rmtree(next(run.checkpoints.glob("step-*6")))
    run.config.write_text(run.config.read_text().replace(f"lr = {begun.lr}", "lr = 0.00125"))  # of an older version
    assert main(command(pretrained, run.path)) == 0
    assert run.read_config(ClassifyConfig).lr == 0.00125


def test_an_interrupted_fine_tuning_ends_as_an_uninterrupted_one(
    pretrained: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(lambda out: command(pretrained, out, "--ema-decay", "0.9"), at=4)


def test_a_fine_tuning_resumes_after_its_pretraining_was_deleted(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(pretrained, tmp_path / "pretrained")
    run = Run(tmp_path / "run")
    assert main(command(source, run.path, "--keep", "9")) == 0
    finished = load_file(run.model / "model.safetensors")
    shutil.rmtree(source)
    for path in (*run.checkpoints.glob("step-*[456]"), run.model, run.path / "metrics.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(command(source, run.path, "--keep", "9")) == 0
    assert "resumes    after step 3" in capsys.readouterr().err
    for name, tensor in load_file(run.model / "model.safetensors").items():
        torch.testing.assert_close(tensor, finished[name], rtol=0, atol=0)

    shutil.rmtree(run.checkpoints)
    assert main(command(source, run.path, "--keep", "9")) == 2
    assert "has no encoder; give the --out directory of a run" in capsys.readouterr().err


def test_a_run_whose_classes_got_other_names_is_not_resumed(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    words = f"finetune classify --from {pretrained} --data {tmp_path / 'images'} --out {tmp_path / 'run'} --steps 2"
    again = [*words.split(), "--batch-size", "2", "--val-fraction", "0.5"]
    assert main(again) == 0
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "zebra")
    capsys.readouterr()
    assert main(again) == 2
    said = capsys.readouterr().err
    assert "(classes ('cat', 'dog') → ('dog', 'zebra')); repeat its command" in said
    assert f"(with --from {tmp_path / 'run' / 'model'} to start from its weights)" in said


def test_the_average_of_the_weights_leaves_out_a_step_that_was_skipped() -> None:
    config = ClassifyConfig(mean=(0.5,) * 3, std=(0.5,) * 3, ema_decay=0.9)
    step = ClassifyStep(torch.nn.Linear(2, 2), config, np.ones(2, np.float32))
    assert step.average is not None
    before = step.average.weight.clone()
    with torch.no_grad():
        step.backbone.weight.add_(1.0)
    step.after_update(torch.tensor(False))
    torch.testing.assert_close(step.average.weight, before, rtol=0, atol=0)
    step.after_update(torch.tensor(True))
    torch.testing.assert_close(step.average.weight, before + 0.1)


def test_attention_is_of_the_kind_that_is_fastest_on_the_cpu(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simmim.torch_engine.train import finetune

    trained = []
    fit = finetune.FinetuneSession.batches
    monkeypatch.setattr(
        finetune.FinetuneSession, "batches", lambda self, step: trained.append(self.step) or fit(self, step)
    )
    for precision in ("fp32", "bf16"):
        words = command(pretrained, tmp_path / precision)
        words[words.index("--precision") + 1], words[words.index("--steps") + 1] = precision, "1"
        assert main(words) == 0
    fused = [{block.attn.fused_attn for block in step.backbone.blocks} for step in trained]
    assert fused == [{True}, {False}]


def test_learning_rates_fall_from_head_to_embedding_as_the_paper_decays_them(pretrained: Path) -> None:
    from simmim.torch_engine.train.finetune import parameter_groups

    backbone = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, global_pool="avg")
    config = ClassifyConfig(layer_decay=0.65, mean=(0.5,) * 3, std=(0.5,) * 3)
    step = ClassifyStep(backbone, config, np.ones(3, np.float32))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in parameter_groups(step, config) for p in group["params"]}
    # Official: 0.65 ** (depth + 1 - layer), the embedding being layer 0 and the head layer depth + 1.
    assert scales["head.weight"] == scales["fc_norm.weight"] == 1
    assert scales["blocks.1.attn.qkv.weight"] == pytest.approx(0.65)
    assert scales["blocks.0.attn.qkv.weight"] == pytest.approx(0.65**2)
    assert scales["patch_embed.proj.weight"] == scales["pos_embed"] == pytest.approx(0.65**3)


def test_an_augmented_image_depends_on_its_key_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    keys = sample_keys(0, 0, np.arange(40), stream="augment")
    distort = RandAugment()
    first = [distort(image, keys[i : i + 1]) for i in range(40)]
    again = [distort(image, keys[i : i + 1]) for i in reversed(range(40))][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    changed = sum((picture != image).any() for picture in first)
    assert 20 < changed < 40  # a quarter is left as it is: two operations, each with probability 1/2


def test_erased_areas_have_timms_mean_share() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    erase = RandomErasing(probability=1.0, mean=(0.5,) * 3, std=(0.1,) * 3)
    keys = sample_keys(0, 0, np.arange(300), stream="augment")
    ours = np.mean([(erase(image, keys[i : i + 1]) > 0).mean() for i in range(300)])
    torch.manual_seed(0)
    timms = TimmErasing(1.0, mode="pixel", device="cpu")
    theirs = np.mean([float((timms(torch.zeros(3, 64, 64)) != 0).float().mean()) for _ in range(300)])
    assert ours == pytest.approx(theirs, rel=0.15)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_images_and_labels_are_mixed_as_timm_mixes_them(mixup: float, cutmix: float) -> None:
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    row = Mix(mixup=mixup, cutmix=cutmix).draw(0, 5, 4, 16, 16)
    mix = torch.from_numpy(row)
    timms = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1, num_classes=4)
    share, top, bottom, left, right = row[0].tolist()
    timms._params_per_batch = lambda: (share, cutmix > 0)  # type: ignore[method-assign]
    if cutmix:
        expected = images.clone()
        box = (slice(None), slice(None), slice(int(top), int(bottom)), slice(int(left), int(right)))
        expected[box] = images.flip(0)[box]
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 256)
    else:
        expected, target = timms(images.clone(), labels)
        torch.testing.assert_close(soft_labels(labels, 4, 0.1, mix), target)
    torch.testing.assert_close(mix_images(images, mix), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetune", f"the task is missing; choose from {TASKS}"),
        ("finetune sort", f"task 'sort' is not known; choose from {TASKS}"),
        (
            "finetune classify --data demo --out x",
            "--from is missing; give the --out directory of a run, scratch or timm:NAME",
        ),
        (
            "finetune classify --data demo --out x --from nowhere",
            "--from nowhere has no encoder; give the --out directory of a run that has saved, scratch, timm:NAME or "
            "local-dir:PATH",
        ),
        (
            "finetune classify --data demo --out x --from scratch --labels-per-class 5000",
            "class symbols has 59 images, fewer than --labels-per-class 5000; use 59 or less",
        ),
    ],
)
def test_fine_tuning_refuses_in_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"simmim: {message}\n"
