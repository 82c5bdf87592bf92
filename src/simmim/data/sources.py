"""Sources of unlabelled images: the schemes that `--data` knows, and how to register another.

Shapes: `N` images, `H W` pixels, `C` channels.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.field_types import Flip
from simmim.config.frames import FRAMES
from simmim.data.archives import ARCHIVES, open_archives
from simmim.data.decode import open_picture
from simmim.data.files import CLIP_SUFFIXES, SOUND_SUFFIXES, SUFFIXES, PathList, open_folder, open_kind, open_list
from simmim.data.hugging_face import open_hugging_face
from simmim.data.key_value import open_lmdb
from simmim.data.packed.format import is_packed, open_packed
from simmim.data.picture import BadImage, Raw
from simmim.data.sounds import Clip, Sounds
from simmim.data.video.source import as_clips, check_frames, open_clips
from simmim.data.volumes import as_slices
from simmim.errors import UserError

_LISTS = (".txt", ".lst", ".npz", ".parquet", *ARCHIVES)  # files that hold or list many images
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_REMEDY = "pass a folder of images or shards, a .zip or .tar, a .txt list of paths, an .npz, hf:NAME or demo"


class ImageSource(Protocol):
    """Images by number. `read` is called from several threads at once.

    A source may have an attribute `defaults`, a `SourceDefaults`.
    """

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return a path or an identity, as `bad_images.txt` lists it."""
        ...

    def read(self, index: int) -> Raw:
        """Return the image as stored. An `OSError` or `ValueError` marks this image as unreadable."""
        ...


@dataclass(frozen=True, kw_only=True)
class SourceDefaults:
    """How a source's images are read unless an option says otherwise. `None`: as for photographs."""

    channels: int | None = None
    dtype: Literal["uint8", "float32"] | None = None
    """Dtype of the pixels, in 0..255 (default: float32 if any of the first images is deeper than 8 bits)."""
    crop_scale: tuple[float, float] | None = None
    """Range of a random crop's share of the image; with (1, 1) and the ratio (1, 1) images are seen whole."""
    crop_ratio: tuple[float, float] | None = None
    """Range of a random crop's width over its height, relative to those of the image size."""
    flip: Flip | None = None


def defaults_of(source: ImageSource) -> SourceDefaults:
    return getattr(source, "defaults", SourceDefaults())


def firsts_of(source: ImageSource) -> Sequence[int]:
    """Return the numbers of the first images of files: the source's `firsts`, where a file holds several."""
    return getattr(source, "firsts", range(len(source)))


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

    def behind(self, index: int) -> tuple[ImageSource, int]:
        """Return the source that an image is of, and its number there."""
        return self._source, int(self._indices[index])


class DemoImages:
    """The emoji in the package, 64×64 RGB. Names are `LABEL/CODEPOINT.webp`."""

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


_SCHEMES: dict[str, Callable[[str], ImageSource]] = {
    "audio": lambda rest: Sounds(open_kind(Path(rest).expanduser(), SOUND_SUFFIXES) or open_source(rest)),
    "demo": lambda _: DemoImages(),
    "hf": open_hugging_face,
    "lmdb": open_lmdb,
    "video": open_clips,
}


def register_source(scheme: str, open: Callable[[str], ImageSource]) -> None:
    """Let `--data SCHEME:REST` (and `SCHEME` alone) open `open(REST)`.

    `open` raises `simmim.errors.UserError` where there is nothing to read. A package that is installed registers its
    source for the command line by an entry point of the group `simmim.sources`, named like the scheme. Raises
    `UserError` for a scheme that is taken or not a word.
    """
    if not scheme.isidentifier():
        raise UserError(f"scheme {scheme!r} is not a word; use letters, digits and underscores")
    if scheme in _SCHEMES and _SCHEMES[scheme] is not open:
        raise UserError(f"scheme {scheme!r} is registered already; choose another name")
    _SCHEMES[scheme] = open


def open_source(data: str, frames: str = FRAMES) -> ImageSource:
    """Open the images that `--data` names.

    That is a registered scheme (`demo`, `hf:NAME_OR_PATH[:SPLIT]`, `lmdb:PATH`), a folder of images or of archives, a
    .zip or .tar, a .parquet, a .txt or .lst of paths, an .npz, an image, or a directory that `simmim pack` wrote, also
    by a URL of object storage. Sounds come likewise, and with `audio:` before any of these whatever their names. Clips
    come as a folder, a list or one of them, or by `video:`; `frames` chooses their images, and is refused where there
    are none. Raises `UserError` if there is nothing to read.
    """
    source = _open(data, frames)
    check_frames(frames, source, data)
    return source


def _open(data: str, frames: str) -> ImageSource:
    check_there(data)
    scheme, _, rest = data.partition(":")
    if scheme == "video":
        return open_clips(rest, frames)
    if open_scheme := _find_scheme(scheme):
        return open_scheme(rest)
    path = Path(data).expanduser()
    if "://" in data or is_packed(path):
        return open_packed(data)
    if archives := open_archives(path):
        return archives
    if path.is_dir():
        return _as_images(open_folder(path), frames)
    if path.name.lower().endswith(SUFFIXES) and path.is_file():  # a scene, a volume, a film
        return _as_images(PathList([path]), frames)
    suffix = path.suffix.lower()
    if suffix in CLIP_SUFFIXES and path.is_file():
        return as_clips(PathList([path]), frames)
    if not path.is_file() or suffix not in _LISTS:
        raise UserError(
            f"{path} is neither a folder, nor an archive, nor a list of image paths, nor an image by its suffix; "
            f"{_REMEDY}"
        )
    if suffix == ".parquet":
        return open_hugging_face(str(path))
    return _open_arrays(path) if suffix == ".npz" else _as_images(open_list(path), frames)


