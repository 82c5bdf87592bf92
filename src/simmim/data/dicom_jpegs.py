"""Decode JPEGs in DICOM files that neither pydicom nor Pillow reads, by imagecodecs: a plugin for pydicom.

GDCM reads them too, but a damaged file can abort the process there (`benchmarks/fuzz.py` found one in 300).
"""

import importlib.util
from typing import Any

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

_NAME = "imagecodecs"
_SYNTAXES = (JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless)
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, (_NAME,))  # pydicom asks for this name, and the next two
"""Packages that each transfer syntax needs."""


def is_available(uid: str) -> bool:
    """Return whether imagecodecs is installed."""
    return uid in _SYNTAXES and importlib.util.find_spec(_NAME) is not None


def decode_frame(frame: bytes, runner: Any) -> bytes:
    """Return the values of a JPEG, colours by pixel; tells `runner`, pydicom's, how many bits each takes."""
    import imagecodecs

    syntax = runner.transfer_syntax
    if syntax in (JPEGLSLossless, JPEGLSNearLossless):
        pixels = imagecodecs.jpegls_decode(frame)
    elif syntax == JPEGExtended12Bit:
        if runner.samples_per_pixel != 1:
            raise ValueError("colours of 12 bits are not read")
        pixels = imagecodecs.jpeg8_decode(frame)
    else:
        pixels = imagecodecs.jpegsof3_decode(frame)
    if pixels.shape[:2] != (runner.rows, runner.columns):
        raise ValueError("the JPEG has another size than the header says")
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    if pixels.ndim == 3:
        runner.set_option("planar_configuration", 0)
    return pixels.tobytes()


def register() -> None:
    """Add the plugin to pydicom's decoders, once."""
    for syntax in _SYNTAXES:
        decoder = get_decoder(syntax)
        if not any(_NAME in label for label in (*decoder.available_plugins, *decoder.missing_dependencies)):
            decoder.add_plugin(_NAME, (__name__, "decode_frame"))
