"""Decode DICOM files: greys by their modality and window, and colours, to 8 or 16 bits.

Formulas are those of DICOM PS3.3 C.11.1 (modality) and C.11.2 (window). pydicom parses and decompresses. Messages quote
nothing of a file but its transfer syntax and class, since all else may be about a patient.

Shapes: `H W` pixels, `C` channels.
"""

import importlib.util
import io
import logging
import os
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simmim.data.files import read_file, try_again
from simmim.data.picture import BadImage, Picture, check_size

DICOM_SUFFIXES = (".dcm", ".dicom")
_DEEPEST = np.iinfo(np.uint16).max
_GREYS, _COLOURS = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PREAMBLE = 132  # bytes before the first element
_META, _SYNTAX = 0x0002, 0x00020010  # group of the file's description; its transfer syntax
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_START = 1 << 16  # bytes in which tags are looked for, in a hundredth of the time that pydicom takes
_NUMBER_OF_FRAMES, _PIXEL_DATA = (b"\x28\0\x08\0", b"\0\x28\0\x08"), (b"\xe0\x7f\x10\0", b"\x7f\xe0\0\x10")
_LEAST = 8  # bytes of a frame in a file, that of an item of compressed ones
_ONCE = threading.Lock()
# All that is read of a file. Names, dates and places stay unread.
_TAGS = [
    "SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "EncryptedAttributesSequence",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
]  # fmt: skip


def may_be_dicom(name: str) -> bool:
    """Tell by its name whether a file may be DICOM: it ends so, in digits, or has no suffix."""
    _, dot, suffix = name.replace("\\", "/").rpartition("/")[2].rpartition(".")
    return name.lower().endswith(DICOM_SUFFIXES) or not dot or suffix.isdigit()


def count_frames(file: BinaryIO) -> int:
    """Count the frames of a DICOM file by its header; 1 where it is short of bytes for them. Raises `BadImage`."""
    with _NoPatientData():
        count = _number(_parse(file, tags=["NumberOfFrames"], stop_before_pixels=True), "NumberOfFrames", 1)
    size = file.seek(0, os.SEEK_END)
    return count if 1 <= count <= size // _LEAST else 1


def count_frames_of(path: str) -> int:
    """Count the frames of a file by its path; 1 where it is no DICOM file, or cannot be read."""

    def count() -> int:
        if not Path(path).is_file():
            return 1
        with Path(path).open("rb") as file:
            start = file.read(_START)
            if start[_PREAMBLE - 4 : _PREAMBLE] != b"DICM":
                return 1
            has_one = any(tag in start for tag in _PIXEL_DATA) and not any(tag in start for tag in _NUMBER_OF_FRAMES)
            return 1 if has_one else count_frames(file)

    try:
        return try_again(count)
    except (BadImage, OSError):
        return 1


def read_frame(path: str, frame: int) -> NDArray[Any]:
    """Read a frame, (H, W, C): uint8 or uint16, as `open_dicom` has it. Raises `BadImage`, or `OSError`."""
    return open_dicom(read_file(path), frame).read(1)


