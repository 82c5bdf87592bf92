import contextlib
import io
import json

import pytest
import timm

from simmim.cli import main
from simmim.config import PretrainConfig
from simmim.torch_engine.bench import count_flops, describe


@pytest.fixture(scope="module")
def printed():
    """What `simmim bench --json` prints, for a very small model."""
    command = "bench --model resnet10t --image-size 64 --batch-size 2 --seconds 0.05 --device cpu --json"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(command.split()) == 0
    return output.getvalue()


def flops(model: str, size: int, **settings) -> int:
    config = PretrainConfig(
        model=model, image_size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3, plain_step=True, **settings
    )
    return count_flops(config)


def test_bench_prints_one_json_object_with_the_agreed_names(printed):
    figures = json.loads(printed)
    assert figures["step"].keys() >= {"images_per_second", "flops_per_image", "mfu"}
    assert figures["step"]["images_per_second"] > 0
    assert figures["input"]["images_per_second"] > 0


def test_the_share_of_the_peak_is_not_known_for_a_cpu(printed):
    assert json.loads(printed)["step"]["mfu"] is None


def test_a_person_is_told_which_of_step_and_input_limits_the_run(printed):
    figures = json.loads(printed)
    figures["step"]["images_per_second"], figures["input"]["images_per_second"] = 9.0, 10.0
    assert describe(figures).splitlines()[-1] == "limit    the step"
    figures["input"]["images_per_second"] = 8.0
    assert describe(figures).splitlines()[-1] == "limit    the input"


@pytest.mark.parametrize(
    ("model", "size", "forward"),
    [  # GFLOP of a forward pass, multiply and add apart, head included (issue 7's hand counts)
        ("vit_base_patch16_224", 224, 35.4),
        ("vit_large_patch16_224", 224, 123.4),
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
