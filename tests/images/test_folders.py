"""Images of one's own: every format is read, every bad input is named."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from inmerge_wrap.errors import for_command_line
from inmerge_wrap.images import collection as image_collection
from inmerge_wrap.images import dicom as image_dicom
from inmerge_wrap.images import files as image_files
from inmerge_wrap.images import folders as image_folders
from inmerge_wrap.images import sets as image_sets
from inmerge_wrap.images.collection import ImageCollection, ImageFile, deal
from inmerge_wrap.images.files import DataError, decode, examine, range_of
from inmerge_wrap.images.finding import find_images
from inmerge_wrap.images.preparation import Preparation, Recipe, Seen
from inmerge_wrap.images.tables import numbered_rows, restored, safe, write_table


def ramp(height: int = 12, width: int = 10, top: int = 255, dtype: Any = np.uint8) -> np.ndarray:
    return np.linspace(0, top, height * width).reshape(height, width).astype(dtype)


def picture(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def fill(folder: Path, counts: dict[str, int], start: int = 0, name: str = "{n}.png") -> int:
    """Different images in class folders."""
    for label, count in counts.items():
        for n in range(count):
            save(folder / label / name.format(n=n), picture(start))
            start += 1
    return start


def opened(folder: Path, **settings: Any) -> tuple[ImageCollection, Preparation]:
    return image_folders.open_images(folder, size=8, **settings)[:2]


def dicom(path: Path, values: np.ndarray, **tags: Any) -> Path:
    """A DICOM file whose pixels are the values, with more tags on top."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 3 if values.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    bits = 8 * values.dtype.itemsize
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


# -- one file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".tiff", ".bmp"])
def test_grey_of_8_bits_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", ramp())
    assert np.array_equal(decode(path).to_bytes(None, override=False), ramp())
    assert not decode(path).colour


def test_colour_is_read_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    decoded = decode(save(tmp_path / "a.png", values))
    assert np.array_equal(decoded.values, values) and decoded.colour


def test_grey_stored_as_colour_counts_as_grey(tmp_path: Path) -> None:
    assert not decode(save(tmp_path / "a.png", np.dstack([ramp()] * 3))).colour


def test_jpeg_is_read(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 30, 30), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(flat).save(path, quality=95)
    assert np.abs(decode(path).values.astype(int) - flat).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
def test_other_modes_become_grey_or_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    image = Image.fromarray(ramp()).convert("RGB" if mode in ("CMYK", "P") else "L").convert(mode)
    image.save(tmp_path / "a.png" if mode in ("P", "LA") else path)
    values = decode(tmp_path / "a.png" if mode in ("P", "LA") else path).values
    assert values.dtype == np.uint8 and values.shape[:2] == (12, 10)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("top,white", [(255, 255), (900, 1023), (4000, 4095), (60000, 65535)])
def test_16_bits_are_scaled_by_the_bits_in_use(
    tmp_path: Path, suffix: str, top: int, white: int
) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(top=top, dtype=np.uint16))
    facts = examine(path)
    assert facts.kind == "integers" and facts.high == top
    found = range_of([facts], None)
    assert found == (0, white)
    shown = decode(path).to_bytes(found, override=False)
    expected = np.round(255 * (ramp(top=top, dtype=np.uint16) / white))
    assert shown.dtype == np.uint8 and np.array_equal(shown, expected)


def test_big_endian_tiff_is_read(tmp_path: Path) -> None:
    values = ramp(top=4000, dtype=np.uint16)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=">")
    assert np.array_equal(decode(tmp_path / "a.tif").values, values)


def test_deep_tiff_in_which_zero_is_white_is_refused(tmp_path: Path) -> None:
    """Pillow inverts one of 8 bits, as the standard says, and not one of 16."""
    tifffile = pytest.importorskip("tifffile")
    deep, flat = ramp(top=4000, dtype=np.uint16), ramp()
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="miniswhite")
    assert "in which 0 is white: invert its values" in str(examine(tmp_path / "a.tif").error)
    tifffile.imwrite(tmp_path / "b.tif", flat, photometric="miniswhite")
    assert np.array_equal(decode(tmp_path / "b.tif").values, 255 - flat)


