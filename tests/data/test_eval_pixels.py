"""What evaluation sees of an image, against open_clip's own evaluation transform."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from data.making_eval_sets import write_choices

from cmpt.data.eval_sets import open_choices
from cmpt.recipe.suite import Task


def encoded(image: PIL.Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


def photograph(height: int, width: int) -> PIL.Image.Image:
    data = pytest.importorskip("skimage.data")
    return PIL.Image.fromarray(data.astronaut()).resize((width, height))


def with_alpha(image: PIL.Image.Image) -> PIL.Image.Image:
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    coloured = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def turned() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(200, 300), "JPEG", exif=exif)


AS_OPEN_CLIP = {
    "jpg": lambda: encoded(photograph(512, 512), "JPEG"),
    "grey jpg": lambda: encoded(photograph(240, 320).convert("L"), "JPEG"),
    "jpg of odd size": lambda: encoded(photograph(257, 333), "JPEG"),
    "png with one side of the view": lambda: encoded(photograph(224, 600), "PNG"),
    "tiny png": lambda: encoded(photograph(32, 32), "PNG"),
    "narrow png": lambda: encoded(photograph(9, 1), "PNG"),
    "grey png": lambda: encoded(photograph(28, 28).convert("L"), "PNG"),
    "opaque RGBA png": lambda: encoded(photograph(375, 500).convert("RGBA"), "PNG"),
    "webp": lambda: encoded(photograph(200, 300), "WEBP", lossless=True),
}
# Where ours differs on purpose: the file, and the image of which open_clip's transform makes what we make of the file.
OTHERWISE = {
    "transparent parts are white, not what lies under them": (
        lambda: encoded(with_alpha(photograph(300, 400)), "PNG"),
        lambda stored: on_white(stored),
    ),
    "turned upright as EXIF says": (turned, lambda stored: stored.transpose(PIL.Image.Transpose.ROTATE_270)),
    "a palette becomes colours before the size changes": (
        lambda: encoded(photograph(300, 400).quantize(32), "PNG"),
        lambda stored: stored.convert("RGB"),
    ),
    "16 bits of grey become 8, not white": (
        lambda: encoded(
            PIL.Image.fromarray(np.asarray(photograph(300, 400).convert("L")).astype(np.uint16) * 257), "PNG"
        ),
        lambda stored: PIL.Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8)),
    ),
}


@pytest.fixture(scope="module")
def view(open_clip) -> Callable[[PIL.Image.Image], np.ndarray]:
    """open_clip's own evaluation transform of an image, as uint8."""
    transform = open_clip.transform.image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    return lambda image: (transform(image) * 255).round().to(torch.uint8).numpy()


def difference(tmp_path: Path, data: bytes, expected_CHW: np.ndarray) -> int:
    folder = write_choices(tmp_path / "set", {"x": [("a.jpg", "one", "two")]})
    (folder / "images/a.jpg").write_bytes(data)
    (batch,) = open_choices(Task("x", "composition", "x", "sugarcrepe"), folder).images.batches(0, 1, 1, 224)
    assert batch.faults == []
    return int(np.abs(batch.images_BCHW[0].numpy().astype(int) - expected_CHW).max())


@pytest.mark.parametrize("make", AS_OPEN_CLIP.values(), ids=AS_OPEN_CLIP)
def test_pixels_are_those_of_open_clip_s_transform_but_for_rounding(tmp_path: Path, view, make) -> None:
    data = make()
    assert difference(tmp_path, data, view(PIL.Image.open(io.BytesIO(data)))) <= 1


@pytest.mark.parametrize(("make", "prepare"), OTHERWISE.values(), ids=OTHERWISE)
def test_pixels_differ_from_open_clip_s_on_purpose_and_in_this_only(tmp_path: Path, view, make, prepare) -> None:
    data = make()
    stored = PIL.Image.open(io.BytesIO(data))
    assert difference(tmp_path / "a", data, view(stored)) > 50
    assert difference(tmp_path / "b", data, view(prepare(stored))) <= 2
