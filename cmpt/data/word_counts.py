"""What a word of a caption is, and the table of how often each occurs, which `tools/count_words.py` writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

from cmpt.data.tokenizer import clean_text
from cmpt.data.validate import DataError, one_line
from cmpt.recipe.paths import resolve_path

TABLE_FORMAT = 1

# Marks belong to the letter before them; the two joiners hold words of Persian and the Indic scripts together.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*"
_WORD = pre_tokenizers.Split(
    Regex(rf"{_LETTERS}(?:['\x{{200C}}\x{{200D}}]{_LETTERS})*|[^\s\p{{L}}\p{{N}}]+"), behavior="removed", invert=True
)
# The same for ASCII, which most captions are, in a tenth of the time.
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*|[^\sA-Za-z0-9]+")


def split_words(caption: str) -> list[str]:
    """The words of a caption, in order and in its own case, none empty.

    The caption is cleaned as CLIP's tokenizer cleans it. A word is then a run of letters and digits, apostrophes
    between them included, or a run of other signs: "a dog's toy, 3.5 m" is a | dog's | toy | , | 3 | . | 5 | m. Where
    a script has no spaces, a run between two signs is one word.
    """
    text = clean_text(caption)
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return [word for word, _ in _WORD.pre_tokenize_str(text)]


def counted_form(word: str) -> str:
    """The form in which a word stands in the table: "Dog" and "dog" are one word."""
    return word.lower()


@dataclass(frozen=True)
class WordCounts:
    """How often words occur in the captions of a data set."""

    counts: Mapping[str, int]  # by counted form
    words_total: int  # of all captions, words that are not in `counts` included
    captions: int
    digest: str = field(default="", compare=False)
    """Of the file that it was read from."""

    def frequency(self, word: str) -> float | None:
        """The share of all words that are this one; None where the table does not have it."""
        count = self.counts.get(counted_form(word))
        return None if count is None else count / self.words_total


def write_word_counts(path: Path, table: WordCounts) -> None:
    """Writes the table as JSON, most frequent word first, one to a line. The file is never there in part.

    Raises OSError.
    """
    ordered = dict(sorted(table.counts.items(), key=lambda item: (-item[1], item[0])))
    content = {
        "format": TABLE_FORMAT,
        "words_total": table.words_total,
        "captions": table.captions,
        "counts": ordered,
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=0)
            file.write("\n")
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_word_counts(path: str) -> WordCounts:
    """The table in a file; `path` as a recipe gives it. Raises DataError that says what is wrong with it."""
    file = resolve_path(path)
    try:
        status = os.stat(file)
        return _read(file, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, RecursionError) as error:
        told = str(error) if isinstance(error, _TableError) else one_line(error)
        raise DataError(f"text_masking.frequencies: {file} is no table of tools/count_words.py: {told}") from error


class _TableError(ValueError):
    """What is wrong with the content of a table."""


@lru_cache(maxsize=2)  # phases mostly share a table, and that of a large data set takes seconds to read
def _read(file: str, mtime_ns: int, size: int) -> WordCounts:
    data = Path(file).read_bytes()
    content = json.loads(data.decode())
    if not isinstance(content, dict):
        raise _TableError(f"it holds {type(content).__name__}, expected an object")
    if content.get("format") != TABLE_FORMAT:
        raise _TableError(f"format is {content.get('format')!r}, expected {TABLE_FORMAT}")
    counts = content.get("counts")
    if not isinstance(counts, dict) or not counts:
        raise _TableError("counts must be an object with at least one word")
    wrong = next((word for word, count in counts.items() if not _is_count(count)), None)
    if wrong is not None:
        raise _TableError(f"the count of {wrong!r} is {counts[wrong]!r}, expected a whole number above 0")
    for name in ("words_total", "captions"):
        if not _is_count(content.get(name)):
            raise _TableError(f"{name} is {content.get(name)!r}, expected a whole number above 0")
    counted = sum(counts.values())
    if counted > content["words_total"]:
        raise _TableError(f"words_total is {content['words_total']}, less than the sum {counted} of its counts")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return WordCounts(counts, content["words_total"], content["captions"], digest)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _umask() -> int:
    """The process' umask, which can only be had by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
