"""Every mistake that a user makes gets one line on stderr (value, rule, remedy) and exit code 2."""

import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from simmim.cli import main
from simmim.config.pretrain_recipes import RECIPES

SUFFIXES = (
    ".avif, .bmp, .dcm, .dicom, .gif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .nii, .nii.gz, .npy, .pbm, .pgm, .png, "
    ".pnm, .ppm, .svs, .tga, .tif, .tiff, .webp"
)
TINY = {
    "--data": "images",
    "--objective": "pixels",
    "--out": "run",
    "--model": "vit_tiny_patch16_224",
    "--model-args": "depth=1 embed_dim=12 num_heads=1",
    "--image-size": "64",
    "--mask-cell": "16",
    "--batch-size": "2",
    "--val-images": "2",
    "--steps": "1",
    "--device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder of six images and of all that is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    random = np.random.default_rng(0)
    for name in ("images", "empty", "texts", "renamed", "bands", "foreign"):
        (folder / name).mkdir()
    for number in range(6):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        np.save(folder / f"bands/{number}.npy", random.integers(0, 256, (64, 64, 5), dtype=np.uint8))
        (folder / f"texts/{number}.txt").write_text("no image")
        (folder / f"renamed/{number}.jpg").write_text("no image")
    (folder / "foreign/thesis.tex").write_text("mine")
    (folder / "file").write_text("a file")
    (folder / "nothing.pth").touch()
    (folder / "empty.txt").write_text("# no path\n")
    (folder / "astray.txt").write_text("nowhere/1.png\n")
    (folder / "broken.toml").write_text("a = [1")
    (folder / "unknown.toml").write_text("mask_rato = 0.5")
    (folder / "type.toml").write_text('batch_size = "many"')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("WORLD_SIZE", raising=False)
        yield folder


def tiny(changes: str = "", without: str = "") -> list[str]:
    """A pretraining that works, but for `changes`, written as on the command line, and an option left out."""
    options = {name: value.split() for name, value in TINY.items() if name != without}
    for word in changes.split():
        if word.startswith("--"):
            options[(name := word)] = []
        else:
            options[name].append(word)
    return ["pretrain", *(word for name, values in options.items() for word in (name, *values))]


def error_of(argv: list[str], capsys) -> str:
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("simmim: ")
    assert text.count("\n") == 1
    return text.removeprefix("simmim: ").rstrip("\n")


FAMILIES = "beit*, convnext*, regnet*, resnet*, swin_*, swinv2_*, vit_*, deit*"
BAD_OPTIONS = {
    # the model
    "--model vit_tny_patch16_224": f"model 'vit_tny_patch16_224' is not known to timm {timm.__version__}; did you mean "
    "vit_tiny_patch16_224 or deit_tiny_patch16_224 or vit_tiny_patch16_384?",
    "--model zzz --model-args": f"model 'zzz' is not known to timm {timm.__version__}; see timm.list_models()",
    "--model efficientnet_b0 --model-args": "model 'efficientnet_b0' cannot take a mask; use one of the families "
    + FAMILIES,
    "--model-args depth": "--model-args 'depth' is not NAME=VALUE; write depth=4",
    "--model-args dept=1": "model 'vit_tiny_patch16_224' cannot be built with image size 64x64, dept 1: "
    "VisionTransformer.__init__() got an unexpected keyword argument 'dept'; change --model-args or --image-size",
    # sizes
    "--image-size big": "--image-size 'big' is not N or HxW in whole pixels; write 224 or 96x160",
    "--image-size 0": "--image-size '0' is not N or HxW in whole pixels; write 224 or 96x160",
    "--image-size 200 --mask-cell 32": "image size 200 is not a multiple of the mask cell 32; use 192 or 224",
    "--image-size 96 --mask-cell 24": "mask cell 24 is not a multiple of the patch 16 of vit_tiny_patch16_224; "
    "use --mask.cell 16 or 32",
    "--model swin_tiny_patch4_window7_224 --model-args --image-size 80": "image size 80 is not a multiple of the "
    "stride 32 of swin_tiny_patch4_window7_224; use 64 or 96",
    # masks, targets and losses
    "--mask-ratio 0": "mask ratio 0.0 is not between 0 and 1; use for example 0.6",
    "--mask-ratio 1": "mask ratio 1.0 is not between 0 and 1; use for example 0.6",
    "--mask-ratio 1.2": "mask ratio 1.2 is not between 0 and 1; use for example 0.6",
    "--mask-ratio most": "--mask.ratio 'most' is not a number; see `simmim pretrain --help`",
    "--mask stripes": "mask 'stripes' is not known; choose from random, block, inverse-block, grid, square, uniform, "
    "attention, hard, noise, strips",
    "--target pixel": "target 'pixel' is not known; choose from pixels, normalized, local_normalized, clusters, hog",
    "--loss l3": "loss 'l3' is not known; choose from l1, mse, smooth_l1, cross_entropy",
    "--target clusters": "loss l1 is undefined for target clusters; use cross_entropy",
    "--loss cross_entropy": "loss cross_entropy is undefined for target pixels; use l1 or mse or smooth_l1",
    "--head big": "head 'big' is not known; choose from linear, mlp, transformer",
    # data
    "--data nowhere": "nowhere does not exist; "
    "pass a folder of images or shards, a .zip or .tar, a .txt list of "
    "paths, an .npz, hf:NAME or demo",
    "--data empty": f"folder empty holds no images; files read end in {SUFFIXES}",
    "--data texts": f"folder texts holds no images; files read end in {SUFFIXES}",
    "--data renamed": "none of the first 6 images can be read, such as renamed/0.jpg: not an image in a format that is "
    "read here",
    "--data file": "file is neither a folder, nor an archive, nor a list of image paths, nor an image by its suffix; "
    "pass a folder of images or shards, a .zip or .tar, a .txt list of paths, an .npz, hf:NAME or demo",
    "--data empty.txt": "list empty.txt names no images; write one path a line",
    "--data astray.txt": "none of the first 1 paths in astray.txt is a file, such as nowhere/1.png; write paths "
    "relative to the list's folder",
    "--data bands": "images have 5 channels, not 3: pass --channels 5",
    "--data images/0.png --val-images 0": "batch size 2 is more than the 1 images to train on (0 are kept aside); use "
    "--batch-size 1 or less, or --crop pixels for windows of it",
    "--channels 4": "images have 3 channels, not 4: pass --channels 3",
    "--channels 0": "channels 0 is less than 1; the default is 3",
    "--batch-size 100": "batch size 100 is more than the 4 images to train on (2 are kept aside); use --batch-size 4 "
    "or less",
    "--val-images 100": "val images 100 leaves none of the 6 images to train on; use --val-images 0",
    "--mean 0.5 --std 0.5": "mean has 1 values for 3 channels; give one per channel",
    "--mean 0.5 0.5 0.5": "mean and std belong together; give both or neither",
    "--mean 0.5 0.5 0.5 --std 1 1 0": "std 0.0 is not above 0; give each channel's own, or measure",
    "--mean red": "--mean 'red' is not a number; see `simmim pretrain --help`",
    # the training
    "--batch-size 0": "batch size 0 is less than 1; the default is 64",
    "--accumulate-steps 3": "batch size 2 is not a multiple of accumulate steps 3; use 3",
    "--steps 0": "steps 0 is less than 1; leave it out for the default",
    "--steps 1.5": "--steps '1.5' is not a whole number; see `simmim pretrain --help`",
    "--epochs 0": "epochs 0.0 is not above 0; the default is 100.0",
    "--lr -1": "lr -1.0 is not above 0; leave it out for the default",
    "--lr inf": "lr inf is not finite; leave it out for the default",
    "--lr": "--lr has no value; give one",
    "--warmup-epochs 50": "warm-up of 50 epochs is longer than the run of 0.5; use --warmup-epochs 0.05",
    "--schedule multistep": "schedule multistep needs milestones; give the epochs, such as --milestones 700",
    "--schedule multistep --milestones 5 2": "milestones (5.0, 2.0) are not in ascending order; sort them",
    "--init-from nowhere": "--init-from nowhere is not there; give a run, a checkpoint, timm:NAME or local-dir:PATH",
    "--init-from local-dir:images": "--init-from local-dir:images has no config.json; give a directory that timm or "
    "save_pretrained wrote",
    "--init-from nothing.pth": "--init-from nothing.pth is empty; copy or download it again",
    "--init-from file": "--init-from file is damaged or not a PyTorch checkpoint: unpickling stack underflow",
    "--probe nowhere": "nowhere does not exist; give a folder of classes, loose or in a .zip or .tar, a .csv, an "
    ".npz, hf:NAME or demo",
    "--probe images": "folder images has no class folders; put each class's images in a folder of its name",
    # the machine
    "--device gpu": "--device 'gpu' is not known; choose from auto, cuda, xpu, mps, tpu, cpu",
    "--decode gpu --device cpu": "--decode gpu is for --device cuda, and this is cpu; use --decode cpu",
    "--decode nvjpeg": "--decode 'nvjpeg' is not known; choose from cpu, gpu",
    "--decode gpu --readers processes": "--readers processes is not for --decode gpu; leave one of them out",
    "--decode gpu --no-antialias": "--no-antialias is not for --decode gpu; leave one of them out",
    "--crop pixels --crop-scale 0.5 1": "--crop-scale is not for --crop pixels; leave one of them out",
    "--crop pixels --decode gpu": "--decode gpu is not for --crop pixels; leave one of them out",
    "--crop pixels --no-antialias": "--no-antialias is not for --crop pixels; leave one of them out",
    "--decode gpu --channels 5": "--decode gpu is for JPEGs, which have 1 or 3 channels, not 5; use --decode cpu",
    "--precision int8": "--precision 'int8' is not known; choose from auto, fp32, bf16, fp16",
    "--shard": "--shard spreads a model over processes and there is one; start it with torchrun, or use --no-shard",
    # the run directory
    "--out file": "file exists and is not a run; give a new directory as --out",
    "--out foreign": "foreign exists and is not a run; give a new directory as --out",
    "--out file/run": "file/run cannot be written: Not a directory; give another --out",
    "--out gs://bucket/run": "--out gs://bucket/run is a URL; give a directory: mount the storage first (docs/data.md)",
    "--keep 0": "keep 0 is less than 1; the default is 2",
    "--max-bad-fraction 2": "max bad fraction 2.0 is more than 1; the default is 0.01",
    "--log mlflow": "--log 'mlflow' is not known; choose from wandb, trackio",
    # the command line itself
    "--recipe huge": f"recipe 'huge' is not known; choose from {', '.join(RECIPES)}",
    "--maskratio 0.5": "option --maskratio is not known; did you mean --mask?",
    "--learning-rate 1": "option --learning-rate is not known; see `simmim pretrain --help`",
    "--compile maybe": "argument 'maybe' is not expected; see `simmim pretrain --help`",
    # configuration files
    "--config nowhere.toml": "configuration nowhere.toml cannot be read: No such file or directory; give a TOML file",
    "--config broken.toml": "configuration broken.toml is not TOML: Unclosed array (at end of document); compare it "
    "with a RUN/config.toml",
    "--config images/0.png": "configuration images/0.png is not text; give a TOML file, such as a RUN/config.toml",
    "--config unknown.toml": "unknown.toml: setting 'mask_rato' is not known; did you mean mask?",
    "--config type.toml": "type.toml: batch size 'many' is not a whole number; the default is 64",
    "--config unknown.toml --recipe demo": "--recipe and --config both set the defaults; use one of them",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_of_pretrain_gets_its_line(options, capsys, here):
    assert error_of(tiny(options), capsys) == BAD_OPTIONS[options]
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("--data", "--data is missing; give a folder, a text file of paths, hf:NAME or demo"),
        ("--out", "--out is missing; give a directory to write"),
    ],
)
def test_a_missing_option_gets_its_line(missing, line, capsys):
    assert error_of(tiny(without=missing), capsys) == line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("pretrian", "command 'pretrian' is not known; did you mean pretrain?"),
        ("recipes huge", "recipe 'huge' is not known; see `simmim recipes` for the names"),
        ("doctor --yaml", "option --yaml is not known; see `simmim doctor --help`"),
        ("bench --batch-size 0", "batch size 0 is less than 1; the default is 8"),
        ("bench --seconds 0", "seconds 0.0 is not above 0; the default is 10.0"),
        (
            "bench --data nowhere",
            "nowhere does not exist; pass a folder of images or shards, a .zip or .tar, a .txt list of "
            "paths, an .npz, hf:NAME or demo",
        ),
        ("reconstruct", "RUN is missing; see `simmim reconstruct --help`"),
        ("reconstruct foreign", "no image is given; name files, a folder, a list, hf:NAME or demo after the run"),
        (
            "reconstruct foreign images",
            "foreign is not a run: it has no config.toml; give the --out directory of a training",
        ),
        ("reconstruct foreign images --out picture.jpg", "--out picture.jpg is not a .png file; name one"),
        ("reconstruct foreign images --count 0", "count 0 is less than 1; the default is 8"),
    ],
)
def test_a_bad_command_gets_its_line(argv, line, capsys):
    assert error_of(argv.split(), capsys) == line