def open_dicom(raw: bytes, frame: int = 0) -> Picture:
    """Read the header of a DICOM file. Raises `BadImage`, also where its pixels cannot be decoded here.

    The picture is one of its frames. Greys: stored value → modality LUT, or slope and intercept → the file's first VOI
    LUT or window, or else the whole range of the stored bits → 0..65535, MONOCHROME1 inverted. They are uint8 if
    no more than 8 bits are stored, and nothing maps them. Colours are RGB, and have no window.
    """
    with _NoPatientData():
        file = _parse(io.BytesIO(raw))
        syntax = _check_readable(file)
        height, width = _number(file, "Rows"), _number(file, "Columns")
        kind = str(file.get("PhotometricInterpretation", ""))
        if kind not in (*_GREYS, *_COLOURS, "PALETTE COLOR"):
            raise BadImage("has a photometric interpretation that is not read; grey, RGB, YBR and palettes are")
        bands = 1 if kind in _GREYS else 3
        check_size(height, width, bands)
        bits = _number(file, "BitsStored")
        if not 1 <= bits <= 16:
            raise BadImage(f"stores {bits} bits a value; 1 to 16 are read")
        if _number(file, "HighBit", bits - 1) != bits - 1:
            raise BadImage("does not store its values in the low bits, which is not read")
        rules = _mapping(file, frame)
        if kind == "PALETTE COLOR":
            depth = _descriptor(file.RedPaletteColorLookupTableDescriptor)[2]
            deep = depth > 8
        else:
            depth, deep = bits, bits > 8 or (kind in _GREYS and bool(rules))

    def read(_: int) -> NDArray[Any]:
        with _NoPatientData():
            pixels = _decompress(file, syntax, frame)
            if kind in _GREYS:
                shares = _shares(pixels, file, rules, bits)
                shares = 1 - shares if kind == "MONOCHROME1" else shares
            else:
                if kind == "PALETTE COLOR":
                    pixels = _pydicom().pixels.apply_color_lut(pixels, file)
                shares = pixels / (2.0**depth - 1)
            shares = shares.reshape(height, width, bands)
            return np.rint(np.clip(shares, 0, 1) * (_DEEPEST if deep else 255)).astype(np.uint16 if deep else np.uint8)

    return Picture(height=height, width=width, bands=bands, dtype=np.dtype(np.uint16 if deep else np.uint8), read=read)


class _NoPatientData:
    """Turn pydicom's errors, which quote a file's values, into `BadImage` without them."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage):
            raise BadImage(f"is a damaged DICOM file ({type(error).__name__} in its header or pixel data)") from None


@cache
def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise BadImage("a DICOM file needs pydicom; pip install 'simmim[medical]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it quotes values, as its warnings do
    warnings.filterwarnings("ignore", module=r"pydicom")
    from simmim.data import dicom_jpegs

    with _ONCE:
        dicom_jpegs.register()
    return pydicom


def _parse(file: BinaryIO, tags: list[str] = _TAGS, **how: bool) -> Any:
    pydicom = _pydicom()
    file.seek(_PREAMBLE)
    elements = pydicom.filereader.data_element_generator(file, False, True, lambda tag, *_: int(tag) >> 16 != _META)
    if any(int(each.tag) == _SYNTAX and _DEFLATED in bytes(each.value or b"") for each in elements):
        # It could unpack to any size.
        raise BadImage("transfer syntax Deflated Explicit VR Little Endian is not read; unpack it, as by dcmconv +te")
    file.seek(0)
    return pydicom.dcmread(file, specific_tags=tags, **how)


def _check_readable(file: Any) -> Any:
    """Return the transfer syntax of a file whose pixels can be decoded. Raises `BadImage`."""
    pydicom = _pydicom()
    if "PixelData" not in file:
        if "EncryptedAttributesSequence" in file:
            raise BadImage("holds encrypted attributes and no pixel data; decrypt it")
        if "FloatPixelData" in file or "DoubleFloatPixelData" in file:
            raise BadImage("holds pixels as floats, which are not read; save them as float32 .tif or .npy")
        raise BadImage(f"a DICOM file without pixel data ({_known_name(file.get('SOPClassUID'))}); leave it out")
    syntax = file.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise BadImage("a DICOM file that names no transfer syntax; write it again, as by gdcmconv")
    name = _known_name(syntax)
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        raise BadImage(f"transfer syntax {name} is not read; convert the file, as by gdcmconv --raw") from None
    if not decoder.is_available:
        raise BadImage(f"transfer syntax {name} needs a decoder; pip install 'simmim[medical]'")
    return syntax


def _known_name(uid: Any) -> str:
    """Return the standard's name of a UID; what a file says itself is not repeated."""
    name = getattr(uid, "name", "")
    return "of an unknown kind" if not name or name == str(uid) else name


def _decompress(file: Any, syntax: Any, frame: int) -> NDArray[Any]:
    """Return the stored values of a frame, (H, W) or (H, W, 3), YBR as RGB."""
    try:
        return _pydicom().pixels.get_decoder(syntax).as_array(file, index=frame, raw=False)[0]
    except Exception as error:
        hint = "" if importlib.util.find_spec("imagecodecs") else ", or it needs pip install 'simmim[medical]'"
        raise BadImage(f"{_known_name(syntax)} pixel data cannot be decoded ({type(error).__name__}){hint}") from None


