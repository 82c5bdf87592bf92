"""A user's mistake is one line and exit code 2; a bug of ours shows its traceback, even if it is a ValueError."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator

from simmim.cli import main
from simmim.config.validation import from_settings
from simmim.data.bad_images import TooManyBadImages
from simmim.data.picture import BadImage
from simmim.errors import TrainingDivergedError, UserError

# A command line of each command, and the function that does its work.
WORK = {
    "pretrain --data demo --out RUN": "simmim.engines.pretrain",
    "reconstruct RUN IMAGE": "simmim.commands.reconstruct.reconstruct",
    "probe timm:resnet18 --data demo": "simmim.torch_engine.tasks.probe.probe",
    "finetune classify --data demo --from scratch --out RUN": "simmim.torch_engine.train.finetune.finetune",
    "predict RUN IMAGE": "simmim.torch_engine.tasks.predict.predict",
    "embed timm:resnet18 --data demo --out FILE": "simmim.torch_engine.tasks.embed.embed_to_file",
    "convert FILE --out RUN": "simmim.torch_engine.interop.convert.convert",
    "export RUN --format onnx --out DIR": "simmim.commands.export.export",
    "pack demo --out DIR": "simmim.commands.pack.pack",
    "bench": "simmim.torch_engine.perf.bench.bench",
    "report RUN": "simmim.report.page.report",
    "search RUN --data demo --query IMAGE": "simmim.commands.search.search",
    "runs": "simmim.commands.runs.find_runs",
    "doctor": "simmim.commands.doctor.examine",
}


@pytest.mark.parametrize("line", WORK)
def test_a_bug_in_a_command_is_raised_and_a_users_mistake_exits_with_2(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> Any:
        def work(*_args: Any, **_settings: Any) -> Any:
            raise error

        return work

    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN/task.json").write_text('{"task": "classify"}')
    for name in ("IMAGE", "FILE"):
        (tmp_path / name).touch()
    monkeypatch.setattr(WORK[line], fail(ValueError("too many values to unpack")))
    with pytest.raises(ValueError, match="too many values to unpack"):
        main(line.split())
    monkeypatch.setattr(WORK[line], fail(UserError("7 is odd; use 8")))
    assert main(line.split()) == 2
    assert capsys.readouterr().err == "simmim: 7 is odd; use 8\n"


def test_a_bug_ends_the_process_with_a_traceback_and_code_1() -> None:
    script = "from simmim.commands import doctor; doctor.examine = lambda _: int('x')\n"
    script += "from simmim.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-1] == "ValueError: invalid literal for int() with base 10: 'x'"


@pytest.mark.parametrize("kind", [UserError, BadImage, TooManyBadImages, TrainingDivergedError])
def test_an_error_keeps_its_class_between_processes(kind: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(kind("3 is too few; use 4")))
    assert type(copy) is kind
    assert str(copy) == "3 is too few; use 4"


def test_a_bug_in_a_validator_is_no_mistake_of_the_user() -> None:
    def check(value: int) -> int:
        if value > 9:
            raise ValueError("bug")
        raise UserError(f"{value} is too few; use 4")

    @dataclass
    class Settings:
        count: Annotated[int, BeforeValidator(check)]

    with pytest.raises(UserError, match="3 is too few; use 4"):
        from_settings(Settings, {"count": 3})
    with pytest.raises(ValueError, match="bug") as caught:
        from_settings(Settings, {"count": 10})
    assert not isinstance(caught.value, UserError)