def test_a_long_name_is_shortened(capsys):
    line = error_of(tiny(f"--model {'x' * 5000} --model-args"), capsys)
    assert line.startswith(f"model '{'x' * 99}…") and len(line) < 300


def test_a_damaged_configuration_of_a_run_is_told(here, capsys):
    (here / "damaged").mkdir()
    (here / "damaged/config.toml").write_bytes(b"\xff\xfe")
    assert error_of(["reconstruct", "damaged", "images"], capsys).startswith(
        "damaged/config.toml cannot be read as a run's: "
    )


@pytest.fixture(scope="module")
def run(here):
    """A finished pretraining of one step."""
    assert main(tiny("--out finished")) == 0
    return here / "finished"


def test_a_run_with_another_configuration_is_refused_naming_the_fields(run, capsys):
    assert error_of(tiny("--out finished --mask-ratio 0.5 --seed 1"), capsys) == (
        "finished holds a run with another configuration (seed 0 → 1, mask random ratio=0.6 cell=16 → random ratio=0.5 "
        "cell=16); "
        "repeat its command to resume it, give another --out (with --init-from finished to start from its weights), or "
        "start again with --fresh"
    )


def test_weights_of_another_model_are_refused(run, capsys):
    assert error_of(tiny("--init-from finished --model-args depth=1 embed_dim=24 num_heads=1"), capsys) == (
        "--init-from finished does not fit the encoder: cls_token is (1, 1, 12) instead of (1, 1, 24); "
        "use the same --model"
    )


