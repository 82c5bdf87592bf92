import json
import shlex

import numpy as np
import pytest
from PIL import Image

from simmim import subcommands
from simmim.cli import COMMANDS, main
from simmim.config.cli_errors import one_line
from simmim.config.pretrain_recipes import RECIPES
from simmim.config.pretraining import PretrainConfig
from simmim.errors import TrainingDivergedError


@pytest.fixture
def asked(monkeypatch):
    """The configurations that `simmim pretrain` would run."""
    configs: list[PretrainConfig] = []
    monkeypatch.setattr(subcommands, "_pretrain", lambda config: configs.append(config) or 0)
    return configs


def run(line: str) -> int:
    return main(shlex.split(line))


def test_no_arguments_show_the_commands(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: simmim {command}" in capsys.readouterr().out


def test_the_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Share of cells to hide, between 0 and 1. (default: 0.5)" in text
    assert "(default: None)" not in text


def test_options_reach_the_configuration(asked):
    run("pretrain --data a --out b --image-size 96x160 --mask-ratio 0.5 --steps 7 --no-compile --mean 0.1 0.2 0.3")
    config = asked[0]
    assert (config.data, config.out, config.image_size, config.mask.ratio) == ("a", "b", (96, 160), 0.5)
    assert (config.steps, config.compile, config.mean) == (7, False, (0.1, 0.2, 0.3))


@pytest.mark.parametrize("option", ["compile", "async-save"])
def test_what_is_left_open_is_chosen_by_an_option_without_a_value(asked, option, capsys):
    for words in ("", f"--{option}", f"--no-{option}"):
        run(f"pretrain --data a --out b {words}")
    assert [getattr(config, option.replace("-", "_")) for config in asked] == [None, True, False]
    with pytest.raises(SystemExit):
        main(["finetune", "classify", "--help"])
    assert f"--{option} / --no-{option}" in capsys.readouterr().out


def test_model_arguments_are_read_as_numbers_and_lists(asked):
    run("pretrain --model-args depth=2 embed_dims=[8,16] act_layer=gelu qkv_bias=true")
    assert asked[0].model_args == {"depth": 2, "embed_dims": [8, 16], "act_layer": "gelu", "qkv_bias": True}


def test_a_recipe_gives_the_defaults_that_options_change(asked):
    run("pretrain --recipe demo --out b --lr 1e-3")
    demo = RECIPES["demo"]()
    assert (asked[0].model_args, asked[0].lr) == (demo.model_args, 1e-3)


def test_a_configuration_file_gives_the_defaults_that_options_change(asked, tmp_path):
    (tmp_path / "a.toml").write_text('mask_ratio = 0.5\nout = "old"\nfresh = true\nsteps = 9\n')
    run(f"pretrain --config {tmp_path}/a.toml --lr 1e-3 --steps auto")
    config = asked[0]
    assert (config.mask.ratio, config.lr, config.steps) == (0.5, 1e-3, None)
    assert (config.out, config.fresh) == (None, False)  # whose run it was is no default


def test_a_failed_training_ends_with_one_line_and_code_1(monkeypatch, capsys):
    def diverge(config):
        raise TrainingDivergedError("the loss was not finite")

    monkeypatch.setattr(subcommands, "_pretrain", diverge)
    assert run("pretrain") == 1
    assert capsys.readouterr().err == "simmim: the loss was not finite\n"


def test_memory_that_does_not_suffice_gets_a_remedy(monkeypatch, capsys):
    def fill(config):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(subcommands, "_pretrain", fill)
    assert run("pretrain") == 1
    assert capsys.readouterr().err == (
        "simmim: out of memory: lower --batch-size, split it with --accumulate-steps, or use --checkpoint-activations\n"
    )


def test_an_interruption_ends_with_code_130(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(subcommands, "_pretrain", interrupt)
    assert run("pretrain") == 130
    assert capsys.readouterr().err == "simmim: interrupted\n"


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="--data is missing"):
        run("pretrain --debug")


def test_recipes_are_listed_with_their_first_line(capsys):
    assert run("recipes") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in RECIPES)


def test_a_recipe_is_shown_as_toml(capsys):
    assert run("recipes demo") == 0
    assert 'model = "vit_tiny_patch16_224"' in capsys.readouterr().out


def test_a_box_of_unknown_words_passes_as_one_line():
    box = """
╭─ New error ──────────────────────────────────╮
│ Something is                                 │
│ new.                                         │
│ ──────────────────────────────────────────── │
│ For full helptext, run simmim pretrain --help │
╰──────────────────────────────────────────────╯
"""
    assert one_line(box.strip()) == "Something is new."


@pytest.mark.parametrize("terminal", [True, False])
def test_a_whole_run_reports_and_is_reconstructed(terminal, tmp_path, monkeypatch, capsys):
    """From images to a picture, by the command line alone, with a bar on a terminal and without."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    options = "--image-size 32 --mask-cell 16 --model-args depth=1 embed_dim=12 num_heads=1 --log-every-steps 1"
    options += " --objective pixels"
    command = f"pretrain --model vit_tiny_patch16_224 --data {tmp_path}/images --out {tmp_path}/run {options}"
    assert run(f"{command} --batch-size 4 --val-images 2 --steps 3 --device cpu") == 0
    shown = capsys.readouterr().err
    assert "images     " in shown
    assert f"done: 3 steps\nthe encoder is {tmp_path}/run/encoder" in shown
    assert ("━" in shown) == terminal
    assert ("\nstep 2/3  epoch 1.00  loss " in shown) != terminal
    assert run(f"reconstruct {tmp_path}/run {tmp_path}/images --count 3 --out {tmp_path}/picture.png") == 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (3 * 128 + 2 * 4, 16 + 3 * 128 + 2 * 4)


def test_its_configuration_repeats_a_run(tmp_path):
    """Also what was found in the images (colours), and a value that is off (clipping)."""
    model = "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=12 num_heads=1 --image-size 32 --mask-cell 16"
    task = "--target clusters --loss cross_entropy --clusters 4 --clip-grad none --batch-size 4 --steps 2"
    assert run(f"pretrain --data demo --out {tmp_path}/a {model} {task} --device cpu --precision fp32") == 0
    assert run(f"pretrain --config {tmp_path}/a/config.toml --out {tmp_path}/b") == 0
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "ab"
    )
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert [row["grad_norm"] for row in first] == [row["grad_norm"] for row in second]


def test_doctor_prints_one_json_object(capsys):
    assert run("doctor --json") == 0
    assert json.loads(capsys.readouterr().out)["training on cpu"].startswith("works")
