"""The commands: argv → configuration → one call. No logic.

To add a command, add a function with a docstring to `COMMANDS`.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from simmim.arguments import parse_checked, parse_with_defaults, parse_with_json
from simmim.config.cli_errors import parse
from simmim.errors import UserError
from simmim.output import show

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig


def pretrain(argv: list[str]) -> int:
    """Pretrain a backbone on unlabelled images, or resume a run"""
    from simmim.config.pretrain_recipes import find_recipe, first_config
    from simmim.config.pretraining import PretrainConfig

    return _pretrain(parse_with_defaults(PretrainConfig, _about("pretrain"), argv, find_recipe, first_config))


def _pretrain(config: "PretrainConfig") -> int:
    from simmim.config.validation import validated
    from simmim.data.labelled.classes import CLASSES
    from simmim.data.sources import check_there
    from simmim.training.origins import check_start

    config = validated(config)  # before PyTorch is loaded, which takes seconds
    assert config.data is not None
    check_there(config.data)
    if config.probe:
        check_there(config.probe, CLASSES)
    check_start(config)
    from simmim.engines import pretrain

    _, outcome = pretrain(config)
    return outcome.exit_code


def reconstruct(argv: list[str]) -> int:
    """Draw original, masked and reconstructed images or sounds side by side, or features as colours"""
    from tyro.conf import Positional, arg

    from simmim.commands.reconstruct import reconstruct

    @dataclass(frozen=True, kw_only=True)
    class Command:
        run: Positional[Annotated[str, arg(metavar="RUN")]]
        """Run directory of a pretraining."""
        images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE...")]]
        """Image or sound files, or any value of --data, from which the seed draws some."""
        out: str = "reconstruction.png"
        """Image file to write."""
        count: int = 8
        """Maximum number of images."""
        seed: int = 0
        """Seed for masks and for drawing images."""
        features: bool = False
        """Draw features as colours (three principal axes) instead; for a run of any objective."""
        wav: bool = False
        """Of sounds, also write what can be heard of original, masked and reconstruction (Griffin-Lim)."""

    command = parse(Command, "reconstruct", _about("reconstruct"), argv)
    picture = reconstruct(**vars(command))
    show([picture, *([f"{picture.with_suffix('')}-*.wav"] if command.wav else [])])
    return 0


def probe(argv: list[str]) -> int:
    """Evaluate frozen features on labelled images"""
    from simmim.config.commands import ProbeConfig

    config, as_json = parse_with_json(ProbeConfig, "probe", _about("probe"), argv)

    from simmim.data.labelled.classes import CLASSES
    from simmim.data.sources import check_there
    from simmim.training.origins import check_encoder

    check_encoder(config.run)
    check_there(config.data, CLASSES)

    from simmim.torch_engine.tasks.probe import describe, probe

    found = probe(config)
    print(json.dumps(found, indent=1) if as_json else describe(found))
    return 0


def finetune(argv: list[str]) -> int:
    """Fine-tune a pretrained encoder on labelled images: simmim finetune TASK"""
    from simmim.config.finetune_recipes import find_finetune_recipe
    from simmim.config.tasks import OWN_TASKS, TASK_CONFIGS, find_task

    if argv[:1] in (["-h"], ["--help"]):
        tasks = "\n".join(f"  {name:10}{kind.__doc__}" for name, kind in TASK_CONFIGS.items())
        print(f"usage: simmim finetune TASK [OPTIONS]\n\n{finetune.__doc__}\n\n{tasks}")
        print("\n`simmim finetune TASK --help` shows a task's options and their defaults.")
        raise SystemExit(0)
    kind = find_task(*argv[:1])
    config = parse_with_defaults(kind, _about("finetune"), argv[1:], lambda name: find_finetune_recipe(name, kind))

    from simmim.config.validation import validated
    from simmim.data.sources import check_there, refuse_archive
    from simmim.training.origins import check_start

    config = validated(config)
    if config.task in OWN_TASKS:
        assert config.data is not None
        check_there(config.data, f"give {config.data_forms}")
        if config.task != "classify":
            refuse_archive(config.data)
    check_start(config)
    from simmim.engines import finetune as run

    _, outcome = run(config)
    return outcome.exit_code


def baseline(argv: list[str]) -> int:
    """Train a fine-tuned model from random weights too: does pretraining help?"""
    from simmim.config.commands import BaselineConfig

    config = parse_checked(BaselineConfig, "baseline", _about("baseline"), argv)

    from simmim.commands.baseline import train_baselines

    lines, code = train_baselines(config)
    show(lines)
    return code


def resume(argv: list[str]) -> int:
    """Go on with an interrupted run, or extend one by --steps or --epochs: simmim resume RUN"""
    if not argv or argv[0].startswith("-"):
        print(f"usage: simmim resume RUN [--steps N | --epochs N] [OPTIONS]\n\n{resume.__doc__}\n")
        print("OPTIONS are those of the command that began the run; all others are as it had them.")
        raise SystemExit(0 if argv[:1] in (["-h"], ["--help"]) else 2)
    from simmim.training.run_directory import Run, find_task_of

    run, options = Run(Path(argv[0])), argv[1:]
    if not run.config.is_file():
        raise UserError(f"{run.path} is not a run: it has no config.toml; give the --out directory of a training")
    given = [*options]
    if any(word.split("=")[0] in ("--steps", "--epochs") for word in options):
        given.append("--extend")
    command = ["--config", str(run.config), "--out", str(run.path), *given]
    task = find_task_of(run.path)
    return finetune([task, *command]) if task else pretrain(command)


def report(argv: list[str]) -> int:
    """Write what a run did and what it is worth as one HTML page; several runs side by side"""
    from simmim.report.page import ReportConfig, report

    show([report(parse(ReportConfig, "report", _about("report"), argv))])
    return 0


def predict(argv: list[str]) -> int:
    """Predict labels, masks or boxes of new images with a fine-tuned model"""
    from simmim.config.commands import PredictConfig

    config, as_json = parse_with_json(PredictConfig, "predict", _about("predict"), argv)

    from simmim.data.sources import check_files
    from simmim.training.run_directory import find_model

    find_model(Path(config.run))
    check_files(config.images)

    from simmim.torch_engine.tasks.predict import describe, predict

    found = predict(config)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(describe(found, config.out))
    return 0


def embed(argv: list[str]) -> int:
    """Write an encoder's features of images to a .parquet, .npz or .csv file"""
    from simmim.config.commands import EmbedConfig

    config = parse_checked(EmbedConfig, "embed", _about("embed"), argv)
    if config.out is None:
        raise UserError("--out is missing; give a .parquet, .npz or .csv file")

    from simmim.data.sources import check_there
    from simmim.training.origins import check_encoder

    check_encoder(config.run)
    check_there(config.data)

    from simmim.torch_engine.tasks.embed import embed_to_file

    show(embed_to_file(config))
    return 0


