"""Folders of images, against what was written into them and what timm makes of them."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from inmerge_wrap.images.files import decode
from inmerge_wrap.images.folders import read_part
from inmerge_wrap.images.labelled import ImageFolder, fit_images

CONFIG = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bicubic"}


def picture(seed: int, shape: tuple[int, ...] = (16, 16, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(folder: Path, name: str, array: np.ndarray, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name, **options)
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        save(tmp_path / "cat", f"{index}.png", picture(index))
    for index in range(2):
        save(tmp_path / "ant" / "more", f"{index}.png", picture(10 + index))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_images_come_class_by_class_with_their_pixels(folder: Path) -> None:
    data = ImageFolder(folder, config=CONFIG)
    assert data.classes == ["ant", "cat"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    for index, seed in enumerate([10, 11, 0, 1, 2]):
        pixels, label = data[index]
        expected = torch.from_numpy(picture(seed)).permute(2, 0, 1) / 255
        assert torch.equal(pixels, expected) and label == data.labels[index]


def test_a_split_is_taken_where_there_is_one(folder: Path) -> None:
    for name in ("ant", "cat"):
        save(folder / "val" / name, "only.png", picture(20))
    part = ImageFolder(folder, config=CONFIG, split="val")
    assert len(part) == 2 and part.part == "val"
    whole = ImageFolder(folder / "val", config=CONFIG)
    assert len(whole) == 2 and whole.part == "all"
    with pytest.raises(ValueError, match="holds no folder test: it has val"):
        ImageFolder(folder, config=CONFIG)
    with pytest.raises(ValueError, match="holds no folder train: it is not split"):
        ImageFolder(folder / "val", config=CONFIG, split="train")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("Val", "TEST")])
def test_parts_are_no_classes_whatever_they_are_called(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for seed, name in enumerate(names):
        for label in ("ant", "cat"):
            save(tmp_path / name / label, "only.png", picture(seed))
    data = ImageFolder(tmp_path, config=CONFIG)
    assert data.classes == ["ant", "cat"] and data.part == "test"
    assert {path.parts[-3] for path in data.paths} == {names[1]}
    pixels, labels, collection = read_part(tmp_path, "test", size=16)
    assert len(pixels) == len(labels) == 2 and collection.images[0].part == "test"


def test_labels_follow_the_order_of_the_model(folder: Path) -> None:
    data = ImageFolder(folder, config=CONFIG, classes=["dog", "cat", "ant"])
    assert data.labels.tolist() == [2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"not classes of the model: ant.*classes are dog, cat"):
        ImageFolder(folder, config=CONFIG, classes=["dog", "cat"])


def test_a_class_has_one_name_whichever_way_its_accent_is_written(tmp_path: Path) -> None:
    written = {form: unicodedata.normalize(form, "Ödem") for form in ("NFC", "NFD")}
    for seed, name in enumerate(written.values()):
        save(tmp_path / name, f"{seed}.png", picture(seed))
    for names in (None, [written["NFC"]], [written["NFD"]]):
        data = ImageFolder(tmp_path, config=CONFIG, classes=names)
        assert data.classes == [written["NFC"]] and len(data) == 2
        _, labels, found = read_part(tmp_path, "test", size=16, classes=names)
        assert found.classes == (written["NFC"],) and labels.tolist() == [0, 0]


def test_images_are_resized_and_cropped_as_timm_does(tmp_path: Path) -> None:
    path = save(tmp_path / "a", "wide.png", picture(0, (40, 60, 3)))
    config = {"input_size": (3, 16, 24), "crop_pct": 0.8, "interpolation": "bilinear"}
    pixels, _ = ImageFolder(tmp_path, config=config)[0]
    stock = timm.data.create_transform((3, 16, 24), interpolation="bilinear", crop_pct=0.8)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    torch.testing.assert_close((pixels - mean) / std, stock(Image.open(path)))


def test_every_depth_of_bits_and_colour_is_read(tmp_path: Path) -> None:
    grey = picture(0, (16, 16))
    save(tmp_path / "a", "1_grey.png", grey)
    save(tmp_path / "a", "2_deep.png", grey.astype(np.uint16) * 257)
    save(tmp_path / "a", "3_alpha.png", np.dstack([picture(1), np.full((16, 16), 7, np.uint8)]))
    for channels in (1, 3):
        data = ImageFolder(tmp_path, config={**CONFIG, "input_size": (channels, 16, 16)})
        expected = (torch.from_numpy(grey) / 255).expand(channels, -1, -1)
        assert torch.equal(data[0][0], expected) and torch.equal(data[1][0], expected)
        assert data[2][0].shape == (channels, 16, 16)


def test_a_photograph_lying_on_its_side_is_put_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    save(tmp_path / "a", "side.png", picture(0), exif=exif)
    upright = np.rot90(picture(0), k=-1).copy()
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 255
    assert torch.equal(ImageFolder(tmp_path, config=CONFIG)[0][0], expected)
    assert np.array_equal(decode(tmp_path / "a" / "side.png").values, upright)  # so it is trained


def test_fractions_are_read_where_black_and_white_are_known(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    save(tmp_path / "a", "fractions.tif", values)
    (shown, _), *_ = ImageFolder(tmp_path, config={**CONFIG, "input_size": (1, 16, 16)})
    torch.testing.assert_close(shown[0], torch.from_numpy(values), atol=1e-3, rtol=0)
    save(tmp_path / "a", "fractions.tif", values * 300)
    with pytest.raises(ValueError, match=r"fractions\.tif .* fractions outside of \[0, 1\]"):
        ImageFolder(tmp_path, config=CONFIG)[0]


def test_a_limit_takes_images_of_all_classes(folder: Path) -> None:
    assert ImageFolder(folder, config=CONFIG, limit=2).labels.tolist() == [0, 1]
    assert len(ImageFolder(folder, config=CONFIG, limit=99)) == 5


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG but no more")
    data = ImageFolder(folder, config=CONFIG)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        data[len(data) - 1]


def test_a_folder_without_images_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match=r"test/CLASS/\*\.png or CLASS/\*\.png"):
        ImageFolder(tmp_path, config=CONFIG)


def test_grey_images_are_repeated_for_a_network_of_colours() -> None:
    grey = torch.rand(2, 1, 8, 8)
    assert torch.equal(fit_images(grey, 3), grey.repeat(1, 3, 1, 1))
    assert fit_images(grey, 1, (4, 6)).shape == (2, 1, 4, 6)
    with pytest.raises(ValueError, match="1 channels and the network reads 4"):
        fit_images(grey, 4)


def test_a_squashed_image_is_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "a", "wide.png", picture(0, (40, 60, 3)))
    pixels, _ = ImageFolder(tmp_path, config={**CONFIG, "crop_mode": "squash"})[0]
    whole = np.array(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(pixels, torch.from_numpy(whole).permute(2, 0, 1) / 255)


@pytest.fixture
def clinic(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """12 bits in 16, and a DICOM file, which PIL cannot open, of the same picture."""
    pydicom = pytest.importorskip("pydicom")
    deep = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)
    save(tmp_path / "a", "deep.png", deep)
    scan = pydicom.dcmread(pydicom.examples.get_path("ct"))
    scan.PixelData, scan.Rows, scan.Columns = deep.tobytes(), 16, 16
    scan.PixelRepresentation, scan.BitsStored, scan.HighBit = 0, 12, 11
    scan.RescaleIntercept = 0
    scan.WindowCenter, scan.WindowWidth = 2048, 4096
    (tmp_path / "b").mkdir()
    scan.save_as(tmp_path / "b" / "1.2.840.1")
    return tmp_path, deep / 4095


def test_dicom_files_show_what_they_say_themselves(clinic: tuple[Path, np.ndarray]) -> None:
    folder, shown = clinic
    pixels, _ = ImageFolder(folder, config=CONFIG)[1]
    expected = torch.from_numpy(shown).float().expand(3, -1, -1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.5 / 255 + 1e-6)
