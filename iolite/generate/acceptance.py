"""How likely a draft is to be accepted, learnt while drafting.

Each thing that may be known of a draft beforehand, its depth in a chain, how sure the drafter was, how long the match
was that it was copied from, has a rate of its own: accepted over tried, of drafts whose forerunners were all right,
with older ones counting less and less. What is never tried drifts back to its first guess, so that everything gets
another chance now and then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KEEPS = 0.98  # of what was seen before, at every new trial: the last fifty count
FORGETS = 0.995  # and at every chance that was not taken
_WEIGHT = 1.0  # of the first guess, in trials

Known = tuple[str, int]
"""A kind of knowledge and its value: ("depth", 1), ("sureness", 7), ("match", 3) or ("copied", 1)."""


def first_guess(known: Known) -> float:
    """The rate of what has not been tried."""
    kind, value = known
    if kind == "sureness":
        return (value + 0.5) / SURENESS_STEPS
    if kind == "match":
        return min(0.8, 0.2 + 0.1 * value)
    return 0.8 if kind == "copied" else 0.6


SURENESS_STEPS = 10


def sureness(probability: float) -> Known:
    """Of a draft to which the drafter gave that probability."""
    return "sureness", min(SURENESS_STEPS - 1, int(probability * SURENESS_STEPS))


@dataclass
class Acceptance:
    """Rates by what is known."""

    _counts: dict[Known, list[float]] = field(default_factory=dict)  # [accepted, tried]

    def rate(self, known: Known) -> float:
        accepted, tried = self._counts.get(known, (0.0, 0.0))
        return (accepted + _WEIGHT * first_guess(known)) / (tried + _WEIGHT)

    def saw(self, known: Known, accepted: float) -> None:
        """A trial; accepted is 1.0 or 0.0, or in between for one whose outcome can only be estimated."""
        counts = self._counts.setdefault(known, [0.0, 0.0])
        counts[0] = KEEPS * counts[0] + accepted
        counts[1] = KEEPS * counts[1] + 1

    def passed_over(self, known: Known) -> None:
        """There was a chance to try, and it did not seem to pay."""
        for i, count in enumerate(self._counts.get(known, ())):
            self._counts[known][i] = FORGETS * count
