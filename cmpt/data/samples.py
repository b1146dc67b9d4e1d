"""One sample: its members read and checked, before its place in the order is fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cmpt.data.captions import captions_from_json, captions_from_text, read_json
from cmpt.data.index import Members
from cmpt.data.reader import ShardReader
from cmpt.data.shards import Shard
from cmpt.data.tar import LINK
from cmpt.data.validate import Cause, ImageHeader, UnusableError, examine_image
from cmpt.recipe import schema

_MOST_BYTES_OF_A_CHARACTER = 4  # UTF-8
_MOST_JSON_BYTES = 16 << 20  # img2dataset's hold a few kB


@dataclass(frozen=True)
class Sample:
    """A sample that passed every check."""

    key: str  # "shard.tar/sample-key"
    image: bytes
    header: ImageHeader
    captions: list[str]  # at least one, none empty
    category: str | None = None


def sample_key(shard: Shard, members: Members) -> str:
    return f"{shard.name}/{members.key}"


def read_captions(reader: ShardReader, shard: Shard, members: Members, data: schema.Data) -> list[str]:
    """The captions of a sample, at least one, none empty. Raises `UnusableError`."""
    extension, longest = data.caption_extension, data.max_caption_characters
    if extension not in members.extents:
        raise UnusableError(Cause.MISSING_CAPTION, f"members: {', '.join(members.extents)}")
    if extension == "json":
        return captions_from_json(_read_json(reader, shard, members), data.caption_field, longest)
    most = (longest * _MOST_BYTES_OF_A_CHARACTER, Cause.CAPTION_TOO_LONG)
    return captions_from_text(_read(reader, shard, members, extension, *most), longest)


def image_extension(members: Members, data: schema.Data) -> str:
    """The member that is the image. Raises `UnusableError`."""
    for extension in data.image_extensions:
        if extension in members.extents:
            return extension
    raise UnusableError(Cause.MISSING_IMAGE, f"members: {', '.join(members.extents)}")


def read_image(reader: ShardReader, shard: Shard, members: Members, data: schema.Data) -> bytes:
    """The bytes of the image, unchecked. Raises `UnusableError`."""
    extension = image_extension(members, data)
    return _read(reader, shard, members, extension, data.max_image_bytes, Cause.TOO_MANY_BYTES)


def _read_json(reader: ShardReader, shard: Shard, members: Members) -> dict[str, Any]:
    return read_json(_read(reader, shard, members, "json", _MOST_JSON_BYTES, Cause.TOO_MANY_BYTES))


def _read(reader: ShardReader, shard: Shard, members: Members, extension: str, most: int, cause: Cause) -> bytes:
    """The bytes of one member, whose size is checked before memory is taken. Raises `UnusableError`."""
    extent = members.extents[extension]
    if extent[1] == LINK:
        raise UnusableError(Cause.LINKED_MEMBER, f"{members.key}.{extension}")
    if extent[1] > most:
        raise UnusableError(cause, f"{extent[1]} bytes, more than {most}")
    return reader.read(shard, extent)


def read_sample(
    reader: ShardReader, shard: Shard, members: Members, data: schema.Data, with_category: bool = False
) -> Sample:
    """Reads and checks one sample, cheapest check first. Raises `UnusableError`."""
    if members.repeated:
        raise UnusableError(Cause.DUPLICATE_KEY)
    image_extension(members, data)  # a sample without an image has that cause, whatever its caption is
    captions = read_captions(reader, shard, members, data)
    category = None
    if with_category and data.category_field and "json" in members.extents:
        category = _read_json(reader, shard, members).get(data.category_field)
    image = read_image(reader, shard, members, data)
    return Sample(
        key=sample_key(shard, members),
        image=image,
        header=examine_image(image, data.max_image_pixels, data.min_image_side),
        captions=captions,
        category=None if category is None else str(category),
    )
