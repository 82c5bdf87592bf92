"""NumPy arrays and .npy files as images."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.picture import BadImage, Picture, check_size


def open_array(pixels: NDArray[Any]) -> Picture:
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise BadImage(f"an array of shape {pixels.shape} is neither (H, W) nor (H, W, C)")
    if pixels.dtype.kind not in "buif":
        raise BadImage(f"an array of {pixels.dtype} holds no pixels")
    native = pixels.dtype.newbyteorder("=")  # a file may hold the other byte order
    pixels = pixels.reshape(*pixels.shape[:2], -1).astype(native, copy=False)
    height, width, bands = pixels.shape
    check_size(height, width, bands)
    return Picture(height=height, width=width, bands=bands, dtype=pixels.dtype, read=lambda _: pixels)


def open_npy(raw: bytes) -> Picture:
    # np.load would allocate the size in the header before it checks for the bytes.
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"version {version[0]}.{version[1]} of .npy is for arrays with named fields")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise BadImage("an array of Python objects is not read, as it could run code")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count * dtype.itemsize > len(raw) - file.tell():
        raise BadImage(f"the file ends before the {count} values of shape {shape} that it claims")
    values = np.frombuffer(raw, dtype, count, file.tell())
    return open_array(values.reshape(shape, order="F" if fortran else "C"))
