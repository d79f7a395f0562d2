"""How many tokens of prompts a step may read without holding up those who draw.

A pass over a few tokens reads all weights once and takes as long as that takes; every token of a prompt adds
arithmetic. What a machine takes for both differs by orders of magnitude, so it is measured while the engine runs: while
somebody draws, a step reads as many tokens as make it about `SLOWER` times as long as without them.
"""

from __future__ import annotations

SLOWER = 3.0  # a long prompt is then read at two thirds of the speed that it has alone
LEAST, FIRST = 8, 64  # tokens of a step: never fewer, and before anything was measured
_SETTLES = 0.2  # share of what a new measurement changes


class Pace:
    """Learns what steps take."""

    def __init__(self, chunk: int) -> None:
        """chunk: the most tokens of a pass."""
        self.chunk = chunk
        self.step = 0.0  # seconds of a step that reads nothing, 0 before the first
        self.token = 0.0  # seconds that a token of a prompt adds

    def tokens(self, drawing: int) -> int:
        """Of prompts, in a step in which so many tokens of answers are computed."""
        if not drawing:
            return self.chunk
        wanted = (SLOWER - 1) * self.step / self.token if self.step and self.token else FIRST
        return max(1, min(max(LEAST, int(wanted)), self.chunk - drawing))

    def saw(self, drawing: int, reading: int, seconds: float) -> None:
        """A pass over so many tokens of answers and of prompts took so long."""
        if drawing and not reading:
            self.step = _settled(self.step, seconds)
        elif reading >= LEAST:
            self.token = _settled(self.token, max(seconds - (self.step if drawing else 0.0), 1e-9) / reading)


def _settled(before: float, seen: float) -> float:
    if not before:
        return seen
    seen = min(2 * before, max(before / 2, seen))  # a pass that something else has held up says nothing about the next
    return before + _SETTLES * (seen - before)