def test_colour_of_16_bits_keeps_its_upper_half(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 2**16, (6, 5, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    assert np.array_equal(decode(tmp_path / "a.tif").values, values >> 8)
    tifffile.imwrite(tmp_path / "dark.tif", values >> 4, photometric="rgb")
    assert "uses only the lowest" in str(examine(tmp_path / "dark.tif").error)


def test_floats_between_0_and_1_need_no_range_and_others_do(tmp_path: Path) -> None:
    unit = examine(save(tmp_path / "a.tif", ramp(top=1, dtype=np.float32) * 0.9))
    assert range_of([unit], None) == (0, 1)
    units = examine(save(tmp_path / "b.tif", ramp(top=1, dtype=np.float32) * 2000 - 1000))
    with pytest.raises(DataError, match=r"1 images hold values .* give pixel_range=BLACK WHITE"):
        range_of([units], None)
    assert range_of([units], (-1000, 400)) == (-1000, 400)


def test_a_tiff_of_several_images_and_values_that_are_no_numbers_are_refused(
    tmp_path: Path,
) -> None:
    frames = [Image.fromarray(ramp()), Image.fromarray(ramp())]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert "holds 2 images" in str(examine(tmp_path / "a.tif").error)
    values = ramp(dtype=np.float32)
    values[0, 0] = np.nan
    assert "not finite" in str(examine(save(tmp_path / "b.tif", values)).error)


# -- DICOM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_is_that_of_the_standard(tmp_path: Path, function: str) -> None:
    """DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, after a rescaling by a half."""
    stored = ramp(top=4095, dtype=np.uint16)
    path = dicom(
        tmp_path / "a.dcm", stored, WindowCenter=600, WindowWidth=900, VOILUTFunction=function,
        RescaleSlope=0.5, RescaleIntercept=-100, BitsStored=12, HighBit=11,
    )  # fmt: skip
    x = stored / 2 - 100
    expected = {
        "LINEAR": np.clip((x - 599.5) / 899 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 600) / 900 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 600) / 900)),
    }[function]
    shown = decode(path).to_bytes(None, override=False)
    assert np.abs(shown - 255 * expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("window", [{}, {"WindowCenter": -999.5, "WindowWidth": 2001}])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_after_a_negative_slope_the_largest_rescaled_value_is_white(
    tmp_path: Path, kind: str, window: dict[str, float]
) -> None:
    stored = ramp(top=255)
    tags = {"RescaleSlope": -8, "RescaleIntercept": 40, "PhotometricInterpretation": kind}
    decoded = decode(dicom(tmp_path / "a.dcm", stored, **tags, **window))
    x = 40 - 8 * stored.astype(float)
    assert np.array_equal(decoded.values, x)
    expected = np.clip((x + 2000) / 2000, 0, 1) if window else (x + 2000) / 2040
    expected = 1 - expected if kind == "MONOCHROME1" else expected
    shown = decoded.to_bytes(None, override=False)
    assert np.abs(shown - 255 * expected).max() <= 0.5 + 1e-6


def test_equal_values_have_one_digest_whatever_type_holds_them(tmp_path: Path) -> None:
    plain = decode(save(tmp_path / "a.png", ramp())).digest
    for n, kind in enumerate((np.int32, np.float32)):
        assert decode(save(tmp_path / f"{n}.tif", ramp().astype(kind))).digest == plain
    assert decode(save(tmp_path / "c.tif", np.float32(ramp() + 0.5))).digest != plain
    deep = ramp(top=4095, dtype=np.uint16)
    stored = decode(save(tmp_path / "b.png", deep)).digest
    tags = {"BitsStored": 12, "HighBit": 11}
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": 0}  # which makes the values float64
    for number, more in enumerate(({}, rescaled, {"WindowCenter": 2000, "WindowWidth": 900})):
        assert decode(dicom(tmp_path / f"{number}.dcm", deep, **tags, **more)).digest == stored
    halves = [dicom(tmp_path / f"half{n}.dcm", deep, **tags, RescaleSlope=0.5, RescaleIntercept=n)
              for n in (0, 0, 1)]  # fmt: skip
    digests = [decode(path).digest for path in halves]
    assert digests[0] == digests[1] != digests[2] and digests[0] != stored


@pytest.mark.parametrize("rescaled", [{}, {"RescaleSlope": -2, "RescaleIntercept": 40}])
def test_what_is_bright_is_part_of_a_digest(tmp_path: Path, rescaled: dict[str, float]) -> None:
    deep = ramp(top=4095, dtype=np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11, **rescaled}
    inverted = {"PhotometricInterpretation": "MONOCHROME1", **tags}
    image = decode(dicom(tmp_path / "a.dcm", deep, **tags))
    negative = decode(dicom(tmp_path / "b.dcm", deep, **inverted))
    same = decode(dicom(tmp_path / "c.dcm", 4095 - deep, **inverted))
    assert negative.digest != image.digest == same.digest
    shown = [each.to_bytes(None, override=False) for each in (image, same)]
    assert np.abs(shown[0].astype(int) - shown[1]).max() <= 1


def test_a_small_dicom_that_claims_or_inflates_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    path = dicom(tmp_path / "a.dcm", ramp(), Rows=60000, Columns=60000)
    assert "it claims 60,000 x 60,000 pixels" in str(examine(path).error)
    data = pydicom.dcmread(dicom(tmp_path / "b.dcm", np.zeros((2000, 2000), np.uint8)))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "c.dcm", data)
    assert (tmp_path / "c.dcm").stat().st_size < 10_000
    assert examine(tmp_path / "c.dcm").error is None
    with open(tmp_path / "c.dcm", "ab") as file:
        file.write(b"\0\0")  # as a stream of an odd length is padded; it was read for ever
    assert examine(tmp_path / "c.dcm").error is None
    monkeypatch.setattr(image_dicom, "_MOST_BYTES", 2**20)
    monkeypatch.setattr(pydicom, "dcmread", lambda path: pytest.fail("it was inflated"))
    assert "it inflates to more than" in str(examine(tmp_path / "c.dcm").error)


