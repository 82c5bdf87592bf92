"""Trainings on DICOM, NIfTI and GeoTIFFs: resumed to the same bits, and without a patient's data."""

import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from . import objectives

RNG = np.random.default_rng(0)


def scan(number: int, frames: int = 1) -> bytes:
    data, file = Dataset(), io.BytesIO()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID, data.PatientName = CTImageStorage, f"1.2.{number}", "Doe^Jane"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 56, 1, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = "1", "-1024", "40", "3000"
    data.NumberOfFrames = frames
    data.PixelData = RNG.integers(0, 4096, (frames, 40, 56), np.uint16).tobytes()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def film(number: int) -> bytes:
    return scan(number, frames=3)


def satellite_image(number: int) -> bytes:
    pixels, file = RNG.integers(-3000, 9000, (5, 140, 156), np.int16), io.BytesIO()
    pixels[:, : 5 * number] = -9999
    tag = (42113, "s", 0, "-9999", True)
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="separate", extratags=[tag])
    return file.getvalue()


def volume(number: int) -> bytes:
    values = RNG.integers(0, 3000, (90, 80, 3 + number), np.int16)
    return nibabel.Nifti1Image(values, np.diag([-1, 1, 4, 1])).to_bytes()


@pytest.mark.parametrize(
    ("make", "name", "channels", "crop"),
    [
        (scan, "IM{}", 1, "resized"),
        (film, "{}.dcm", 1, "resized"),
        (satellite_image, "{}.tif", 5, "resized"),
        (satellite_image, "{}.tif", 5, "pixels"),
        (volume, "{}.nii", 1, "resized"),
        (volume, "{}.nii", 1, "pixels"),
    ],
)
def test_a_training_resumes_to_the_same_bits(
    make: Any, name: str, channels: int, crop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / name.format(number)).write_bytes(make(number))
    objectives.check_resume(
        tmp_path,
        monkeypatch,
        data=str(images),
        channels=channels,
        mean="measure",
        std="measure",
        batch_size=2,
        crop=crop,
    )
    for path in (tmp_path / "whole").rglob("*"):
        assert path.is_dir() or b"Jane" not in path.read_bytes()
