"""Encoders by their names."""

from pathlib import Path

import pytest

from simmim.cli import main


@pytest.mark.parametrize(
    "command",
    ["finetune classify --data demo --out {out} --from", "probe --data demo", "embed --data demo --out {out}.npz",
     "search --data demo --duplicates"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["mae.pth", "folder/pytorch_model.bin"])
def test_a_checkpoint_of_another_package_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    given = tmp_path / name.split("/")[0]
    assert main([*command.format(out=tmp_path / "out").split(), str(given)]) == 2
    line = capsys.readouterr().err
    assert f"{given} is a checkpoint and no encoder yet; make it one with simmim convert {given} --out DIR" in line