@pytest.mark.parametrize("padding", [b"", b"\0", b"\0" * 70_000])
def test_what_follows_a_deflated_stream_does_not_matter(tmp_path: Path, padding: bytes) -> None:
    """The standard pads it to an even length (PS3.5, A.5), which depends on the file's content."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    data = pydicom.dcmread(dicom(tmp_path / "a.dcm", ramp()))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(tmp_path / "b.dcm", data)
    written = (tmp_path / "b.dcm").read_bytes()
    (tmp_path / "b.dcm").write_bytes(written + padding)
    assert examine(tmp_path / "b.dcm").error is None
    np.testing.assert_array_equal(decode(tmp_path / "b.dcm").values, ramp())


def test_dicom_is_shown_by_its_window_after_its_rescaling(tmp_path: Path) -> None:
    stored = ramp(top=4000, dtype=np.uint16)
    path = dicom(
        tmp_path / "a.dcm",
        stored,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=[40, 300],
        WindowWidth=[400, 1500],
    )
    decoded = decode(path)
    hounsfield = stored.astype(float) - 1024
    assert examine(path).kind == "windowed" and np.array_equal(decoded.values, hounsfield)
    expected = np.clip((hounsfield - 39.5) / 399 + 0.5, 0, 1)
    assert np.array_equal(decoded.to_bytes(None, override=False), np.round(255 * expected))
    lung = np.clip((hounsfield + 1000) / 1400, 0, 1)
    assert np.array_equal(decoded.to_bytes((-1000, 400), override=True), np.round(255 * lung))
    assert range_of([examine(path)], None) is None


@pytest.mark.parametrize(
    "name", ["ModalityLUTSequence", "RescaleSlope", "VOILUTSequence", "half a rescaling"]
)
def test_what_anonymisers_leave_empty_is_as_if_it_were_not_there(tmp_path: Path, name: str) -> None:
    stored = ramp(top=4095, dtype=np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, WindowCenter=1000)
    tags = {"RescaleSlope": 2} if name == "half a rescaling" else {name: None}
    other = dicom(tmp_path / "b.dcm", stored, BitsStored=12, HighBit=11, **tags)
    for file in (path, other):
        shown = decode(file).to_bytes(None, override=False)
        assert np.array_equal(shown, np.round(255 * (stored / 4095)))


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 40, "WindowWidth": 400}])
def test_a_rescale_slope_of_zero_is_refused(window: dict, tmp_path: Path) -> None:
    """It was shown as black, for the range of the bits had no width."""
    tags = {"RescaleSlope": 0, "RescaleIntercept": -1024, **window}
    path = dicom(tmp_path / "a.dcm", ramp(top=4095, dtype=np.uint16), BitsStored=12, **tags)
    assert "rescale slope is 0" in str(examine(path).error)


def test_dicom_without_a_window_shows_all_its_bits_and_monochrome1_is_inverted(
    tmp_path: Path,
) -> None:
    stored = ramp(top=4095, dtype=np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11}
    path = dicom(tmp_path / "a.dcm", stored, **tags)
    assert examine(path).kind == "unwindowed"
    shown = decode(path).to_bytes(None, override=False)
    assert np.array_equal(shown, np.round(255 * (stored / 4095)))
    negative = dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", **tags)
    assert np.array_equal(
        decode(negative).to_bytes(None, override=False), np.round(255 * (1 - stored / 4095))
    )


def test_a_range_in_place_of_windows_needs_no_warning_of_their_absence(tmp_path: Path) -> None:
    for n in range(12):
        values = picture(n).astype(np.uint16) * 16
        dicom(tmp_path / "ab"[n % 2] / f"{n}.dcm", values, BitsStored=12, HighBit=11)
    for pixel_range, told in ((None, True), ((0.0, 4000.0), False)):
        collection, _ = opened(tmp_path, pixel_range=pixel_range)
        said = any("DICOM files without a window" in text for text in collection.warnings)
        assert said == told


def test_signed_8_bit_and_colour_dicom(tmp_path: Path) -> None:
    signed = (ramp(top=2000, dtype=np.int32) - 1000).astype(np.int16)
    path = dicom(tmp_path / "a.dcm", signed, WindowCenter=0, WindowWidth=2000)
    expected = np.clip((signed + 0.5) / 1999 + 0.5, 0, 1)
    assert np.array_equal(decode(path).to_bytes(None, override=False), np.round(255 * expected))
    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    decoded = decode(dicom(tmp_path / "b.dcm", colours))
    assert np.array_equal(decoded.values, colours) and decoded.colour


def test_a_lookup_table_of_dicom_is_used(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 8]
    item.LUTData = [255 - n for n in range(256)]
    item.add_new("LUTData", "US", item.LUTData)
    path = dicom(tmp_path / "a.dcm", ramp(), VOILUTSequence=pydicom.Sequence([item]))
    assert np.array_equal(decode(path).to_bytes(None, override=False), 255 - ramp())


def test_dicom_is_recognised_without_a_suffix_and_several_frames_are_refused(
    tmp_path: Path,
) -> None:
    bare = dicom(tmp_path / "IM0001", ramp())
    uid = dicom(tmp_path / "1.2.840.113", ramp())
    assert image_files.is_image(bare) and image_files.is_image(uid)
    assert np.array_equal(decode(bare).to_bytes(None, override=False), ramp())
    siemens = dicom(tmp_path / "CT.0001.IMA", ramp())
    assert image_files.is_image(siemens)
    (tmp_path / "notes.IMA").write_text("text")
    assert not image_files.is_image(tmp_path / "notes.IMA")
    (tmp_path / "README").write_text("text")
    assert not image_files.is_image(tmp_path / "README")
    frames = np.stack([ramp(), ramp()])
    path = dicom(tmp_path / "b.dcm", frames[0], NumberOfFrames=2, PixelData=frames.tobytes())
    assert "holds 2 frames" in str(examine(path).error)


def test_without_pydicom_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dicom(tmp_path / "a" / "x.dcm", ramp())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r'pip install "inmerge-wrap\[dicom\]"'):
        examine(path)
    with pytest.raises(DataError, match=r"inmerge-wrap\[dicom\]"):
        opened(tmp_path)


# -- what the network sees -------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 28), (30, 61), (7, 7)])
def test_a_preparation_is_the_transform_of_timm(
    tmp_path: Path, crop_mode: str, channels: int, shape: tuple[int, int]
) -> None:
    from timm.data import create_transform

    values = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", values if channels == 3 else values[..., 0])
    ours = Preparation(24, channels, crop_mode)(path)
    transform = create_transform(
        (channels, 24, 24),
        crop_pct=1.0,
        crop_mode=crop_mode,
        interpolation="bicubic",
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    theirs = transform(Image.open(path).convert("RGB" if channels == 3 else "L"))
    assert ours.dtype == torch.uint8 and ours.shape == (channels, 24, 24)
    assert torch.equal(ours.float() / 255, theirs)


@pytest.mark.parametrize("shape", [(3, 400), (401, 3)])
def test_the_ends_of_a_strip_are_not_resized(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    path, resized = save(tmp_path / "a.png", values), []
    resize = v2.functional.resize
    monkeypatch.setattr(
        v2.functional, "resize", lambda image, *a: resized.append(resize(image, *a)) or resized[-1]
    )
    ours = Preparation(24, 1, "center")(path)
    assert max(resized[0].size) < 10 * 24
    whole = v2.functional.center_crop(resize(Image.open(path), [24], 3), [24, 24])
    assert torch.equal(ours, v2.functional.pil_to_tensor(whole))


def test_a_preparation_checks_itself() -> None:
    for wrong, message in (
        ({"size": 4}, "at least 8"),
        ({"channels": 2}, "1 or 3"),
        ({"crop_mode": "pad"}, "squash"),
        ({"pixel_range": (5, 5)}, "BLACK < WHITE"),
    ):
        with pytest.raises(DataError, match=message):
            Preparation(**{"size": 32, "channels": 1, **wrong})


# -- folders and tables ----------------------------------------------------------------------------


def test_class_folders_in_parts(tmp_path: Path) -> None:
    start = 0
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        start = fill(tmp_path / part, {"sick": count, "well": count}, start, "p/{n}.png")
    collection, preparation = opened(tmp_path)
    assert collection.classes == ("sick", "well") and collection.task == "multiclass"
    assert [len(collection.part(part)) for part in ("train", "val", "test")] == [12, 4, 6]
    assert collection.counts(collection.part("test")) == [3, 3]
    assert collection.part("train")[0].name == "train/sick/p/0.png"
    assert preparation == Preparation(8, 1)


def test_missing_parts_are_split_off_train_and_test_stays_as_it_is(tmp_path: Path) -> None:
    start = fill(tmp_path / "train", {"a": 20, "b": 20})
    fill(tmp_path / "test", {"a": 4, "b": 4}, start)
    collection, _ = opened(tmp_path)
    assert {image.name.split("/")[0] for image in collection.part("test")} == {"test"}
    assert collection.counts(collection.part("val")) == [4, 4]  # .15 / .85 of 20
    assert any("val was split" in note for note in collection.notes)


def test_class_folders_are_split_by_class_and_seed(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 40, "b": 20})
    first, _ = opened(tmp_path)
    assert first.counts(first.part("test")) == [6, 3] == first.counts(first.part("val"))
    again, _ = opened(tmp_path)
    other, _ = opened(tmp_path, split_seed=1)
    assert first == again and first.images != other.images
    assert any("no groups were named" in text for text in first.warnings)
    halves, _ = opened(tmp_path, shares={"train": 0.5, "val": 0.25, "test": 0.25})
    assert halves.counts(halves.part("train")) == [20, 10]


def test_groups_by_a_pattern_stay_together(tmp_path: Path) -> None:
    start = 0
    for patient in range(20):
        label = "ab"[patient % 2]
        for n in range(1 + patient % 4):
            save(tmp_path / label / f"patient{patient}_{n}.png", picture(start))
            start += 1
    collection, _ = opened(tmp_path, groups=r"patient(\d+)_")
    parts: dict[str, set[str]] = {}
    for image in collection.images:
        parts.setdefault(str(image.group), set()).add(str(image.part))
    assert len(parts) == 20 and all(len(found) == 1 for found in parts.values())
    assert not any("no groups were named" in text for text in collection.warnings)
    assert all(min(collection.counts(collection.part(p))) for p in ("train", "val", "test"))
    with pytest.raises(DataError, match=r"not found in 50 names: a/patient0_0.png"):
        opened(tmp_path, groups=r"case(\d+)")
    with pytest.raises(DataError, match="no column and no regular expression"):
        opened(tmp_path, groups="(")
    told = r"50 images with these labels are too few to split: .* none is left for val and test"
    with pytest.raises(DataError, match=told):
        opened(tmp_path, groups="p")  # which is found in every name
    table = write_table_of(tmp_path / "t.csv", [{"path": "a/patient0_0.png", "label": "a"}])
    with pytest.raises(
        DataError, match=r"is no column of a table \(it has path, label\), and as a"
    ):
        find_images(tmp_path, table=table, groups="owner")


def test_a_patient_whose_accent_is_written_in_two_ways_is_one(tmp_path: Path) -> None:
    for n in range(24):
        name = ("B\u00f6hm", "Bo\u0308hm", "Abel", "NA")[n % 4]
        save(tmp_path / "ab"[n // 4 % 2] / f"{name}_{n}.png", picture(n))
    collection = find_images(tmp_path, groups="([^/]+)_", marks=["B\u00f6hm|Abel|NA"])
    assert {image.group for image in collection.images} == {"B\u00f6hm", "Abel", None}
    assert {image.marks[0][1] for image in collection.images} == {"B\u00f6hm", "Abel", ""}


def write_table_of(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_of_one_label_with_groups(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(30):
        save(tmp_path / "all" / f"{n}.png", picture(n))
        rows.append({"path": f"all/{n}.png", "label": n % 3 + 8, "patient": f"p{n // 3}"})
    table = write_table_of(tmp_path / "t.csv", rows)
    collection, _ = opened(tmp_path, table=table, groups="patient")
    assert collection.classes == ("8", "9", "10")
    assert len({image.group for image in collection.images}) == 10
    with pytest.raises(DataError, match=r"names 'label', a column of split\.csv too"):
        opened(tmp_path, table=table, subgroups=["patient", "label"])
    for group in {image.group for image in collection.images}:
        assert len({image.part for image in collection.images if image.group == group}) == 1


def test_a_table_of_several_labels_and_parts(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(12):
        save(tmp_path / f"{n}.png", picture(n))
        marks = {"effusion": n % 2, "mass": "" if n == 0 else int(n % 3 == 0)}
        rows.append({"path": f"{n}.png", **marks, "part": ("train", "val", "test")[n // 4]})
    table = write_table_of(tmp_path / "t.csv", rows)
    collection, preparation = opened(tmp_path, table=table, labels=("effusion", "mass"))
    assert collection.task == "multilabel" and collection.classes == ("effusion", "mass")
    assert [len(collection.part(part)) for part in ("train", "val", "test")] == [4, 4, 4]
    images = image_sets.ImageSet(collection.part("train"), preparation)
    assert images[0][1].dtype == torch.float32
    assert images.labels[0].tolist()[0] == 0 and images.labels[0, 1].isnan()
    image_folders.write_split(collection, tmp_path / "split.csv")
    pixels, labels, read = image_folders.read_part(tmp_path / "split.csv", "test", size=8)
    assert pixels.shape == (4, 1, 8, 8) and read.classes == collection.classes
    assert torch.equal(labels, torch.tensor([image.label for image in collection.part("test")]))
    with pytest.raises(DataError, match=r"^labels names 'group', another column of split\.csv"):
        opened(tmp_path, table=table, labels=("effusion", "group"))
    for row in rows[4:8]:
        row |= {"effusion": "", "mass": ""}
    with pytest.raises(DataError, match="the part val holds no image of which a label is known"):
        table = write_table_of(tmp_path / "t.csv", rows)
        opened(tmp_path, table=table, labels=("effusion", "mass"))


def test_a_test_part_alone_is_read_in_the_order_of_the_models_classes(tmp_path: Path) -> None:
    fill(tmp_path / "test", {"b": 2, "a": 1})
    _, labels, read = image_folders.read_part(tmp_path, "test", size=8)
    assert labels.tolist() == [0, 1, 1] and read.classes == ("a", "b")
    with pytest.raises(DataError, match="has test but no val"):
        image_folders.read_part(tmp_path, "val", size=8)
    whole = write_table_of(tmp_path / "t.csv", [{"path": "test/a/0.png", "label": "a"}])
    for place in (tmp_path / "test", whole):
        with pytest.raises(DataError, match="is not split, so it has no part val"):
            image_folders.read_part(place, "val", size=8)
    names = ["b", "missing", "a"]
    for place in (tmp_path, tmp_path / "test"):
        _, labels, read = image_folders.read_part(place, "test", size=8, classes=names)
        assert labels.tolist() == [2, 0, 0] and read.classes == tuple(names)
    (tmp_path / "test" / "b" / "0.png").write_bytes(b"left out by the limit")
    settings = {"size": 8, "classes": names, "preparation": Preparation(8, 1)}
    _, labels, read = image_folders.read_part(tmp_path, "test", limit=2, **settings)
    assert labels.tolist() == [2, 0] and len(read.images) == 2
    with pytest.raises(DataError, match=r"no class of the model: b; its classes are a, c"):
        image_folders.read_part(tmp_path, "test", size=8, classes=["a", "c"])


@pytest.mark.parametrize(
    ("encoding", "delimiter"),
    [("utf-8-sig", ";"), ("utf-16", "\t"), ("cp1252", ";"), ("utf-8", ","), ("utf-8", ";")],
)
def test_tables_of_windows_are_read(tmp_path: Path, encoding: str, delimiter: str) -> None:
    lines = [delimiter.join(["path", "label"])]
    for n in range(30):
        save(tmp_path / "bilder" / f"{n}.png", picture(n))
        lines.append(delimiter.join([f"bilder\\{n}.png", ("gesund", "Ödem")[n % 2]]))
    lines += [delimiter] * 2  # as a spreadsheet ends where rows were emptied
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode(encoding))
    collection, _ = opened(tmp_path, table=tmp_path / "t.csv")
    assert collection.classes == ("gesund", "Ödem") and len(collection.images) == 30
    assert collection.images[3].name == "bilder/3.png"


def test_cells_that_a_spreadsheet_would_run_are_made_safe_and_read_back(tmp_path: Path) -> None:
    texts = ["=HYPERLINK(1)", "+1", "-a", "@x", "'=a", "'a", "a=b", "\tx", ""]
    assert [restored(safe(text)) for text in texts] == texts
    assert not any(safe(text).startswith(("=", "+", "-", "@", "\t")) for text in texts)
    write_table(tmp_path / "t.csv", ["name", "=size"], [[text, -1.5] for text in texts[:3]])
    rows = [row for _, row in numbered_rows(tmp_path / "t.csv")]
    assert rows[0] == {"name": "=HYPERLINK(1)", "=size": "-1.5"}
    assert (tmp_path / "t.csv").read_text().splitlines()[:2] == [
        "name,'=size", "'=HYPERLINK(1),-1.5",
    ]  # fmt: skip
    images: list[dict[str, object]] = []
    for n in range(20):
        save(tmp_path / f"{n}.png", picture(n))
        images.append({"path": f"{n}.png", "label": "=" + "ab"[n % 2]})
    collection, _ = opened(tmp_path, table=write_table_of(tmp_path / "x.csv", images))
    image_folders.write_split(collection, tmp_path / "split.csv")
    assert ",'=a," in (tmp_path / "split.csv").read_text()
    _, _, again = image_folders.read_part(tmp_path / "split.csv", "test", size=8)
    assert again.classes == ("=a", "=b")


def test_an_accent_of_two_characters_is_that_of_one(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(30):
        save(tmp_path / f"{n}.png", picture(n))
        rows.append({"path": f"{n}.png", "label": ("gesund", "\u00d6dem", "O\u0308dem")[n % 3]})
    collection, _ = opened(tmp_path, table=write_table_of(tmp_path / "t.csv", rows))
    assert collection.classes == ("gesund", "\u00d6dem")
    fill(tmp_path / "folders", {"gesund": 6, "O\u0308dem": 6})  # as a Mac writes names
    collection, _ = opened(tmp_path / "folders")
    assert collection.classes == ("gesund", "\u00d6dem")


@pytest.mark.parametrize("empty", ["nan", "NA", "", "#N/A", "n/a", "#NA", "NULL"])
def test_what_tables_write_for_nothing_is_neither_a_patient_nor_a_class(
    tmp_path: Path, empty: str
) -> None:
    rows: list[dict[str, object]] = []
    for n in range(30):
        save(tmp_path / f"{n}.png", picture(n))
        patient = empty if n < 8 else f"p{n}"
        rows.append({"path": f"{n}.png", "label": "ab"[n % 2], "patient": patient})
    table = write_table_of(tmp_path / "t.csv", rows)
    collection, _ = opened(tmp_path, table=table, groups="patient")
    assert sum(image.group is None for image in collection.images) == 8
    assert "8 images without a patient" in " ".join(collection.notes)
    rows[5]["label"] = empty
    with pytest.raises(DataError, match=r"without a label: row 7 \(5\.png\)"):
        opened(tmp_path, table=write_table_of(tmp_path / "t.csv", rows))


def test_equal_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label, label\n1.png,a,b\n")
    with pytest.raises(ValueError, match="has several columns 'label': keep one"):
        numbered_rows(tmp_path / "t.csv")


def test_cells_beyond_the_header_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n1.png,benign,\n2.png,benign, mild\n")
    with pytest.raises(ValueError, match=r"t\.csv, row 3 has more cells than the header: put"):
        numbered_rows(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text('path,label\n1.png,benign,\n2.png,"benign, mild"\n')
    assert [row["label"] for _, row in numbered_rows(tmp_path / "t.csv")] == [
        "benign",
        "benign, mild",
    ]


def test_a_site_is_held_out_whole(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(40):
        save(tmp_path / f"{n}.png", picture(n))
        rows.append({"path": f"{n}.png", "label": "ab"[n % 2], "hospital": "XYZ"[n % 3]})
    table = write_table_of(tmp_path / "t.csv", rows)
    collection, _ = opened(tmp_path, table=table, site=("hospital", "Y"))
    for image in collection.images:
        assert (image.part == "test") == (image.mark("hospital") == "Y")
    assert len(collection.part("test")) == 13 and len(collection.part("val")) > 0
    with pytest.raises(DataError, match="there are X, Y, Z; two are needed"):
        opened(tmp_path, table=table, site=("hospital", "W"))
    for row in rows[:4]:
        row["hospital"] = ""
    table = write_table_of(tmp_path / "t.csv", rows)
    collection, _ = opened(tmp_path, table=table, site=("hospital", "Y"))
    assert "4 images without a hospital, used in training" in " ".join(collection.warnings)
    by_name, _ = opened(tmp_path, table=table, site=(r"^\d", "1"))
    assert {image.name[0] for image in by_name.part("test")} == {"1"}


@pytest.mark.parametrize(
    "change,settings,message",
    [
        ({}, {"labels": ("diagnosis",)}, r"no column 'diagnosis': name it with labels"),
        ({}, {"path_column": "file"}, r"no column 'file': name it with path_column"),
        ({"label": ""}, {}, r"1 row without a label: row 3 \(1.png\)"),
        ({"path": "0.png"}, {}, r"of another row: row 3 \(0.png, as row 2\)"),
        ({"path": ""}, {}, r"1 row without a path: row 3"),
        ({"part": "trian"}, {}, r"unknown part: row 3 \('trian'\)"),
        ({"mark": "yes"}, {"labels": ("label", "mark")}, r"row 2 \(label is 'a'\)"),
        ({"part": ""}, {}, r"1 row without a part: row 3 \(1.png\)"),
        ({"path": "gone.png"}, {}, r"gone.png: .*No such file"),
    ],
)
def test_a_malformed_table_is_named_by_row(
    tmp_path: Path, change: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    rows: list[dict[str, object]] = []
    for n in range(9):
        save(tmp_path / f"{n}.png", picture(n))
        part = ("train", "val", "test")[n % 3]
        rows.append({"path": f"{n}.png", "label": "ab"[n % 2], "part": part, "mark": "1"})
    rows[1] |= change
    with pytest.raises(DataError, match=message):
        opened(tmp_path, table=write_table_of(tmp_path / "t.csv", rows), **settings)


def test_a_table_that_is_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read"):
        opened(tmp_path, table=tmp_path / "none.csv")
    (tmp_path / "t.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="a header and no rows"):
        opened(tmp_path, table=tmp_path / "t.csv")


# -- what is wrong ---------------------------------------------------------------------------------


def test_broken_files_are_named_counted_and_skipped_by_choice(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "a" / "text.png").write_text("no image")
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "empty.jpg").touch()
    with pytest.raises(DataError) as raised:
        opened(tmp_path)
    message = str(raised.value)
    assert message.startswith("3 of 27 images cannot be read:") and "skip_broken=True" in message
    for name in ("a/text.png: ", "b/short.png: ", "b/empty.jpg: "):
        assert name in message
    collection, _ = opened(tmp_path, skip_broken=True)
    assert len(collection.images) == 24
    assert any("3 of 27 images cannot be read and were left out" in n for n in collection.warnings)


def test_the_reason_of_a_broken_file_has_its_name_without_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"junk")
    reason = str(examine(path).error)
    assert "cannot identify image file 'broken.png'" in reason and str(tmp_path) not in reason


def test_a_dangling_link_says_where_it_leads(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"a/link.png: it is a link to .*gone.png, which does not"):
        opened(tmp_path)


def test_the_image_that_forbids_a_range_is_named(tmp_path: Path) -> None:
    for n in range(20):
        save(tmp_path / "ab"[n % 2] / f"{n}.png", ramp(top=4000 + n, dtype=np.uint16))
    save(tmp_path / "a" / "odd.tif", ramp(top=1, dtype=np.float32))
    with pytest.raises(DataError, match=r"20 of them whole .*, or convert or remove a/odd.tif"):
        opened(tmp_path)
    (tmp_path / "a" / "odd.tif").unlink()
    save(tmp_path / "b" / "minus.tif", ramp(top=900, dtype=np.int32) - 400)
    with pytest.raises(DataError, match=r"from -400 to .*or convert or remove b/minus.tif"):
        opened(tmp_path)


def test_long_lists_are_kept_whole(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 20, "b": 20})
    for n in range(9):
        (tmp_path / "a" / f"{n}.txt").write_text("text")
    collection, _ = opened(tmp_path)
    (note,) = [note for note in collection.notes if "ignored" in note]
    assert note.endswith("a/4.txt and 4 more (all of them in lists.txt).")
    assert dict(collection.lists)["9 files ignored, not images in a class"][8] == "a/8.txt"


def test_a_class_of_broken_files_alone_is_an_error_all_the_same(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 6})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"no image is left of b"):
        opened(tmp_path, skip_broken=True)


def test_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no images in class folders"):
        opened(tmp_path)
    fill(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("soon")
    with pytest.raises(DataError, match=r"no image in 1 class folder: c;"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images in it would be missing without a word."""
    fill(tmp_path / "data", {"a": 2, "a/visit2": 2, "b": 2})
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("visit2"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"a.visit2 cannot be read \(Permission denied\): make it"):
        find_images(tmp_path / "data")


