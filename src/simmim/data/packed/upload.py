"""Packed images on their way into object storage, through fsspec."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from simmim.data.packed.format import RemoteStorage
from simmim.errors import UserError


class Bucket(RemoteStorage):
    """Directory in object storage that files are copied to, each whole or not at all.

    Requests that fail are made again, as in reading. Every method raises `UserError` where that does not help.
    """

    def __init__(self, url: str):
        if "::" in url:
            raise UserError(f"--out {url} is a chain of storages; give the last one alone, {url.split('::')[-1]}")
        super().__init__(url)
        self._url = url.rstrip("/")

    def is_empty(self) -> bool:
        with self._explained("", "read"):
            try:
                return not self._again(lambda: self._files.ls(self._root, detail=False))
            except FileNotFoundError:
                return True

    def send(self, path: Path) -> None:
        """Copy a file into the directory under its own name, over one that is there."""
        with self._explained(path.name, "written"):
            self._again(lambda: self._files.put_file(str(path), f"{self._root}/{path.name}"))
            self._files.invalidate_cache()
            if (size := self.size(path.name)) != path.stat().st_size:
                raise OSError(f"it has {size} bytes there, and {path.stat().st_size} here")

    def fetch(self, path: Path) -> bool:
        """Copy the file of a path's name out of the directory to that path; return whether there is one."""
        with self._explained(path.name, "read"):
            try:
                self._again(lambda: self._files.get_file(f"{self._root}/{path.name}", str(path)))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file, unless it is gone."""
        with self._explained(name, "removed"), contextlib.suppress(FileNotFoundError):
            self._again(lambda: self._files.rm_file(f"{self._root}/{name}"))

    def holds(self, name: str, size: int) -> bool:
        """Tell whether there is a file of this name and size in bytes."""
        with self._explained(name, "read"):
            try:
                return self.size(name) == size
            except FileNotFoundError:
                return False

    @contextlib.contextmanager
    def _explained(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._url}/{name} cannot be {what}: {error}; check the storage and your rights there, then repeat "
                "the command, which goes on"
            ) from error
