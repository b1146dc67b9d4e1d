"""Every kind of damage that crawled data have, and odd files that are none."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
from data.making import jpeg, picture, text_sample, undecodable_jpeg, write_tar

from cmpt.data.validate import Cause

Kind = tuple[Cause | None, dict[str, bytes]]  # what it is counted as (None: it can be used), its members
SIZE = (48, 64)  # height, width in pixels
CAPTION = b"picture number 7"


def encoded(image: PIL.Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a kilobyte that promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")
    )


def kinds(number: int) -> dict[str, Kind]:
    """One sample of each kind; images differ from number to number."""
    whole, rgb = jpeg(number, *SIZE), PIL.Image.fromarray(picture(number, *SIZE))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    wide = np.asarray(rgb)[:, :, 0].astype(np.uint16) * 257
    alpha = PIL.Image.fromarray(np.dstack([np.asarray(rgb), np.full(SIZE, 128, np.uint8)]))
    webp = encoded(rgb, "WEBP", quality=80)
    noise = np.random.default_rng(number).bytes(3000)
    cut = len(whole) * 2 // 3

    def pair(image: bytes, caption: bytes = CAPTION, extension: str = "jpg") -> dict[str, bytes]:
        return {extension: image, "txt": caption}

    return {
        "truncated-jpeg": (Cause.TRUNCATED_IMAGE, pair(whole[:cut])),
        "garbage": (Cause.UNKNOWN_SIGNATURE, pair(b"\x01" + noise)),
        "empty-file": (Cause.EMPTY_IMAGE, pair(b"")),
        "html-page": (Cause.HTML_PAGE, pair(b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>")),
        "bomb": (Cause.TOO_MANY_PIXELS, pair(bomb(), extension="png")),
        "one-pixel": (Cause.TOO_SMALL, pair(encoded(rgb.resize((1, 1)), "PNG"), extension="png")),
        "cmyk": (None, pair(encoded(rgb.convert("CMYK"), "JPEG"))),
        "grey": (None, pair(encoded(rgb.convert("L"), "JPEG"))),
        "16-bit-png": (None, pair(encoded(PIL.Image.fromarray(wide), "PNG"), extension="png")),
        "alpha-png": (None, pair(encoded(alpha, "PNG"), extension="png")),
        "animated-webp": (
            None,
            pair(encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)] * 3), extension="webp"),
        ),
        "broken-webp": (Cause.TRUNCATED_IMAGE, pair(webp[: len(webp) // 2], extension="webp")),
        "damaged-webp": (Cause.BROKEN_HEADER, pair(webp[:12] + noise[: len(webp) - 12], extension="webp")),
        "progressive": (None, pair(encoded(rgb, "JPEG", progressive=True, quality=90))),
        "turned": (None, pair(encoded(rgb, "JPEG", exif=exif, quality=90))),
        "no-image": (Cause.MISSING_IMAGE, {"txt": CAPTION}),
        "no-caption": (Cause.MISSING_CAPTION, {"jpg": whole}),
        "caption-latin-1": (Cause.CAPTION_NOT_UTF8, pair(whole, "café".encode("latin-1"))),
        "caption-emoji": (Cause.CAPTION_WITHOUT_WORDS, pair(whole, "😀❤️ 👩‍🚀".encode())),
        "caption-100-kb": (Cause.CAPTION_TOO_LONG, pair(whole, b"buy now " * 12_800)),
        "caption-empty": (Cause.EMPTY_CAPTION, pair(whole, b" \n")),
        "undecodable": (Cause.DECODE_FAILED, pair(undecodable_jpeg(number))),
    }


def write_dirty_shards(folder: Path, good: int, rounds: int) -> dict[str, Cause]:
    """Three shards of `good` samples with `rounds` of every kind among them, one of which is cut short; an empty one.

    The shards hold directories and links too, and samples whose key comes twice. Returns sample key or shard name ->
    cause of all that is counted; "repeated/..." stands for a sample whose key comes twice.
    """
    rng = np.random.default_rng(7)
    samples = [text_sample(number) for number in range(good)]
    causes: dict[str, Cause] = {}
    for number in range(rounds):
        for name, (cause, members) in kinds(number).items():
            samples.append((f"{name}-{number}", members))
            if cause is not None:
                causes[f"{name}-{number}"] = cause
    samples = [samples[place] for place in rng.permutation(len(samples))]
    third = -(-len(samples) // 3)
    found: dict[str, Cause] = {}
    for shard in range(3):
        name = f"dirty-{shard}.tar"
        part = samples[shard * third : (shard + 1) * third]
        found |= {f"{name}/{key}": causes[key] for key, _ in part if key in causes}
        write_tar(folder / name, part)
        with tarfile.open(folder / name, "a") as archive:
            directory = tarfile.TarInfo("folder.d")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            link = tarfile.TarInfo(f"linked-{shard}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
            archive.addfile(link)
            for extension, data in (("txt", CAPTION),):
                member = tarfile.TarInfo(f"linked-{shard}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            found[f"{name}/linked-{shard}"] = Cause.LINKED_MEMBER
            key, members = next(sample for sample in part if sample[0] not in causes)
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            found[f"repeated/{name}/{key}"] = Cause.DUPLICATE_KEY
    _cut_last_sample(folder / "dirty-2.tar")
    found["dirty-2.tar"] = Cause.TRUNCATED_SHARD
    key = next(key for key in found if key.startswith("repeated/dirty-2.tar"))
    (folder / "dirty-3.tar").write_bytes(b"")
    found["dirty-3.tar"] = Cause.EMPTY_SHARD
    assert key  # its caption was cut off: it is still a repetition
    return found


def _cut_last_sample(path: Path) -> None:
    """Ends the file within the last member: the caption of the repeated sample."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    with path.open("r+b") as file:
        file.truncate(last.offset_data + 3)