def test_two_links_to_one_file_are_two_images_of_the_written_split(tmp_path: Path) -> None:
    save(tmp_path / "store" / "1.png", picture(0))
    for part in ("train", "val", "test"):
        fill(tmp_path / "data" / part, {"a": 1, "b": 1}, start=10 * len(part) + ord(part[0]))
    for name in ("one.png", "two.png"):
        (tmp_path / "data" / "test" / "a" / name).symlink_to(tmp_path / "store" / "1.png")
    collection, _ = opened(tmp_path / "data")
    image_folders.write_split(collection, tmp_path / "split.csv")
    _, labels, read = image_folders.read_part(tmp_path / "split.csv", "test", size=8)
    assert labels.tolist() == [0, 0, 0, 1]
    assert [image.path.name for image in read.images] == ["0.png", "one.png", "two.png", "0.png"]


def test_names_that_no_table_can_hold_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    start = fill(tmp_path, {"benign ": 12, "malign": 12})
    collection, _ = opened(tmp_path)
    image_folders.write_split(collection, tmp_path / "split.csv")
    *_, read = image_folders.read_part(tmp_path / "split.csv", "test", size=8)
    assert read.classes == collection.classes == ("benign", "malign")
    fill(tmp_path, {"NA": 12}, start)
    with pytest.raises(DataError, match="the class folder 'NA' is called what tables write for no"):
        opened(tmp_path)
    latin = os.fsencode(tmp_path / "NA" / "R") + b"\xf6ntgen.png"  # an umlaut of Windows
    os.rename(tmp_path / "NA" / "0.png", latin)
    with pytest.raises(DataError, match=r"1 name not in UTF-8: '.*R\\udcf6ntgen\.png'; rename"):
        opened(tmp_path)


