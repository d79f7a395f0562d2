"""What a benchmark is: questions with one right answer each, asked of anything that can chat, counted with error bars.

Answers are compared as they are, but for white space at the ends: half right is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Answered(Protocol):
    @property
    def text(self) -> str: ...


class Chat(Protocol):
    """Whoever is examined: `iolite.generate.model.Model` is one."""

    def chat(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float) -> Answered: ...


@dataclass(frozen=True)
class Question:
    """Messages to answer, the right answer, and the group (a length, a kind) that it is counted in besides."""

    messages: list[dict[str, Any]]
    answer: str
    group: str = ""


@dataclass(frozen=True)
class Score:
    """Right answers out of n, in all and by group. `wrong` keeps the first few (right answer, given answer)."""

    right: int = 0
    n: int = 0
    groups: dict[str, Score] = field(default_factory=dict)
    wrong: tuple[tuple[str, str], ...] = ()

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else math.nan

    def to_dict(self) -> dict[str, Any]:
        """`accuracy`, `n` and `ci95`, and the same of each group under `groups`."""
        report: dict[str, Any] = {"accuracy": self.accuracy, "n": self.n, "ci95": list(wilson(self.right, self.n))}
        if self.groups:
            report["groups"] = {name: score.to_dict() for name, score in sorted(self.groups.items())}
        return report


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): unlike the textbook's ±, never outside 0 to 1, and not of width 0
    when all answers are right."""
    if not n:
        return 0.0, 1.0
    share, zz = right / n, z * z / n
    middle = (share + zz / 2) / (1 + zz)
    half = z / (1 + zz) * math.sqrt(share * (1 - share) / n + zz / (4 * n))
    # At the ends the exact limits are 0 and 1; rounding must not move them.
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def ask(
    model: Chat,
    questions: Iterable[Question],
    *,
    max_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
    keep_wrong: int = 20,
) -> Score:
    """Asks one by one, always taking the likeliest token. progress gets (asked, right) after each."""
    counts: dict[str, list[int]] = {}
    right = asked = 0
    wrong: list[tuple[str, str]] = []
    for question in questions:
        given = model.chat(question.messages, max_tokens=max_tokens, temperature=0.0).text.strip()
        hit = given == question.answer
        asked, right = asked + 1, right + hit
        group = counts.setdefault(question.group, [0, 0])
        group[0] += hit
        group[1] += 1
        if not hit and len(wrong) < keep_wrong:
            wrong.append((question.answer, given))
        if progress:
            progress(asked, right)
    groups = {name: Score(right=pair[0], n=pair[1]) for name, pair in counts.items() if name}
    return Score(right, asked, groups, tuple(wrong))
