"""DICOM files for `fuzz.py` to damage."""

import io
from typing import Any

import imagecodecs
import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)


def dicom_files(pixels: np.ndarray) -> dict[str, bytes]:
    """Write 16-bit pixels (H, W) with a window, plain and in each kind of compression, and frames with a VOI LUT."""
    small, lut = (pixels >> 8).astype(np.uint8), Dataset()
    lut.LUTDescriptor = [256, 0, 16]
    lut.add_new("LUTData", "US", list(range(0, 65536, 256)))
    window = {"WindowCenter": ["40", "300"], "WindowWidth": ["400", "1500"]}
    run_length = _image(pixels)
    run_length.compress(RLELossless)
    found = {
        "plain": _image(pixels, RescaleSlope="2", RescaleIntercept="-1024", **window),
        "frames": _image(np.stack([small, small[::-1]]), NumberOfFrames="2", VOILUTSequence=[lut]),
        "rle": run_length,
        "jpeg": _compressed(small, JPEGBaseline8Bit, imagecodecs.jpeg8_encode(small)),
        "lossless": _compressed(pixels, JPEGLosslessSV1, imagecodecs.ljpeg_encode(pixels)),
        "jpeg-ls": _compressed(pixels, JPEGLSLossless, imagecodecs.jpegls_encode(pixels)),
        "jpeg2000": _compressed(
            pixels, JPEG2000Lossless, imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", level=0)
        ),
    }
    return {name: _stored(made) for name, made in found.items()}


def _image(pixels: np.ndarray, **more: Any) -> Dataset:
    made, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta = meta
    made.SOPClassUID, made.SOPInstanceUID, made.PatientName = CTImageStorage, "1.2.3", "Doe^Jane"
    made.Rows, made.Columns = pixels.shape[-2:]
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.HighBit = made.BitsStored - 1
    made.PixelData = pixels.tobytes()
    for name, value in more.items():
        setattr(made, name, value)
    return made


def _compressed(pixels: np.ndarray, syntax: Any, frame: Any) -> Dataset:
    made = _image(pixels)
    made.file_meta.TransferSyntaxUID, made.PixelData = syntax, encapsulate([bytes(frame)])
    made["PixelData"].is_undefined_length = True
    return made


def _stored(made: Dataset) -> bytes:
    out = io.BytesIO()
    dcmwrite(out, made, enforce_file_format=True)
    return out.getvalue()
