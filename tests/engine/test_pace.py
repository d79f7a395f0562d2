"""How many tokens of prompts a step reads, by what steps and tokens take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iolite.engine.pace import FIRST, LEAST, SLOWER, Pace

SECONDS = st.floats(1e-6, 10)


def learnt(step: float, token: float, chunk: int = 512) -> Pace:
    """After many passes of a machine on which they take so long."""
    pace = Pace(chunk)
    for _ in range(200):
        pace.saw(3, 0, step)
        pace.saw(3, 100, step + 100 * token)
    return pace


@given(SECONDS, SECONDS, st.integers(1, 40))
def test_steps_become_slower_by_no_more_than_was_said(step, token, drawing):
    pace = learnt(step, token)
    tokens = pace.tokens(drawing)
    assert 1 <= tokens <= 512 - drawing
    slower = (step + tokens * token) / step
    assert slower <= 1.05 * SLOWER or tokens == LEAST
    assert slower >= 0.9 * SLOWER or tokens >= min(512 - drawing, LEAST) or token * LEAST > step


def test_a_prompt_alone_is_read_in_whole_chunks():
    assert Pace(128).tokens(0) == learnt(0.1, 0.1, 128).tokens(0) == 128


def test_before_anything_is_known():
    assert Pace(512).tokens(4) == FIRST
    assert Pace(64).tokens(4) == 60
    assert Pace(64).tokens(70) == 1


def test_one_pass_that_was_held_up_changes_little():
    pace = learnt(0.1, 0.01)
    before = pace.tokens(2)
    pace.saw(2, 0, 30.0)
    assert before <= pace.tokens(2) <= 1.25 * before
    pace.saw(2, 100, 3000.0)
    assert pace.tokens(2) >= before / 1.25


def test_few_tokens_say_nothing_about_one():
    pace = Pace(512)
    pace.saw(0, LEAST - 1, 1.0)
    assert pace.token == 0
    pace.saw(0, LEAST, LEAST / 4)
    assert pace.token == 0.25
