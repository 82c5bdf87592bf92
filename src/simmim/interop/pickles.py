"""Read PyTorch's `.pth` files without executing anything that they name.

A pickle is a program that may call anything importable. This reader builds plain containers, numbers and tensors only.
Objects of any other class (yacs' CfgNode, argparse's Namespace) become inert records, and a call of anything else
refuses the file. Nothing is imported on its behalf.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file of PyTorch before 1.6
_BFLOAT16 = "bfloat16"  # NumPy has no such type
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class UnsafePickleError(UserError):
    """The pickle asks to call something."""


class _NoCalls(type):
    def __call__(cls, *_args: Any, **_settings: Any) -> Any:
        raise UnsafePickleError(f"it asks to run {cls.__name__}, which no weights need")


class Record(dict[Any, Any], metaclass=_NoCalls):
    """Inert record of an object of an unknown class; attributes and items are both stored as items."""

    def __new__(cls, *_args: Any) -> "Record":
        return dict.__new__(cls)

    def append(self, item: Any) -> None:
        self[len(self)] = item

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.update(part)


@dataclass(frozen=True)
class Storage:
    """Location of the values of one or more tensors: a member of a zip file, or bytes of a legacy file."""

    key: str
    code: str
    count: int

    @property
    def itemsize(self) -> int:
        return 2 if self.code == _BFLOAT16 else np.dtype(self.code).itemsize


Read = Callable[[Storage], bytes]


@dataclass(frozen=True)
class StoredTensor:
    """Lazily read tensor; an optimiser's tensors are never read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    read: Read

    def array(self) -> NDArray[Any]:
        """Read the values; bfloat16 becomes float32. Raises `UserError` for a truncated file or an invalid extent."""
        numbers = (self.offset, *self.size, *self.stride)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if any(not isinstance(n, int) or n < 0 for n in numbers) or last >= self.storage.count > 0 < math.prod(
            self.size
        ):
            raise UserError(f"a tensor of {self.size} reaches beyond its {self.storage.count} stored numbers")
        if 0 in self.size:
            return np.zeros(self.size, np.float32)
        data = self.read(self.storage)
        if self.storage.code == _BFLOAT16:
            flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(data, self.storage.code)
        strides = [step * flat.itemsize for step in self.stride]
        return np.array(np.lib.stride_tricks.as_strided(flat[self.offset :], self.size, strides))


def read_pickle(path: Path) -> Any:
    """Read a `.pth` file of any PyTorch version, with a `StoredTensor` for each tensor.

    Raises `UserError` for a missing or damaged file, `UnsafePickleError` for one that would execute code.
    """
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{path} is empty; copy or download it again")
    try:
        with path.open("rb") as file:
            return _read_zip(path) if file.read(4) == b"PK\x03\x04" else _read_legacy(path)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} is refused: {error}") from None
    except EOFError:
        raise UserError(f"{path} is cut short or not a PyTorch checkpoint; copy or download it again") from None
    except Exception as error:  # a damaged pickle may break anything: missing members, types, the recursion limit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint: {reason}") from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        program = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
        if program is None:
            raise UserError("it is a zip file without data.pkl")
        root = program.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError("its numbers are big-endian")
        content = archive.read(program)

    def read(storage: Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            try:
                data = archive.read(f"{root}data/{storage.key}")
            except (KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"{path} is damaged: {error}") from None
        return _checked(data, storage, path)

    return _Unpickler(io.BytesIO(content), read).load()


def _read_legacy(path: Path) -> Any:
    places: dict[str, int] = {}

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(places[storage.key])
            return _checked(file.read(storage.count * storage.itemsize), storage, path)

    with path.open("rb") as file:
        if _Unpickler(file, read).load() != _LEGACY_MAGIC:
            raise UserError("it does not begin as one")
        _Unpickler(file, read).load()  # the version of the format
        if not _Unpickler(file, read).load()["little_endian"]:
            raise UserError("its numbers are big-endian")
        unpickler = _Unpickler(file, read)
        content = unpickler.load()
        for key in _Unpickler(file, read).load():
            places[key] = file.tell() + 8  # after the count of numbers
            file.seek(unpickler.storages[key].count * unpickler.storages[key].itemsize + 8, io.SEEK_CUR)
        if file.tell() > path.stat().st_size:
            raise UserError("it is cut short")
    return content


def _checked(data: bytes, storage: Storage, path: Path) -> bytes:
    if len(data) != storage.count * storage.itemsize:
        raise UserError(f"{path} is damaged: {len(data)} bytes of a storage of {storage.count} numbers")
    return data


class _Dtype:
    """NumPy dtype of a pickled scalar."""

    def __init__(self, code: str, *_: Any):
        if code not in {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} | {"b1"}:
            raise UnsafePickleError(f"it holds numbers of the unknown type {code}")
        self.code = code

    def __setstate__(self, _state: Any) -> None:
        """Ignore byte order and alignment: every machine that PyTorch supports has the same."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, read: Read):
        super().__init__(file, encoding="latin1")
        self._read = read
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        rebuild = {"_rebuild_tensor": self._tensor, "_rebuild_tensor_v2": self._tensor, "_rebuild_parameter": _first}
        if module == "torch._utils" and name in rebuild:
            return rebuild[name]
        harmless = {
            "collections.OrderedDict": OrderedDict,
            "collections.defaultdict": defaultdict,
            "__builtin__.set": set,
            "builtins.set": set,
            "_codecs.encode": _encode,
            "torch.Size": tuple,
            "torch.device": _word,
            "pathlib.PosixPath": _word,
            "pathlib.WindowsPath": _word,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
        }
        return harmless[origin] if origin in harmless else _NoCalls(origin, (Record,), {})

    def persistent_load(self, pid: Any) -> Storage:
        kind, code, key, _place, count, *view = pid
        if kind != "storage" or code not in _STORAGES.values() or any(part is not None for part in view):
            raise UserError(f"it keeps numbers as {kind} of {getattr(code, '__name__', code)}")
        return self.storages.setdefault(key, Storage(key, code, count))

    def _tensor(self, storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
        return StoredTensor(storage, offset, tuple(size), tuple(stride), self._read)


def _first(value: Any, *_: Any) -> Any:
    return value


def _word(*parts: Any) -> str:
    return "/".join(str(part) for part in parts)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # the one that pickles of bytes use
        raise UnsafePickleError(f"it asks to encode text as {encoding}")
    return text.encode(encoding)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.code)[0].item()