def _mapping(file: Any, frame: int) -> dict[str, Any]:
    """Return the attributes that map values to greys, by name, of the file or of a frame's functional groups.

    What maps nothing, a slope of 1 and an intercept of 0, is left out.
    """
    named: dict[str, Any] = {}
    groups = [file]
    for group, place in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if file.get(group) and file[group][place].get(macro):
                groups.append(file[group][place][macro][0])
    for part in groups:
        for name in ("ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction"):
            if part.get(name):
                named[name] = part.get(name)
        for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
            if part.get(name) not in (None, ""):
                named[name] = _first_number(part.get(name))
    if (named.get("RescaleSlope", 1), named.get("RescaleIntercept", 0)) == (1, 0):
        named.pop("RescaleSlope", None)
        named.pop("RescaleIntercept", None)
    if not {"WindowCenter", "WindowWidth"} <= set(named):
        for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
            named.pop(name, None)
    return named


def _shares(pixels: NDArray[Any], file: Any, rules: dict[str, Any], bits: int) -> NDArray[np.float64]:
    """Map stored values to shares (H, W) of the range that is shown, within 0..1 where they lie in it."""
    signed = _number(file, "PixelRepresentation", 0) == 1
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    values = np.clip(pixels, low, high).astype(np.float64)  # unused high bits may hold overlays
    if "ModalityLUTSequence" in rules:
        values, depth = _look_up(values, rules["ModalityLUTSequence"][0], signed)
        low, high = 0.0, 2.0**depth - 1
    elif "RescaleSlope" in rules or "RescaleIntercept" in rules:
        slope, intercept = rules.get("RescaleSlope", 1.0), rules.get("RescaleIntercept", 0.0)
        values = values * slope + intercept
        low, high = sorted((low * slope + intercept, high * slope + intercept))
    if "VOILUTSequence" in rules:
        values, depth = _look_up(values, rules["VOILUTSequence"][0], signed)
        return values / (2.0**depth - 1)
    if "WindowWidth" not in rules:
        return (values - low) / (high - low) if high > low else np.zeros_like(values)
    window = _pydicom().Dataset()
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 16, 0
    for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
        if name in rules:
            setattr(window, name, rules[name])
    return _pydicom().pixels.apply_windowing(values, window) / _DEEPEST


def _look_up(values: NDArray[Any], table: Any, signed: bool) -> tuple[NDArray[np.float64], int]:
    """Map values by a modality or VOI LUT (PS3.3 C.11.1.1); return them and the bits of its entries."""
    count, first, depth = _descriptor(table.LUTDescriptor)
    entries = _integers(table.LUTData, packed=count)[:count]
    if not len(entries) or not 1 <= depth <= 16:
        raise BadImage("has a lookup table that is not read")
    first -= 2**16 if signed and first >= 2**15 else 0
    return entries[np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)].astype(np.float64), depth


def _descriptor(value: Any) -> tuple[int, int, int]:
    """Return a lookup table's number of entries, the value that the first is for, and the bits of an entry."""
    count, first, depth = _integers(value).tolist()
    return count or 2**16, first, depth


def _integers(value: Any, packed: int = 0) -> NDArray[np.int64]:
    """Return 16-bit integers, which implicit VR leaves as bytes; those of `packed` bytes are 8 bits each."""
    if isinstance(value, bytes):
        return np.frombuffer(value, "u1" if len(value) == packed else "<u2").astype(np.int64)
    return np.array(value, np.int64).reshape(-1)


def _first_number(value: Any) -> float:
    number = float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)
    if not np.isfinite(number):
        raise BadImage("has a slope, intercept or window that is not finite")
    return number


def _number(file: Any, name: str, usual: int | None = None) -> int:
    """Return a header's whole number. Raises `BadImage` where there is none."""
    if file.get(name) is None and usual is not None:
        return usual
    try:
        return int(file.get(name))
    except (TypeError, ValueError):
        raise BadImage(f"has no usable number {name} in its header") from None
