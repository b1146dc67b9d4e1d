"""Which place a stall is blamed on."""

from __future__ import annotations

import threading

import pytest

from cmpt.data.places import Places


@pytest.mark.parametrize("place", ["fetching", "reading", "decoding", "tokenizing"])
def test_a_stall_is_blamed_on_what_goes_on_longest(place: str) -> None:
    places, begun, go_on = Places(), threading.Event(), threading.Event()

    def stuck() -> None:
        with places.at(place, "a.tar"):
            begun.set()
            go_on.wait(20)

    thread = threading.Thread(target=stuck)
    thread.start()
    begun.wait(20)
    with places.at("reading", "b.tar"):
        stall = places.stall(3.0)
    go_on.set()
    thread.join()
    assert (stall.waited_s, stall.place, stall.detail) == (3.0, place, "a.tar")
    assert stall.place_s > 0
    assert str(stall).startswith(f"has waited 3 s for data; longest at one thing: {place} a.tar, ")
    assert places.stall(1.0).place == "nowhere"


def test_a_place_is_left_also_by_an_error() -> None:
    places = Places()
    with pytest.raises(ZeroDivisionError), places.at("decoding"):
        raise ZeroDivisionError
    assert places.stall(1.0).place == "nowhere"
