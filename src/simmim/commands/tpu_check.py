"""`simmim tpu-check`: the user's own training step, compiled by the TPU compiler where there is no TPU.

Whether it fits, HBM by kind, FLOPs, collectives, and the largest batch that fits. Each compile is a process of its own:
libtpu reads its environment as it loads, and TorchTPU changes PyTorch for good.
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import parse_toml, to_toml
from simmim.config.validation import from_settings, validated
from simmim.errors import UserError
from simmim.hardware.tpu_compiler import ENVIRONMENT, CompilerReport
from simmim.method.targets import ClusterTarget, Target

# What a compile needs, by engine and backend, and the extra that installs it.
_NEEDED = {
    "torch": (("torch_tpu", "libtpu", "jax"), "tpu"),
    "jax": (("keras", "jax", "libtpu"), "keras,tpu"),
    "tensorflow": (("keras", "tensorflow", "jax", "libtpu"), "keras,tpu"),
}
_UNIT = 8  # images; TPUs lay out numbers in eights
_CHILD = "from simmim.commands.tpu_check import _compile_here; _compile_here()"


@dataclass(frozen=True, kw_only=True)
class TpuCheckConfig(PretrainConfig):
    """A pretraining whose step is compiled: every option of `simmim pretrain`, and these.

    A training's own command line or `RUN/config.toml` can be checked as it is. Options that do not change the step
    (`unlisted`) are accepted and ignored.
    """

    command: ClassVar[str] = "tpu-check"
    unlisted: ClassVar[frozenset[str]] = frozenset({
        "data", "out", "mean", "std", "max_bad_fraction", "workers", "epochs", "steps", "lr", "warmup_lr", "min_lr",
        "warmup_epochs", "schedule", "milestones", "seed", "device", "compile", "save_every_steps", "keep", "fresh",
        "log_every_steps", "log", "decode", "readers", "antialias", "init_from", "val_images", "picture_every_steps",
        "probe", "probe_every_epochs", "crop", "crop_scale", "crop_ratio", "kernels", "gpu", "accept_changed_data",
    })  # fmt: skip

    topology: str = "v5e:1x1"
    """The TPU: generation and shape, such as v5e:1x1, v5e:2x4, v6e:2x4, v4:2x2x1, v5p:2x2x1 or tpu7x:2x2x1."""
    search: bool = False
    """Find the largest batch a device that fits, from --batch-size on: a handful of compiles."""
    json: bool = False
    """Print JSON only."""


def tpu_check(config: TpuCheckConfig, say: Callable[[str], None] = lambda line: None) -> CompilerReport:
    """Compile the step for a TPU and report; with `search`, find the largest that fits. `say` gets lines of progress.

    A step that does not fit is a report. Raises `UserError` if the step cannot be compiled.
    """
    config = complete(config)
    check_machine(config)
    say(f"compiling {config.model} for {config.topology}: about a minute{' for each batch' * config.search}")
    report = _compile(config)
    if not config.search:
        return report
    devices = report.devices

    def compile(batch: int) -> CompilerReport:
        found = _compile(dataclasses.replace(config, batch_size=batch * devices))
        say(f"{batch} images per device: {memory_line(found)}")
        return found

    say(f"{report.batch_a_device} images per device: {memory_line(report)}")
    return largest(compile, report, unit=math.lcm(_UNIT, config.pieces))


def largest(compile: Callable[[int], CompilerReport], report: CompilerReport, *, unit: int) -> CompilerReport:
    """Find the report of the largest batch a device that fits, to an eighth or `unit`, from a first report on.

    Its `too_large` is the smallest batch found not to fit. If nothing fits, the last report is returned.
    """
    fits: CompilerReport | None = None
    too_large: CompilerReport | None = None
    while True:
        if report.fits:
            fits = report
        else:
            too_large = report
        low = fits.batch_a_device if fits else 0
        high = too_large.batch_a_device if too_large else 0
        if high and not low and high <= unit:
            return report
        if fits and high and high - low <= max(unit, low // 8):
            return dataclasses.replace(fits, too_large=high)
        batch = (low + high) // 2 if high else low * 2
        report = compile(max(batch // unit, 1) * unit)


def complete(config: TpuCheckConfig) -> TpuCheckConfig:
    """Check a configuration, and fill in the values that a training takes from its images or its machine.

    Fields in `unlisted` get their defaults, so that they cannot change the report.
    """
    ignored = {field.name: field.default for field in dataclasses.fields(config) if field.name in config.unlisted}
    config = validated(dataclasses.replace(config, **ignored | {"data": "none", "out": "none"}))
    colour = (0.5,) * config.channels
    target: Target = config.target
    if isinstance(target, ClusterTarget):
        target = dataclasses.replace(target, centres=(colour,) * target.clusters)
    return dataclasses.replace(
        config,
        mean=colour,
        std=colour,
        precision="bf16" if config.precision == "auto" else config.precision,
        target=target,
    )


def check_machine(config: PretrainConfig) -> None:
    """Raise `UserError` if this machine cannot compile for a TPU."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        raise UserError(
            f"compiling for a TPU does not work on {machine}: libtpu is for Linux x86_64; use such a machine"
        )
    packages, extra = _NEEDED["torch" if config.engine == "torch" else config.backend or "jax"]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"compiling for a TPU needs {', '.join(missing)}; pip install 'simmim[{extra}]'")


