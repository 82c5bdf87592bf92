"""`simmim tpu-check` but for the compiler itself (tests/torch_engine/test_lower.py)."""

import dataclasses
import json

import pytest

from simmim.commands import tpu_check
from simmim.commands.tpu_check import TpuCheckConfig, check_machine, complete, describe, largest
from simmim.hardware.tpu_compiler import CompilerReport, _program, sizes
from simmim.method.losses import CrossEntropyLoss
from simmim.method.targets import ClusterTarget

GIB = 2**30


def report(batch: int = 128, *, fits: bool = True) -> CompilerReport:
    hbm = {"arguments": GIB, "outputs": GIB, "aliased": GIB, "temporaries": 8 * GIB, "code": 0, "total": 9 * GIB}
    return CompilerReport(
        engine="torch",
        backend=None,
        model="vit_base_patch16_224",
        image_size=(224, 224),
        precision="bf16",
        topology="v5e:2x4",
        devices=8,
        batch_size=8 * batch,
        notes=("what is left out",),
        fits=fits,
        available=16 * GIB,
        needed=None if fits else 20 * GIB,
        hbm=hbm if fits else {},
        flops=12e12 if fits else None,
        kernels=36,
        collectives={"all-reduce": 4, "all-gather": 0},
        seconds=28.4,
        versions={"libtpu": "0.0.52"},
    )


@pytest.mark.parametrize("limit", [8, 9, 100, 128, 300, 352, 1000])
@pytest.mark.parametrize("start", [1, 30, 64, 2048])
def test_the_largest_batch_is_found_to_an_eighth(limit: int, start: int) -> None:
    tried = []

    def compile(batch: int) -> CompilerReport:
        tried.append(batch)
        return report(batch, fits=batch <= limit)

    found = largest(compile, compile(start), unit=8)
    assert found.fits
    assert found.too_large is not None
    assert found.batch_a_device <= limit < found.too_large
    assert found.too_large - found.batch_a_device <= max(8, found.batch_a_device / 8)
    assert len(tried) == len(set(tried)) <= 14


def test_where_not_even_the_smallest_batch_fits_the_report_says_so() -> None:
    found = largest(lambda batch: report(batch, fits=False), report(64, fits=False), unit=8)
    assert (found.fits, found.batch_a_device) == (False, 8)


@pytest.mark.parametrize(
    "message",
    [
        "Used 20.83G of 15.75G hbm. Exceeded hbm capacity by 5.08G.",
        "the total memory required for HLO temporaries (20.83G) exceeds available HBM (15.75G). HLO module: m.",
    ],
)
def test_what_a_step_needs_is_read_from_the_compilers_words(message: str) -> None:
    assert sizes(message)[:2] == [round(20.83 * GIB), round(15.75 * GIB)]


def test_a_report_is_text_with_every_kind_of_memory_and_says_that_nothing_ran() -> None:
    assert describe(dataclasses.replace(report(), too_large=144)).splitlines() == [
        "step         vit_base_patch16_224 at 224x224, bf16, torch",
        "TPU          v5e:2x4: 8 devices, 128 of 1024 images on each",
        "HBM          fits, 9.00 of 16.00 GiB a device",
        "             arguments 1.00, outputs 1.00, aliased 1.00, temporaries 8.00, code 0.00",
        "FLOP         12 T a device, 96 T in all; 36 calls of kernels are not counted",
        "collectives  4 all-reduce",
        "largest      128 images per device; 144 do not fit",
        "not in it    what is left out",
        "compiled     in 28 s by libtpu 0.0.52",
        "These are the TPU compiler's estimates. Nothing ran on a TPU, and no speed was measured.",
    ]


def test_a_step_that_does_not_fit_is_described_by_what_it_needs() -> None:
    lines = describe(report(512, fits=False)).splitlines()
    assert "HBM          does not fit, 20.00 GiB asked for, 16.00 there on a device" in lines
    assert not any(line.startswith("FLOP") for line in lines)


def test_a_program_that_cannot_be_read_leaves_its_collectives_unknown() -> None:
    errors = pytest.importorskip("jax.errors")

    class Program:
        def hlo_modules(self) -> None:
            raise errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    assert _program(Program()) is None
    lines = describe(dataclasses.replace(report(), kernels=None, collectives=None)).splitlines()
    assert "collectives  not known, and no kernels: jaxlib cannot read the compiled program" in lines


def test_json_has_what_follows_from_the_rest() -> None:
    found = json.loads(report().as_json())
    assert (found["batch_a_device"], found["flops_a_step"], found["hbm"]["total"]) == (128, 96e12, 9 * GIB)


def test_a_check_needs_neither_images_nor_a_place() -> None:
    config = complete(TpuCheckConfig(target=ClusterTarget(), loss=CrossEntropyLoss(), channels=2))
    assert (config.precision, config.mean) == ("bf16", (0.5, 0.5))
    assert isinstance(config.target, ClusterTarget)
    assert config.target.centres == ((0.5, 0.5),) * 128


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_check.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(tpu_check.platform, "machine", lambda: "arm64")
    with pytest.raises(
        ValueError, match=r"does not work on Darwin arm64: libtpu is for Linux x86_64; use such a machine"
    ):
        check_machine(TpuCheckConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"needs torch_tpu, libtpu, jax; pip install 'simmim\[tpu\]'"),
        ({"engine": "keras"}, r"needs keras, jax, libtpu; pip install 'simmim\[keras,tpu\]'"),
        ({"engine": "keras", "backend": "tensorflow"}, r"needs keras, tensorflow, jax, libtpu; pip install"),
    ],
)
def test_missing_packages_are_named(settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_check.platform, "system", lambda: "Linux")
    monkeypatch.setattr(tpu_check.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(tpu_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=words):
        check_machine(TpuCheckConfig(**settings))  # type: ignore[arg-type]


def test_a_trainings_own_command_line_gives_the_report_of_its_step_alone():
    training = TpuCheckConfig(
        data="images", out="run", epochs=3.0, lr=1.0, schedule="multistep", milestones=(2.0,), seed=5, device="cuda",
        compile=True, mean=(0.1,) * 3, std=(0.2,) * 3, val_images=0, probe="demo", fresh=True, log=("wandb",),
    )  # fmt: skip
    assert complete(training) == complete(TpuCheckConfig())