def search(argv: list[str]) -> int:
    """Find images that are like others, or likely copies of one another"""
    from simmim.commands.search import SearchConfig, describe, search

    config, as_json = parse_with_json(SearchConfig, "search", _about("search"), argv)
    found = search(config)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(describe(found))
    return 0


def pack(argv: list[str]) -> int:
    """Convert images to shards that load faster"""
    from simmim.commands.pack import PackConfig, pack

    show(pack(parse(PackConfig, "pack", _about("pack"), argv)))
    return 0


def paste(argv: list[str]) -> int:
    """Paste pieces of unlabelled images on one another: boxes and masks to pretrain a detector on"""
    from simmim.config.commands import PasteConfig

    config = parse_checked(PasteConfig, "paste", _about("paste"), argv)

    from simmim.data.sources import check_there
    from simmim.training.origins import check_encoder

    check_there(config.images)
    check_encoder(config.run, "--from", scratch=False)

    from simmim.commands.paste import paste

    show(paste(config))
    return 0


def advise(argv: list[str]) -> int:
    """Estimate accelerators, time, cost and memory of a training"""
    from simmim.advise.launch import Launcher, launch_file
    from simmim.advise.rank import advise, compile_for_tpus
    from simmim.advise.report import plot, show
    from simmim.advise.request import Request
    from simmim.config.field_types import Word

    @dataclass(frozen=True, kw_only=True)
    class Command(Request):
        json: bool = False
        """Print JSON only."""
        plot: Word = None
        """PNG file for a plot of time against cost."""
        tpu_check: bool = False
        """Compile the step for each TPU option, as simmim tpu-check does (a minute each)."""
        launch: Launcher = "none"
        """Print a file that starts the first option, and starts it again, in place of the table."""

    command = parse(Command, "advise", _about("advise"), argv)
    if command.json and command.launch != "none":
        raise UserError(f"--json prints one object, and --launch {command.launch} a file; use one of them")
    advice = advise(Request(**{field.name: getattr(command, field.name) for field in dataclasses.fields(Request)}))
    if command.tpu_check:
        advice = compile_for_tpus(advice, lambda line: print(line, file=sys.stderr))
    if command.launch != "none":
        print(launch_file(advice.options[0], command.launch), end="")
    else:
        print(advice.as_json() if command.json else show(advice))
    if command.plot:
        plot(advice, command.plot)
    return 0


def tpu_check(argv: list[str]) -> int:
    """Compile the training step for a TPU without having one: memory, FLOPs, largest batch"""
    from simmim.commands.tpu_check import TpuCheckConfig, describe, tpu_check
    from simmim.config.pretrain_recipes import find_recipe

    def find(name: str) -> TpuCheckConfig:
        return TpuCheckConfig(**vars(find_recipe(name)))

    config = parse_with_defaults(TpuCheckConfig, _about("tpu-check"), argv, find)
    report = tpu_check(config, lambda line: print(line, file=sys.stderr))
    print(report.as_json() if config.json else describe(report))
    return 0


