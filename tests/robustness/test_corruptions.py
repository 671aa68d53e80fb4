"""The registry of corruptions: what each must do to pictures, and what it must not do."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import correlate
from torchvision.transforms.v2 import functional as vision

from inmerge_wrap.robustness.corruptions import (
    CORRUPTIONS,
    DATASET_PRESETS,
    PRESETS,
    Corruption,
    Draws,
    check_images,
    corrupt,
    resolve_preset,
)
from inmerge_wrap.robustness.effects import _filtered

NAMES = list(CORRUPTIONS)
FIXED = [
    "gaussian_blur", "defocus_blur", "zoom_blur", "jpeg_compression", "pixelate", "brightness_up",
    "brightness_down", "contrast_up", "contrast_down", "gamma_up", "gamma_down", "saturate",
    "black_corner", "border",
]  # fmt: skip
RANDOM = [name for name in NAMES if name not in FIXED]
GREY = list(PRESETS["grey"])


def pictures(count: int, channels: int, side: int) -> torch.Tensor:
    """Smooth colourful blobs with some texture, neither black nor white: each corruption shows."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    texture = torch.rand(count, channels, side, side, generator=generator)
    return (0.15 + 0.65 * smooth + 0.02 * texture).clamp(0.05, 0.95)


def distances(images: torch.Tensor, name: str) -> list[float]:
    return [float((corrupt(images, name, s) - images).abs().mean()) for s in range(1, 6)]


@pytest.mark.parametrize("name", NAMES)
def test_damage_grows_with_severity_in_colour_at_28_px(name):
    found = distances(pictures(24, 3, 28), name)
    assert found[0] > 1e-4
    assert all(later > 1.02 * earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", GREY)
def test_damage_grows_with_severity_in_grey_at_96_px(name):
    found = distances(pictures(8, 1, 96), name)
    assert found[0] > 1e-4
    assert all(later > 1.02 * earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [1, 5])
def test_shape_dtype_and_range_are_kept(name, severity):
    channels = 3 if CORRUPTIONS[name].rgb_only else 1
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        # Not square, and extremes in it: a white and a black picture leave the range soonest.
        images = pictures(4, channels, 40)[..., :33].to(dtype)
        images[0], images[1] = 0, 1
        before = images.clone()
        damaged = corrupt(images, name, severity)
        assert damaged.shape == images.shape
        assert damaged.dtype == dtype
        assert damaged.min() >= 0 and damaged.max() <= 1
        assert damaged.isfinite().all()
        assert torch.equal(images, before), "the input was written to"


@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_follow_the_seed(name):
    images = pictures(6, 3, 28)
    first = corrupt(images, name, 4, seed=1)
    assert torch.equal(first, corrupt(images, name, 4, seed=1))
    assert not torch.equal(first, corrupt(images, name, 4, seed=2))
    # Every image has luck of its own.
    same = corrupt(images[:1].expand(6, -1, -1, -1), name, 4, seed=1)
    assert len({picture.numpy().tobytes() for picture in same}) > 1


@pytest.mark.parametrize("name", FIXED)
def test_the_others_do_not(name):
    images = pictures(4, 3, 28)
    assert torch.equal(corrupt(images, name, 4, seed=1), corrupt(images, name, 4, seed=2))


@pytest.mark.parametrize("name", NAMES)
def test_independent_of_the_batch_and_of_global_generators(name):
    images = pictures(7, 3, 28)
    torch.manual_seed(3)
    np.random.seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()
    whole = corrupt(images, name, 3, indices=range(10, 17))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    torch.manual_seed(4)
    parts = [
        corrupt(images[a:b], name, 3, indices=range(10 + a, 10 + b))
        for a, b in ((0, 1), (1, 5), (5, 7))
    ]
    # Blurs and powers may differ in the last digit, since kernels vectorise by batch size.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_an_image_keeps_its_damage_when_its_place_moves_with_it():
    images = pictures(4, 3, 28)
    order = [2, 0, 3, 1]
    shuffled = corrupt(images[order], "gaussian_noise", 2, indices=order)
    assert torch.equal(shuffled, corrupt(images, "gaussian_noise", 2)[order])
    assert not torch.equal(shuffled, corrupt(images[order], "gaussian_noise", 2))


def test_noise_has_the_strength_it_states():
    images = torch.full((16, 3, 64, 64), 0.5)
    noisy = corrupt(images, "gaussian_noise", 1) - images
    assert float(noisy.std()) == pytest.approx(0.04, rel=0.01)
    assert abs(float(noisy.mean())) < 5e-4
    shot = corrupt(images, "shot_noise", 1) - images
    assert float(shot.std()) == pytest.approx(math.sqrt(0.5 / 100), rel=0.01)
    speckle = corrupt(images, "speckle_noise", 1) - images
    assert float(speckle.std()) == pytest.approx(0.08 * 0.5, rel=0.01)
    impulses = corrupt(images, "impulse_noise", 5)
    assert float((impulses == 0).float().mean()) == pytest.approx(0.085, rel=0.05)
    assert float((impulses == 1).float().mean()) == pytest.approx(0.085, rel=0.05)


@pytest.mark.parametrize("name", [n for n, c in CORRUPTIONS.items() if c.kind == "blur"])
def test_blur_keeps_a_flat_picture_and_spreads_a_point(name):
    flat = torch.full((2, 3, 28, 28), 0.4)
    torch.testing.assert_close(corrupt(flat, name, 5), flat, rtol=0, atol=1e-5)
    point = torch.zeros(1, 1, 29, 29)
    point[..., 14, 20] = 1.0
    blurred = corrupt(point, name, 5)
    if name == "zoom_blur":  # it magnifies: light grows by the mean square of 1 to 1.3
        assert 1.1 < float(blurred.sum()) < 1.3**2
    else:
        assert float(blurred.sum()) == pytest.approx(1, abs=1e-4)
    assert float(blurred.max()) < 0.6


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "zoom_blur"])
def test_lengths_scale_with_the_picture(name):
    # The same picture at 32 and 128 px: the damage to it is about the same at both.
    large = F.interpolate(pictures(8, 3, 16), size=128, mode="bilinear", align_corners=False)
    small = F.interpolate(large, size=32, mode="area")
    at_large, at_small = distances(large, name)[4], distances(small, name)[4]
    assert at_large == pytest.approx(at_small, rel=0.35)


