"""Images in an LMDB, a file of keys and values."""

import os
from pathlib import Path
from typing import Any

from simmim.data.names import Names
from simmim.data.picture import BadImage
from simmim.errors import UserError


class LmdbImages:
    """Values of an LMDB that are image files, in the order of their keys; an `ImageSource`.

    Keys that begin with two underscores (`__len__`, `__keys__`), which many writers add, are left out.
    """

    def __init__(self, path: str):
        """Raise `UserError` where there is no LMDB, or none of its values is left."""
        self._path = path
        self._process = 0
        try:
            with self._begin() as transaction, transaction.cursor() as cursor:
                keys = [bytes(key) for key in cursor.iternext(keys=True, values=False) if not key.startswith(b"__")]
        except ImportError as error:
            raise UserError(f"lmdb:{path} needs the library lmdb; pip install simmim[data]") from error
        except Exception as error:  # its own kinds, and those of the disk
            raise UserError(f"lmdb:{path} cannot be read as an LMDB ({error}); give its folder or file") from error
        if not keys:
            raise UserError(f"lmdb:{path} is empty; write images to it, a key each")
        self._keys = Names(os.fsdecode(key) for key in keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return LmdbImages, (self._path,)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> bytes:
        with self._begin() as transaction:
            found = transaction.get(os.fsencode(self._keys[index]))
        if found is None:
            raise BadImage("is not in the LMDB any more")
        return found

    def _begin(self) -> Any:
        if self._process != os.getpid():  # what another process opened cannot be used here
            import lmdb

            folder = Path(self._path).is_dir()
            self._file = lmdb.open(self._path, subdir=folder, readonly=True, create=False, lock=False, readahead=False)
            self._process = os.getpid()
        return self._file.begin()


def open_lmdb(path: str) -> LmdbImages:
    """Open the LMDB of a folder or file. Raises `UserError`."""
    return LmdbImages(str(Path(path).expanduser()))