def bench(argv: list[str]) -> int:
    """Measure step and input speed on this machine, and its share of peak FLOPS"""
    from simmim.config.commands import BenchConfig

    @dataclass(frozen=True, kw_only=True)
    class Command(BenchConfig):
        json: bool = False
        """Print JSON only."""

    command = parse_checked(Command, "bench", _about("bench"), argv)

    from simmim.data.sources import check_there

    check_there(command.data)

    from simmim.torch_engine.perf.bench import bench, describe

    figures = bench(command)
    print(json.dumps(figures, indent=1) if command.json else describe(figures))
    return 0


def runs(argv: list[str]) -> int:
    """List the runs below a directory: progress, figures, and how to resume them"""
    from tyro.conf import Positional, arg

    from simmim.commands.runs import describe, find_runs

    @dataclass(frozen=True, kw_only=True)
    class Command:
        directory: Positional[Annotated[str, arg(metavar="DIR")]] = "runs"
        """Directory to look in, at any depth."""
        json: bool = False
        """Print JSON only."""

    command = parse(Command, "runs", _about("runs"), argv)
    found = find_runs(command.directory)
    if command.json:
        print(json.dumps({"runs": found}, indent=1))
    else:
        show(describe(found))
    return 0


def doctor(argv: list[str]) -> int:
    """Check this machine: what works, what is missing, and what would endanger a run"""
    from tyro.conf import Positional, arg

    from simmim.commands.doctor import examine

    @dataclass(frozen=True, kw_only=True)
    class Command:
        directory: Positional[Annotated[str, arg(metavar="DIR")]] = "."
        """Directory that runs are to be written to: its disk, and its file locks."""
        json: bool = False
        """Print JSON only."""

    command = parse(Command, "doctor", _about("doctor"), argv)
    findings = examine(command.directory)
    width = max(map(len, findings)) + 2
    if command.json:
        print(json.dumps(findings, indent=1))
    else:
        show(f"{name:{width}}{finding}" for name, finding in findings.items())
    return 0


def recipes(argv: list[str]) -> int:
    """List recipes, or show one: simmim recipes NAME"""
    from tyro.conf import Positional

    from simmim.config.finetune_recipes import FINETUNE_RECIPES, find_finetune_recipe
    from simmim.config.pretrain_recipes import RECIPES, find_recipe
    from simmim.config.tasks import FinetuneConfig
    from simmim.config.toml import to_toml

    @dataclass(frozen=True, kw_only=True)
    class Command:
        name: Positional[str | None] = None
        """Recipe to show."""

    command = parse(Command, "recipes", _about("recipes"), argv)
    if command.name is None:
        for name, recipe in {**RECIPES, **FINETUNE_RECIPES}.items():
            print(f"{name:32}{(recipe.__doc__ or '').splitlines()[0]}")
    else:
        tuning = command.name in FINETUNE_RECIPES
        if not tuning and command.name not in RECIPES:
            close = difflib.get_close_matches(command.name, [*RECIPES, *FINETUNE_RECIPES], n=1)
            remedy = f"did you mean {close[0]}?" if close else "see `simmim recipes` for the names"
            raise UserError(f"recipe {command.name!r} is not known; {remedy}")
        print(to_toml(find_finetune_recipe(command.name, FinetuneConfig) if tuning else find_recipe(command.name)))
        text = (FINETUNE_RECIPES if tuning else RECIPES)[command.name].__doc__ or ""
        print("\n".join("# " + line.strip() for line in text.splitlines()))
    return 0


def convert(argv: list[str]) -> int:
    """Convert a checkpoint of official SimMIM, MAE, Swin or BEiT, Transformers or timm to a run"""
    from simmim.config.commands import ConvertConfig

    config = parse_checked(ConvertConfig, "convert", _about("convert"), argv)
    if not Path(config.checkpoint).exists():
        raise UserError(f"{config.checkpoint} is not there; give a checkpoint file or directory")

    from simmim.torch_engine.interop.convert import convert

    show(convert(config))
    return 0


def export(argv: list[str]) -> int:
    """Export a run's model to timm, Transformers, ONNX or official SimMIM, and verify it"""
    from tyro.conf import Positional, arg

    from simmim.commands.export import export

    @dataclass(frozen=True, kw_only=True)
    class Command:
        run: Positional[Annotated[str, arg(metavar="RUN")]]
        """Run directory of a training."""
        format: Literal["timm", "transformers", "onnx", "official"]
        """Format to write; docs/interop.md lists what each keeps."""
        out: str
        """Output directory."""
        allow_loss: bool = False
        """Export even if the format cannot hold everything."""

    show(export(**vars(parse(Command, "export", _about("export"), argv))))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        pretrain,
        report,
        reconstruct,
        probe,
        finetune,
        baseline,
        resume,
        predict,
        embed,
        search,
        convert,
        export,
        pack,
        paste,
        advise,
        tpu_check,
        bench,
        doctor,
        recipes,
        runs,
    )
}


def _about(command: str) -> str | None:
    """Return what --help says of a command: a function imported in one has the same name."""
    return COMMANDS[command].__doc__
