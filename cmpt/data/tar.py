"""Where the regular members of a tar file lie: header by header, without touching the contents.

About four times as fast as `tarfile`: for 10**8 samples of three members an hour of one core instead of four.
And unlike `tarfile`, which ends quietly at a damaged header, it tells: a shard that was cut short is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cmpt.data.validate import Cause, DataError

_BLOCK = 512
_END_MARK = bytes(_BLOCK)
_REGULAR, _LINKS = (b"0", b"\0", b"7"), (b"1", b"2")
_MOST_METADATA_BYTES = 1 << 20  # of one header; names and attributes have some hundreds
_GNU_LONG_NAME, _GNU_SPARSE, _PAX, _PAX_GLOBAL = b"L", b"S", b"x", b"g"


class TarError(DataError):
    """What cannot be read of a tar, from some byte on: members yielded before are whole."""

    def __init__(self, cause: Cause, url: str, detail: str) -> None:
        super().__init__(f"{url}: {detail}")
        self.cause, self.detail = cause, detail


class Member(NamedTuple):
    name: str
    offset: int  # of the contents, in bytes
    size: int  # in bytes; LINK for a link, whose bytes lie elsewhere


LINK = -1


def walk_members(path: Path, url: str) -> Iterator[Member]:
    """Yields every regular file and link in a ustar, GNU or pax archive.

    Directories and devices are passed over. Raises `TarError`, naming `url`, where a file is not a tar, is cut short or
    has a damaged header.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _walk(descriptor, url)
    except TarError:
        raise
    except ValueError as error:
        raise TarError(Cause.DAMAGED_SHARD, url, f"damaged tar header: {error}") from error
    finally:
        os.close(descriptor)


def _walk(descriptor: int, url: str) -> Iterator[Member]:
    file_size = os.fstat(descriptor).st_size
    if file_size == 0:
        raise TarError(Cause.EMPTY_SHARD, url, "is an empty file, not a tar")
    position = 0
    global_pax: dict[str, bytes] = {}
    pax: dict[str, bytes] = {}
    long_name: bytes | None = None
    while (header := os.pread(descriptor, _BLOCK, position)) != _END_MARK:
        if len(header) < _BLOCK and position > 0:
            detail = f"cut short, ends at byte {position} without the end mark of a tar"
            raise TarError(Cause.TRUNCATED_SHARD, url, detail)
        kind = header[156:157]
        size = _checked_size(header, position, url)
        if kind not in (_PAX, _PAX_GLOBAL, _GNU_LONG_NAME) and "size" in pax:
            size = int(pax["size"])
            if size < 0:
                raise TarError(Cause.DAMAGED_SHARD, url, f"a member of {size} bytes at byte {position}")
        if kind in (_PAX, _PAX_GLOBAL, _GNU_LONG_NAME) and size > _MOST_METADATA_BYTES:
            raise TarError(Cause.DAMAGED_SHARD, url, f"{size} bytes of metadata at byte {position}")
        contents = position + _BLOCK
        if contents + size > file_size:
            detail = f"cut short, a member at byte {contents} has {size} bytes and the file ends at {file_size}"
            raise TarError(Cause.TRUNCATED_SHARD, url, detail)
        position = contents + -(-size // _BLOCK) * _BLOCK
        if kind == _PAX:
            pax = global_pax | _pax_records(os.pread(descriptor, size, contents))
        elif kind == _PAX_GLOBAL:
            global_pax = global_pax | _pax_records(os.pread(descriptor, size, contents))
        elif kind == _GNU_LONG_NAME:
            long_name = os.pread(descriptor, size, contents).rstrip(b"\0")
        elif kind == b"K":  # GNU long link target: describes the next header, which is a link
            continue
        else:
            if kind == _GNU_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise TarError(Cause.DAMAGED_SHARD, url, f"sparse members are not supported (byte {contents})")
            name = (long_name or pax.get("path") or _name(header)).partition(b"\0")[0]
            if kind in _LINKS or (kind in _REGULAR and not name.endswith(b"/")):
                length = LINK if kind in _LINKS else size
                yield Member(name.decode("utf-8", "backslashreplace"), contents, length)
            pax, long_name = dict(global_pax), None


def _checked_size(header: bytes, position: int, url: str) -> int:
    """The size field of a header that is whole and whose check sum is right."""
    field = header[148:156]
    try:
        size, stated = _number(header[124:136]), _number(field)
    except (ValueError, IndexError):
        size, stated = -1, -1
    if len(header) < _BLOCK or stated != sum(header) - sum(field) + 8 * ord(" ") or size < 0:
        what = "is not an uncompressed tar" if position == 0 else f"damaged tar header at byte {position}"
        raise TarError(Cause.DAMAGED_SHARD, url, what)
    return size


def _number(field: bytes) -> int:
    """A number of a header: octal text, or (GNU, for large values) base 256 after a set top bit."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.replace(b"\0", b" ").strip() or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # POSIX only: GNU keeps other things where the prefix is
        prefix = header[345:500].partition(b"\0")[0]
        return prefix + b"/" + name if prefix else name
    return name


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Records of the form `LENGTH KEY=VALUE` + newline, the length counting all of it."""
    records, start = {}, 0
    while start < len(data):
        end = start + int(data[start : data.index(b" ", start)])
        key, equals, value = data[start:end].partition(b" ")[2].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(data):
            raise ValueError("malformed pax record")
        records[key.decode("utf-8", "replace")] = value[:-1]
        start = end
    return records