def test_hidden_files_and_others_are_left_alone_and_named(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 12, "b": 12})
    for name in (".git", "System Volume Information", "$RECYCLE.BIN", "lost+found"):
        (tmp_path / name / "x").mkdir(parents=True)
    save(tmp_path / "a" / ".thumbs" / "0.png", ramp())
    (tmp_path / "a" / "notes.txt").write_text("text")
    save(tmp_path / "loose.png", ramp())
    save(tmp_path / ".5 mg" / "0.png", ramp())
    collection, _ = opened(tmp_path)
    assert len(collection.images) == 24
    assert "2 files ignored, not images in a class: loose.png, a/notes.txt." in collection.notes
    assert "1 folder with images ignored, as hidden: .5 mg." in collection.notes


@pytest.mark.parametrize(
    "folders,message",
    [
        (["val/a", "test/a"], "has test and val but no train"),
        (["Validation/a", "Testing/a"], "has Testing and Validation but no train"),
        (["train/a", "extra/a"], "train and also extra: is that a part, or a class"),
        (["Train/a", "Test/a", "Extra/a"], "Test and Train and also Extra"),
        (["train/a", "val/a", "validation/a"], "both look like val: keep one"),
        (["site1/a", "site1/b", "site2/a", "site2/b"], "hold the folders a, b: which of them"),
        (["sick/train", "sick/test", "well/train", "well/test"], "hold the folders test, train"),
    ],
)
def test_parts_with_other_names_are_not_taken_for_classes(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    for n, folder in enumerate(folders):
        save(tmp_path / folder / "0.png", picture(n))
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("Training", "Validation", "Test"),
        ("training", "valid", "testing"),
        ("TRAIN_SET", "dev-set", "test images"),
        ("01_train", "02_val", "03_test"),
    ],
)
def test_parts_are_read_in_any_case_and_wording(
    tmp_path: Path, names: tuple[str, str, str]
) -> None:
    start = 0
    for name in names:
        start = fill(tmp_path / name, {"sick": 4, "well": 4}, start)
    collection, _ = opened(tmp_path)
    assert collection.classes == ("sick", "well")
    assert [len(collection.part(part)) for part in ("train", "val", "test")] == [8, 8, 8]
    assert f"The folder {names[0]} was taken as the part train." in collection.notes


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    fill(tmp_path, {"Control": 10, "Test": 10})
    assert opened(tmp_path)[0].classes == ("Control", "Test")


