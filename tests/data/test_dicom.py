"""What DICOM files that pydicom wrote come out as, against the standard's formulas, and what is said of broken ones."""

import io
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import simmim.data.dicom
from simmim.cli import main
from simmim.data.decode import decode, open_picture
from simmim.data.pages import say_pages
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, open_source

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 4096, (40, 56), np.uint16)
COLOURS = RNG.integers(0, 256, (40, 56, 3), np.uint8)
JPEGS = {
    JPEG2000Lossless: lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", level=0),
    JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    JPEGLSLossless: imagecodecs.jpegls_encode,
}
LOSSY = {JPEGExtended12Bit: lambda pixels: imagecodecs.jpeg8_encode(pixels, bitspersample=12, level=100)}
PATIENT = "Doe^Jane"


def dicom(pixels: np.ndarray, *, bits: int = 12, kind: str = "MONOCHROME2", syntax: Any = None, **more: Any) -> Dataset:
    """Make the data set of an image, (H, W), (H, W, 3) or (frames, H, W), with values of `bits` bits."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    made.PatientName, made.PatientID, made.PatientBirthDate = PATIENT, "4711", "19700101"
    colours = kind not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    made.Rows, made.Columns = pixels.shape[-3:-1] if colours else pixels.shape[-2:]
    if pixels.ndim == 3 and not colours:
        made.NumberOfFrames = len(pixels)
    made.SamplesPerPixel, made.PhotometricInterpretation = 3 if colours else 1, kind
    if colours:
        made.PlanarConfiguration = 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    for name, value in more.items():
        setattr(made, name, value)
    return made


def stored(data: Dataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def table(first: int, entries: list[int], bits: int, vr: str) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", vr, entries if vr == "US" else np.array(entries, "<u2").tobytes())
    return [item]


def read(data: Dataset) -> np.ndarray:
    """Return stored values (H, W, C), before they are brought to 0..255."""
    return open_picture(stored(data)).read(1)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_greys_keep_every_value(bits: int):
    pixels = np.arange(2**bits, dtype=np.uint16).reshape(-1, 64)
    found = read(dicom(pixels, bits=bits))[..., 0]
    np.testing.assert_array_equal(np.rint(found / 65535 * (2**bits - 1)), pixels)
    assert found.dtype == np.uint16 and found.max() == 65535


def test_the_package_gets_them_as_float_in_0_to_255():
    found = decode(stored(dicom(DEEP)), channels=1, dtype=np.float32)
    np.testing.assert_allclose(found[..., 0], DEEP / 4095 * 255, atol=255 / 65535)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, *JPEGS])
def test_greys_are_the_same_in_every_lossless_transfer_syntax(syntax: Any):
    data = dicom(DEEP, syntax=syntax if syntax == ImplicitVRLittleEndian else None)
    plain = read(dicom(DEEP))
    if syntax == RLELossless:
        data.compress(syntax)
    elif syntax != ImplicitVRLittleEndian:
        data = compressed(data, syntax)
    np.testing.assert_array_equal(read(data), plain)


def compressed(data: Dataset, syntax: Any) -> Dataset:
    """Put a JPEG of the frame in the place of its values."""
    data.PixelData = pydicom.encaps.encapsulate([(JPEGS | LOSSY)[syntax](data.pixel_array)])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax
    return data


def test_jpeg_of_12_bits_keeps_them():
    found = read(compressed(dicom(DEEP), JPEGExtended12Bit))[..., 0] / 65535 * 4095
    assert abs(found - DEEP).max() <= 2 < np.ptp(DEEP)


def test_a_big_endian_file_reads_the_same():
    data = dicom(DEEP, syntax=ExplicitVRBigEndian)
    data.PixelData = DEEP.astype(">u2").tobytes()
    np.testing.assert_array_equal(read(data), read(dicom(DEEP)))


def test_the_window_is_that_of_hounsfield_units():
    units = np.array([[-1200, -160, -159.5, 40, 239, 240, 3000]])
    pixels = ((units + 1024) / 0.5).astype(np.int16)
    data = dicom(pixels, bits=16, RescaleSlope="0.5", RescaleIntercept="-1024", WindowCenter="40", WindowWidth="400")
    # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5), within 0..1
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1) * 65535
    np.testing.assert_allclose(read(data)[..., 0], expected, atol=0.5)


def test_the_first_of_several_windows_is_taken():
    data = dicom(DEEP, WindowCenter=["1000", "300"], WindowWidth=["501", "40"])
    expected = np.clip((DEEP - 999.5) / 500 + 0.5, 0, 1) * 65535
    np.testing.assert_allclose(read(data)[..., 0], expected, atol=0.5)


def test_signed_values_without_a_window_take_their_whole_range():
    pixels = np.array([[-2048, 0, 2047]], np.int16)
    expected = np.array([0, 2048 / 4095 * 65535, 65535])
    data = dicom(pixels, RescaleSlope="2", RescaleIntercept="7")
    np.testing.assert_allclose(read(data)[0, :, 0], expected, atol=0.5)
    np.testing.assert_allclose(read(dicom(pixels, RescaleSlope="-2"))[0, :, 0], 65535 - expected, atol=0.5)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["US", "OW"])
def test_lookup_tables_are_applied_one_after_the_other(vr: str, syntax: Any):
    pixels = np.array([[9, 10, 11, 12, 40, 4000]], np.uint16)
    modality, grey = table(10, [100, 200, 300], 16, vr), table(100, list(range(256)), 8, vr)
    data = dicom(pixels, syntax=syntax, ModalityLUTSequence=modality, VOILUTSequence=grey)
    np.testing.assert_array_equal(read(data)[0, :, 0] / 257, [0, 0, 100, 200, 200, 200])


def test_monochrome1_is_inverted():
    np.testing.assert_array_equal(read(dicom(DEEP, kind="MONOCHROME1")), 65535 - read(dicom(DEEP)))


def test_eight_bits_stay_as_they_are():
    pixels = COLOURS[..., 0]
    assert read(dicom(pixels, bits=8)).dtype == np.uint8
    np.testing.assert_array_equal(read(dicom(pixels, bits=8))[..., 0], pixels)


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_is_read_in_either_layout(planar: int):
    data = dicom(COLOURS, bits=8, kind="RGB", PlanarConfiguration=planar)
    if planar:
        data.PixelData = np.ascontiguousarray(np.moveaxis(COLOURS, -1, 0)).tobytes()
    np.testing.assert_array_equal(decode(stored(data), channels=3, dtype=np.uint8), COLOURS)


def test_ybr_of_ultrasound_becomes_rgb():
    ybr = np.array([[[76, 85, 255], [150, 44, 21], [255, 128, 128]]], np.uint8)  # red, green, white by JFIF's formula
    found = read(dicom(ybr, bits=8, kind="YBR_FULL"))
    np.testing.assert_allclose(found[0], [[254, 0, 0], [0, 255, 1], [255, 255, 255]], atol=1)


def test_jpeg_ultrasound_reads_as_pillow_reads_the_jpeg():
    from PIL import Image

    smooth = Image.fromarray(COLOURS[:5, :7]).resize((56, 40))
    jpeg = io.BytesIO()
    smooth.save(jpeg, "JPEG", quality=95)
    data = dicom(np.asarray(smooth), bits=8, kind="YBR_FULL_422")
    data.PixelData = pydicom.encaps.encapsulate([jpeg.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    difference = read(data).astype(int) - np.asarray(Image.open(jpeg))
    assert abs(difference).max() <= 3  # YBR to RGB is rounded once more


def test_a_palette_becomes_rgb():
    data = dicom(np.array([[0, 1, 2]], np.uint8), bits=8, kind="PALETTE COLOR")
    for name, values in {"Red": [10, 20, 30], "Green": [1, 2, 3], "Blue": [255, 0, 9]}.items():
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [3, 0, 16])
        setattr(data, f"{name}PaletteColorLookupTableData", (np.array(values, "<u2") * 257).tobytes())
    np.testing.assert_array_equal(read(data)[0] // 257, [[10, 1, 255], [20, 2, 0], [30, 3, 9]])


def frames_of(folder: Path, data: Dataset, name: str = "a.dcm") -> ImageSource:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(stored(data))
    return open_source(str(folder))


def pixels_of(source: ImageSource, index: int) -> np.ndarray:
    return open_picture(source.read(index)).read(1)


@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
def test_every_frame_of_a_file_is_an_image(tmp_path: Path, name: str):
    frames = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    source = frames_of(tmp_path, dicom(frames), name)
    assert [Path(source.name(index)).name for index in range(len(source))] == [
        f"{name}#00{index}" for index in range(3)
    ]
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(pixels_of(source, index), read(dicom(frame)))
    assert say_pages(source) is None


def test_every_frame_of_a_compressed_file_is_an_image(tmp_path: Path):
    frames = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]])
    made = dicom(frames, syntax=JPEG2000Lossless)
    made.PixelData = pydicom.encaps.encapsulate([JPEGS[JPEG2000Lossless](frame) for frame in frames])
    made["PixelData"].is_undefined_length = True
    source = frames_of(tmp_path, made)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(pixels_of(source, index), read(dicom(frame)))


def test_each_frame_has_the_window_of_its_functional_group(tmp_path: Path):
    groups = []
    for centre in ("500", "2500"):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, "1001"
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    source = frames_of(tmp_path, dicom(np.stack([DEEP, DEEP]), PerFrameFunctionalGroupsSequence=groups))
    for index, centre in enumerate((500, 2500)):
        expected = read(dicom(DEEP, WindowCenter=str(centre), WindowWidth="1001"))
        np.testing.assert_array_equal(pixels_of(source, index), expected)


def test_a_file_that_claims_more_frames_than_its_bytes_hold_counts_as_one(tmp_path: Path):
    assert len(frames_of(tmp_path, dicom(DEEP, NumberOfFrames=10**9))) == 1


def test_files_of_one_frame_stay_as_they_are(tmp_path: Path):
    data = dicom(DEEP)
    assert frames_of(tmp_path, data).read(0) == stored(data)


def test_in_an_archive_the_first_frame_is_read_and_the_user_is_told(tmp_path: Path):
    with ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.dcm", stored(dicom(np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]]))))
    source = open_source(str(tmp_path / "a.zip"))
    np.testing.assert_array_equal(pixels_of(source, 0), read(dicom(DEEP)))
    assert "a.dcm has 3 (one file)" in (say_pages(source) or "")


def test_an_enhanced_file_has_its_rules_in_the_functional_groups():
    rescale, window, shared, frame = Dataset(), Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = "1", "-1000"
    window.WindowCenter, window.WindowWidth = "500", "1001"
    shared.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [rescale], [window]
    data = dicom(DEEP[None], SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=[frame])
    expected = np.clip((DEEP - 1000.0 - 499.5) / 1000 + 0.5, 0, 1) * 65535
    np.testing.assert_allclose(read(data)[..., 0], expected, atol=0.5)


def test_files_without_a_suffix_are_looked_at_where_no_other_file_is_an_image(tmp_path: Path):
    raw = stored(dicom(DEEP))
    for name in ("IM0002", "1.2.840.7", "DICOMDIR", "notes", "x.bak"):
        (tmp_path / name).write_bytes(b"\0" * 200 if name == "notes" else raw)
    source = open_source(str(tmp_path))
    assert [Path(source.name(index)).name for index in range(len(source))] == ["1.2.840.7", "IM0002"]
    (tmp_path / "a.dcm").write_bytes(raw)
    source = open_source(str(tmp_path))
    assert [Path(source.name(index)).name for index in range(len(source))] == ["a.dcm"]


def without_pixels() -> Dataset:
    data = dicom(DEEP)
    del data.PixelData
    return data


def encrypted() -> Dataset:
    data = without_pixels()
    data.EncryptedAttributesSequence = [Dataset()]
    return data


def video() -> Dataset:
    data = dicom(DEEP)
    data.PixelData = pydicom.encaps.encapsulate([b"1234"])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = MPEG2MPML
    return data


def cut() -> Dataset:
    data = dicom(DEEP)
    data.PixelData = data.PixelData[:-200]
    return data


BROKEN = {
    "without pixel data (CT Image Storage); leave it out": without_pixels,
    "holds encrypted attributes and no pixel data; decrypt it": encrypted,
    "transfer syntax MPEG2 Main Profile / Main Level is not read; convert the file": video,
    "transfer syntax Deflated Explicit VR": lambda: dicom(DEEP, syntax=DeflatedExplicitVRLittleEndian),
    "pixel data cannot be decoded (ValueError)": cut,
    "stores 32 bits a value; 1 to 16 are read": lambda: dicom(DEEP.astype(np.uint32), bits=32),
    "claims 60000 x 60000 pixels": lambda: dicom(DEEP, Rows=60_000, Columns=60_000),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_one_line_without_the_patient(message: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(BadImage) as caught:
        read(BROKEN[message]())
    said = str(caught.value) + "".join(capfd.readouterr())
    assert message in said and "\n" not in said
    assert not any(secret in said for secret in (PATIENT, "4711", "1970"))


def test_a_deflated_file_cannot_hide_that_it_is():
    data = dicom(DEEP, syntax=DeflatedExplicitVRLittleEndian)
    # Bytes of the element that names the syntax, in the value of one before it.
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    raw = stored(data).replace(b"1.2.3\0", b"\x02\0\x10\0UI", 1)
    assert raw.count(b"\x02\0\x10\0UI") == 2
    with pytest.raises(BadImage, match="Deflated Explicit VR Little Endian is not read"):
        open_picture(raw)


def test_a_file_without_a_transfer_syntax_is_told_so():
    raw = stored(dicom(DEEP)).replace(b"\x02\0\x10\0UI", b"\x02\0\x11\0UI", 1)
    with pytest.raises(BadImage, match="names no transfer syntax"):
        open_picture(raw)


def test_the_files_that_come_with_pydicom_read_as_its_own_functions_do():
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    compared = 0
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        data = pydicom.dcmread(path, force=True)
        try:
            found = open_picture(path.read_bytes()).read(1)
        except BadImage:
            continue
        if data.PhotometricInterpretation == "PALETTE COLOR":
            continue
        values, low, high = pixel_array(data, index=0), 0.0, 2.0**data.BitsStored - 1
        if data.SamplesPerPixel == 1:
            if data.PixelRepresentation:
                low, high = -(2.0 ** (data.BitsStored - 1)), 2.0 ** (data.BitsStored - 1) - 1
            low, high = (
                end * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0)) for end in (low, high)
            )
            values = apply_voi_lut(apply_modality_lut(values, data), data)[..., None]
        shares = np.clip((values - low) / (high - low), 0, 1)
        np.testing.assert_allclose(found, shares * np.iinfo(found.dtype).max, atol=0.51, err_msg=path.name)
        compared += 1
    assert compared >= 40


def test_a_value_that_pydicom_would_quote_is_not_told(capfd: pytest.CaptureFixture[str]):
    raw = stored(dicom(DEEP, RescaleSlope="1.25", RescaleIntercept="0")).replace(b"1.25", b"Jane")
    with pytest.raises(BadImage) as caught:
        open_picture(raw)
    assert "Jane" not in str(caught.value) + "".join(capfd.readouterr())


def test_a_missing_pydicom_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.dcm").write_bytes(stored(dicom(DEEP)))
    simmim.data.dicom._pydicom.cache_clear()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "a DICOM file needs pydicom; pip install 'simmim[medical]'" in said and said.count("\n") == 1


def test_a_missing_decoder_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    data = compressed(dicom(DEEP), JPEGLSLossless)
    read(data)
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLSLosslessDecoder, "_available", {})
    with pytest.raises(BadImage, match=r"syntax JPEG-LS Lossless .* needs a decoder; pip install 'simmim\[medical\]'"):
        read(data)
