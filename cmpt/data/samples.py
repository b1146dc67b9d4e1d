"""One sample: its members read and checked, before its place in the order is fixed."""

from __future__ import annotations

from dataclasses import dataclass

from cmpt.data.captions import captions_from_json, captions_from_text, read_json
from cmpt.data.shards import Members, Shard, ShardReader
from cmpt.data.validate import Cause, ImageHeader, UnusableError, examine_image
from cmpt.recipe import schema


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
    extents = members.extents
    if data.caption_extension not in extents:
        raise UnusableError(Cause.MISSING_CAPTION, f"members: {', '.join(extents)}")
    content = reader.read(shard, extents[data.caption_extension])
    if data.caption_extension == "json":
        return captions_from_json(read_json(content), data.caption_field)
    return captions_from_text(content)


def read_sample(
    reader: ShardReader, shard: Shard, members: Members, data: schema.Data, with_category: bool = False
) -> Sample:
    """Reads and checks one sample, cheapest check first. Raises `UnusableError`."""
    extents = members.extents
    extension = next((name for name in data.image_extensions if name in extents), None)
    if extension is None:
        raise UnusableError(Cause.MISSING_IMAGE, f"members: {', '.join(extents)}")
    captions = read_captions(reader, shard, members, data)
    category = None
    if with_category and data.category_field and "json" in extents:
        category = read_json(reader.read(shard, extents["json"])).get(data.category_field)
    image = reader.read(shard, extents[extension])
    return Sample(
        key=sample_key(shard, members),
        image=image,
        header=examine_image(image, data.max_image_pixels),
        captions=captions,
        category=None if category is None else str(category),
    )
