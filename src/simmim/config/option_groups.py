"""Options of a training in groups, for `--help`."""

import contextlib
import io
import os
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator

# Options by group, in the order of the help; `mask.*` stands for every setting of a strategy.
_GROUPS = {
    "common": "data out from recipe model image-size epochs batch-size lr objective mask target",
    "data": (
        "frames channels mean std flip crop crop-scale crop-ratio val-images val-fraction max-bad-fraction "
        "accept-changed-data sound.*"
    ),
    "model": "model-args init-from positions head head.* drop-path",
    "method": ("mask.* target.* loss loss.* encode masks-per-image objectives"),
    "optimisation": (
        "steps warmup-epochs warmup-lr min-lr schedule milestones weight-decay layer-decay betas clip-grad seed"
    ),
    "hardware": (
        "device precision engine backend compile accumulate-steps checkpoint-activations shard plain-step workers "
        "readers decode antialias kernels.* gpu.*"
    ),
    "run": (
        "config save-every-steps keep async-save max-hours extend fresh log-every-steps log "
        "picture-every-steps probe probe-every-epochs eval-every-epochs help"
    ),
}
_ORDER = {option: (group, place) for group, names in _GROUPS.items() for place, option in enumerate(names.split())}
_COLUMN = 28  # where the help text starts
_NARROW = 78  # columns that the narrowest usual terminal has for an option


@contextlib.contextmanager
def wide_output(stream: io.StringIO) -> Iterator[None]:
    """Redirect standard output to `stream` as for a terminal of 129 columns.

    On a narrow one tyro breaks inside words; from 130 columns on it may put boxes of options side by side.
    """
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "129"
    try:
        with contextlib.redirect_stdout(stream):
            yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def show_in_groups(text: str, rest: str, hidden: Collection[str] = ()) -> str:
    """Return tyro's help text with its options in groups.

    An option that no group names goes to group `rest`, after the common ones: it belongs to this command alone.
    Options of the fields named in `hidden` are left out.
    """
    from simmim.method.objectives import Objective  # not before it is needed: it loads tyro

    head, *_ = re.split(r"^ options *$", text, maxsplit=1, flags=re.MULTILINE)
    groups: dict[str, list[tuple[int, str, str]]] = {name: [] for name in ("common", rest, *_GROUPS)}
    for invocation, words in _entries(text):
        option = re.findall(r"--([\w.-]+)", invocation)[0]
        field = option.partition(".")[0]
        if field.replace("-", "_") in hidden:
            continue
        usual = ("method", len(_ORDER)) if field in Objective.kinds else (rest, 0)
        name, place = _ORDER.get(option) or _ORDER.get(f"{field}.*") or usual
        groups[name].append((place, invocation, words))
    width = max(shutil.get_terminal_size().columns - 2, _COLUMN + 20)
    lines = [head.rstrip()]
    for name, entries in groups.items():
        if entries:
            lines += ["", f"{name}:"]
        for _, invocation, words in sorted(entries, key=lambda entry: entry[0]):
            lines += _show(invocation, words, width)
    return "\n".join(lines)


def _show(invocation: str, words: str, width: int) -> list[str]:
    """Wrap one option; its help starts in a column of its own."""
    start = f"  {invocation}  ".ljust(_COLUMN)
    column = " " * _COLUMN
    wrapped = textwrap.wrap(
        words, width, initial_indent=column, subsequent_indent=column, break_on_hyphens=False, break_long_words=False
    )
    if len(start) > _COLUMN or not wrapped:
        return [*_choices(start.rstrip()), *wrapped]
    return [start + wrapped[0][_COLUMN:], *wrapped[1:]]


def _choices(line: str) -> list[str]:
    """Break an option with too many choices for any terminal at one of them, the same for every width."""
    if len(line) <= _NARROW:
        return [line]
    end = line.rindex("|", 0, _NARROW) + 1
    return [line[:end], *_choices(" " * 8 + line[end:])]


def _entries(text: str) -> list[tuple[str, str]]:
    """Read options with their metavars, and their help, from tyro's boxes drawn in ASCII."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if re.match(r"  -+[a-zA-Z]", line):
            entries.append(re.split(r"\s{2,}", line.strip(), maxsplit=1))
        elif entries and line.startswith("    "):
            entries[-1].append(line.strip())
    texts = [(invocation, " ".join(filter(None, words))) for invocation, *words in entries]
    # The help of a value that is decided later says so itself.
    return [(name, text.removesuffix(" (default: auto)") if "(default" in text[:-15] else text) for name, text in texts]
