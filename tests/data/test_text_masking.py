"""Text masking: which tokens stay, against references that are slow and readable."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data.making import take, text_sample, write_tar
from data.test_loader import assert_same_batch, captions_of

from cmpt.data.text_masking import TextMask, drop_probability
from cmpt.data.tokenizer import Tokenizer, open_tokenizer
from cmpt.data.validate import DataError
from cmpt.data.word_counts import WordCounts, counted_form, read_word_counts, split_words, write_word_counts
from cmpt.ops.random import Purpose, uniform
from cmpt.recipe.schema import TextMasking
from cmpt.recipe.schema import Tokenizer as TokenizerSettings

CLIPART = "pkg:data/clipart"
CONTEXT_LENGTH = 77
DRAWS = 10_000
CAPTION = "a small dog with a red ball beside the old wooden fence of a garden"
DIRTY = [
    CAPTION,
    "İstanbul's “old” harbour — seen from the ferry, 3.5 km away (2019)",
    "<b>AT&amp;T</b> &lt;shop&gt; doesnâ€™t open http://a.b/c?d=e&f=g #tag @name",
    "кошка сидит на окне и смотрит на улицу, где идёт снег",
    "日本語のとても長いキャプションがここにあります そして続きます",
    "हिन्दी में एक लंबा शीर्षक जो कई शब्दों का है",
    "😀👨‍👩‍👧 🇫🇷 ❤️ many many emoji 😀 and flags 🇫🇷 for all ❤️ of us",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "!?!?!?!?!?!?!?!?!?!?!? ... --- *** $$$ ((( ))) [[[ ]]] {{{ }}} ~~~ ^^^ ``` ;;; :::",
    "word " * 300,
    "\u200b\u00ad \x07bell \x1b[31mred\x1b[0m one two three four five six seven",
]


@pytest.fixture(scope="module", params=["sentencepiece", "clip_bpe"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind."""
    if request.param == "clip_bpe":
        if importlib.util.find_spec("open_clip") is None:
            pytest.skip("the extra open-clip is not installed")
        return open_tokenizer(TokenizerSettings("clip_bpe"), CONTEXT_LENGTH)
    return open_tokenizer(TokenizerSettings("sentencepiece", f"{CLIPART}/tokenizer.model"), CONTEXT_LENGTH)


def write_table(path: Path, counts: dict[str, int], words_total: int | None = None) -> str:
    write_word_counts(path, WordCounts(counts, words_total or sum(counts.values()), 1))
    return str(path)


def make(strategy: str, tokens: int | None, tokenizer: Tokenizer, seed: int = 0, **settings: object) -> TextMask:
    if strategy == "frequency":
        settings.setdefault("frequencies", f"{CLIPART}/word_counts.json")
    return TextMask(TextMasking(strategy=strategy, tokens=tokens, **settings), tokenizer, seed)  # type: ignore[arg-type]


