"""What pyproject.toml lists is what the package imports: no more, no less."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# A distribution by the name of what it is imported as, where the two differ.
MODULES = {
    "pillow": "pil",
    "opencv-python-headless": "cv2",
    "tomli-w": "tomli_w",
    "tensorflow-cpu": "tensorflow",
    "faster-coco-eval": "faster_coco_eval",
}
# timm imports torchvision without listing the versions of it that fit torch's.
BY_OTHERS = {"torchvision"}


def name_of(requirement: str) -> str:
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
    return MODULES.get(name, name)


@functools.cache
def imported() -> set[str]:
    """The top-level modules that the package imports, at the top of a file or inside a function."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return {name.lower() for name in found}


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_a_dependency_is_imported(requirement):
    assert name_of(requirement) in imported() | BY_OTHERS


def test_what_is_imported_is_a_dependency_or_an_extra():
    listed = {name_of(line) for line in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        listed |= {name_of(line) for line in extra}
    standard = {name.lower() for name in sys.stdlib_module_names}
    assert imported() - listed - standard - {"simmim"} == set()
