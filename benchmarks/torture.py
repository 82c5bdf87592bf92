"""Disturb tiny commands at random moments: each must end in the bits of one that nothing disturbed.

    python benchmarks/torture.py --kills 8 --seed 0

The commands are those of `torture_jobs.py`, fp32 on the CPU. A disturbance is a signal (SIGCONT follows on SIGSTOP)
or a power cut (`power_cut.py`), after a time drawn by the seed from that of an undisturbed command, which begins
after its imports. What ended early is repeated by the same command, which is disturbed too, until all were sent. Then
weights and figures, or the bytes of files, must be the same, and no other file may be there. Nothing that a power cut
should leave may be done again.

Processes are forked from a server that has imported PyTorch and JAX. Two processes are started by torchrun's agent, as
programs of their own (`--rank`); their signals go to one of the ranks or to the agent. Of a command that takes longer
than `TIMED_OUT`, the stacks of all processes are shown.
"""

import argparse
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import power_cut
from torture_jobs import JOBS, PRETRAIN, Job, draw_data

CUTS = ("names lost", "names kept")
"""Power cuts, by what became of names that were not synced."""
FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGSTOP", *CUTS)
TIMED_OUT = 120
"""Seconds after which a command counts as hanging."""

_context = multiprocessing.get_context("forkserver")


class Place(NamedTuple):
    """Where a command works: `data` beside, and `box`, which it writes `out` into."""

    data: Path
    box: Path
    out: Path
    log: Path
    syncs: Path


def place_of(job: Job, data: Path) -> Place:
    return Place(data, data / "box", data / "box" / job.out, data / "log", data / "syncs")


def set_up(job: Job, place: Place) -> None:
    """Make this process one that a command is to run in: output into the log, signals as a program's, modules."""
    import torch

    output = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR2)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # as a program starts, and not as a fork server's child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for module in job.modules.split():
        importlib.import_module(module)
    for module, name, value in job.settings:
        setattr(importlib.import_module(module), name, value)


def run_command(job: Job, place: Place, begun: Connection) -> None:
    """Run a command in this process, which it ends."""
    from simmim.cli import main

    os.setsid()
    set_up(job, place)
    power_cut.note_all(place.box, place.syncs)
    power_cut.record(place.syncs)
    begun.send(None)
    if job.processes == 1:
        sys.exit(main(job.argv(place.data, place.out)))
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config: dict[str, Any] = {"monitor_interval": 0.1, "max_restarts": 0, "run_id": str(os.getpid())}
    config |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    # A program, as of torchrun. A function would be forked from the agent, which hangs at times: it then wakes ranks
    # by a `multiprocessing.Event`, whose `set` waits for ever for one that was killed in its `wait`.
    launch = elastic_launch(LaunchConfig(1, 1, job.processes, **config), sys.executable)
    launch(__file__, "--rank", job.name, str(place.data))


def run_rank(job: Job, place: Place) -> int:
    """Run a command as one of several ranks."""
    from simmim.cli import main

    set_up(job, place)
    power_cut.record(place.syncs)
    (place.data / f"begun-{os.environ['RANK']}").touch()
    return main(job.argv(place.data, place.out))


def start(job: Job, place: Place) -> BaseProcess:
    """Begin a command; return when its imports are done."""
    for path in place.data.glob("begun-*"):
        path.unlink()
    ours, theirs = _context.Pipe()
    process = _context.Process(target=run_command, args=(job, place, theirs))
    process.start()
    theirs.close()
    ours.recv()
    ranks = job.processes if job.processes > 1 else 0
    while process.exitcode is None and len(list(place.data.glob("begun-*"))) < ranks:
        time.sleep(0.02)
    return process


def wait(job: Job, process: BaseProcess, place: Place, history: Sequence[str] = ()) -> int:
    """Wait for the command and its ranks to end; return its exit code."""
    process.join(TIMED_OUT)
    end = time.monotonic() + TIMED_OUT
    while job.processes > 1 and _group(process) and time.monotonic() < end:  # ranks that outlive torchrun
        time.sleep(0.05)
    if process.exitcode is None or _group(process):
        ended = f"code {process.exitcode}" if process.exitcode is not None else "not ended"
        stacks = explain(_group(process), place.log)
        _kill_all(process)
        raise AssertionError(f"{job.name} hangs after {history} ({ended}):\n{place.log.read_text()}\n{stacks}")
    return process.exitcode


def explain(pids: Sequence[int], log: Path) -> str:
    """Have processes that called `set_up` write the Python stack of each thread into their log; say what each is."""
    lines = []
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text().replace("\0", " ").strip()
            with log.open("a") as file:
                file.write(f"\nstacks of process {pid}\n")
            os.kill(pid, signal.SIGUSR2)
            time.sleep(0.5)
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            lines.append(f"process {pid}, child of {parent}: {words}")
            for task in sorted((folder / "task").iterdir()):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                waits = (task / "wchan").read_text() or "?"
                lines.append(f"  thread {task.name} {(task / 'comm').read_text().strip()}: {state}, kernel {waits}")
    return "\n".join(lines)


