"""Counting right answers, and how sure the count makes us."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iolite.evals.task import Question, Score, ask, wilson


@dataclass
class Parrot:
    """Answers with the question."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""

    def chat(self, messages: Any, *, max_tokens: int, temperature: float) -> Parrot:
        self.asked.append({"max_tokens": max_tokens, "temperature": temperature})
        return Parrot(text=f" {messages[-1]['content']}\n")


def question(said: str, answer: str, group: str = "") -> Question:
    return Question([{"role": "user", "content": said}], answer, group)


def test_answers_are_compared_whole_and_counted_by_group() -> None:
    parrot, seen = Parrot(), []
    questions = [question("a b", "a b", "x"), question("a", "a b", "x"), question("c", "c", "y"), question("d", "e")]
    score = ask(parrot, questions, max_tokens=5, progress=lambda *pair: seen.append(pair))
    assert (score.right, score.n) == (2, 4)
    assert score.groups == {"x": Score(1, 2), "y": Score(1, 1)}
    assert score.wrong == (("a b", "a"), ("e", "d"))
    assert seen == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert parrot.asked[0] == {"max_tokens": 5, "temperature": 0.0}


def test_the_report_is_plain_data() -> None:
    report = Score(9, 10, {"1 digit": Score(1, 1)}).to_dict()
    assert report["accuracy"] == 0.9
    assert report["n"] == 10
    assert report["groups"]["1 digit"]["ci95"][1] == 1.0


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # From R 4.3: prop.test(right, n, correct = FALSE)$conf.int
    [(9, 10, 0.5958500, 0.9821238), (50, 100, 0.4038315, 0.5961685), (0, 20, 0.0, 0.1611252), (20, 20, 0.8388748, 1.0)],
)
def test_intervals_are_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_the_share(pair: tuple[int, int]) -> None:
    right, n = pair
    low, high = wilson(right, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= right / n <= high
