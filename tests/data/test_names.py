"""Names in little memory behave as a list of them."""

import os
import tracemalloc

import pytest

from simmim.data.names import Names

SOME = ["a/b.jpg", "", "grüße.png", os.fsdecode(b"not utf-8: \xff.png"), "c" * 1000]


def test_names_are_those_that_were_given():
    assert list(Names(SOME)) == SOME
    assert [Names(SOME)[index] for index in (-1, 2)] == [SOME[-1], SOME[2]]
    assert list(Names(SOME)[1:4:2]) == SOME[1:4:2]


def test_a_number_beyond_the_last_is_an_error():
    with pytest.raises(IndexError):
        Names(SOME)[len(SOME)]


def test_a_million_names_take_little_more_than_their_bytes():
    tracemalloc.start()
    try:
        names = Names(f"folder {index % 1000}/photograph {index}.jpg" for index in range(100_000))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1.5 * sum(len(name) + 8 for name in names)  # a list takes 2.9 times as much