def test_reconstructing_what_is_no_image_is_refused(run, capsys):
    assert error_of(["reconstruct", "finished", "images/1.png", "file"], capsys) == (
        "file cannot be read: not an image in a format that is read here; give other images"
    )


def test_reconstructing_a_missing_image_is_refused(run, capsys):
    assert error_of(["reconstruct", "finished", "images/1.png", "nowhere.png"], capsys) == (
        "nowhere.png does not exist; give image files, or one folder, list, hf:NAME or demo"
    )


def test_reconstructing_with_a_run_that_has_no_checkpoint_is_refused(run, capsys):
    run.with_name("begun").mkdir()
    run.with_name("begun").joinpath("config.toml").write_text((run / "config.toml").read_text())
    assert error_of(["reconstruct", "begun", "images"], capsys) == (
        "begun has no checkpoint yet; wait for its first --save-every-steps"
    )


def test_reconstructing_a_target_that_is_no_picture_is_refused(here, capsys):
    assert main(tiny("--out gradients --target hog")) == 0
    capsys.readouterr()
    assert error_of(["reconstruct", "gradients", "images"], capsys) == (
        "target hog of gradients shows no picture; add --features to draw its features"
    )


def test_too_many_broken_images_fail_the_run(here, capsys):
    shutil.copytree(here / "images", here / "torn")
    for number in range(5):
        (here / f"torn/{number}.png").write_bytes((here / f"images/{number}.png").read_bytes()[:100])
    # One thread, since several may find a broken image each before the first error is seen.
    assert main(tiny("--data torn --out torn_run --val-images 0 --steps 9 --workers 1")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.sub(r"torn/\d", "torn/N", line) == (
        "simmim: 1 of 6 images (16.7%) cannot be read, such as torn/N.png, more than --max-bad-fraction 0.01; "
        "they are listed in torn_run/bad_images.txt"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert error_of(tiny("--device cuda"), capsys) == (
        "device 'cuda' is not here: PyTorch sees no NVIDIA or AMD GPU; use --device cpu, or see `simmim doctor`"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is not None, reason="TorchTPU is installed")
def test_a_tpu_without_its_library_is_refused(capsys):
    assert error_of(tiny("--device tpu"), capsys) == (
        "device 'tpu' needs TorchTPU: pip install 'simmim[tpu]' on a Cloud TPU machine"
    )


@pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is None, reason="TorchTPU is not installed: simmim[tpu]")
@pytest.mark.slow
def test_a_tpu_that_is_not_there_is_refused():
    """In a process of its own: TorchTPU changes torch when it is imported."""
    command = [sys.executable, "-m", "simmim", "pretrain", *tiny("--device tpu")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "simmim: device 'tpu' is not here: TorchTPU sees no TPU; use --device cpu, or see `simmim doctor`"
    )


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(package, capsys):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert error_of(tiny(f"--log {package}"), capsys) == (
        f"log {package!r} needs the package {package}; pip install {package}"
    )
