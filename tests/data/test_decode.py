"""Pixels: every kind of image, crop windows, and no threads behind the caller's back."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
import torch
from data.making import jpeg, picture, undecodable_jpeg

from cmpt.data.decode import crop_draws, crop_window, decode_upright, heldout_pixels, resize, train_pixels
from cmpt.data.validate import Cause, UnusableError, examine_image
from cmpt.recipe import schema

LIMIT = 10**8
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")
WHOLE = schema.Image(size=16, crop_scale=(1.0, 1.0), crop_ratio=(0.01, 100.0))


def save(image: PIL.Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return decode_upright(data, examine_image(data, LIMIT))


def exif(orientation: int) -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


def close(a: np.ndarray, b: np.ndarray, most: float) -> None:
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).mean() <= most


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_jpeg_equals_pillow(options) -> None:
    data = save(PIL.Image.fromarray(picture(1, 60, 80)), "JPEG", quality=90, **options)
    close(decoded(data), np.asarray(PIL.Image.open(io.BytesIO(data))), 0.5)


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_lossless_formats_are_exact(image_format) -> None:
    image = PIL.Image.fromarray(picture(1)).quantize(64).convert("RGB")
    np.testing.assert_array_equal(decoded(save(image, image_format)), np.asarray(image))


def test_webp_decodes() -> None:
    np.testing.assert_array_equal(decoded(save(PIL.Image.fromarray(picture(1)), "WEBP", lossless=True)), picture(1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "damaged JPEG"])
def test_exif_orientation_is_honoured(kind, orientation) -> None:
    image = PIL.Image.fromarray(picture(3, 40, 56))
    if kind == "damaged JPEG":  # stray bytes before the end marker: simplejpeg refuses them, Pillow does not
        data = save(image, "JPEG", quality=95, exif=exif(orientation))[:-2] + bytes(40) + b"\xff\xd9"
        with pytest.raises(ValueError):
            simplejpeg.decode_jpeg(data)
    else:
        data = save(image, kind, quality=95, exif=exif(orientation))
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    close(decoded(data), np.asarray(upright), 0.7)
    assert decoded(data).shape[:2] == ((56, 40) if orientation >= 5 else (40, 56))


def test_grey_and_cmyk_jpeg_become_rgb() -> None:
    grey = PIL.Image.fromarray(picture(1)).convert("L")
    found = decoded(save(grey, "JPEG", quality=95))
    close(found, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2), 2)
    image = PIL.Image.fromarray(picture(1))
    close(decoded(save(image.convert("CMYK"), "JPEG", quality=95)), np.asarray(image), 4)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_transparent_parts_are_white(image_format) -> None:
    alpha = np.zeros((24, 32), np.uint8)
    alpha[:, 16:], alpha[:, 24:] = 255, 128
    rgba = PIL.Image.fromarray(np.dstack([picture(1), alpha]))
    found = decoded(save(rgba, image_format, **({"lossless": True, "exact": True} if image_format == "WEBP" else {})))
    assert (found[:, :16] == 255).all()
    np.testing.assert_array_equal(found[:, 16:24], picture(1)[:, 16:24])
    close(found[:, 24:], ((picture(1)[:, 24:].astype(int) * 128 + 255 * 127) / 255).astype(np.uint8), 1)


def test_transparent_palette_grey_and_colour_key_are_white() -> None:
    palette = PIL.Image.fromarray(picture(1)).quantize(8)
    index = np.asarray(palette)
    found = decoded(save(palette, "PNG", transparency=int(index[0, 0])))
    assert (found[index == index[0, 0]] == 255).all()
    np.testing.assert_array_equal(found[index != index[0, 0]], np.asarray(palette.convert("RGB"))[index != index[0, 0]])
    grey_alpha = PIL.Image.merge("LA", [PIL.Image.new("L", (4, 4), 60), PIL.Image.new("L", (4, 4), 0)])
    assert (decoded(save(grey_alpha, "PNG")) == 255).all()
    key = PIL.Image.new("RGB", (4, 4), (10, 20, 30))
    assert (decoded(save(key, "PNG", transparency=(10, 20, 30))) == 255).all()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    for image_format in ("PNG", "TIFF"):
        found = decoded(save(PIL.Image.fromarray(ramp), image_format))
        np.testing.assert_array_equal(found[:, :, 0], ramp >> 8)
        assert (found == found[:, :, :1]).all()


def test_one_bit_images_decode() -> None:
    image = PIL.Image.fromarray(picture(1)).convert("1")
    np.testing.assert_array_equal(decoded(save(image, "PNG")), np.asarray(image.convert("RGB")))


def test_what_no_decoder_takes_is_unusable() -> None:
    broken_png = bytearray(save(PIL.Image.fromarray(picture(1)), "PNG"))
    start = broken_png.index(b"IDAT") + 12
    broken_png[start : start + 60] = bytes(60)
    for data in (undecodable_jpeg(1), bytes(broken_png)):
        with pytest.raises(UnusableError) as caught:
            decoded(data)
        assert caught.value.cause is Cause.DECODE_FAILED


def test_damage_never_raises_anything_else() -> None:
    generator = np.random.default_rng(1)
    originals = [jpeg(1), save(PIL.Image.fromarray(picture(1)), "PNG"), save(PIL.Image.fromarray(picture(1)), "WEBP")]
    outcomes = set()
    for trial in range(400):
        data = bytearray(originals[trial % 3])
        for place in generator.integers(0, len(data), size=generator.integers(1, 12)):
            data[place] = generator.integers(256)
        try:
            header = examine_image(bytes(data), LIMIT // 100)
            outcomes.add(train_pixels(bytes(data), header, crop_draws(0, np.array([trial]))[0], WHOLE).shape)
        except UnusableError as error:
            outcomes.add(error.cause)
    assert (3, 16, 16) in outcomes and Cause.DECODE_FAILED in outcomes


DRAWS = crop_draws(7, np.arange(4000))


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 384), (100, 100), (1, 1), (3, 1000), (1000, 2)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_windows_lie_inside_the_image(height, width, scale) -> None:
    image = schema.Image(crop_scale=scale)
    for draws in DRAWS[:500]:
        window = crop_window(draws, height, width, image)
        assert window.height > 0 and window.width > 0
        assert 0 <= window.top <= height - window.height and 0 <= window.left <= width - window.width
        assert not window.flip


def test_windows_have_the_stated_statistics() -> None:
    """Areas uniform in the scale, log ratios uniform, places uniform: where the first attempt always fits."""
    image = schema.Image(crop_scale=(0.1, 0.5), crop_ratio=(0.75, 4 / 3), flip=True)
    windows = [crop_window(draws, 1000, 1000, image) for draws in DRAWS]
    area = np.array([w.height * w.width / 1e6 for w in windows])
    log_ratio = np.array([math.log(w.width / w.height) for w in windows])
    down = np.array([w.top / (1000 - w.height) for w in windows])
    right = np.array([w.left / (1000 - w.width) for w in windows])
    limit = math.log(4 / 3)
    for values, low, high in ((area, 0.1, 0.5), (log_ratio, -limit, limit), (down, 0, 1), (right, 0, 1)):
        share = np.histogram(values, bins=10, range=(low - 2e-3, high + 2e-3))[0] / len(values)
        np.testing.assert_allclose(share, 0.1, atol=0.02)
    correlations = np.corrcoef(np.stack([area, log_ratio, down, right, [w.flip for w in windows]]))
    assert np.abs(correlations - np.eye(5)).max() < 0.06
    assert abs(np.mean([w.flip for w in windows]) - 0.5) < 0.03


@pytest.mark.parametrize(("height", "width"), [(384, 512), (512, 384), (100, 101), (7, 9), (1, 1), (3, 1000)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_windows_are_those_of_the_plain_algorithm(height, width, scale) -> None:
    """Attempts that are left out early are ones that could not have fitted."""
    image = schema.Image(crop_scale=scale)
    log_low, log_high = (math.log(ratio) for ratio in image.crop_ratio)
    for draws in DRAWS[:500].tolist():
        expected = None
        for area_draw, ratio_draw in zip(draws[3::2], draws[4::2], strict=True):
            area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
            ratio = math.exp(log_low + ratio_draw * (log_high - log_low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                expected = (int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w)
                break
        found = crop_window(np.array(draws), height, width, image)[:4]
        if expected:
            assert found == expected
        else:
            ratio = min(max(width / height, image.crop_ratio[0]), image.crop_ratio[1])
            assert found[2:] == (min(height, round(width / ratio)), min(width, round(height * ratio)))


def test_retries_keep_the_conditional_distribution() -> None:
    """Against torchvision's algorithm, written out with numpy's generator, where most first attempts fail."""
    image = schema.Image(crop_scale=(0.5, 1.0), crop_ratio=(0.5, 2.0))
    height, width = 100, 180
    generator = np.random.default_rng(0)

    def reference() -> tuple[int, int]:
        for _ in range(10):
            area = height * width * generator.uniform(0.5, 1.0)
            ratio = math.exp(generator.uniform(math.log(0.5), math.log(2.0)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return h, w
        return height, width

    ours = np.array([crop_window(draws, height, width, image)[2:4] for draws in DRAWS])
    theirs = np.array([reference() for _ in range(len(DRAWS))])
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0.02)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.06)


def test_no_fitting_attempt_falls_back_to_the_centre() -> None:
    image = schema.Image(crop_scale=(1.0, 1.0), crop_ratio=(0.75, 4 / 3))
    assert crop_window(DRAWS[0], 100, 1000, image)[:4] == (0, 433, 100, 133)
    assert crop_window(DRAWS[0], 1000, 100, image)[:4] == (433, 0, 133, 100)


def test_train_view_is_the_window_resized() -> None:
    data = jpeg(1, 60, 80)
    header = examine_image(data, LIMIT)
    image = schema.Image(size=16, crop_scale=(0.2, 0.6), flip=True)
    whole = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None].float()
    flips = set()
    for draws in DRAWS[:20]:
        top, left, height, width, flip = crop_window(draws, 60, 80, image)
        crop = whole[:, :, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(crop, size=(16, 16), mode="bicubic", antialias=True)[0]
        expected = (expected.flip(-1) if flip else expected).clamp(0, 255)
        found = train_pixels(data, header, draws, image)
        assert np.abs(found.astype(float) - expected.numpy()).max() <= 2
        flips.add(flip)
    assert flips == {True, False}


@pytest.mark.parametrize("size", [16, 60])
@pytest.mark.parametrize("flip", [False, True])
def test_a_given_array_gets_the_same_pixels(size, flip) -> None:
    image = schema.Image(size=size, crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10.0), flip=flip)
    rows_BCHW = np.zeros((3, 3, size, size), np.uint8)
    data = jpeg(1, 60, 60)
    for draws in DRAWS[:10]:
        alone = train_pixels(data, examine_image(data, LIMIT), draws, image)
        given = train_pixels(data, examine_image(data, LIMIT), draws, image, rows_BCHW[1])
        assert np.shares_memory(given, rows_BCHW)
        np.testing.assert_array_equal(given, alone)
        np.testing.assert_array_equal(rows_BCHW[1], alone)
    assert not rows_BCHW[[0, 2]].any()


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (64, 64), (16, 16), (9, 40), (100, 17)])
def test_heldout_view_equals_pillow_resize_and_centre_crop(height, width) -> None:
    """open_clip's evaluation transform, with Pillow."""
    data = save(PIL.Image.fromarray(picture(2, height, width)), "PNG")
    found = heldout_pixels(data, examine_image(data, LIMIT), 16)
    shorter = min(height, width)
    size = (int(16 * width / shorter), int(16 * height / shorter))
    resized = np.asarray(PIL.Image.fromarray(picture(2, height, width)).resize(size, PIL.Image.Resampling.BICUBIC))
    top, left = round((resized.shape[0] - 16) / 2), round((resized.shape[1] - 16) / 2)
    expected = resized[top : top + 16, left : left + 16].transpose(2, 0, 1)
    assert found.shape == (3, 16, 16)
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 32), (50, 60), (1, 9)])
def test_resize_equals_torch_interpolate_bit_for_bit(size) -> None:
    for pixels_HWC in (picture(1), picture(2, 40, 56)[8:32, 5:37], picture(3)[::-1], picture(4, 1, 7)):
        chosen = torch.from_numpy(pixels_HWC.transpose(2, 0, 1)[None].copy())
        expected = torch.nn.functional.interpolate(chosen, size=size, mode="bicubic", antialias=True)[0]
        np.testing.assert_array_equal(resize(pixels_HWC, *size), expected.numpy())


def test_resize_to_the_same_size_is_the_identity() -> None:
    np.testing.assert_array_equal(resize(picture(1), 24, 32), picture(1).transpose(2, 0, 1))


def test_decoding_in_a_thread_starts_no_torch_threads_and_leaves_the_settings() -> None:
    code = """
import os, threading
os.environ["OMP_NUM_THREADS"] = "4"
import numpy as np, simplejpeg, torch
from cmpt.data.decode import crop_draws, train_pixels
from cmpt.data.validate import examine_image
from cmpt.recipe import schema
torch.set_num_threads(4)
data = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8))
batch = np.empty((1, 3, 224, 224), np.uint8)
def work():
    counts.append(len(os.listdir("/proc/self/task")))
    for draws in crop_draws(0, np.arange(5)):
        batch[0] = train_pixels(data, examine_image(data, 10**8), draws, schema.Image(size=224, flip=True))
    counts.append(len(os.listdir("/proc/self/task")))
counts = []
thread = threading.Thread(target=work)
thread.start(); thread.join()
assert counts[0] == counts[1], counts
assert torch.get_num_threads() == 4
"""
    subprocess.run([sys.executable, "-c", code], check=True)
