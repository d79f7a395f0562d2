"""Prompt lookup against the obvious search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iolite.generate.lookup import LEAST_MATCH, MOST_MATCH, PromptLookup


def obvious(ids: list[int], most: int) -> tuple[list[int], int]:
    best, length = 0, 0
    for end in range(1, len(ids)):  # the match ends before `end`
        agree = 0
        while agree < min(end, MOST_MATCH) and ids[end - 1 - agree] == ids[-1 - agree]:
            agree += 1
        if agree >= length:
            best, length = end, agree
    if length < LEAST_MATCH or most < 1:
        return [], 0
    return ids[best : best + most], length


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 8))
def test_finds_what_the_obvious_search_finds(ids, most):
    assert PromptLookup(ids).find(most) == obvious(ids, most)


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8))
def test_the_sequence_may_grow(parts):
    ids: list[int] = []
    lookup = PromptLookup(ids)
    for part in parts:
        ids += part
        assert lookup.find(4) == obvious(ids, 4)


def test_a_quotation_is_followed():
    assert PromptLookup([5, 6, 7, 8, 9, 1, 2, 6, 7]).find(2) == ([8, 9], 2)


def test_one_token_says_too_little():
    assert PromptLookup([5, 6, 7, 1, 6]).find(4) == ([], 0)
