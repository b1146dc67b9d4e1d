"""The counter-based generator against published answers, and numpy against torch."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from cmpt.ops.random import Purpose, _philox_rounds, permutation, random_words, random_words_tensor, uniform

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**32 - 1, 2**63 + 12345, -1]
ORDINALS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers_in_numpy_and_torch(counter, key, answer) -> None:
    words = _philox_rounds(*(np.array([word], dtype=np.uint64) for word in counter), *key)
    assert tuple(int(word[0]) for word in words) == answer
    words = _philox_rounds(*(torch.tensor([word], dtype=torch.int64) for word in counter), *key)
    assert tuple(int(word[0]) for word in words) == answer


def test_counter_is_index_purpose_ordinal_low_high() -> None:
    seed, ordinal, purpose = 0x299F31D0_A4093822, 0x03707344_13198A2E, 0x85A308D3
    expected = _philox_rounds(
        *(np.array([word], dtype=np.uint64) for word in (1, purpose, 0x13198A2E, 0x03707344)), 0xA4093822, 0x299F31D0
    )
    assert random_words(seed, ordinal, purpose, 8)[4:].tolist() == [int(word[0]) for word in expected]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 23])
def test_numpy_and_torch_words_are_the_same(seed, count) -> None:
    on_host = random_words(seed, np.array(ORDINALS), Purpose.ANCHORS, count)
    in_torch = random_words_tensor(seed, torch.tensor(ORDINALS), Purpose.ANCHORS, count)
    assert on_host.shape == (len(ORDINALS), count)
    np.testing.assert_array_equal(on_host.astype(np.int64), in_torch.numpy())


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    np.testing.assert_array_equal(random_words(7, 9, Purpose.CROP, 3), random_words(7, 9, Purpose.CROP, 23)[:3])


def test_a_batch_of_ordinals_equals_single_ordinals() -> None:
    together = uniform(3, np.array(ORDINALS), Purpose.CROP, 5)
    for row, ordinal in zip(together, ORDINALS, strict=True):
        np.testing.assert_array_equal(row, uniform(3, ordinal, Purpose.CROP, 5))


def test_seed_ordinal_and_purpose_all_change_every_word() -> None:
    base = random_words(1, 2, Purpose.CROP, 8)
    for other in (
        random_words(2, 2, Purpose.CROP, 8),
        random_words(1 << 32 | 1, 2, Purpose.CROP, 8),
        random_words(1, 3, Purpose.CROP, 8),
        random_words(1, 1 << 32 | 2, Purpose.CROP, 8),
        random_words(1, 2, Purpose.CAPTION, 8),
    ):
        assert not (base == other).any()


def test_uniform_is_uniform() -> None:
    draws = uniform(5, np.arange(20_000), Purpose.CROP, 5)
    assert draws.min() >= 0 and draws.max() < 1
    observed = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in draws.T])
    chi_square = ((observed - 1000) ** 2 / 1000).sum(axis=1)
    assert (chi_square < 45).all()  # 19 degrees of freedom: 45 is exceeded once in 1,500 columns


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_permutation_holds_every_number_once(count) -> None:
    order = permutation(11, 5, Purpose.UNIT_ORDER, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_uniform_over_keys() -> None:
    counts = dict.fromkeys(permutations(range(4)), 0)
    for key in range(6000):
        counts[tuple(permutation(1, key, Purpose.MEMBER_ORDER, 4).tolist())] += 1
    chi_square = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert chi_square < 55  # 23 degrees of freedom: exceeded once in 5,000 seeds


def test_a_long_permutation_mixes_far() -> None:
    moved = np.abs(permutation(1, 0, Purpose.MEMBER_ORDER, 10_000) - np.arange(10_000))
    assert abs(moved.mean() / 10_000 - 1 / 3) < 0.01  # the mean of |x - y| for uniform x, y
