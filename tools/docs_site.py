"""Lay out the pages of the docs site: python tools/docs_site.py build/docs (`make docs` runs it, then builds).

The pages are docs/*.md and some files of the repository's root, as they are. Links are written for GitHub's view; here
they are pointed to where the pages are on the site. Two parts are generated from the code: a page for each command,
from its `--help`, and the Python interface, from `simmim.__all__`.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import simmim
from simmim.cli import COMMANDS, main, usage
from simmim.config.tasks import TASK_CONFIGS

ROOT = Path(__file__).parents[1]
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CITATION.cff": "CITATION.cff",
    "notebooks/quickstart.ipynb": "notebooks/quickstart.ipynb",
    "notebooks/audio.ipynb": "notebooks/audio.ipynb",
}
"""Where files outside of docs/ are on the site."""


def lay_out(root: Path, out: Path) -> None:
    """Write all pages and pictures of the site into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    places = find_places(root)
    for name, place in places.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            text = (root / name).read_text(encoding="utf-8")
            (out / place).write_text(for_site(text, name, places), encoding="utf-8")
        else:
            shutil.copyfile(root / name, out / place)
    write_commands(out / "commands")
    (out / "python.md").write_text(python_page(), encoding="utf-8")


def find_places(root: Path) -> dict[str, str]:
    """Return the place on the site of each file that the site shows, both as paths with slashes."""
    places = {name: place for name, place in PLACES.items() if (root / name).is_file()}
    for path in sorted((root / "docs").rglob("*")):
        if path.suffix in (".md", ".png", ".css"):
            places[path.relative_to(root).as_posix()] = path.relative_to(root / "docs").as_posix()
    for path in sorted((root / "benchmarks" / "results").glob("*.md")):
        places[path.relative_to(root).as_posix()] = f"results/{path.name}"
    return places


def for_site(text: str, name: str, places: dict[str, str]) -> str:
    """Point the links of a page to the site's places, and write its tables as Python-Markdown reads them.

    A link to a file that is no page of the site stays as it is; `mkdocs build --strict` refuses it.
    """

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(name).parent / link["path"])
        if target not in places:
            return link[0]
        return f"]({os.path.relpath(places[target], Path(places[name]).parent)}{link['anchor'] or ''})"

    text = re.sub(r"\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", moved, text)
    # GitHub needs a bar in a table's code escaped; Python-Markdown shows the backslash.
    return re.sub(
        r"^\|.*", lambda row: re.sub(r"`[^`]*`", lambda c: c[0].replace("\\|", "|"), row[0]), text, flags=re.M
    )


def write_commands(folder: Path) -> None:
    """Write a page for each command, and an index of them."""
    folder.mkdir()
    about = {name: (function.__doc__ or "").splitlines()[0] for name, function in COMMANDS.items()}
    about |= {f"finetune {task}": kind.__doc__ or "" for task, kind in TASK_CONFIGS.items()}
    rows = [f"| [`simmim {name}`]({page_of(name)}) | {about[name]} |" for name in sorted(about)]
    index = ["# Commands", "", "Generated from the code.", "", f"```text\n{usage().splitlines()[0]}\n```", ""]
    index += ["| command | purpose |", "| --- | --- |", *rows, ""]
    index += ["Exit codes are listed under [Contracts](../architecture.md#contracts)."]
    (folder / "index.md").write_text("\n".join(index) + "\n", encoding="utf-8")
    for name in about:
        (folder / page_of(name)).write_text(command_page(name, help_of(name)), encoding="utf-8")


def page_of(command: str) -> str:
    return command.replace(" ", "-") + ".md"


def help_of(command: str) -> str:
    """Return the help text of a command, 100 columns wide."""
    box = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in box.getvalue().splitlines())


def command_page(command: str, text: str) -> str:
    """Return a command's page: its help text, with a heading for each group of options."""
    parts = re.split(r"^([\w-]+):$", text, flags=re.MULTILINE)
    lines = [f"# simmim {command}", "", f"```text\n{parts[0].strip()}\n```", ""]
    for group, options in zip(parts[1::2], parts[2::2], strict=True):
        lines += [f"## {group.capitalize()}", "", "```text", options.strip("\n"), "```", ""]
    return "\n".join(lines)


def python_page() -> str:
    """Return the page of the Python interface: a directive of mkdocstrings for each public name."""
    names = [name for name in simmim.__all__ if not name.startswith("_")]
    functions = [name for name in names if name[0].islower()]
    lines = ["# Python", "", "All that `import simmim` offers; `simmim.__all__` is the whole public interface.", ""]
    lines += ["Settings of `simmim.pretrain` and `simmim.finetune` are the options of the"]
    lines += ["[commands](commands/index.md), with `_` for `-`.", ""]
    for title, members in (("Functions", functions), ("Classes", [n for n in names if n not in functions])):
        lines += [f"## {title}", ""]
        lines += [line for name in members for line in (f"::: simmim.{name}", "")]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pages; emptied first")
    lay_out(ROOT, parser.parse_args().out)