def test_a_test_part_without_labels_is_said_to_be_of_no_use(tmp_path: Path) -> None:
    start = fill(tmp_path / "train", {"a": 20, "b": 20})
    for n in range(7):
        save(tmp_path / "test" / f"{n}.png", picture(start + n))
    collection, _ = opened(tmp_path)
    assert {image.name.split("/")[0] for image in collection.images} == {"train"}
    assert any("test holds 7 images and no class folders" in w for w in collection.warnings)
    assert not any("ignored" in note for note in collection.notes)


def test_one_class_and_classes_missing_in_a_part(tmp_path: Path) -> None:
    start = fill(tmp_path / "one", {"a": 9})
    with pytest.raises(DataError, match="there is one class, 'a'"):
        opened(tmp_path / "one")
    start = fill(tmp_path / "two" / "train", {"a": 4, "b": 4}, start)
    start = fill(tmp_path / "two" / "val", {"a": 2, "b": 2}, start)
    start = fill(tmp_path / "two" / "test", {"a": 2}, start)
    collection, _ = opened(tmp_path / "two")
    assert any("No image of b in test" in text for text in collection.warnings)
    assert any("Fewer than 10 test images of a (2)" in text for text in collection.warnings)
    fill(tmp_path / "two" / "test", {"c": 2}, start)
    with pytest.raises(DataError, match="no training image of c"):
        opened(tmp_path / "two")


