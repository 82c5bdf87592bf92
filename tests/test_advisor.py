"""Choice, ranking and words, on a step whose work is simple enough for arithmetic by hand."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest

from simmim.advise import rank as advisor
from simmim.advise.rank import advise, compile_for_tpus
from simmim.advise.report import plot, show
from simmim.advise.request import Request
from simmim.cli import main
from simmim.hardware.roofline import StepWork
from simmim.hardware.tpu_compiler import CompilerReport
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.train.storage import save_backbone

MODEL = "vit_tiny_patch16_224"
GIB = 2**30


def step_work(*, gflop=100.0, gib_image=0.05, parameters=100e6, gib_base=0.0) -> StepWork:
    """All arithmetic: `gflop` an image; states and gradients, and activations of `gib_image` an image."""
    states, gradients = 12 * parameters, 4 * parameters
    return StepWork(
        forward_flops=int(gflop * 1e9 / 3),
        parameters=int(parameters),
        trained=int(parameters),
        largest_block=int(parameters / 10),
        update_starts=2,
        flops=np.array([[0.0, 0, 0], [gflop * 1e9, 0, 0]]),
        traffic=np.zeros((2, 3)),
        live=np.array([[states, states + gradients, states + gradients], [gib_image * GIB, 0, 0]]) + gib_base * GIB,
        gradients=np.array([0, gradients, gradients]),
    )


def measure(config) -> StepWork:
    work = step_work()
    if config.checkpoint_activations:
        work = dataclasses.replace(work, flops=work.flops * 4 / 3, live=work.live * [[1.0], [0.2]])
    return work


def request(**settings) -> Request:
    return Request(**({"model": MODEL, "images": 100_000, "epochs": 10} | settings))


def answer(**settings):
    return advise(request(**settings), measure)


def test_the_hours_are_flops_over_what_the_accelerator_reaches():
    option = answer(accelerator=("a100-80gb",), devices=1, cores=100).options[0]
    steps = 100_000 // 512 * 10
    assert option.hours[1] == pytest.approx(steps * 512 * 100e9 / (312e12 * 0.80) / 3600, rel=0.01)


def test_a_step_is_counted_once_and_kept_for_the_next_call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path))
    monkeypatch.setattr("simmim.torch_engine.perf.cost.measure_work", measure)
    told = "counting the operations of a step on cuda in bf16\n"
    asked = request(accelerator=("a100-80gb", "h100-pcie"), devices=1)
    first = advise(asked)
    assert capsys.readouterr().err == told
    assert advise(asked) == first and capsys.readouterr().err == ""
    next(tmp_path.rglob("*.npz")).write_bytes(b"damaged")
    assert advise(asked) == first and capsys.readouterr().err == told
    advise(request(accelerator=("a100-80gb",), devices=1, image_size=128))
    assert capsys.readouterr().err == told


def test_a_step_with_a_teacher_is_counted_each_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path))
    monkeypatch.setattr("simmim.torch_engine.perf.cost.measure_work", measure)
    asked = request(accelerator=("a100-80gb",), devices=1, objective=("teacher",), teacher="timm:resnet18")
    for _ in range(2):
        advise(asked)
        assert "counting" in capsys.readouterr().err


def test_the_cost_is_hours_times_devices_times_price():
    option = answer(accelerator=("a100-80gb",), devices=4).options[0]
    assert option.usd == pytest.approx([hours * 4 * 1.79 for hours in option.hours])


def test_a_price_that_a_user_gives_rules():
    option = answer(accelerator=("a100-80gb",), devices=1, price=("a100-80gb=10",)).options[0]
    assert option.usd[1] == pytest.approx(option.hours[1] * 10)


def test_an_accelerator_that_costs_nothing_comes_first():
    assert answer(price=("rtx-3060=0",)).options[0].accelerator == "rtx-3060"


def test_a_batch_that_is_not_a_power_of_two_is_taken_in_pieces_that_divide_it():
    option = answer(accelerator=("rtx-3060",), devices=1, batch_size=750).options[0]
    assert option.images_at_a_time * option.accumulate_steps == 750
    assert option.accumulate_steps == 5


def test_under_a_deadline_the_cheapest_comes_first():
    advice = answer(deadline=5)
    costs = [option.usd[1] for option in advice.options if option.usd]
    assert costs[0] <= min(costs) * 1.05
    assert all(option.hours[1] <= 5 for option in advice.options)


def test_under_a_budget_the_fastest_comes_first():
    advice = answer(budget=50)
    hours = [option.hours[1] for option in advice.options]
    assert hours == sorted(hours)
    assert all(option.usd[1] <= 50 for option in advice.options)


def test_an_accelerator_without_a_price_is_no_answer_to_a_budget():
    assert "price not known" in answer(budget=50).left_out["rtx-3060"]


def test_an_accelerator_that_simmim_cannot_reach_is_left_out():
    assert answer().left_out["apple-m4-max"] == "simmim has no --device that reaches it"


def test_a_batch_too_large_for_the_memory_is_taken_in_pieces():
    option = answer(accelerator=("rtx-3060",), devices=1, batch_size=512).options[0]
    assert option.images_at_a_time * option.accumulate_steps == 512
    assert option.accumulate_steps > 1
    assert option.memory_gib <= 12 * 0.92


def test_checkpointing_is_chosen_only_where_nothing_else_fits():
    def greedy(config):
        work = step_work(gib_image=20.0)
        if config.checkpoint_activations:
            return dataclasses.replace(work, live=work.live * [[1.0], [0.1]], flops=work.flops * 4 / 3)
        return work

    small, large = (
        advise(request(accelerator=(name,), devices=1), greedy).options[0] for name in ("rtx-3060", "a100-80gb")
    )
    assert small.checkpoint_activations
    assert not large.checkpoint_activations


def test_a_model_too_large_for_one_device_is_sharded():
    def large(config):
        return step_work(parameters=4e9, gib_image=0.01)

    options = advise(request(accelerator=("a100-40gb",)), large).options
    assert options[0].shard
    assert options[0].devices > 1


def test_cards_without_bf16_calculate_in_fp16():
    assert answer(accelerator=("t4",)).options[0].precision == "fp16"


def test_fewer_cores_than_reading_needs_are_the_limit():
    option = answer(accelerator=("a100-80gb",), devices=1, cores=1).options[0]
    assert option.limit == "reading images"
    assert option.images_per_second == pytest.approx(520)


def test_more_devices_exchange_gradients_in_the_time_of_the_backward_pass():
    one, eight = (answer(accelerator=("h100-sxm",), devices=n, batch_size=512).options[0] for n in (1, 8))
    assert one.hours[1] / eight.hours[1] == pytest.approx(8, rel=0.01)


def test_the_exchange_is_waited_for_where_it_is_longer_than_the_backward_pass():
    def heavy(config):
        return step_work(gflop=0.1, parameters=500e6, gib_image=0.001)

    option = advise(request(accelerator=("rtx-4090",), devices=8, batch_size=64, cores=1000), heavy).options[0]
    assert option.limit == "exchange of gradients"


def test_the_command_has_only_options_that_pretrain_has(capsys):
    def large(config):
        return step_work(parameters=3e9, gib_image=0.2 if config.checkpoint_activations else 10.0)

    settings = {"devices": 4, "batch_size": 1024, "channels": 1, "image_size": (96, 160), "model_args": {"depth": 4}}
    option = advise(request(accelerator=("a100-40gb",), head="mlp", **settings), large).options[0]
    words = shlex.split(option.command)
    assert words[:6] == ["torchrun", "--nproc-per-node", "4", "-m", "simmim", "pretrain"]
    used = {word for word in words[6:] if word.startswith("--")}
    assert used >= {"--checkpoint-activations", "--shard", "--accumulate-steps", "--channels", "--head", "--model-args"}
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert used <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_an_objective_is_counted_and_named_in_the_command():
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    asked = {"accelerator": ("rtx-3060",), "devices": 1, "batch_size": 64, "model": "vit_tiny_patch16_224"}
    plain, averaged = (
        advise(request(model_args=small, objective=objective, **asked)).options[0]
        for objective in ((), ("pixels=1", "ema=0.5"))
    )
    assert averaged.hours[1] > 1.2 * plain.hours[1]
    assert "--objective pixels=1 ema=0.5" in averaged.command and "--objective pixels " in plain.command


def test_a_teacher_is_counted_by_the_command_line(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    small = {"depth": 1, "embed_dim": 24, "num_heads": 1}
    save_backbone(teacher, create_backbone("vit_tiny_patch16_224", image_size=(224, 224), model_args=small))
    words = "advise --model vit_tiny_patch16_224 --images 1000 --accelerator rtx-3060 --devices 1 --top 1 --json"
    assert main([*words.split(), "--teacher", str(teacher)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"--teacher {teacher}" in found["options"][0]["command"]


def test_the_command_for_tpus_tells_torchtpu_of_its_processes():
    launch = "env $(python -m torch.tpu.distributed | tr -d '\"') torchrun --nproc-per-node 2 -m simmim pretrain "
    assert answer(accelerator=("tpu-v5e",), devices=2, batch_size=512).options[0].command.startswith(launch)
    assert answer(accelerator=("tpu-v5e",), devices=1, batch_size=512).options[0].command.startswith("simmim pretrain ")


def test_pretrain_understands_the_command_as_far_as_its_data_and_device(tmp_path, capsys):
    option = answer(accelerator=("rtx-3060",), devices=1, batch_size=512, model_args={"depth": 4}).options[0]
    words = shlex.split(option.command.replace("IMAGES", str(tmp_path)).replace("RUN", str(tmp_path / "run")))
    assert main(words[1:]) == 2
    assert re.search(r"holds no images|device 'cuda' is not here", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": ("rtx4090",)}, "accelerator 'rtx4090' is not known; did you mean rtx-4090?"),
        ({"budget": 0.01}, r"budget 0.01 USD is too little: the cheapest way costs about .* USD \(.* h\)"),
        ({"deadline": 0.0001}, r"deadline 0.0001 h cannot be met: the fastest way takes about .* h \(.*\)"),
        ({"accelerator": ("rtx-3060",), "budget": 5.0}, "cannot be judged: no price is known; give --price"),
        ({"accelerator": ("apple-m4-max",)}, "no accelerator is left: apple-m4-max"),
        ({"accelerator": ("t4",), "precision": "bf16"}, "its FLOP/s in bf16 are not known"),
        ({"price": ("rtx-4090",)}, "is not NAME=USD an hour; write rtx-4090=0.5"),
        ({"price": ("rtx-4090=-1",)}, "is not NAME=USD an hour; write rtx-4090=0.5"),
        ({"batch_size": 200_000}, "batch size 200000 is more than 100000 images"),
        ({"devices": 3}, "their number must divide the batch of 512"),
        ({"images": 0}, "images 0"),
    ],
)
def test_an_impossible_wish_gets_one_line_and_the_nearest(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        answer(**settings)
    assert "\n" not in str(error.value)


def test_a_model_that_fits_nowhere_gets_one_line_with_what_it_needs():
    def huge(config):
        return step_work(parameters=1e12)

    with pytest.raises(ValueError, match=r"fits nowhere: it needs \d+ GiB a device on 8 × .*the nearest is a model"):
        advise(request(), huge)


def test_a_measured_machine_is_an_option(tmp_path):
    file = tmp_path / "calibration.json"
    step = {"device": "my CPU", "kind": "cpu", "precision": "fp32", "model": MODEL, "image_size": [224, 224]}
    steps = [step | {"memory_gib": 16, "batch_size": n, "step": {"seconds": n * 0.5}} for n in (4, 8)]
    file.write_text(json.dumps({"steps": steps}))
    option = answer(calibration=str(file), accelerator=("this-machine",), batch_size=64).options[0]
    assert option.title == "my CPU"
    assert option.images_per_second == pytest.approx(2, rel=0.01)
    assert "--device cpu" in option.command


def test_text_names_every_option_and_its_command():
    advice = answer(deadline=24)
    text = show(advice)
    assert all(option.command in text and option.accelerator in text for option in advice.options)


def test_json_can_be_read_back():
    assert json.loads(answer().as_json())["options"][0]["hours"][0] > 0


def test_the_plot_is_a_picture(tmp_path):
    plot(answer(), str(tmp_path / "advice.png"))
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_any_price_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no price of rtx-3060 is known; give --price NAME=USD$"):
        plot(answer(accelerator=("rtx-3060",)), str(tmp_path / "advice.png"))
    assert not list(tmp_path.iterdir())


def test_the_spot_price_is_named_as_cheaper():
    assert any(re.match(r"--spot: about .* USD instead of", hint) for hint in answer(accelerator=("tpu-v5e",)).hints)


def compiler(config, _say) -> CompilerReport:
    """As `tpu_check`: does not fit a v5e."""
    fits = config.topology != "v5e:1x1"
    return CompilerReport(
        engine="torch",
        backend=None,
        model=config.model,
        image_size=config.image_size,
        precision=config.precision,
        topology=config.topology,
        devices=1,
        batch_size=config.batch_size,
        fits=fits,
        available=16 * GIB,
        needed=None if fits else 20 * GIB,
        hbm={"total": 10 * GIB} if fits else {},
        seconds=30.0,
        versions={},
    )


def test_the_compiler_is_shown_the_step_of_each_tpu(monkeypatch):
    monkeypatch.setattr(advisor, "tpu_check", compiler)
    found = compile_for_tpus(answer(accelerator=("tpu-v5e", "tpu-v6e", "tpu-v4", "l4"), price=("tpu-v4=1",)))
    assert set(found.compiled) == {"tpu-v5e", "tpu-v6e"}
    option = next(option for option in found.options if option.accelerator == "tpu-v6e")
    report = found.compiled["tpu-v6e"]
    assert report.topology == "v6e:1x1"
    assert (report.batch_size, report.precision) == (option.images_at_a_time * option.accumulate_steps, "bf16")
    lines = [line.strip() for line in show(found).splitlines()]
    assert "TPU compiler: fits, 10.00 of 16.00 GiB a device" in lines
    assert "TPU compiler: does not fit, 20.00 GiB asked for, 16.00 there on a device" in lines
    assert json.loads(found.as_json())["compiled"]["tpu-v6e"]["hbm"]["total"] == 10 * GIB


def test_the_compiler_is_not_asked_where_no_option_is_a_tpu():
    with pytest.raises(ValueError, match=r"^--tpu-check finds no tpu-v5e or .* among the options; ask for them by"):
        compile_for_tpus(answer(accelerator=("l4",)))


@pytest.mark.slow
def test_advise_reads_what_bench_saved(tmp_path, capsys):
    file = str(tmp_path / "mine.json")
    for model in ("resnet10t", "convnext_atto"):
        words = f"bench --model {model} --image-size 64 --batch-size 2 --seconds 0.05 --device cpu --precision fp32"
        assert main([*words.split(), "--save-calibration", file]) == 0
    capsys.readouterr()
    words = (
        "advise --accelerator this-machine --devices 1 --model resnet10t --image-size 64 --images 100 --batch-size 2"
    )
    assert main([*words.split(), "--calibration", file, "--json"]) == 0
    option = json.loads(capsys.readouterr().out)["options"][0]
    saved = json.loads((tmp_path / "mine.json").read_text())["steps"]
    assert option["title"] == saved[0]["device"]
    assert option["images_per_second"] < 10 * max(step["step"]["images_per_second"] for step in saved)


def test_steps_of_two_machines_do_not_mix(tmp_path):
    from simmim.torch_engine.perf.bench import add_calibration

    file = tmp_path / "mine.json"
    add_calibration(file, {"device": "one"})
    with pytest.raises(ValueError, match=r"is of 'one'; give another file for 'two'"):
        add_calibration(file, {"device": "two"})


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"steps": [{"precision": "fp32"}]}'])
def test_a_calibration_that_cannot_be_read_is_refused(tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read; write one with simmim bench --save-calibration"):
        answer(calibration=str(file))
