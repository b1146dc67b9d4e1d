"""Shards for benchmarks of the loader: photographs of scikit-image, cut and tinted, with made-up captions."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg
from numpy.typing import NDArray

HEIGHT, WIDTH, QUALITY = 384, 512, 90
_LEAST_ZOOM = 0.85  # of the largest window: smaller ones would be enlarged, which makes small files
_IMAGES_PER_SHARD = 256

# In the manner of alternative texts on the web: sentences, titles of products, file names; one in five is not ASCII or
# has an entity, which costs a tokenizer more.
_FORMS = (
    "a {a} {b} {c} with {d} in the background",
    "{A} {B} {C} - {n}",
    "Photo of the {a} {b}, {c}, {m} {y}",
    "{A} {B} | {D} and {C}",
    "Stock image: {a} {b} {c} isolated on {d}",
    "{N} Best {A} {B}s for {C} in {y}",
    "IMG_{n}.jpg",
    "“{A} {B}” by {C} {D}, oil on canvas, {n} cm",
    "The {b}'s {c}: how we found a {a} {d} near the {b}",
    "{A}-{b} {c} {d} {n}x{y} wallpaper",
    "View from the {b} over {C} at {d}, {m} {y}, with people and a {a} {c} in front of the old {b} of the town",
    "{A} {B} &amp; {D}, {C}",
    "person walks past a {a} {b} during {c} {d}",
    "Why Every {B} Needs {D} (and {N} More {A} Ideas)",
    "{c} {b} {y} for sale, {a}, {d}, {n} miles",
)
_WORDS = """
red old wooden snowy modern vintage blue tiny bright empty handmade floral rusty quiet golden striped
house bicycle harbour cat bridge teapot mountain car garden portrait lamp street horse tower table dog
Lisbon sunset Matterhorn Victoria kitchen Denver Brooklyn winter design Toyota beach Reykjavík sofa Kyoto
trees white sunrise clouds autumn leaves grey noon museum rain studio light people flowers
January March May July September November
"""


def captions_of(count: int) -> list[str]:
    """So many captions, always the same, no two alike."""
    generator = np.random.default_rng(1)
    words = [line.split() for line in _WORDS.strip().splitlines()]
    found: dict[str, None] = {}
    while len(found) < count:
        a, b, c, d, month = (str(generator.choice(line)) for line in words)
        caption = str(generator.choice(_FORMS)).format(
            **{"a": a, "b": b, "c": c, "d": d, "A": a.title(), "B": b.title(), "C": c, "D": d.title()},
            N=generator.integers(5, 50),
            n=generator.integers(100, 9999),
            m=month,
            y=generator.integers(1950, 2025),
        )
        found[caption] = None
    return list(found)


def write_shards(folder: Path, count: int) -> str:
    """Writes tars of samples with the members jpg and txt. Returns their paths as one pattern with braces."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = zip(images_of(count), captions_of(count), strict=True)
    shards = -(-count // _IMAGES_PER_SHARD)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * count // shards, (shard + 1) * count // shards):
                image, caption = next(samples)
                for extension, data in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"{folder.absolute()}/{{00000..{shards - 1:05d}}}.tar"


def images_of(count: int) -> Iterator[bytes]:
    """JPEG files of WIDTH x HEIGHT with halved colour resolution, as cameras write them: always the same."""
    photographs = [PIL.Image.fromarray(pixels) for pixels in _photographs()]
    generator = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        largest = min(photograph.width / WIDTH, photograph.height / HEIGHT)
        zoom, right, down = generator.uniform((_LEAST_ZOOM, 0, 0), 1) * (largest, 1, 1)
        width, height = zoom * WIDTH, zoom * HEIGHT
        left, top = right * (photograph.width - width), down * (photograph.height - height)
        box = (left, top, left + width, top + height)
        cut_HWC = np.asarray(photograph.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC, box))
        mirrored_HWC = cut_HWC[:, ::-1] if generator.random() < 0.5 else cut_HWC
        tinted_HWC = (mirrored_HWC * generator.uniform(0.8, 1.1, 3)).clip(0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(tinted_HWC, quality=QUALITY, colorsubsampling="420")


def _photographs() -> list[NDArray[np.uint8]]:
    """Those that come with the package and are large enough."""
    from skimage import data

    left, right, _ = data.stereo_motorcycle()
    return [data.astronaut(), data.coffee(), data.rocket(), left, right, data.hubble_deep_field(), data.retina()]
