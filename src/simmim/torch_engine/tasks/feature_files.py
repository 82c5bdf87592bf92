"""Files of features: the parts that `simmim embed` writes, and the one file that they are joined into.

Shapes: `N` images, `n` images of a part, `h w` feature-map cells, `D` features. Features are (N, D) or (N, h·w, D).
"""

import contextlib
import importlib.util
import json
import math
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.bad_images import BadImages
from simmim.data.labelled.every import ClassLabels
from simmim.data.sources import ImageSource
from simmim.errors import UserError
from simmim.training.run_lock import locked
from simmim.training.whole_files import read_json, write_json, written_whole

_FACTS = "simmim"  # of a file: the settings that its features depend on, as JSON


@dataclass(frozen=True)
class Part:
    """Features of consecutive images, of which `indices` (n,) are readable; `bad` has a reason for each other name."""

    indices: NDArray[np.int64]
    features: NDArray[Any]
    bad: dict[str, str]


@dataclass(frozen=True)
class FeatureFile:
    """The file `out` with the features of a source's images, and until it is whole the parts beside it.

    A part has the features of `part_size` images, and is written whole or not at all.
    """

    out: Path
    source: ImageSource
    part_size: int
    labels: ClassLabels | None = None
    """Label of each image of the source, if they are written."""

    @property
    def directory(self) -> Path:
        """Directory of the parts, which a finished file does not have."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def bad_images(self) -> Path:
        """List of the unreadable images, in the form of a run's `bad_images.txt`."""
        return self.out.with_name(self.out.name + ".bad_images.txt")

    def __len__(self) -> int:
        """Count the parts, finished or not."""
        return math.ceil(len(self.source) / self.part_size)

    def images(self, number: int) -> range:
        """Return the indices of a part's images."""
        return range(number * self.part_size, min((number + 1) * self.part_size, len(self.source)))

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    @contextlib.contextmanager
    def hold(self, *, is_main: bool) -> Iterator[None]:
        """Keep other commands out of the parts; the main process does it for all.

        Raises `UserError` where another has them.
        """
        with contextlib.ExitStack() as held:
            if is_main:
                try:
                    held.enter_context(locked(self.directory))
                except OSError as error:
                    raise self._not_writable(error) from None
            yield

    def begin(self, settings: dict[str, Any]) -> int:
        """Make the directory of parts, or find the one that a killed process left; returns the number of parts there.

        Raises `UserError` for an `out` that exists, or parts of other settings.
        """
        finished = sum(map(self.has, range(len(self))))
        if self.out.exists() and finished < len(self):  # else killed after it joined the parts; `join` removes them
            raise UserError(f"--out {self.out} exists already; give a new file, or remove it")
        begun, settings = read_json(self.directory / "settings.json"), settings | {"part_size": self.part_size}
        changes = [f"{name} {old} → {settings.get(name)}" for name, old in begun.items() if old != settings.get(name)]
        if changes:
            raise UserError(
                f"{self.directory} was begun with other settings ({', '.join(changes)}); "
                "repeat that command to resume it, or remove the directory to start again"
            )
        try:
            write_json(self.directory / "settings.json", settings)
            self._list_bad_images()
        except OSError as error:
            raise self._not_writable(error) from None
        return finished

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"{self.directory} cannot be written: {error.strerror}; give another --out")

    def write(self, number: int, part: Part) -> None:
        bad = np.array([*part.bad.items()], np.str_).reshape(-1, 2)
        with written_whole(self._path(number)) as aside, aside.open("wb") as file:
            np.savez(file, indices=part.indices, features=part.features, bad=bad)

    def names(self) -> Iterator[list[str]]:
        """Yield the names of the readable images, part by part."""
        for indices in self._arrays("indices"):
            yield [self.source.name(index) for index in indices.tolist()]

    def label_names(self) -> Iterator[list[str]]:
        """Yield the labels of the readable images, part by part."""
        assert self.labels is not None
        for indices in self._arrays("indices"):
            yield self.labels.names(indices)

    def columns(self) -> Iterator[tuple[list[str], list[str] | None, NDArray[Any]]]:
        """Yield names, labels (`None` where there are none) and features, part by part."""
        return zip(self.names(), self.label_names() if self.labels else repeat(None), self.features())  # noqa: B905

    def facts(self) -> str:
        """Return what the features depend on, as JSON: the settings that the parts were begun with."""
        return json.dumps(read_json(self.directory / "settings.json"), sort_keys=True)

    def features(self) -> Iterator[NDArray[Any]]:
        """Yield features (n, D) or (n, h·w, D), part by part."""
        return self._arrays("features")

    def join(self) -> None:
        """Write `out` from the parts, one at a time, and remove them."""
        if not self.out.exists():
            self._list_bad_images()
            with written_whole(self.out) as aside:
                FORMATS[self.out.suffix.lower()](aside, self)
        shutil.rmtree(self.directory)

    def _arrays(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield an array of each part that has readable images."""
        for number in range(len(self)):
            with np.load(self._path(number)) as arrays:
                if len(arrays["indices"]):
                    yield arrays[name]

    def _path(self, number: int) -> Path:
        return self.directory / f"part-{number:06d}.npz"

    def _list_bad_images(self) -> None:
        """List the bad images of the finished parts, in order. Those of other parts are found again."""
        self.bad_images.unlink(missing_ok=True)
        listed = BadImages(self.bad_images, total=len(self.source), max_fraction=1)
        for number in filter(self.has, range(len(self))):
            with np.load(self._path(number)) as arrays:
                for name, reason in arrays["bad"].tolist():
                    listed.add(name, reason)


def check_format(out: str, *, patches: bool) -> None:
    """Raise `UserError` for a file that cannot be written, by its suffix."""
    suffix = Path(out).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"--out {out} is none of {', '.join(FORMATS)}; name such a file")
    if suffix == ".csv" and patches:
        raise UserError(f"--out {out} takes one vector an image, and --patches gives many; use .npz or .parquet")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--out {out} needs the package pyarrow; pip install 'simmim[data]'")


def write_parquet(path: Path, file: FeatureFile) -> None:
    """Write a row group for each part: `name`, `label`, and `features` as a list (of lists) of fixed size."""
    import pyarrow
    from pyarrow import parquet

    writer = None
    for names, labels, features in file.columns():
        column = pyarrow.array(features.reshape(-1))
        for size in reversed(features.shape[1:]):
            column = pyarrow.FixedSizeListArray.from_arrays(column, size)
        texts = {"name": names} if labels is None else {"name": names, "label": labels}
        columns = {name: pyarrow.array(map(as_text, values), pyarrow.string()) for name, values in texts.items()}
        table = pyarrow.table({**columns, "features": column}).replace_schema_metadata({_FACTS: file.facts()})
        writer = writer or parquet.ParquetWriter(path, table.schema, use_dictionary=False)  # numbers do not repeat
        writer.write_table(table, row_group_size=len(names))
    assert writer is not None
    writer.close()


def write_npz(path: Path, file: FeatureFile) -> None:
    """Write the arrays `names` (N,), `labels` (N,) and `features` (N, D) or (N, h·w, D), and `simmim` (), JSON."""
    texts = {"names": file.names} | ({"labels": file.label_names} if file.labels else {})
    count, first, facts = sum(map(len, file.names())), next(file.features()), np.array(file.facts())
    with zipfile.ZipFile(path, "w") as archive:
        for name, pieces in texts.items():
            kind = np.dtype((np.str_, max(len(text) for piece in pieces() for text in piece)))
            arrays = (np.array(piece, kind) for piece in pieces())
            _append(archive, name, (count,), kind, arrays, zipfile.ZIP_DEFLATED)  # mostly padding
        shape = (count, *first.shape[1:])
        _append(archive, "features", shape, first.dtype, file.features(), zipfile.ZIP_STORED)
        _append(archive, _FACTS, (), facts.dtype, [facts.reshape(1)], zipfile.ZIP_STORED)


def _append(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    pieces: Iterable[NDArray[Any]],
    compression: int,
) -> None:
    """Append an array to an .npz, from pieces along its first axis."""
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that equal arrays give equal bytes
    info.compress_type = compression
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, header)
        for piece in pieces:
            member.write(np.ascontiguousarray(piece).data.cast("B"))


def write_csv(path: Path, file: FeatureFile) -> None:
    """Write the columns name, label, f0, f1, …; numbers have the digits that tell them apart in their precision."""
    first = next(file.features())
    row = ",".join(["%.9g" if first.dtype == np.float32 else "%.5g"] * first.shape[1])
    with path.open("w", encoding="utf-8", newline="") as out:
        texts = ["name"] if file.labels is None else ["name", "label"]
        out.write(",".join([*texts, *(f"f{number}" for number in range(first.shape[1]))]) + "\n")
        for names, labels, features in file.columns():
            for number, vector in enumerate(features.tolist()):
                texts = [names[number]] if labels is None else [names[number], labels[number]]
                quoted = ",".join('"' + as_text(text).replace('"', '""') + '"' for text in texts)
                out.write(f"{quoted},{row % tuple(vector)}\n")


def as_text(name: str) -> str:
    r"""Return a name as text: bytes of a file's name that are not UTF-8 become `\udc80` and the like."""
    return name.encode(errors="backslashreplace").decode()


def read_features(path: Path) -> tuple[list[str], NDArray[Any], dict[str, Any]]:
    """Read the names, as text, the features, and what they depend on, of an .npz or .parquet that `simmim embed` wrote.

    The last is empty where a version of simmim before 0.2 wrote the file.
    """
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path) as arrays:
                facts = json.loads(arrays[_FACTS].item()) if _FACTS in arrays else {}
                return [as_text(name) for name in arrays["names"].tolist()], arrays["features"], facts
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            table = parquet.read_table(path)
            column = table["features"].combine_chunks()
            shape = [len(column)]
            while hasattr(column.type, "list_size"):  # a list of D numbers, or of h·w such lists
                shape.append(column.type.list_size)
                column = column.flatten()
            facts = json.loads((table.schema.metadata or {}).get(_FACTS.encode(), b"{}"))
            return table["name"].to_pylist(), column.to_numpy().reshape(shape), facts
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as features: {error}; give what simmim embed wrote") from None
    raise UserError(f"{path} is no .npz or .parquet file; have simmim embed write one")


FORMATS = {".parquet": write_parquet, ".npz": write_npz, ".csv": write_csv}
"""Writers of the joined file, by its suffix."""