def test_motion_blur_is_a_line_of_its_own_direction():
    point = torch.zeros(6, 1, 41, 41)
    point[..., 20, 20] = 1.0
    blurred = corrupt(point, "motion_blur", 5)[:, 0]
    offsets = torch.arange(41.0) - 20
    rows = (blurred * offsets[:, None] ** 2).sum((1, 2))
    columns = (blurred * offsets[None, :] ** 2).sum((1, 2))
    cross = (blurred * offsets[:, None] * offsets[None, :]).sum((1, 2))
    half_gap = torch.hypot((rows - columns) / 2, cross)
    along, across = (rows + columns) / 2 + half_gap, (rows + columns) / 2 - half_gap
    # A line of length L has variance L^2 / 12 along it, and the grid adds a fraction of a pixel.
    assert along.sub(8.2**2 / 12).abs().max() < 0.4
    assert across.max() < 0.4
    assert blurred.flatten(1).unique(dim=0).shape[0] == 6


def test_colour_casts_need_colour():
    for name in NAMES:
        if CORRUPTIONS[name].rgb_only:
            with pytest.raises(ValueError, match="needs colour"):
                corrupt(pictures(2, 1, 28), name, 1)
            assert name not in GREY


def test_pixelate_leaves_blocks():
    coded = corrupt(pictures(1, 1, 28), "pixelate", 5)
    assert len(coded.unique()) == 7 * 7


def test_bars_are_as_many_as_stated():
    images = torch.full((5, 3, 28, 28), 0.5)
    for severity, count in enumerate((1, 2, 4, 6, 9), start=1):
        dead = (corrupt(images, "bars", severity) == 0).all(2).all(1).sum(1)
        assert dead.tolist() == [count] * 5
        narrow = (corrupt(images[..., :9], "bars", severity) == 0).all(2).all(1).sum(1)
        assert narrow.tolist() == [math.ceil(count * 9 / 28)] * 5, "the same share"


