"""Feed damaged and hostile files to everything that reads files: 10,000 mutations.

    python benchmarks/fuzz.py --mutations 10000 --seed 0

Real files of each kind are made first, then mutated: flipped bits, extreme numbers, cut, doubled, swapped and spliced
parts, in archives also inside of their members. A reader may read what comes of it, or refuse it with a `UserError`
(one line). Faults are: any other exception, a crash of the process, over `_SECONDS` for a file, over `_MEMORY` more
memory, a program or module run, a connection, and a file written or removed outside of the folder of the trial.

Readers run in a forked process, which the main process watches; audit hooks (PEP 578) see what it opens and runs.
"""

import argparse
import io
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
from fuzz_kinds import Kind, make_kinds

from simmim.errors import UserError

_SECONDS, _MEMORY = 20, 2 * 2**30  # for a file; bytes beyond what the process had
_RUNS = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Tally:
    """What became of the trials of a kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Seed and reason of each fault."""
    seconds: float = 0.0


def mutate(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Damage a file's bytes in one to four ways; `other` is a file of which parts may be taken."""
    if data[:2] == b"PK" and draw.random() < 0.5:
        return mutate_member(data, other, draw)
    found = bytearray(data)
    for _ in range(int(draw.integers(1, 5))):
        size = len(found)
        place, length = int(draw.integers(size + 1)), int(2 ** draw.uniform(0, 10))
        match int(draw.integers(10)):
            case 0 if size:
                found[place % size] ^= 1 << int(draw.integers(8))
            case 1:
                found[place : place + 1] = draw.bytes(1)
            case 2 | 3:  # a length, an offset or a count, in either byte order
                value, order = _EXTREMES[draw.integers(len(_EXTREMES))], "<>"[draw.integers(2)]
                number = struct.pack(f"{order}I", value)
                found[place : place + 4] = number
            case 4:
                del found[place:]
            case 5:
                del found[place : place + length]
            case 6:
                found[place:place] = found[place : place + length] * int(draw.integers(1, 5))
            case 7:
                start = int(draw.integers(len(other) + 1))
                found[place : place + length] = other[start : start + length]
            case 8:
                found[place:place] = draw.bytes(length)
            case _:
                mutate_number(found, draw)
    return bytes(found)


def mutate_number(text: bytearray, draw: np.random.Generator) -> None:
    """Replace a number that is written in digits."""
    first = int(draw.integers(max(len(text) - 4096, 1)))
    digits = [place for place in range(first, min(first + 4096, len(text))) if 48 <= text[place] <= 57]
    if digits:
        end = start = digits[int(draw.integers(len(digits)))]
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        values = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"0.5", b"null", b'"x"', b"[]")
        text[start:end] = values[int(draw.integers(len(values)))]


def mutate_member(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Damage a member of a zip, so that its checksum is right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as written:
        names = archive.namelist()
        chosen = names[int(draw.integers(len(names)))]
        for name in names:
            content = archive.read(name)
            written.writestr(name, mutate(content, other, draw) if name == chosen else content)
    return out.getvalue()


class Watch:
    """An audit hook that notes what a reader must not do. It cannot be taken away again."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.on = str(folder), "", False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _RUNS:
            self.seen = f"{event} {arguments[:1]}"
        elif event in _CHANGES and not self.inside(arguments[0]):
            if "__pycache__" in os.fsdecode(arguments[0]):  # Python's own, of a module that a reader imports
                return
            self.seen = f"{event} {arguments[:2]}"
        elif event == "open" and not self.inside(arguments[0]):
            writes = set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & _WRITES
            if writes and "__pycache__" not in str(arguments[0]):
                self.seen = f"open {arguments[0]!r} to write"

    def inside(self, path: Any) -> bool:
        return isinstance(path, int) or os.path.abspath(os.fsdecode(path)).startswith(self.folder)  # noqa: PTH100


def try_one(kind: Kind, seed: int, folder: Path, watch: Watch) -> str:
    """Damage a file of a kind and read it: "read", "refused", or the fault."""
    draw = np.random.default_rng(abs(seed))
    names = list(kind.mutated or kind.files)
    chosen = names[int(draw.integers(len(names)))]
    other = kind.files[names[int(draw.integers(len(names)))]]
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in kind.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(mutate(content, other, draw) if name == chosen and seed >= 0 else content)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch.seen, watch.on = "", True
    begun = time.monotonic()
    try:
        kind.read(folder)
        outcome = "read"
    except UserError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        watch.on = False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if time.monotonic() - begun > _SECONDS:
        return f"took {time.monotonic() - begun:.0f} s"
    return watch.seen or (f"took {grown >> 20} MiB" if grown > _MEMORY else outcome)


def run_seeds(kind: Kind, seeds: Sequence[int], folder: Path) -> Iterator[tuple[int, str]]:
    """Try each seed in a forked process; after a crash or a hang, go on with the next seed in another one."""
    left = list(seeds)
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            watch = Watch(folder)
            for seed in left:
                text = " ".join(try_one(kind, seed, folder, watch).split())[:300]
                os.write(writing, f"{text}\n".encode(errors="replace"))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            for outcome in _lines(pipe.fileno()):
                yield left.pop(0), outcome
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if left:
            yield left.pop(0), f"no answer: the process ended with {status} or hung"


def _lines(pipe: int) -> Iterator[str]:
    """Yield lines from a pipe until it closes, or nothing comes for three times the limit of a file."""
    text = b""
    while select.select([pipe], [], [], 3 * _SECONDS)[0] and (part := os.read(pipe, 65_536)):
        *whole, text = (text + part).split(b"\n")
        yield from (line.decode() for line in whole)


def fuzz(kind: Kind, seeds: Sequence[int], folder: Path) -> Tally:
    """Try mutations of a kind, one for each seed, in `folder`, which is removed; first its files as they are."""
    tally, begun = Tally(), time.monotonic()
    for seed, outcome in run_seeds(kind, [-1, *seeds], folder):
        if seed < 0:
            if outcome != kind.whole:
                tally.faults.append(f"files without damage: {outcome}, not {kind.whole}")
            continue
        tally.outcomes[outcome if outcome in ("read", "refused") else "fault"] += 1
        if outcome not in ("read", "refused"):
            tally.faults.append(f"{seed}: {outcome}")
    shutil.rmtree(folder, ignore_errors=True)
    tally.seconds = round(time.monotonic() - begun, 1)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        kinds = make_kinds(Path(work))
        table: dict[str, dict[str, Any]] = {}
        for number, (name, kind) in enumerate(kinds.items()):
            count = len(range(number, options.mutations, len(kinds)))
            first = options.seed * 10_000_000 + number * 100_000
            tally = fuzz(kind, range(first, first + count), Path(work) / "trial")
            table[name] = {**tally.outcomes, "seconds": tally.seconds, "faults": tally.faults}
            print(name, table[name], flush=True)
    results.save("fuzz", {**results.machine(), "kinds": table})
    sys.exit(any(row["faults"] for row in table.values()))


if __name__ == "__main__":
    main()