def inner(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids between begin and end of text, which must be there, and nowhere else."""
    specials = {*tokenizer.begin, tokenizer.eot_id}
    assert tuple(ids[: len(tokenizer.begin)]) == tokenizer.begin and ids[-1] == tokenizer.eot_id
    text = ids[len(tokenizer.begin) : -1]
    assert not specials & set(text)
    return text


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


def chi_square(observed: Counter, places: int) -> float:
    """Of counts that should be equal; over its expectation plus 5 deviations it is no chance (less than 1 in 10^5)."""
    expected = observed.total() / places
    return sum((observed[place] - expected) ** 2 / expected for place in range(places))


def chi_square_limit(degrees: float) -> float:
    return degrees + 5 * math.sqrt(2 * degrees)


STRATEGIES = ["truncate", "random", "block", "frequency"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tokens", [3, 8, 16, CONTEXT_LENGTH])
def test_at_most_so_many_tokens_stay_with_begin_and_end(strategy, tokens, either) -> None:
    mask = make(strategy, tokens, either)
    masked = 0
    for ordinal, caption in enumerate(DIRTY * 3):
        whole = either.text_ids(caption)
        kept = inner(mask(caption, ordinal), either)
        budget = tokens - 1 - len(either.begin)
        if len(whole) <= budget:
            assert kept == whole, caption
            continue
        masked += 1
        assert 1 <= len(kept) <= budget, caption
        if strategy != "frequency":
            assert len(kept) == budget and is_subsequence(kept, whole), caption
    assert masked > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_caption_that_fits_stays_as_it_is(strategy, either) -> None:
    caption = "A Cat's  TOY, 3.5 m!"
    whole = either.encode(caption)
    for ordinal in range(20):
        assert make(strategy, len(whole), either)(caption, ordinal) == whole
    assert make(strategy, len(whole) - 1, either)(caption, 0) != whole


def test_without_masking_only_the_context_length_cuts(either) -> None:
    mask = make("none", None, either)
    assert [mask(caption, 5) for caption in DIRTY] == [either.encode(caption) for caption in DIRTY]
    assert len(mask("word " * 300, 0)) == CONTEXT_LENGTH


def test_truncate_keeps_the_first_tokens(either) -> None:
    kept = inner(make("truncate", 8, either)(CAPTION, 3), either)
    assert kept == either.text_ids(CAPTION)[: 8 - 1 - len(either.begin)]


class Spelling(Tokenizer):
    """An id per character, so that a place in the caption is an id."""

    context_length, vocab_size, eot_id, begin = 60, 1002, 1000, (1001,)

    def text_ids(self, text: str) -> list[int]:
        return [ord(character) - ord("A") for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("A") + token) for token in ids if token < 1000)


LETTERS = "".join(chr(ord("A") + place) for place in range(40))  # place p has id p


def test_random_keeps_every_place_and_every_pair_of_places_equally_often() -> None:
    mask = make("random", 10, Spelling(), seed=7)
    draws_BK = mask.draws(np.arange(DRAWS))
    kept = [mask(LETTERS, ordinal, draws_BK[ordinal])[1:-1] for ordinal in range(DRAWS)]
    assert all(places == sorted(set(places)) and len(places) == 8 for places in kept)
    # Drawn without replacement the counts vary less than independent ones, so the limit holds all the more.
    assert chi_square(Counter(place for places in kept for place in places), 40) < chi_square_limit(39)
    neighbours = sum(b - a == 1 for places in kept for a, b in zip(places, places[1:], strict=False))
    expected = 39 * (8 / 40) * (7 / 39)  # neighbours of a random 8 of 40
    assert abs(neighbours / DRAWS - expected) < 0.06


def test_block_keeps_a_run_that_starts_everywhere_equally_often() -> None:
    mask = make("block", 10, Spelling(), seed=7)
    starts: Counter[int] = Counter()
    draws_BK = mask.draws(np.arange(DRAWS))
    for ordinal in range(DRAWS):
        places = mask(LETTERS, ordinal, draws_BK[ordinal])[1:-1]
        assert places == list(range(places[0], places[0] + 8))
        starts[places[0]] += 1
    assert set(starts) == set(range(33))
    assert chi_square(starts, 33) < chi_square_limit(32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_drawn_for_a_batch_at_once_change_nothing(strategy, either) -> None:
    mask, ordinal_B = make(strategy, 8, either), np.arange(2**32 - 5, 2**32 + 6)
    draws_BK = mask.draws(ordinal_B)
    for caption in (CAPTION, "one word of three hundred " * 60):
        for ordinal, draws_K in zip(ordinal_B.tolist(), draws_BK, strict=True):
            assert mask(caption, ordinal, draws_K) == mask(caption, ordinal)


@pytest.mark.parametrize("strategy", ["random", "block"])
def test_tokens_behind_the_context_length_can_stay(strategy) -> None:
    caption = "".join(chr(ord("A") + place) for place in range(200))
    mask = make(strategy, 10, Spelling())
    assert max(max(mask(caption, ordinal)[1:-1]) for ordinal in range(200)) > 150


@pytest.mark.parametrize("strategy", ["random", "block", "frequency"])
def test_what_stays_follows_seed_and_ordinal_alone(strategy, either) -> None:
    expected = [make(strategy, 8, either, seed=4)(CAPTION, ordinal) for ordinal in range(50)]
    assert len(set(map(tuple, expected))) > 5
    shared = make(strategy, 8, either, seed=4)
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).permutation(50).tolist()
        found = dict(zip(order, pool.map(lambda ordinal: shared(CAPTION, ordinal), order), strict=True))
    assert [found[ordinal] for ordinal in range(50)] == expected
    assert [make(strategy, 8, either, seed=5)(CAPTION, ordinal) for ordinal in range(50)] != expected


def reference_frequency(caption, ordinal, tokens, tokenizer, counts, total, threshold, seed) -> list[str]:
    """The words that stay by the rule as the paper words it, tokens counted word by word; none cut."""
    words = split_words(caption)
    left = tokens - 1 - len(tokenizer.begin)
    rank = {}
    draws = uniform(seed, ordinal, Purpose.TEXT_MASK, len(words))
    for place, word in enumerate(words):
        count = counts.get(word.lower(), 0)
        p = max(0, 1 - math.sqrt(threshold * total / count)) if count else 1
        rank[place] = draws[place] - p
    kept = []
    for place in sorted(rank, key=lambda place: (-rank[place], place)):
        size = len(tokenizer.text_ids(words[place]))
        if size <= left:
            kept.append(place)
            left -= size
    return [words[place] for place in sorted(kept)]


def test_frequency_follows_the_rule_of_the_paper(either, tmp_path) -> None:
    counts = {"a": 50_000, "dog": 300, "with": 9_000, "ball": 40, "garden": 2, "the": 70_000, "old": 500, "red": 900}
    total = 1_000_000
    path = write_table(tmp_path / "table.json", counts, total)
    mask = make("frequency", 9, either, seed=11, frequencies=path, threshold=1e-4)
    caption = CAPTION.title()  # the table's words are lower case
    for ordinal in range(300):
        words = reference_frequency(caption, ordinal, 9, either, counts, total, 1e-4, 11)
        kept = inner(mask(caption, ordinal), either)
        assert words and kept == either.text_ids(" ".join(words)) == sum(map(either.text_ids, words), [])


def test_a_rare_word_stays_as_much_more_often_as_its_probability_says(tmp_path) -> None:
    """Two words, room for one: P(U1 - p1 > U2 - p2) with d = p1 - p2 >= 0 is (1 - d)^2 / 2."""
    path = write_table(tmp_path / "table.json", {"aaaa": 640_000, "bbbb": 40_000}, 1_000_000)
    p_common, p_rare = drop_probability(0.64, 1e-2), drop_probability(0.04, 1e-2)
    assert (p_common, p_rare) == (pytest.approx(1 - 0.125), pytest.approx(1 - 0.5))
    mask = make("frequency", 6, Spelling(), frequencies=path, threshold=1e-2)
    draws_BK = mask.draws(np.arange(DRAWS))
    kept = Counter(Spelling().decode(mask("aaaa bbbb", ordinal, draws_BK[ordinal])) for ordinal in range(DRAWS))
    assert set(kept) == {"aaaa", "bbbb"}
    expected = (1 - (p_common - p_rare)) ** 2 / 2
    assert abs(kept["aaaa"] / DRAWS - expected) < 5 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_unknown_words_go_first_and_words_rarer_than_the_threshold_never_pay() -> None:
    assert drop_probability(None, 1e-6) == 1
    assert drop_probability(1e-7, 1e-6) == 0
    assert drop_probability(1e-4, 1e-6) == pytest.approx(0.9)


def test_a_word_that_does_not_fit_is_passed_over_and_the_next_is_tried(tmp_path) -> None:
    path = write_table(tmp_path / "table.json", {"rare-filler": 1, "longest": 1, "ab": 10**6}, 2 * 10**6)
    mask = make("frequency", 7, Spelling(), frequencies=path, threshold=1e-6)
    for ordinal in range(20):  # "longest" has 7 characters, and p = 0 where "ab" has nearly 1
        assert Spelling().decode(mask("longest ab", ordinal)) == "ab"


def test_where_no_word_fits_the_best_is_cut(tmp_path) -> None:
    path = write_table(tmp_path / "table.json", {"common": 10**6, "rarest": 1}, 2 * 10**6)
    mask = make("frequency", 5, Spelling(), frequencies=path, threshold=1e-6)
    kept = Counter(Spelling().decode(mask("common rarest", ordinal)) for ordinal in range(200))
    assert set(kept) <= {"rar", "com"} and kept["rar"] > 190


def test_a_word_of_no_tokens_does_not_take_the_place_of_text() -> None:
    class Silent(Spelling):
        def text_ids(self, text: str) -> list[int]:
            return super().text_ids(text.replace("...", ""))

    mask = make("frequency", 5, Silent())
    assert all(len(mask("longest ... longer", ordinal)) == 5 for ordinal in range(20))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's toy, 3.5 m", ["A", "dog's", "toy", ",", "3", ".", "5", "m"]),
        ("'quoted' rock'n'roll don''t", ["'", "quoted", "'", "rock'n'roll", "don", "''", "t"]),
        ("AT&amp;amp;T doesnâ€™t “see” x_1", ["AT", "&", "T", "doesn't", '"', "see", '"', "x", "_", "1"]),
        ("été — ½ Ωmega", ["été", "—", "½", "Ωmega"]),
        ("हिन्दी ❤️ 👨‍👩‍👧!", ["हिन्दी", "❤️", "👨‍👩‍👧!"]),
        ("日本語のキ、日", ["日本語のキ", "、", "日"]),
        (" \t\u3000\u00a0 ", []),
    ],
)
def test_words_are_runs_of_letters_or_of_signs(caption, words) -> None:
    assert split_words(caption) == words


def test_words_of_ascii_are_the_same_by_both_patterns() -> None:
    noise = np.random.default_rng(3).choice(list("aB3'_-. ,&#;\"<\t"), size=(300, 30))
    for row in noise:
        caption = "".join(row)
        # The letter makes the text non-ASCII and is a word of its own.
        assert split_words(caption + " é") == [*split_words(caption), "é"], caption


def test_a_table_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "table.json"
    write_table(path, {"b": 3, "über": 7, "a": 3}, 20)
    assert list(json.loads(path.read_text(encoding="utf-8"))["counts"].items()) == [("über", 7), ("a", 3), ("b", 3)]
    table = read_word_counts(str(path))
    assert (table.frequency("ÜBER"), table.frequency("none"), table.words_total) == (7 / 20, None, 20)
    assert counted_form("Über") == "über"
    write_table(path, {"b": 4})
    assert read_word_counts(str(path)).counts == {"b": 4}, "a table that was written anew is read anew"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "JSONDecodeError"),
        (b"\xff\xfe{}", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"[1]", "it holds list, expected an object"),
        (b'{"counts": {"a": 1}}', "format is None, expected 1"),
        (b'{"format": 2, "counts": {"a": 1}}', "format is 2, expected 1"),
        (b'{"format": 1, "counts": {}, "words_total": 1, "captions": 1}', "at least one word"),
        (b'{"format": 1, "counts": ["a"], "words_total": 1, "captions": 1}', "at least one word"),
        (b'{"format": 1, "counts": {"a": -1}, "words_total": 1, "captions": 1}', "the count of 'a' is -1"),
        (b'{"format": 1, "counts": {"a": 1.5}, "words_total": 2, "captions": 1}', "the count of 'a' is 1.5"),
        (b'{"format": 1, "counts": {"a": true}, "words_total": 2, "captions": 1}', "the count of 'a' is True"),
        (b'{"format": 1, "counts": {"a": 1}, "words_total": 0, "captions": 1}', "words_total is 0"),
        (b'{"format": 1, "counts": {"a": 1}, "captions": 1}', "words_total is None"),
        (b'{"format": 1, "counts": {"a": 1}, "words_total": 1, "captions": "1"}', "captions is '1'"),
        (b'{"format": 1, "counts": {"a": 2}, "words_total": 1, "captions": 1}', "less than the sum 2"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_bad_table_is_named_with_what_is_wrong(content, told, tmp_path) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        make("frequency", 8, Spelling(), frequencies=str(path))
    assert str(caught.value).startswith(f"text_masking.frequencies: {path} is no table of tools/count_words.py: ")
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strategy": "random"}, "text_masking.tokens must be given"),
        ({"strategy": "random", "tokens": Spelling.context_length + 1}, "text_masking.tokens must be in"),
        ({"strategy": "random", "tokens": 1}, "text_masking.tokens must be in"),
        ({"strategy": "syntax", "tokens": 8}, "text_masking.strategy must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told) -> None:
    with pytest.raises(ValueError, match=told):
        TextMask(TextMasking(**settings), Spelling(), 0)


LONG = "the long caption of picture number {} with red and two cats and dogs in it"


@pytest.fixture
def long_pattern(tmp_path: Path) -> str:
    samples = [(key, {**members, "txt": LONG.format(key).encode()}) for key, members in map(text_sample, range(24))]
    write_tar(tmp_path / "long.tar", samples)
    return str(tmp_path / "long.tar")


@pytest.mark.parametrize("strategy", ["random", "block", "frequency"])
def test_a_loader_masks_alike_at_any_world_size_and_after_a_resume(make_loader, long_pattern, strategy) -> None:
    settings = TextMasking(strategy, 8, f"{CLIPART}/word_counts.json" if strategy == "frequency" else None)
    whole = take(make_loader(long_pattern, text_masking=settings), 5)
    parts = [take(make_loader(long_pattern, rank=rank, world_size=2, text_masking=settings), 5) for rank in range(2)]
    for step, (batch, _) in enumerate(whole):
        assert [ids for part in parts for ids in captions_of(part[step][0])] == captions_of(batch)
        assert max(batch.text.lengths) <= 8
    resumed = take(make_loader(long_pattern, text_masking=settings), 1, whole[2][1])
    assert_same_batch(resumed[0][0], whole[3][0])
    visits = {ids for batch, _ in whole for ids, key in zip(captions_of(batch), batch.keys, strict=True)
              if key.endswith("000003")}  # fmt: skip
    assert len(visits) > 1, "a sample that comes again is masked anew"


def test_the_loader_masks_by_the_ordinal_of_the_slot(make_loader, long_pattern, model_path) -> None:
    settings = TextMasking("random", 8)
    mask = TextMask(settings, open_tokenizer(TokenizerSettings("sentencepiece", str(model_path)), 32), 3)
    batches = take(make_loader(long_pattern, text_masking=settings, seed=3), 3)
    for batch, _ in batches:
        for ids, key, ordinal in zip(captions_of(batch), batch.keys, batch.ordinal_B.tolist(), strict=True):
            assert list(ids) == mask(LONG.format(key.rpartition("/")[2]), ordinal)


def test_a_phase_may_change_the_text_masking_and_keeps_the_order(make_loader, long_pattern) -> None:
    plain = take(make_loader(long_pattern), 1)[0][0]
    loader = make_loader(long_pattern, text_masking=TextMasking("truncate", 8))
    assert set(take(loader, 1)[0][0].text.lengths) == {8}
    batches = loader.batches(loader.initial_state(), text_masking=TextMasking())
    batch, _ = next(batches)
    batches.close()
    assert_same_batch(batch, plain)


def test_a_loader_refuses_a_bad_table_before_it_reads(make_loader, long_pattern, tmp_path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    bad = TextMasking("frequency", 8, str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match=r"text_masking\.frequencies: .*bad\.json"):
        make_loader(long_pattern, text_masking=bad)


def test_another_table_of_words_is_other_data(make_loader, long_pattern, tmp_path) -> None:
    path = tmp_path / "counts.json"
    masks = TextMasking("frequency", 8, str(path))
    found = []
    for count in (3, 3, 4):
        write_word_counts(path, WordCounts({"a": count}, 10, 5))
        found.append(make_loader(long_pattern, text_masking=masks).data_fingerprint)
    assert found[0] == found[1] != found[2]
    assert make_loader(long_pattern).data_fingerprint not in found