def test_presets_name_known_corruptions_and_grey_modalities_no_colour():
    for preset in PRESETS:
        assert [entry.name for entry in resolve_preset(preset)] == list(PRESETS[preset])
    for preset in ("tissue", "oct", "ultrasound", "chest_xray", "pneumonia", "abdominal_ct"):
        assert set(PRESETS[preset]) <= set(GREY), preset
    assert set(PRESETS["all"]) == set(NAMES)
    assert len(DATASET_PRESETS) == 12
    for flag, preset in DATASET_PRESETS.items():
        assert resolve_preset(flag) == resolve_preset(preset)
    # What MedMNIST-C gives to dermatoscopy and to no other modality.
    own = {name for name in PRESETS["dermatoscopy"] if name in ("black_corner", "characters")}
    assert own == {"black_corner", "characters"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dermatoscpy", "did you mean dermatoscopy"),
        ("qqqq", "choose from pathology"),
        ("gaussian_noise", r"pass \['gaussian_noise'\]"),
        (["gausian_noise"], "did you mean gaussian_noise"),
        (["bars", "bars"], "twice"),
        ([], "empty"),
    ],
)
def test_unknown_presets_are_refused_with_a_hint(wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve_preset(wrong)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"float\(\) / 255"),
        (torch.full((1, 3, 8, 8), 1.5), r"\[1.5, 1.5\]"),
        (torch.full((1, 3, 8, 8), -0.1), "normalisation"),
        (torch.full((1, 3, 8, 8), math.nan), "nan"),
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(1, 2, 8, 8), "channels"),
        (torch.zeros(0, 3, 8, 8), "nothing"),
        ([0.5], "list"),
    ],
)
def test_images_that_are_no_pixels_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images)


def test_settings_out_of_range_are_refused():
    images = pictures(2, 3, 28)
    for severity in (0, 6, 1.5):
        with pytest.raises(ValueError, match="severity"):
            corrupt(images, "bars", severity)
    with pytest.raises(ValueError, match="3 entries for 2 images"):
        corrupt(images, "bars", 1, indices=range(3))
    with pytest.raises(ValueError, match="kind"):
        Corruption("own", "weather", lambda images, draws: images, ({},) * 5)
    with pytest.raises(ValueError, match="exactly 5"):
        Corruption("own", "noise", lambda images, draws: images, ({},) * 4)


def test_a_corruption_of_ones_own():
    def dim(images: torch.Tensor, draws: Draws, *, factor: float) -> torch.Tensor:
        return images * factor

    own = Corruption("dim", "colour", dim, tuple({"factor": 1 - s / 10} for s in range(1, 6)))
    assert resolve_preset([own, "bars"])[0] is own
    images = pictures(2, 3, 28)
    torch.testing.assert_close(corrupt(images, own, 5), images * 0.5)


def test_effects_are_those_of_torchvision_and_pillow():
    images = pictures(2, 3, 64)
    for severity in (1, 5):
        levels = {name: CORRUPTIONS[name].severities[severity - 1] for name in NAMES}

        def seen(name, severity=severity):
            return corrupt(images, name, severity)

        sigma = levels["gaussian_blur"]["sigma"] * 64
        width = 2 * math.ceil(3 * sigma) + 1
        blurred = vision.gaussian_blur(images, [width, width], [sigma, sigma])
        torch.testing.assert_close(seen("gaussian_blur"), blurred, rtol=0, atol=1e-6)
        darker = vision.adjust_gamma(images, levels["gamma_up"]["gamma"])
        torch.testing.assert_close(seen("gamma_up"), darker, rtol=0, atol=1e-6)
        # torchvision's weights of the three colours have four digits, those of the norm three.
        flat = vision.adjust_contrast(images, levels["contrast_down"]["factor"])
        torch.testing.assert_close(seen("contrast_down"), flat, rtol=0, atol=3e-4)
        vivid = vision.adjust_saturation(images, levels["saturate"]["factor"])
        torch.testing.assert_close(seen("saturate"), vivid, rtol=0, atol=5e-4)
        for image, found in zip(images, seen("jpeg_compression"), strict=True):
            file = io.BytesIO()
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            quality = int(levels["jpeg_compression"]["quality"])
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            decoded = np.asarray(Image.open(file))
            assert np.array_equal((found.permute(1, 2, 0) * 255).round().byte().numpy(), decoded)


def test_every_image_is_filtered_by_its_own_kernel():
    images = pictures(3, 2, 20).double()
    kernels = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _filtered(images, kernels)
    for n, c in itertools.product(range(3), range(2)):
        expected = correlate(images[n, c].numpy(), kernels[n].numpy(), mode="mirror")
        np.testing.assert_allclose(found[n, c].numpy(), expected, atol=1e-12)