def _group(process: BaseProcess) -> list[int]:
    """Find the living processes of a command: those of its session, and ranks, which have sessions of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                rank = f"TORCHELASTIC_RUN_ID={process.pid}\0".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if (int(session) == process.pid or rank) and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def _kill_all(process: BaseProcess) -> None:
    for pid in _group(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def disturb(process: BaseProcess, name: str, seconds: float, draw: np.random.Generator) -> bool:
    """Send a signal after `seconds`, unless the process has ended; return whether it was sent."""
    process.join(seconds)
    if process.exitcode is not None or process.pid is None:
        return False
    if name in CUTS:
        _kill_all(process)
        return True
    pid = int(draw.choice(_group(process) or [process.pid]))
    try:
        os.kill(pid, getattr(signal, name))
        if name == "SIGSTOP":
            time.sleep(0.2)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def check_end(job: Job, name: str, sent: bool, code: int, place: Place) -> None:
    """Raise `AssertionError` for an end that a disturbance does not explain, or a traceback of ours."""
    log = place.log.read_text()
    number = signal.SIGKILL if name in CUTS else getattr(signal, name)
    usual = {0} | ({-number, 128 + number} if sent else set())
    if sent and name == "SIGUSR1":
        usual.add(75)
    if sent and job.processes > 1:
        usual |= {1, -signal.SIGTERM}  # torchrun's own
    done = any(words in log for words in ("exists already", "finished already", "holds a run; give a new"))
    assert code in usual or (code == 2 and done), f"{job.name}: code {code} after {name}\n{log}"
    if job.processes == 1:
        # Python shows and drops a KeyboardInterrupt that comes in a callback of the garbage collector.
        log = re.sub(r"Exception ignored in: .*\nTraceback[^:]*:\n(  .*\n)*KeyboardInterrupt: \n", "", log)
        assert "Traceback" not in log, f"{job.name}: {name}\n{log}"


def cut_power(job: Job, name: str, place: Place, counts: Counter[str]) -> None:
    before = job.progress(place.out)
    power_cut.cut(place.box, place.syncs, names_kept=name == CUTS[1])
    after = job.progress(place.out)
    counts["kept"] += after
    assert after >= before - job.at_stake, f"{job.name}: {name} loses {before - after} of {before}"


def outcome(job: Job, place: Place) -> dict[str, Any]:
    return job.outcome(place.out) | {"beside": sorted(path.name for path in place.box.iterdir())}


def compare(job: Job, found: dict[str, Any], wanted: dict[str, Any], history: list[str]) -> None:
    for key in wanted.keys() | found.keys():
        told = f"{job.name}, after {history}: {key} is {found.get(key)}, not {wanted.get(key)}"
        assert found.get(key) == wanted.get(key), told


def torture(job: Job, data: Path, kills: int, faults: Sequence[str], draw: np.random.Generator) -> Counter[str]:
    """Disturb a command until `kills` disturbances hit it; return how many of each, and the commands that they hit."""
    place = place_of(job, data)
    _undisturbed(job, place)  # which may also fill caches
    wanted = outcome(job, place)
    seconds = _undisturbed(job, place)
    compare(job, outcome(job, place), wanted, [])
    counts: Counter[str] = Counter()
    while sum(counts[name] for name in faults) < kills:
        _clear(place)
        history: list[str] = []
        while True:
            process, name = start(job, place), str(draw.choice(faults))
            sent = False
            if sum(counts[each] for each in faults) < kills:
                moment = float(draw.uniform(0, seconds))
                if sent := disturb(process, name, moment, draw):
                    counts[name] += 1
                    history.append(f"{name} at {moment:.2f} s")
            code = wait(job, process, place, history)
            print(f"{job.name}: {history[-1] if sent else 'undisturbed'}, code {code}", file=sys.stderr, flush=True)
            check_end(job, name, sent, code, place)
            place.log.unlink()
            if sent and name in CUTS:
                cut_power(job, name, place, counts)
                continue
            if code in (0, 2):
                break
        compare(job, outcome(job, place), wanted, history)
        counts["commands"] += 1
    return counts


def _undisturbed(job: Job, place: Place) -> float:
    _clear(place)
    process, begun = start(job, place), time.monotonic()
    code = wait(job, process, place)
    assert code == 0, place.log.read_text()
    return time.monotonic() - begun


def _clear(place: Place) -> None:
    shutil.rmtree(place.box, ignore_errors=True)
    place.box.mkdir()
    place.log.unlink(missing_ok=True)


def prepare(folder: Path, draw: np.random.Generator) -> None:
    """Write the images, and pretrain what the other commands begin with."""
    draw_data(folder, draw)
    place = Place(folder, folder / "box", folder / "pretrained", folder / "log", folder / "syncs")
    _undisturbed(PRETRAIN, place)
    (folder / "timm").mkdir()
    shutil.copy(folder / "pretrained/encoder/model.safetensors", folder / "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="disturbances of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the command of this name, or those whose name begins so")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--rank", nargs=2, metavar=("COMMAND", "DATA"), help="be a rank that torchrun's agent starts")
    options = parser.parse_args()
    if options.rank:
        job = next(job for job in JOBS if job.name == options.rank[0])
        sys.exit(run_rank(job, place_of(job, Path(options.rank[1]))))
    os.environ |= {"SIMMIM_KERNELS": "rules"}  # a measurement would choose by the machine's load
    os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    jobs = [job for job in JOBS if job.name == options.only] or [
        job for job in JOBS if job.name.startswith(options.only)
    ]
    modules = {module for job in jobs for module in job.modules.split()}
    _context.set_forkserver_preload(["simmim.cli", *sorted(modules | set(PRETRAIN.modules.split()))])
    draw = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), draw)
        print(f"| command | {' | '.join(FAULTS)} | commands | seconds |", flush=True)
        for job in jobs:
            begun = time.monotonic()
            counts = torture(job, Path(name), options.kills, options.faults, draw)
            row = [counts[each] for each in (*FAULTS, "commands")]
            print(f"| {job.name} | {' | '.join(map(str, row))} | {time.monotonic() - begun:.0f} |", flush=True)
    print(datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))


if __name__ == "__main__":
    main()
