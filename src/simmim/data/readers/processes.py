"""Read images in worker processes, which avoids GIL contention.

Workers write images into memory shared with the training process, a few images at a time and in turn. Each has room for
two such pieces. Order, crops and bad images are those of `stream_from_threads`, to the bit.
"""

import contextlib
import ctypes
import multiprocessing
import pickle
import signal
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.pipeline import Batch, Loader, Rows
from simmim.errors import UserError

_AHEAD = 2
"""Pieces that a worker holds, ready or unfinished."""
_MOST = 32
"""Images of a piece; handing one over takes 0.2 ms."""


def stream_from_processes(loader: Loader, positions: range, size: int, processes: int) -> Iterator[Batch]:
    """Yield the batches of `stream_from_threads`, for a loader with rows, from workers. Close it to end them."""
    work = _Work(loader, positions, size, together=min(_MOST, -(-size // processes)))
    readers = [_Reader(work, range(first, work.pieces, processes)) for first in range(min(processes, work.pieces))]
    try:
        for batch in range(work.batches):
            image = np.empty((size, *work.rows.shape[1:]), work.rows.dtype)
            index, epoch = np.empty(size, np.int64), np.empty(size, np.int64)
            for number, places in enumerate(work.places, batch * len(work.places)):
                index[places], epoch[places] = readers[number % processes].fetch(image[places])
            yield {"image": image, "index": index, "epoch": epoch}
    finally:
        for reader in readers:
            reader.close()


@dataclass(frozen=True)
class _Work:
    """The batches of `size` images at these positions, in pieces of up to `together` images, numbered from 0 on."""

    loader: Loader
    positions: range
    size: int
    together: int

    @property
    def rows(self) -> Rows:
        assert self.loader.rows
        return self.loader.rows

    @property
    def batches(self) -> int:
        return len(self.positions) // self.size

    @property
    def pieces(self) -> int:
        return self.batches * len(self.places)

    @property
    def places(self) -> list[slice]:
        """Slices of a batch, one a piece."""
        return [slice(first, min(first + self.together, self.size)) for first in range(0, self.size, self.together)]

    def piece(self, number: int) -> range:
        """Return the positions of a piece."""
        batch, place = divmod(number, len(self.places))
        return self.positions[batch * self.size : (batch + 1) * self.size][self.places[place]]

    def rooms(self, memory: Any) -> NDArray[Any]:
        """View shared memory as the pieces that it has room for: (`_AHEAD`, `together`, H, W, C)."""
        pixels = np.ctypeslib.as_array(memory).view(self.rows.dtype)
        return pixels.reshape(_AHEAD, self.together, *self.rows.shape[1:])


class _Reader:
    """A worker that reads the pieces of some numbers, and the memory shared with it."""

    def __init__(self, work: _Work, numbers: range):
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
        values = _AHEAD * work.together * int(np.prod(work.rows.shape[1:]))
        memory = context.RawArray(ctypes.c_uint8, values * np.dtype(work.rows.dtype).itemsize)
        self._rooms = work.rooms(memory)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_read, args=(work, numbers, memory, theirs), daemon=True)
        try:
            self._process.start()
        except (TypeError, AttributeError, pickle.PicklingError) as error:  # whichever pickle chooses
            raise UserError(f"these images cannot be sent to processes ({error}); use --readers threads") from error
        theirs.close()
        self.close = weakref.finalize(self, _end, self._connection, self._process)  # at exit at the latest
        for room in range(_AHEAD):
            self._connection.send(room)

    def fetch(self, images: NDArray[Any]) -> tuple[list[int], list[int]]:
        """Copy the next piece into `images`; its indices and epochs. Raises what reading it raised."""
        try:
            found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise UserError(
                f"a reading process ended with exit code {self._process.exitcode}, for want of memory, or of "
                "if __name__ == '__main__' in a script that trains; use fewer --workers, or --readers threads"
            ) from None
        if isinstance(found, Exception):
            raise found
        room, index, epoch = found
        images[:] = self._rooms[room, : len(images)]
        with contextlib.suppress(OSError):  # it was killed, which the next piece tells
            self._connection.send(room)
        return index, epoch


def _end(connection: Connection, process: Any) -> None:
    connection.close()
    process.kill()  # it has nothing to finish
    process.join()


def _read(work: _Work, numbers: range, memory: Any, connection: Connection) -> None:
    """Run a worker: fill rooms as they become free, until the training process is gone."""
    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
    ):  # those are for the process that trains: it ends a step, and saves
        signal.signal(stop, signal.SIG_IGN)
    rooms = work.rooms(memory)
    try:
        for number in numbers:
            room, piece = connection.recv(), work.piece(number)
            try:
                found = [work.loader(position, row) for position, row in zip(piece, rooms[room], strict=False)]
            except Exception as error:
                error.add_note(traceback.format_exc())
                connection.send(error)
                return
            connection.send((room, [element.index for element in found], [element.epoch for element in found]))
        while True:
            connection.recv()
    except (EOFError, OSError):  # the process that trains is gone
        pass