def test_equal_images_in_two_parts_are_an_error_in_any_format(tmp_path: Path) -> None:
    start = 0
    for part in ("train", "val", "test"):
        start = fill(tmp_path / part, {"a": 3, "b": 3}, start)
    save(tmp_path / "train" / "a" / "same.png", ramp())
    save(tmp_path / "test" / "a" / "other.tif", ramp())
    found = (
        r"1 image with equal pixels in several parts: "
        r"train/a/same.png \(train\) = test/a/other.tif \(test\)"
    )
    with pytest.raises(DataError, match=found):
        opened(tmp_path)
    save(tmp_path / "test" / "a" / "other.tif", np.dstack([ramp()] * 3))  # grey, stored as colour
    with pytest.raises(DataError, match=found):
        opened(tmp_path)
    collection, _ = opened(tmp_path, allow_overlap=True)
    assert any("Figures are too good" in text for text in collection.warnings)


def test_equal_images_stay_in_one_part_when_we_split_and_labels_are_compared(
    tmp_path: Path,
) -> None:
    fill(tmp_path, {"a": 20, "b": 20})
    for n in range(8):
        save(tmp_path / "ab"[n % 2] / f"copy{n}.png", picture(n))  # of a/0.png to a/7.png
    collection, _ = opened(tmp_path)
    parts: dict[str, set[str]] = {}
    for image in collection.images:
        parts.setdefault(image.digest, set()).add(str(image.part))
    assert all(len(found) == 1 for found in parts.values())
    assert any("4 images with equal pixels and different labels" in w for w in collection.warnings)
    assert any("8 images there more than once" in w for w in collection.warnings)


def test_groups_in_two_parts_are_an_error(tmp_path: Path) -> None:
    start = 0
    for part in ("train", "val", "test"):
        start = fill(tmp_path / part, {"a": 3, "b": 3}, start, name=f"{part}{{n}}.png")
    save(tmp_path / "train" / "a" / "p7_0.png", picture(start))
    save(tmp_path / "test" / "b" / "p7_1.png", picture(start + 1))
    pattern = r"(p7|[a-z]+\d)[^/]*\.png"
    with pytest.raises(DataError, match=r"1 group in several parts: p7 \(train, test\)") as raised:
        opened(tmp_path, groups=pattern)
    assert raised.value.names == ("p7 (train, test)",), "for lists.txt, where there are many"
    collection, _ = opened(tmp_path, groups=pattern, allow_overlap=True)
    assert any("1 group in several parts: p7" in text for text in collection.warnings)


def test_shares_that_are_no_shares(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    for shares in ((0.7, 0.2, 0.2), (1.0, 0.0, 0.0)):
        with pytest.raises(DataError, match="shares"):
            opened(tmp_path, shares=dict(zip(("train", "val", "test"), shares, strict=True)))


def test_arguments_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    start = 0
    for part in ("train", "val", "test"):
        start = fill(tmp_path / part, {"a": 3, "b": 3}, start)
    with pytest.raises(DataError, match="shares would do nothing"):
        opened(tmp_path, shares={"train": 0.5, "val": 0.25, "test": 0.25})
    with pytest.raises(DataError, match="split_seed would do nothing"):
        opened(tmp_path, split_seed=0)
    with pytest.raises(DataError, match="pixel_range would do nothing"):
        opened(tmp_path, pixel_range=(0, 100))


# -- dealing out -----------------------------------------------------------------------------------


def test_every_label_gets_its_share_and_rare_ones_are_in_every_part() -> None:
    generator = np.random.default_rng(0)
    contents = np.zeros((600, 6))
    for unit in range(600):  # several images a unit, several labels an image, very unequal
        contents[unit, generator.choice(5, p=(0.6, 0.25, 0.1, 0.04, 0.01))] += 1 + unit % 3
        if unit % 7 == 0:
            contents[unit, 1] += 1
    contents[:3, 5] = 1  # a label of three units
    shares = [0.7, 0.15, 0.15]
    parts = np.array(deal(contents, shares, seed=3))
    assert set(parts) == {0, 1, 2}
    for label in range(6):
        got = np.array([contents[parts == part, label].sum() for part in range(3)])
        assert got.min() > 0
        if contents[:, label].sum() > 50:
            assert np.abs(got / got.sum() - shares).max() < 0.03
    assert deal(contents, shares, seed=3) == parts.tolist()
    assert deal(contents, shares, seed=4) != parts.tolist()


# -- the data set ----------------------------------------------------------------------------------


def test_kept_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    fill(tmp_path / "data", {"a": 6, "b": 6})
    collection, preparation = opened(tmp_path / "data")
    images = image_sets.ImageSet(collection.images, preparation)
    kept = image_sets.keep_pixels(images, tmp_path / "cache" / "all.npy")
    assert len(kept) == 12 and kept.pixels is not None
    for n in range(12):
        assert torch.equal(kept[n][0], images[n][0]) and kept[n][1] == images[n][1]
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / "all.npy"]
    # What a process that is spawned receives: the place of the pixels, not a copy of them.
    wide = image_sets.ImageSet(images.images, dataclasses.replace(preparation, size=200))
    sent = pickle.dumps(image_sets.keep_pixels(wide, tmp_path / "cache" / "wide.npy"))
    assert len(sent) < 12 * 200 * 200 / 10
    assert torch.equal(pickle.loads(sent)[3][0], wide[3][0])


