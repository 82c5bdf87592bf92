"""The images of a run, recorded by name, so that a resumed run notices a data set that changed."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from simmim.data.sources import ImageSource
from simmim.errors import UserError
from simmim.training.run_directory import Run
from simmim.training.whole_files import write_json, written_whole

_EXAMPLES = 3


def check_data(run: Run, sources: Mapping[str, ImageSource], *, accept: bool) -> str | None:
    """Record the images of a new run; compare those of a resumed run with its record.

    `sources` are the parts of the data, such as train and val. RUN/data.json holds their counts and the SHA-256 of
    their names in order, RUN/data_names.gz the names. Raises `UserError` for images that changed, unless `accept`:
    then they are recorded anew, and the returned line says what changed. A run without a record (version 0.1) gets one.
    """
    names = {part: [source.name(index) for index in range(len(source))] for part, source in sources.items()}
    found = {part: {"images": len(listed), "names_sha256": _digest(listed)} for part, listed in names.items()}
    change = None
    if run.data.is_file():
        if json.loads(run.data.read_text(encoding="utf-8")) == found:
            return None
        old = _read_names(run)
        if old != names:
            change = _describe_change(old, names)
        if change and not accept:
            raise UserError(
                f"the images of {run.path} changed since it began: {change}; bring the old ones back, give another "
                "--out, or go on with other splits and order by --accept-changed-data"
            )
    # Names first: a process killed in between leaves the names of changes that were accepted, and old digests.
    with written_whole(run.data_names) as path:
        path.write_bytes(gzip.compress(_encode(names), compresslevel=1, mtime=0))
    write_json(run.data, found, indent=2)
    return change


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def _encode(names: Mapping[str, list[str]]) -> bytes:
    return json.dumps(names, ensure_ascii=False).encode(errors="surrogateescape")


def _read_names(run: Run) -> dict[str, list[str]]:
    return json.loads(gzip.decompress(run.data_names.read_bytes()).decode(errors="surrogateescape"))


def _describe_change(old: Mapping[str, list[str]], new: Mapping[str, list[str]]) -> str:
    """Name the images that were added and removed, or the part whose order is another."""
    before, after = (Counter(name for listed in names.values() for name in listed) for names in (old, new))
    changes = [
        f"{sum(names.values())} {what}, such as {', '.join(sorted(names)[:_EXAMPLES])}"
        for what, names in (("added", after - before), ("removed", before - after))
        if names
    ]
    return " and ".join(changes) or f"the same {sum(after.values())} in another order or split"
