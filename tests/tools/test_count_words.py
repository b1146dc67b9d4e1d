"""The tool that counts words: against a plain counter, what it refuses, and the table that is shipped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from data.making import json_sample, text_sample, write_tar

import count_words
from cmpt.data.word_counts import read_word_counts

REPOSITORY = Path(__file__).parents[2]
CLIPART = REPOSITORY / "cmpt/data/clipart"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe over three shards with dirty captions, one of them in two sources; the words are written below."""
    one = [
        json_sample(0, ["A red cat", "a red cat", "two  cats\n&amp; a dog's toy"]),
        json_sample(1, "A RED CAT."),
        json_sample(2, ["Ein ÜBER-Hund doesnâ€™t", " ", ""]),
        json_sample(3, []),
        json_sample(4, None),
        ("000005", {"jpg": b"no picture at all", "json": b'{"captions": "lonely words"}'}),
    ]
    two = [
        json_sample(6, "dog, dog"),
        ("000007", {"jpg": b"", "json": b"{"}),
        ("000008", {"json": b'{"captions": "caf\xe9"}'}),
        ("000009", {"txt": b"no json"}),
        json_sample(10, [{"not": "a text"}]),
        json_sample(11, ["dog"], caption="x"),
    ]
    three = [json_sample(12, "the last one")]
    for name, samples in (("a-0000", one), ("a-0001", two), ("b", three)):
        write_tar(tmp_path / f"{name}.tar", samples)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
data:
  train:
    - urls: ["{tmp_path}/a-{{0000..0001}}.tar"]
      weight: 3
    - urls: [{tmp_path}/b.tar, {tmp_path}/a-0000.tar]
  caption_extension: json
  caption_field: captions
  cache_folder: {tmp_path}/cache
text_masking:
  strategy: frequency
  tokens: 8
  frequencies: {tmp_path}/named.json
""",
        encoding="utf-8",
    )
    return path


TEXT = (
    "a red cat a red cat two cats & a dog's toy a red cat . ein über - hund doesn't lonely words "
    "dog , dog dog the last one"
)
WORDS = Counter(TEXT.split())
CAPTIONS = 3 + 1 + 1 + 1 + 1 + 1 + 1
UNUSABLE = {
    "empty_caption": 1,
    "caption_wrong_type": 2,
    "caption_broken_json": 1,
    "caption_not_utf8": 1,
    "missing_caption": 1,
}


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_are_those_of_a_plain_counter(workers, recipe, tmp_path, capsys) -> None:
    assert count_words.main([str(recipe), "--workers", str(workers)]) == 0
    content = json.loads((tmp_path / "named.json").read_text(encoding="utf-8"))
    assert content.pop("counts") == dict(WORDS)
    assert content == {"format": 1, "words_total": WORDS.total(), "captions": CAPTIONS}
    table = read_word_counts(str(tmp_path / "named.json"))
    assert list(table.counts) == sorted(WORDS, key=lambda word: (-WORDS[word], word))
    told = capsys.readouterr().out
    assert f"{CAPTIONS} captions of 13 samples, {WORDS.total()} words, {len(WORDS)} of them distinct" in told
    for cause, count in UNUSABLE.items():
        assert f"not counted: {count} samples, {cause}\n" in told
    assert told.count("not counted") == len(UNUSABLE)


def test_text_members_are_counted_too(tmp_path, capsys) -> None:
    write_tar(tmp_path / "s.tar", [text_sample(number) for number in range(4)])
    output = tmp_path / "table.json"
    assert count_words.main([
        str(REPOSITORY / "recipes/quickstart.yaml"), f"data.train=[{{urls: [{tmp_path}/s.tar]}}]",
        "data.caption_extension=txt", f"data.cache_folder={tmp_path}/cache", "--output", str(output), "--workers", "1",
    ]) == 0  # fmt: skip
    expected = {"number": 4, "picture": 4, "0": 1, "1": 1, "2": 1, "3": 1}
    assert json.loads(output.read_text())["counts"] == expected


def test_rare_words_can_be_left_out_and_still_count_in_the_total(recipe, tmp_path, capsys) -> None:
    output = tmp_path / "small.json"
    assert count_words.main([str(recipe), "--least-count", "3", "--output", str(output), "--workers", "1"]) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["counts"] == {word: count for word, count in WORDS.items() if count >= 3}
    assert content["words_total"] == WORDS.total()
    assert "the 4 words that occur at least 3 times" in capsys.readouterr().out
    assert not (tmp_path / "named.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.train=[{urls: [no-such.tar]}]"], "no such file"),
        (["data.caption_field="], "data.caption_field"),
        (["--output", "no/such/folder/x.json"], "no such folder: no/such/folder"),
        (["text_masking.frequencies=null"], "--output must name a file"),
        (["--least-count", "99"], "no word occurs 99 times in 9 captions; 2 samples: caption_wrong_type"),
        (["data.trian=[]"], "data.trian"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, told, recipe, tmp_path, capsys) -> None:
    assert count_words.main([str(recipe), "--workers", "1", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and told in captured.err and not captured.out
    assert not (tmp_path / "named.json").exists()


def test_a_broken_shard_is_told(recipe, tmp_path, capsys) -> None:
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    assert count_words.main([str(recipe), "--workers", "1"]) == 0
    assert "damaged_shard" in "".join(capsys.readouterr())


def test_a_broken_shard_may_end_the_tool_and_leaves_an_older_table_alone(recipe, tmp_path, capsys) -> None:
    (tmp_path / "named.json").write_text("older")
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    assert count_words.main([str(recipe), "data.broken_shards=stop", "--workers", "1"]) == 2
    assert "b.tar" in capsys.readouterr().err
    assert (tmp_path / "named.json").read_text() == "older"


def test_the_shipped_table_is_the_one_that_the_command_makes(tmp_path) -> None:
    made = tmp_path / "word_counts.json"
    recipe = str(REPOSITORY / "recipes/quickstart.yaml")
    cache = f"data.cache_folder={tmp_path}/cache"
    assert count_words.main([recipe, cache, "--output", str(made), "--workers", "1"]) == 0
    assert made.read_bytes() == (CLIPART / "word_counts.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"word_counts.json", "cache"}
