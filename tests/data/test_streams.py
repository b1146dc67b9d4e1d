"""The order of samples: pure functions, so thousands of cases cost nothing."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from cmpt.data.streams import LoaderState, SourceOrder, draw_sources, owned_streams

CASES = [
    ([1], 1),
    ([1], 4),
    ([3], 8),
    ([5, 2], 8),
    ([1, 1, 1], 2),
    ([10], 4),
    ([7, 11, 3, 9], 4),
    ([7, 0, 3], 4),
    ([100] * 16, 8),
    ([3] * 40, 7),
    ([1000, 1, 1], 16),
]


def visits(order: SourceOrder, stream: int, epochs: int) -> list[tuple[int, int, int]]:
    """(epoch, unit, member) of everything the stream sees in its first epochs."""
    seen = []
    for candidate in order.candidates(stream, (0, 0)):
        if candidate.after[0] >= epochs:
            return seen
        seen.append((candidate.after[0], candidate.unit, candidate.member))
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("sizes", "streams"), CASES)
def test_every_sample_exactly_once_per_epoch(sizes, streams) -> None:
    order = SourceOrder(seed=5, source=0, unit_sizes=sizes, streams=streams)
    epochs = 3
    seen = Counter(visit for stream in range(streams) for visit in visits(order, stream, epochs))
    everything = {
        (epoch, unit, member) for epoch in range(epochs) for unit, size in enumerate(sizes) for member in range(size)
    }
    assert set(seen) == everything
    assert set(seen.values()) == {1}


@pytest.mark.parametrize(("sizes", "streams"), CASES)
def test_parts_of_an_epoch_are_equal_to_one_sample_and_even_out(sizes, streams) -> None:
    order = SourceOrder(5, 0, sizes, streams)
    lengths = np.array(
        [[end - start for start, end in (order.part(s, e) for s in range(streams))] for e in range(streams)]
    )
    assert lengths.max() - lengths.min() <= 1
    assert (lengths.sum(axis=0) == sum(sizes)).all()  # over S epochs every stream gets the same


@pytest.mark.parametrize(("sizes", "streams"), CASES)
def test_any_position_resumes_without_replay(sizes, streams) -> None:
    order = SourceOrder(5, 0, sizes, streams)
    for stream in range(min(streams, 4)):
        line = list(islice(order.candidates(stream, (0, 0)), 40))
        for place, candidate in enumerate(line[:-1]):
            assert next(order.candidates(stream, candidate.after)) == line[place + 1]


def test_a_position_far_out_is_reached_at_once() -> None:
    order = SourceOrder(5, 0, [10_000] * 10_000, 8)
    candidate = next(order.candidates(3, (1_000_000, 12_345_678)))
    assert candidate.after == (1_000_000, 12_345_679)


def test_epochs_seeds_and_sources_have_different_orders() -> None:
    def line(seed: int, source: int, epoch: int) -> list[tuple[int, int]]:
        found = islice(SourceOrder(seed, source, [50, 50], 1).candidates(0, (epoch, 0)), 100)
        return [(candidate.unit, candidate.member) for candidate in found]

    lines = [line(0, 0, 0), line(1, 0, 0), line(0, 1, 0), line(0, 0, 1)]
    assert len({tuple(line) for line in lines}) == len(lines)
    assert len({tuple(sorted(line)) for line in lines}) == 1


def test_members_of_different_units_have_different_orders() -> None:
    line = list(islice(SourceOrder(0, 0, [50, 50], 1).candidates(0, (0, 0)), 100))
    first, second = line[:50], line[50:]
    assert first[0].unit != second[0].unit
    assert [c.member for c in first] != [c.member for c in second]


def test_a_stream_stays_in_its_unit_until_the_unit_ends() -> None:
    units = [candidate.unit for candidate in islice(SourceOrder(0, 0, [30] * 8, 2).candidates(0, (0, 0)), 120)]
    assert sum(a != b for a, b in zip(units, units[1:], strict=False)) == 3


def test_an_empty_source_is_a_fault() -> None:
    with pytest.raises(ValueError, match="source number 2 holds no samples"):
        SourceOrder(0, 2, [0, 0], 4)


def test_sources_are_drawn_in_proportion_to_weight_and_by_ordinal_alone() -> None:
    ordinals = np.arange(40_000)
    drawn = draw_sources(9, ordinals, [1.0, 2.0, 5.0])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [1 / 8, 2 / 8, 5 / 8], atol=0.01)
    np.testing.assert_array_equal(drawn[100:200], draw_sources(9, ordinals[100:200], [10, 20, 50]))


def test_state_survives_json_and_is_joined_from_its_parts() -> None:
    parts = [
        LoaderState(7, {0: ((1, 2), (0, 5)), 1: ((0, 3), (2, 0))}),
        LoaderState(7, {3: ((9, 9), (0, 0)), 2: ((4, 4), (1, 1))}),
    ]
    whole = LoaderState.merge(parts[::-1])
    assert whole.step == 7
    assert list(whole.cursors) == [0, 1, 2, 3]
    assert LoaderState.from_json(whole.to_json()) == whole
    assert LoaderState.initial(range(2), 2).cursors == {0: ((0, 0), (0, 0)), 1: ((0, 0), (0, 0))}
    with pytest.raises(ValueError, match="a stream twice"):
        LoaderState.merge([parts[0], parts[0]])
    with pytest.raises(ValueError, match=r"steps \[7, 8\]"):
        LoaderState.merge([parts[0], LoaderState(8, {2: ((0, 0),)})])


def test_ranks_own_contiguous_streams() -> None:
    assert [list(owned_streams(8, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="divisible by the world size 3, got 8"):
        owned_streams(8, 0, 3)
