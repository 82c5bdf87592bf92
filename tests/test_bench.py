import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.data.sources import open_source
from simmim.torch_engine.perf.bench import BenchConfig, describe, plan_of
from simmim.torch_engine.perf.cost import count_flops

TINY = "bench --model resnet10t --image-size 64 --batch-size 2 --seconds 0.05 --device cpu --json"


@dataclass(frozen=True)
class Printed:
    out: str
    err: str
    trace: Path

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What `simmim bench --json --profile` prints and writes, for a very small model."""
    trace = tmp_path_factory.mktemp("bench") / "trace.json"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*TINY.split(), "--profile", str(trace)]) == 0
    return Printed(out.getvalue(), err.getvalue(), trace)


def flops(model: str, size: int, **settings) -> int:
    config = PretrainConfig(
        model=model, image_size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3, plain_step=True, **settings
    )
    return count_flops(config)


def test_bench_prints_one_json_object_with_the_agreed_names(printed):
    figures = printed.figures
    assert figures["step"].keys() >= {"images_per_second", "flops_per_image", "mfu"}
    assert figures["step"]["images_per_second"] > 0
    assert figures["input"]["images_per_second"] > 0


def test_the_share_of_the_peak_is_not_known_for_a_cpu(printed):
    assert printed.figures["step"]["mfu"] is None


def test_training_end_to_end_is_compared_with_the_slower_of_step_and_input(printed):
    step, source, whole = (printed.figures[name] for name in ("step", "input", "end_to_end"))
    slower = min(step["images_per_second"], source["images_per_second"])
    assert whole["steps"] >= 3
    assert whole["share_of_slower"] == pytest.approx(whole["images_per_second"] / slower)


def test_the_memory_of_a_process_on_the_cpu_holds_at_least_its_weights_and_averages(printed):
    step = printed.figures["step"]
    assert 12 * step["parameters"] < step["memory_bytes"] < 2**36


def test_a_profile_is_a_trace_that_browsers_read_and_names_the_costliest_operators(printed):
    events = {event.get("name") for event in json.loads(printed.trace.read_text())["traceEvents"]}
    operators = printed.figures["profile"]["operators"]
    assert len(operators) == 10
    assert {row["name"] for row in operators} <= events
    assert [row["share"] for row in operators] == sorted((row["share"] for row in operators), reverse=True)
    assert "next batch" in events


def test_what_is_being_measured_is_said_meanwhile(printed):
    assert "measuring input" in printed.err


def test_a_person_is_told_each_figure_the_limit_and_what_to_try(printed):
    figures = printed.figures
    starts = [line.split(maxsplit=1)[0] for line in describe(figures).splitlines()]
    assert [word for word in starts if word.isalpha()] == [
        "machine", "step", "kernels", "memory", "input", "both", "limit", "try", "profile",
    ]  # fmt: skip
    assert f"try      {figures['limit']['suggestion']}" in describe(figures).splitlines()


def test_a_person_is_told_which_objective_was_measured(printed):
    figures = printed.figures | {"objective": ["pixels", "ema"]}
    assert "objective pixels + ema:" in next(line for line in describe(figures).splitlines() if line.startswith("step"))


def test_fewer_images_than_a_batch_has_are_read_again(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    config = BenchConfig(model="resnet10t", image_size=(64, 64), batch_size=8)
    assert plan_of(config, open_source(str(tmp_path)), "cpu").steps_per_epoch == 1


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    file = tmp_path / "none" / "trace.json"
    assert main(["bench", "--profile", str(file)]) == 2
    expected = f"simmim: {file} cannot be written: its folder is not there; make it, or give another file\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("model", "size", "forward"),
    [  # GFLOP of a forward pass, multiply and add apart, head included (issue 7's hand counts)
        ("vit_base_patch16_224", 224, 35.4),
        pytest.param("vit_large_patch16_224", 224, 123.4, marks=pytest.mark.slow),
        ("resnet50", 224, 8.8),
    ],
)
def test_flops_of_a_step_are_three_forward_passes(model, size, forward):
    """A backward pass costs two, but for the first layer, whose input needs no gradient."""
    assert flops(model, size) == pytest.approx(3 * forward * 1e9, rel=0.025)


def test_attention_is_counted():
    """4 N² D for a block and image: two products of N × N × D, multiply and add apart; three times with backward."""
    tokens, width = 17, timm.create_model("vit_tiny_patch16_224").num_features
    blocks = [flops("vit_tiny_patch16_224", 64, model_args={"depth": depth}) for depth in (1, 2)]
    linear = 2 * tokens * width * 12 * width  # queries, keys, values; projection; two layers of four times the width
    assert blocks[1] - blocks[0] == 3 * (linear + 4 * tokens**2 * width)
