"""Text masking: which tokens of a training caption the text tower sees.

"truncate", "random" and "block" choose among tokens (CLIPA, arXiv 2305.07017, section 3.2); "frequency" chooses among
words, and leaves frequent ones out more often (CLIPF, arXiv 2412.16148, section 3; the rule is that of subsampling in
word2vec, arXiv 1310.4546, section 2.3). What is drawn for a caption depends on the seed and its ordinal in the run
alone. Evaluation sees whole captions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from cmpt.data.tokenizer import Tokenizer
from cmpt.data.word_counts import WordCounts, read_word_counts, split_words
from cmpt.ops.random import Purpose, uniform
from cmpt.recipe import schema

_WORDS_REMEMBERED = 1 << 16
_DRAWN_AT_ONCE = 64  # numbers for every row of a batch: few captions have more tokens
_DRAWING = ("random", "block", "frequency")

Drawn = Callable[[int], NDArray[np.float64]]
"""So many uniform numbers in [0, 1), those of the caption."""


class TextMask:
    """Captions to ids under a recipe's text masking. Safe to share between threads.

    A caption whose tokens fit stays whole. Of a longer one the whole is masked, not what the context length leaves of
    it: a token behind the context length is as likely to stay as one before it.
    """

    def __init__(self, settings: schema.TextMasking, tokenizer: Tokenizer, seed: int) -> None:
        """`settings` as check_recipe lets them pass. Raises DataError for a table of words that cannot be used."""
        self._strategy, self._threshold, self._seed = settings.strategy, settings.threshold, seed
        self._tokenizer = tokenizer
        self.table_digest = ""
        if settings.strategy == "none":
            return
        if settings.tokens is None:
            raise ValueError(f'text_masking.tokens must be given with strategy "{settings.strategy}", got null')
        self._budget = settings.tokens - len(tokenizer.begin) - 1  # of the text alone
        if self._budget < 1 or settings.tokens > tokenizer.context_length:
            limits = f"{len(tokenizer.begin) + 2} … {tokenizer.context_length}, the context length"
            raise ValueError(f"text_masking.tokens must be in {limits}; got {settings.tokens}")
        if settings.strategy == "frequency":
            assert settings.frequencies is not None
            self._table: WordCounts = read_word_counts(settings.frequencies)
            self.table_digest = self._table.digest
            self._tokens_of_word = lru_cache(_WORDS_REMEMBERED)(lambda word: len(tokenizer.text_ids(word)))
        elif settings.strategy not in ("truncate", "random", "block"):
            raise ValueError(
                f'text_masking.strategy must be "none", "truncate", "random", "block" or "frequency", '
                f"got {settings.strategy!r}"
            )

    def draws(self, ordinal_B: NDArray[np.int64]) -> NDArray[np.float64]:
        """The first random numbers of each ordinal, [B, K], K = 0 for a strategy that draws none.

        For a batch at once they cost 5 µs a row, one by one 200 µs.
        """
        return uniform(self._seed, ordinal_B, Purpose.TEXT_MASK, _DRAWN_AT_ONCE if self._strategy in _DRAWING else 0)

    def __call__(self, caption: str, ordinal: int, draws_K: NDArray[np.float64] | None = None) -> list[int]:
        """The ids of a caption that stay, in order, begin (if the kind has one) and end of text included.

        `ordinal`: of the sample in the run, which keys what is drawn. `draws_K`: its row of `draws`, or null; the ids
        are the same.
        """
        ids = self._tokenizer.text_ids(caption)
        if self._strategy != "none" and len(ids) > self._budget:
            ids = self._masked(caption, ids, partial(self._drawn, ordinal, draws_K))
        return self._tokenizer.framed(ids)

    def _masked(self, caption: str, ids: list[int], drawn: Drawn) -> list[int]:
        count, budget = len(ids), self._budget
        if self._strategy == "random":
            places = np.sort(np.argsort(drawn(count), kind="stable")[:budget])
            return [ids[place] for place in places.tolist()]
        if self._strategy == "block":
            start = int(drawn(1)[0] * (count - budget + 1))
            return ids[start : start + budget]
        if self._strategy == "frequency":
            text = " ".join(self._frequency_words(split_words(caption), drawn))
            # Tokens of words joined by spaces are those of the words; only odd vocabularies differ, hence the cut. It
            # is also what makes a word fit that is longer than the budget.
            return self._tokenizer.text_ids(text)[:budget]
        return ids[:budget]

    def _frequency_words(self, words: list[str], drawn: Drawn) -> list[str]:
        """The words that stay, in order: those with the largest U - p whose tokens fit.

        Every word draws its own U, uniform in [0, 1), where it comes twice too. One that does not fit into what is
        left of the budget is passed over, and the next is tried; where not even one fits, the best stays, to be cut.
        """
        p_W = np.array([drop_probability(self._table.frequency(word), self._threshold) for word in words])
        ranked = np.argsort(p_W - drawn(len(words)), kind="stable").tolist()
        kept: list[int] = []
        left = self._budget
        too_long: list[int] = []
        for place in ranked:
            tokens = self._tokens_of_word(words[place])
            if 0 < tokens <= left:
                kept.append(place)
                left -= tokens
            elif tokens > self._budget:
                too_long.append(place)
            if not left:
                break
        return [words[place] for place in sorted(kept or too_long[:1])]

    def _drawn(self, ordinal: int, draws_K: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
        """The first `count` numbers of an ordinal; how many are asked for changes none of them."""
        if draws_K is not None and count <= len(draws_K):
            return draws_K[:count]
        return uniform(self._seed, ordinal, Purpose.TEXT_MASK, count)


def drop_probability(frequency: float | None, threshold: float) -> float:
    """CLIPF's p of a word: max(0, 1 - sqrt(threshold / frequency)), and 1 for one that the table does not have."""
    return 1.0 if frequency is None else max(0.0, 1.0 - (threshold / frequency) ** 0.5)