def test_files_are_examined_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "data", {"a": 6, "b": 6})
    memory = tmp_path / "files.json"
    first, _ = opened(tmp_path / "data", memory=memory)
    read: list[Path] = []
    original = image_sets.examine
    monkeypatch.setattr(image_sets, "examine", lambda path: read.append(path) or original(path))
    again, _ = opened(tmp_path / "data", memory=memory)
    assert again == first and read == []
    changed = save(tmp_path / "data" / "a" / "0.png", picture(99, 9))
    other, _ = opened(tmp_path / "data", memory=memory)
    assert read == [changed] and other.fingerprint != first.fingerprint
    broken = tmp_path / "data" / "a" / "broken.png"
    broken.write_bytes(b"no image")
    for _ in range(2):  # its reader may have been missing
        read.clear()
        opened(tmp_path / "data", memory=memory, skip_broken=True)
        assert read == [broken]


def test_channels_and_sizes_of_mixed_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 6, "b": 6})
    save(tmp_path / "a" / "colour.png", np.random.default_rng(0).integers(0, 255, (5, 30, 3), "u1"))
    save(tmp_path / "b" / "deep.tif", ramp(20, 9, 4000, np.uint16))
    collection, preparation = opened(tmp_path)
    assert preparation.channels == 3 and preparation.pixel_range == (0, 4095)
    images = image_sets.ImageSet(collection.images, preparation)
    assert {tuple(pixels.shape) for pixels, _ in images} == {(3, 8, 8)}
    assert any("one side more than half as long again" in w for w in collection.warnings)
    assert opened(tmp_path, channels=1)[1].channels == 1


def test_names_are_counted_and_cut_short() -> None:
    assert image_collection.named(list("abc")) == "a, b, c"
    assert image_collection.named([str(n) for n in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
    assert image_collection.counted(1, "file") == "1 file"
    assert ImageFile(Path("a"), "a", (1.0, float("nan"), 1.0)).label[0] == 1


def test_an_error_names_arguments_in_python_options_on_the_command_line_and_names_as_they_are(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError) as raised:
        Preparation(size=4, channels=3)
    assert str(raised.value) == "size must be at least 8 pixels, got 4"
    assert for_command_line(raised.value).startswith("--size must")
    for name in ("<i>", "<b>x"):
        (tmp_path / name).mkdir()
    save(tmp_path / "a.png", ramp())
    (tmp_path / "a.png").rename(tmp_path / "<b>x" / "a.png")
    with pytest.raises(DataError, match="no image in 1 class folder: <i>") as raised:
        find_images(tmp_path)
    assert "folder: <i>" in for_command_line(raised.value)


@pytest.mark.parametrize(
    "edited,told",
    [
        ({"thresholds": [50, 40]}, r"thresholds must lie in \[0, 1\].*\(50, 40\)"),
        ({"thresholds": [float("nan"), 0.5]}, r"thresholds must lie in \[0, 1\]"),
        ({"std": [0]}, r"std is 0, but pixels in \[0, 1\] need \(0, 1\]"),
        ({"mean": [127]}, "mean is 127, .*for grey levels up to 255, pass 0.498"),
        ({"mean": [0.4, 0.5, 0.6]}, "mean must be 1 number, got 3"),
        ({"classes": ["a", "a"]}, "classes must have different names, got a, a"),
        ({"class_shares": [0.5]}, "class_shares must be 2 numbers, got 1"),
    ],
)
def test_what_someone_wrote_into_a_deployment_is_checked(
    edited: dict, told: str, tmp_path: Path
) -> None:
    """All of it gave wrong answers without a word."""
    recipe = Recipe(
        *(Preparation(32, 1), (0.5,), (0.2,), "multilabel", ("a", "b")), thresholds=(0.2, 0.9)
    )
    recipe.write(tmp_path)
    assert Recipe.read(tmp_path) == recipe
    content = json.loads((tmp_path / "preparation.json").read_text()) | edited
    (tmp_path / "preparation.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"preparation\.json cannot be used: {told}"):
        Recipe.read(tmp_path)


def test_a_deployment_survives_json_and_checks_itself(tmp_path: Path) -> None:
    seen = Seen(40, ("integers",), 0.0, 0.0, 4095.0, 900.0, 30, 200, (0.1, 0.4), (0.05, 0.2))
    several = Recipe(
        Preparation(32, 1, "center", (0.0, 4095.0), True),
        (0.5,), (0.2,), "multilabel", ("a", "b"), 1.7, (0.2, 0.9), seen, (0.3, 0.1),
        ("0123",),
    )  # fmt: skip
    several.write(tmp_path)
    assert Recipe.read(tmp_path) == several
    content = json.loads((tmp_path / "preparation.json").read_text())
    assert content["pixel_range"] == [0, 4095] and content["thresholds"] == [0.2, 0.9]
    logits = torch.tensor([[1.0, -2.0]])
    assert torch.allclose(several.probabilities(logits).float(), (logits / 1.7).sigmoid())
    one = Recipe(Preparation(32, 1), (0.5,), (0.2,), "multiclass", ("a", "b"), 0.5)
    assert torch.allclose(one.probabilities(logits).float(), (logits * 2).softmax(1))
    with pytest.raises(DataError, match="has one for each label"):
        Recipe(Preparation(32, 1), (0.5,), (0.2,), "multilabel", ("a", "b"))
    with pytest.raises(DataError, match=r"are \(0\.5,\), .* has one for each label: a, b"):
        dataclasses.replace(several, thresholds=(0.5,))
    (tmp_path / "preparation.json").write_text('{"size": 32}')
    with pytest.raises(DataError, match=r"preparation.json cannot be used: 'channels'|missing"):
        Recipe.read(tmp_path)
    with pytest.raises(DataError, match=r"no preparation\.json"):
        Recipe.read(tmp_path / "nowhere")