def _as_images(files: PathList, frames: str) -> ImageSource:
    """Return the frames of clips, the slices of volumes, or files of other kinds as they are."""
    found = as_clips(files, frames)
    return as_slices(files) if isinstance(found, PathList) else found


def check_there(data: str, remedy: str = _REMEDY) -> None:
    """Raise `UserError` if `--data` names neither a scheme, nor a URL, nor a path that is there, or an archive.

    Opens nothing. `remedy` says what to give.
    """
    scheme, _, rest = data.partition(":")
    if _find_scheme(scheme) or "://" in data:
        return
    refuse_archive(data, _COMPRESSED)
    if Path(data).expanduser().exists():
        return
    if rest and scheme.isidentifier():
        raise UserError(
            f"scheme {scheme} of {data} is not known; use one of {', '.join(_SCHEMES)}, or simmim.register_source"
        )
    raise UserError(f"{data} does not exist; {remedy}")


def refuse_archive(data: str, suffixes: tuple[str, ...] = (*ARCHIVES, *_COMPRESSED)) -> None:
    """Raise `UserError` for a file that holds others and cannot be read as it is, by its name."""
    path = Path(data).expanduser()
    if path.is_file() and path.name.lower().endswith(suffixes):
        raise UserError(
            f"{data} is an archive whose files cannot be read one by one here; unpack it and give the folder"
        )


def _find_scheme(name: str) -> Callable[[str], ImageSource] | None:
    if name not in _SCHEMES and name.isidentifier():
        for found in metadata.entry_points(group="simmim.sources", name=name):
            register_source(name, found.load())
    return _SCHEMES.get(name)


def open_files(images: Sequence[str], frames: str = FRAMES) -> ImageSource:
    """Open several image files, or whatever one thing `open_source` takes. Raises `UserError` likewise.

    `frames` chooses those of clips, and may be there for images.
    """
    check_files(images)
    return _open(images[0], frames) if _is_set(images) else _as_images(PathList(images), frames)


def check_files(images: Sequence[str]) -> None:
    """Raise `UserError` where `open_files` would find nothing. Opens nothing."""
    if not images:
        raise UserError("no image is given; name files, a folder, a list, hf:NAME or demo after the run")
    if _is_set(images) and not images[0].lower().endswith((*SUFFIXES, *CLIP_SUFFIXES, *SOUND_SUFFIXES)):
        check_there(images[0])
        return
    for image in images:
        if not Path(image).exists():
            raise UserError(f"{image} does not exist; give image files, or one folder, list, hf:NAME or demo")
        if len(images) > 1 and not Path(image).is_file():
            raise UserError(f"{image} is not a file; give image files, or one folder, list, hf:NAME or demo")


def _is_set(images: Sequence[str]) -> bool:
    """Tell whether this is one thing that holds images, and not files."""
    return len(images) == 1 and (not Path(images[0]).is_file() or Path(images[0]).suffix.lower() in _LISTS)


def sniff(source: ImageSource, *, channels: int, trained: bool = False) -> np.dtype[Any]:
    """Look at the first readable images: uint8, or float32 if any of them is deeper than 8 bits (sounds: int16, 16).

    One image of each file is looked at before others. A dtype among the source's defaults decides instead. Raises
    `UserError` if most do not have `channels` channels, or none can be read. `trained`: an encoder decides on these.
    """
    looked_at, deep, reason, plain = 0, False, "", np.dtype(np.uint8)
    misfits: Counter[int] = Counter()
    first = min(len(source), 100)
    for index in dict.fromkeys((*firsts_of(source)[:100], *range(first))):
        try:
            picture = open_picture(read_raw(source, index))
            picture.check()
        except BadImage as error:
            reason = reason or f"{source.name(index)}: {error}"
            continue
        looked_at += 1
        plain = np.dtype(np.int16 if isinstance(picture, Clip) else np.uint8)
        deep |= picture.dtype not in (plain, np.bool_)
        misfits[picture.channels] += not picture.fits(channels)
        if looked_at == 16:
            break
    if not looked_at:
        raise UserError(f"none of the first {first} images can be read, such as {reason}")
    if 2 * misfits.total() > looked_at:  # fewer are bad images, counted and listed as such
        found = misfits.most_common(1)[0][0]
        remedy = f"give images of {channels}, or another encoder" if trained else f"pass --channels {found}"
        raise UserError(f"images have {found} channels, not {channels}: {remedy}")
    return np.dtype(defaults_of(source).dtype or (np.float32 if deep else plain))


def read_raw(source: ImageSource, index: int) -> Raw:
    """Return the image as stored. Raises `BadImage` if it cannot be read."""
    try:
        return source.read(index)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage(" ".join(str(error).split())) from error


def _open_arrays(path: Path) -> ArrayImages:
    arrays = read_npz(path, ("x_train", "images"))
    if not arrays:
        raise UserError(f"{path} has no array x_train or images; give the images one of these names")
    name, images = next(iter(arrays.items()))
    return ArrayImages(images, name)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Load those of the arrays `names` that an .npz holds. Raises `UserError` if it is damaged or no .npz."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names if name in arrays.files}
        if wrong := next((name for name, array in found.items() if not isinstance(array, np.ndarray)), None):
            raise ValueError(f"{wrong} is no array")
        return found
    except Exception as error:  # damaged files raise arbitrary errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as .npz ({reason}); write it with numpy.savez") from error
