"""What check_shards.py tells: the sums over all shards, the table on the console, and the JSON result."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from cmpt.data.validate import Cause
from shard_contents import HEADERS, SIZES, Checks, Contents, Finding, SharedKey, Sizes, sizes_to_json

FORMAT = 1
# The settings that decide what can be used.
DECIDING = (
    "image_extensions",
    "caption_extension",
    "caption_field",
    "category_field",
    "min_image_side",
    "max_image_pixels",
    "max_image_bytes",
    "max_caption_characters",
)
MOST_SHARDS_NAMED = 20
MOST_DETAIL_CHARACTERS = 100
PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB")


class Totals:
    """The sums over the shards that were checked; of each cause and fault the first that came."""

    def __init__(self, checks: Checks, names: Sequence[str]) -> None:
        """`names`: of the shards in the order in which they will be added, as they are to be shown."""
        self.checks, self.names = checks, names
        self.shards = self.samples = self.bytes = 0
        self.extensions: Counter[str] = Counter()
        self.sizes = {name: Sizes() for name in SIZES}
        self.causes: Counter[str] = Counter()
        self.first: dict[str, tuple[str, Finding]] = {}  # cause -> shard's name and sample
        self.undecodable = 0
        self.faults: Counter[str] = Counter()
        self.faulty: list[tuple[str, str, str]] = []  # shard's name, cause and detail, of the first
        self.shared_keys = 0
        self.shared_examples: list[SharedKey] = []

    def add(self, contents: Contents) -> None:
        name = self.names[self.shards]
        self.shards += 1
        self.samples += contents.samples
        self.bytes += contents.bytes
        self.extensions.update(contents.extensions)
        for size, of in contents.sizes.items():
            self.sizes[size].add(of)
        self.causes.update(contents.causes())
        self.undecodable += len(contents.undecodable)
        for finding in (*contents.unusable, *contents.undecodable):
            self.first.setdefault(finding.cause, (name, finding))
        if contents.fault is not None:
            self.faults[str(contents.fault.cause)] += 1
            if len(self.faulty) < MOST_SHARDS_NAMED:
                self.faulty.append((name, str(contents.fault.cause), contents.fault.detail))

    @property
    def unusable(self) -> int:
        return self.causes.total()

    @property
    def sound(self) -> bool:
        return not (self.unusable or self.undecodable or self.faults)

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "shard_faults": dict(self.faults),
            "samples": self.samples,
            "unusable": self.unusable,
            "undecodable": self.undecodable,
            "bytes": self.bytes,
            "extensions": dict(self.extensions),
            "sizes": sizes_to_json(self.sizes),
            "shared_keys": self.shared_keys,
            "shared_examples": [
                {"key": example.key, "shards": [self.names[shard] for shard in example.shards]}
                for example in self.shared_examples
            ],
        }


class JsonResult:
    """The JSON result, written whole or not at all; until then the shards' part is in a file without a name."""

    def __init__(self, target: str | None, checks: Checks) -> None:
        """`target`: a path, "-" for the standard output, or None for no result. Raises OSError."""
        self._path = None if target in (None, "-") else Path(target)
        self._checks = checks
        folder = None if self._path is None else self._path.parent
        if self._path is not None and self._path.is_dir():
            raise IsADirectoryError(f"--json: is a folder: {self._path}")
        if folder is not None and not folder.is_dir():
            raise NotADirectoryError(f"--json: no such folder: {folder}")
        self._rows = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8") if target else None  # noqa: SIM115
        self._separator = ""

    def __enter__(self) -> JsonResult:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rows is not None:
            self._rows.close()

    def add(self, contents: Contents) -> None:
        if self._rows is not None:
            self._rows.write(self._separator + json.dumps(contents.to_json()))
            self._separator = ",\n"

    def write(self, totals: Totals) -> None:
        """Raises OSError."""
        if self._rows is None:
            return
        head = {
            "format": FORMAT,
            "checks": self._checks.depth,
            "data": {name: getattr(self._checks.data, name) for name in DECIDING},
            "totals": totals.to_json(),
            "causes": dict(totals.causes),
        }
        if self._path is None:
            self._write(sys.stdout, head)
            return
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                self._write(file, head)
            os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone
            os.replace(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _write(self, file: TextIO, head: dict[str, Any]) -> None:
        """The totals come first, for who looks at the beginning of a long file; one line per shard."""
        assert self._rows is not None
        self._rows.seek(0)
        file.write(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "shards": [\n')
        shutil.copyfileobj(self._rows, file)
        file.write("\n]}\n")


def table(totals: Totals, seconds: float, processes: int) -> str:
    """What a person sees at the end."""
    sections = [_contents(totals, seconds, processes), _sizes(totals), _unusable(totals), _faulty(totals)]
    return "\n\n".join("\n".join(lines) for lines in [*sections, _verdict(totals)] if lines)


def _contents(totals: Totals, seconds: float, processes: int) -> list[str]:
    members = ", ".join(f"{extension} {count:,}" for extension, count in totals.extensions.most_common(8))
    if len(totals.extensions) > 8:
        members += f", and {len(totals.extensions) - 8} more extensions"
    lines = [
        f"{_count(totals.shards, 'shard')}, {_count(totals.samples, 'sample')}, {_bytes(totals.bytes)}; "
        f"checked in {seconds:,.1f} s by {_count(processes, 'process', 'processes')}",
        f"members: {members or 'none'}",
    ]
    if totals.shared_keys:
        example = totals.shared_examples[0]
        where = " and ".join(totals.names[shard] for shard in example.shards)
        told = f"{totals.shared_keys:,}, e.g. {_one(example.key, '')} in {where}"
        lines.append(f"keys in more than one shard, which is no fault: {told}")
    return lines


def _sizes(totals: Totals) -> list[str]:
    rows: list[Sequence[str]] = [("of what can be used", "least", "median", "most", "in all")]
    for name, sizes in totals.sizes.items():
        if sizes.count:
            in_all = _bytes(sizes.total) if name == "image_bytes" else ""
            if name == "caption_characters":
                in_all = _count(sizes.count, "caption")
            figures = (f"{size:,}" for size in (sizes.least or 0, sizes.median(), sizes.most))
            rows.append((name.replace("_", " "), *figures, in_all))
    return _aligned(rows, "<>>>>") if len(rows) > 1 else []


def _unusable(totals: Totals) -> list[str]:
    counts = totals.causes.most_common()
    if totals.undecodable:  # the last one: these keep their places in the order
        counts.append((str(Cause.DECODE_FAILED), totals.undecodable))
    rows = [("cause", "samples", "share", "first")]
    for cause, count in counts:
        name, finding = totals.first[cause]
        rows.append((cause, f"{count:,}", _share(count, totals.samples), _one(f"{name}/{finding.key}", finding.detail)))
    return _aligned(rows, "<>><") if counts else []


def _faulty(totals: Totals) -> list[str]:
    if not totals.faults:
        return []
    rows = [("faulty shard", "cause", ""), *((name, cause, _one("", detail)) for name, cause, detail in totals.faulty)]
    left = totals.faults.total() - len(totals.faulty)
    return _aligned(rows, "<<<") + ([f"and {left:,} more"] if left else [])


def _verdict(totals: Totals) -> list[str]:
    looked = " (by the headers alone: no image or caption was read)" if totals.checks.depth == HEADERS else ""
    if totals.sound:
        return [f"verdict: everything can be used{looked}"]
    parts = []
    if totals.unusable:
        share = _share(totals.unusable, totals.samples)
        parts.append(f"{totals.unusable:,} of {_count(totals.samples, 'sample')} ({share}) cannot be used")
    if totals.undecodable:
        parts.append(f"the decoder refuses {_count(totals.undecodable, 'image')}")
    if totals.faults:
        parts.append(f"{totals.faults.total():,} of {_count(totals.shards, 'shard')} faulty")
    lines = [f"verdict: {'; '.join(parts)}{looked}"]
    if totals.faults and totals.checks.data.broken_shards == "stop":
        lines.append('a run would not start with them: data.broken_shards is "stop"')
    return lines


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns, each "<" to the left or ">" to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _one(key: str, detail: str) -> str:
    """Names in a tar are foreign text, which shall not move the cursor."""
    key, detail = ("".join(c if c.isprintable() else "?" for c in text) for text in (key, detail))
    text = ": ".join(part for part in (key, detail) if part)
    most = len(key) + MOST_DETAIL_CHARACTERS
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _count(number: int, what: str, many: str = "") -> str:
    return f"{number:,} {what if number == 1 else many or f'{what}s'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g} %" if part < whole else "100 %"


def _bytes(number: float) -> str:
    for prefix in PREFIXES[:-1]:
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} {PREFIXES[-1]}"
