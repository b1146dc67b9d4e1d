"""Captions of a sample, and which of them a visit uses."""

from __future__ import annotations

import json
from typing import Any

from cmpt.data.validate import Cause, UnusableError, one_line


def read_json(data: bytes) -> dict[str, Any]:
    """The JSON object of a sample. Raises `UnusableError`."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnusableError(Cause.CAPTION_NOT_UTF8, one_line(error)) from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(Cause.CAPTION_BROKEN_JSON, one_line(error)) from error
    if not isinstance(content, dict):
        raise UnusableError(Cause.CAPTION_WRONG_TYPE, f"the JSON is of type {type(content).__name__}, not an object")
    return content


def captions_from_json(content: dict[str, Any], field: str, longest: int) -> list[str]:
    """The captions in a field that holds a string or a list of strings; at least one. Raises `UnusableError`.

    Of a list those that cannot be used are left out; the first one's cause counts where none is left.
    """
    if field not in content:
        raise UnusableError(Cause.CAPTION_MISSING_FIELD, f"no field {field!r}")
    value = content[field]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableError(Cause.CAPTION_WRONG_TYPE, f"field {field!r} holds {type(value).__name__}")
    return _usable(texts, longest)


def captions_from_text(data: bytes, longest: int) -> list[str]:
    """The one caption of a text member, of at most `longest` characters, as a list. Raises `UnusableError`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError(Cause.CAPTION_NOT_UTF8, one_line(error)) from error
    return _usable([text], longest)


def choose_caption(captions: list[str], draw: float) -> str:
    """The caption that a uniform draw in [0, 1) picks (`Purpose.CAPTION`, keyed by the slot's ordinal)."""
    return captions[int(draw * len(captions))]


def _usable(texts: list[str], longest: int) -> list[str]:
    """White space normalised, captions of a list that cannot be used left out."""
    captions, faults = [], []
    for text in texts:
        try:
            captions.append(_checked(" ".join(text.split()), longest))
        except UnusableError as error:
            faults.append(error)
    if not captions:
        raise faults[0] if faults else UnusableError(Cause.EMPTY_CAPTION, "an empty list")
    return captions


def _checked(caption: str, longest: int) -> str:
    if not caption:
        raise UnusableError(Cause.EMPTY_CAPTION)
    if len(caption) > longest:
        raise UnusableError(
            Cause.CAPTION_TOO_LONG, f"{len(caption)} characters exceed data.max_caption_characters {longest}"
        )
    if not caption.isascii():
        try:
            caption.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise UnusableError(Cause.CAPTION_NOT_UTF8, one_line(error)) from error
    if not any(map(str.isalnum, caption)):
        raise UnusableError(Cause.CAPTION_WITHOUT_WORDS, repr(caption[:40]))
    return caption