def _compile(config: TpuCheckConfig) -> CompilerReport:
    done = _run(_CHILD, to_toml(config))
    lines = done.stdout.splitlines()
    if not lines:
        raise RuntimeError(f"the compiler's process ended with code {done.returncode}:\n{done.stderr}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise UserError(answer["error"])
    return from_settings(CompilerReport, answer)


def _compile_here() -> None:
    """Run in the new process: read a configuration as TOML, write a report or an error as JSON."""
    config = parse_toml(sys.stdin.read(), TpuCheckConfig)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        if config.engine == "keras":
            from simmim.keras_engine import compile_step
        else:
            from simmim.torch_engine.tpu.lower import compile_step
        answer = dataclasses.asdict(compile_step(config, config.topology))
    except UserError as error:
        answer = {"error": str(error)}
    os.write(answers, json.dumps(answer).encode())
    os._exit(0)  # TorchTPU may abort as the interpreter ends


def describe(report: CompilerReport) -> str:
    """Format a report for a person."""
    height, width = report.image_size
    engine = f"{report.engine} on {report.backend}" if report.backend else report.engine
    lines = [
        f"step         {report.model} at {height}x{width}, {report.precision}, {engine}",
        f"TPU          {report.topology}: {report.devices} device{'s' * (report.devices > 1)}, "
        f"{report.batch_a_device} of {report.batch_size} images on each",
        f"HBM          {memory_line(report)}",
    ]
    if report.fits:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in report.hbm.items() if name != "total")
        lines += [
            f"             {parts}",
            f"FLOP         {_tera(report.flops)} T a device, {_tera(report.flops_a_step)} T in all"
            + (f"; {report.kernels} calls of kernels are not counted" if report.kernels else ""),
        ]
        if report.collectives is None:
            lines.append("collectives  not known, and no kernels: jaxlib cannot read the compiled program")
        else:
            exchanged = ", ".join(f"{count} {name}" for name, count in report.collectives.items() if count)
            lines.append(f"collectives  {exchanged or 'none'}")
    if report.too_large:
        lines.append(f"largest      {report.batch_a_device} images per device; {report.too_large} do not fit")
    lines += [f"not in it    {note}" for note in report.notes]
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    lines.append(f"compiled     in {report.seconds:.0f} s by {versions}")
    lines.append("These are the TPU compiler's estimates. Nothing ran on a TPU, and no speed was measured.")
    return "\n".join(lines)


def memory_line(report: CompilerReport) -> str:
    """Say in words whether the step fits a device's memory."""
    if report.fits:
        return f"fits, {_gib(report.hbm['total'])} of {_gib(report.available)} GiB a device"
    return f"does not fit, {_gib(report.needed)} GiB asked for, {_gib(report.available)} there on a device"


def try_compiler() -> str:
    """Try to compile a few operations for a v5e; say in words whether this machine can."""
    script = "from simmim.hardware.tpu_compiler import available_hbm; print(available_hbm('v5e:1x1'))"
    try:
        check_machine(PretrainConfig())
    except UserError as error:
        return f"no: {error}"
    done = _run(script)
    if done.returncode:
        return f"no: {(done.stderr.splitlines() or ['it ended without a word'])[-1]}"
    return f"yes, also without a TPU (a v5e has {_gib(int(done.stdout.splitlines()[-1]))} GiB to use)"


def _run(script: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a script in a new process, since libtpu reads its environment as it loads."""
    command, environment = [sys.executable, "-c", script], os.environ | ENVIRONMENT
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f}"


def _tera(number: float | None) -> str:
    return "?" if number is None else f"{number / 1e12:.3g}"
