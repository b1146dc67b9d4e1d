"""Captions from text and JSON members."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from cmpt.data.captions import captions_from_json, captions_from_text, choose_caption, read_json
from cmpt.data.validate import Cause, UnusableError

LONGEST = 100


def from_bytes(data: bytes, field: str = "caption") -> list[str]:
    return captions_from_json(read_json(data), field, LONGEST)


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"a cat", ["a cat"]),
        (b"  a\t\n cat \r\n", ["a cat"]),
        ("\ufeffa café\u00a0noir".encode(), ["a café noir"]),
    ],
)
def test_text_is_normalised(data, captions) -> None:
    assert captions_from_text(data, LONGEST) == captions


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a  cat", ["a cat"]),
        (["a cat", " ", "", "a\ndog"], ["a cat", "a dog"]),
        (["x"], ["x"]),
        (["\U0001f600", "x" * 101, "\u732b", "7"], ["\u732b", "7"]),
    ],
)
def test_json_field_is_a_string_or_a_list(value, captions) -> None:
    assert from_bytes(json.dumps({"caption": value, "other": 1}).encode()) == captions


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"{", Cause.CAPTION_BROKEN_JSON),
        (b"", Cause.CAPTION_BROKEN_JSON),
        (b"[" * 100_000, Cause.CAPTION_BROKEN_JSON),
        (b"[1]", Cause.CAPTION_WRONG_TYPE),
        (b"{}", Cause.CAPTION_MISSING_FIELD),
        (b'{"caption": null}', Cause.CAPTION_WRONG_TYPE),
        (b'{"caption": 3}', Cause.CAPTION_WRONG_TYPE),
        (b'{"caption": {"en": "x"}}', Cause.CAPTION_WRONG_TYPE),
        (b'{"caption": ["x", 3]}', Cause.CAPTION_WRONG_TYPE),
        (b'{"caption": []}', Cause.EMPTY_CAPTION),
        (b'{"caption": ["", " "]}', Cause.EMPTY_CAPTION),
        (b'{"caption": "\xe9"}', Cause.CAPTION_NOT_UTF8),
        (rb'{"caption": "half a pair \ud83d"}', Cause.CAPTION_NOT_UTF8),
    ],
)
def test_bad_json_is_refused_with_its_cause(data, cause) -> None:
    with pytest.raises(UnusableError) as caught:
        from_bytes(data)
    assert caught.value.cause is cause


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\xff\xfe", Cause.CAPTION_NOT_UTF8),
        (b"", Cause.EMPTY_CAPTION),
        ("\u2003\n".encode(), Cause.EMPTY_CAPTION),
        ("\U0001f600\u2764\ufe0f \U0001f469\u200d\U0001f680!".encode(), Cause.CAPTION_WITHOUT_WORDS),
        (b"... --- ???", Cause.CAPTION_WITHOUT_WORDS),
        (b"word " * 21, Cause.CAPTION_TOO_LONG),
    ],
)
def test_bad_text_is_refused_with_its_cause(data, cause) -> None:
    with pytest.raises(UnusableError) as caught:
        captions_from_text(data, LONGEST)
    assert caught.value.cause is cause


def test_every_caption_is_chosen_equally_often() -> None:
    chosen = Counter(choose_caption(["a", "b", "c"], draw) for draw in np.linspace(0, 1, 3000, endpoint=False))
    assert chosen == {"a": 1000, "b": 1000, "c": 1000}
    assert choose_caption(["a", "b", "c"], 1 - 2.0**-32) == "c"
