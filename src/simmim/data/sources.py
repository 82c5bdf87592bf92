"""Where unlabelled images come from: a folder, a list of paths, packed shards, a Hugging Face data set, the emoji in
the package."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.data.decode import BadImage, Raw, open_picture
from simmim.data.names import Names
from simmim.data.packed.format import is_packed, open_packed
from simmim.errors import UserError

_SUFFIXES = ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .npy .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
SUFFIXES = tuple(_SUFFIXES.split())
"""The files of a folder that are taken for images."""

_LISTS = (".txt", ".lst", ".npz")  # files that hold or name many images
_WHOLE = "whole"  # the one part of a Hugging Face set that has no splits


class ImageSource(Protocol):
    """Images by number; `read` is called from several threads at once."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A path or an identity, as `bad_images.txt` lists it."""
        ...

    def read(self, index: int) -> Raw:
        """The image as stored. An `OSError` or a `ValueError` says that this image cannot be had."""
        ...


class PathList:
    """Image files by path, relative to `root`."""

    def __init__(self, names: Sequence[str | Path], root: str | Path = ""):
        self._names = names
        self._root = root

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(Path(self._root, self._names[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()


class Subset:
    """Some images of a source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: NDArray[np.integer]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> Raw:
        return self._source.read(int(self._indices[index]))


class DemoImages:
    """The emoji that come with the package, 64×64 RGB; names are `LABEL/CODEPOINT.webp`."""

    def __init__(self):
        archive = resources.files("simmim.data") / "demo.zip"
        with archive.open("rb") as file, zipfile.ZipFile(file) as zipped:
            # About 1 MB: held in memory, so that threads need not share an open file.
            self._files = [(name, zipped.read(name)) for name in sorted(zipped.namelist()) if "/" in name]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0]

    def read(self, index: int) -> bytes:
        return self._files[index][1]


class ArrayImages:
    """Images of one array (N, H, W) or (N, H, W, C)."""

    def __init__(self, images: NDArray[Any], name: str):
        if images.ndim not in (3, 4):
            raise UserError(f"array {name} has {images.ndim} dimensions; images are (N, H, W) or (N, H, W, C)")
        self._images = images
        self._name = name

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._name} {index}"

    def read(self, index: int) -> NDArray[Any]:
        return self._images[index]


class HuggingFaceImages:
    """The image column of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, column: str):
        import datasets

        self._dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"{self._column} {index}"

    def read(self, index: int) -> bytes:
        stored = self._dataset[int(index)][self._column]
        if stored is None:
            raise BadImage("the data set holds no image here")
        if stored["bytes"] is not None:
            return stored["bytes"]
        return Path(stored["path"]).read_bytes()


def open_source(data: str) -> ImageSource:
    """The images that `--data` names: a folder, a .txt or .lst of paths, an .npz, what `simmim pack` wrote (also by a
    URL of object storage), `hf:NAME_OR_PATH[:SPLIT]`, or `demo`.

    Raises a one-line `ValueError` where there is nothing to read.
    """
    if data == "demo":
        return DemoImages()
    if data.startswith("hf:"):
        return _open_hugging_face(data.removeprefix("hf:"))
    path = Path(data).expanduser()
    if "://" in data or is_packed(path):
        return open_packed(data)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_arrays(path) if path.suffix.lower() == ".npz" else _open_list(path)
    raise UserError(
        f"{data} does not exist; pass a folder of images or shards, a .txt list of paths, an .npz, hf:NAME or demo"
    )


def open_images(images: Sequence[str]) -> ImageSource:
    """Several image files, or one thing that `open_source` takes; a one-line `ValueError` likewise."""
    if not images:
        raise UserError("no image is given; name files, a folder, a list, hf:NAME or demo after the run")
    if len(images) == 1 and (not Path(images[0]).is_file() or Path(images[0]).suffix.lower() in _LISTS):
        return open_source(images[0])
    for image in images:
        if not Path(image).is_file():
            raise UserError(f"{image} is not a file; give image files, or one folder, list, hf:NAME or demo")
    return PathList(images)


def sniff(source: ImageSource, *, channels: int) -> np.dtype[Any]:
    """The dtype that the images want, uint8 or (deeper than 8 bits) float32, from the first ones that can be read.

    Raises a one-line `ValueError` where they don't have `channels` channels, or none can be read.
    """
    looked_at, deep, reason = 0, False, ""
    misfits: Counter[int] = Counter()
    for index in range(min(len(source), 100)):
        try:
            picture = open_picture(read_raw(source, index))
            picture.decode(channels=picture.channels, dtype=np.float32)
        except BadImage as error:
            reason = reason or f"{source.name(index)}: {error}"
            continue
        looked_at += 1
        deep |= picture.dtype not in (np.uint8, np.bool_)
        misfits[picture.channels] += not picture.fits(channels)
        if looked_at == 16:
            break
    if not looked_at:
        raise UserError(f"none of the first {min(len(source), 100)} images can be read, such as {reason}")
    if 2 * misfits.total() > looked_at:  # fewer are bad images, counted and listed as such
        found = misfits.most_common(1)[0][0]
        raise UserError(f"images have {found} channels, not {channels}: pass --channels {found}")
    return np.dtype(np.float32 if deep else np.uint8)


def read_raw(source: ImageSource, index: int) -> Raw:
    """The image as stored, or `BadImage` where it cannot be had."""
    try:
        return source.read(index)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage(" ".join(str(error).split())) from error


def _open_folder(folder: Path) -> PathList:
    try:
        names = find_images(folder)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error
    if not names:
        raise UserError(f"folder {folder} holds no images; files read end in {', '.join(SUFFIXES)}")
    return PathList(names, root=folder)


def find_images(root: Path) -> Names:
    """Image files in any depth, sorted, as paths relative to `root`; hidden files and folders are left out."""
    return Names(_walk(root, "", set()))


def _walk(root: Path, folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = Path(root, folder).stat()
    if (status.st_dev, status.st_ino) in seen:  # a symbolic link to a folder that was walked already
        return
    seen.add((status.st_dev, status.st_ino))
    found: list[str] = []
    with os.scandir(Path(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir(follow_symlinks=False):
                found.append(entry.name)
            elif entry.is_dir():
                found.append(f"{entry.name}/")
    found.sort()  # folders by their names with the slash: so whole paths are in order, without a list of all
    for name in found:
        if name.endswith("/"):
            yield from _walk(root, folder + name, seen)
        else:
            yield folder + name


def _open_list(path: Path) -> PathList:
    if path.suffix.lower() not in _LISTS:
        raise UserError(f"{path} is neither a folder nor a .txt or .lst of image paths; pass one of these")
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        names = Names(name for line in lines if (name := line.strip()) and not name.startswith("#"))
    if not names:
        raise UserError(f"list {path} names no images; write one path a line")
    source = PathList(names, root=path.parent)
    first = min(len(source), 100)
    if not any(Path(source.name(index)).is_file() for index in range(first)):
        raise UserError(
            f"none of the first {first} paths in {path} is a file, such as {source.name(0)}; "
            "write paths relative to the list's folder"
        )
    return source


def _open_arrays(path: Path) -> ArrayImages:
    arrays = read_npz(path, ("x_train", "images"))
    if not arrays:
        raise UserError(f"{path} has no array x_train or images; give the images one of these names")
    name, images = next(iter(arrays.items()))
    return ArrayImages(images, name)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those of the arrays `names` that an .npz holds. One-line `ValueError` where it is none, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays.files}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as .npz ({reason}); write it with numpy.savez") from error


def _open_hugging_face(name: str) -> HuggingFaceImages:
    path, split = name, ""
    if ":" in name and not Path(name).exists():
        path, _, split = name.rpartition(":")
    splits = load_hugging_face(path)
    if split and list(splits) == [_WHOLE]:
        raise UserError(f"data set hf:{path} has no splits; leave out :{split}")
    split = split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        raise UserError(f"data set hf:{path} has no split {split}; choose of {', '.join(map(str, splits))}")
    return HuggingFaceImages(splits[split], image_column(splits[split], name))


def load_hugging_face(path: str) -> dict[str, Any]:
    """The splits of a data set, by a directory that `save_to_disk` wrote or what `load_dataset` takes."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{path} needs the library datasets; pip install simmim[data]") from error
    saved = any(Path(path, file).exists() for file in ("state.json", "dataset_dict.json"))
    try:
        loaded: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # it raises whatever its many back ends do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set hf:{path} cannot be opened ({reason}); pass a name on the Hub or a folder"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(split): part for split, part in loaded.items()}
    return {_WHOLE: loaded}


def image_column(dataset: Any, name: str) -> str:
    """The column of a data set that holds images."""
    import datasets

    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"data set hf:{name} has no image column, only {', '.join(dataset.features)}; pass another")
    return "image" if "image" in columns else columns[0]
