"""What a sequence of tokens is, as one digest for each prefix of it: equal digests, equal prefixes, media included.

Two pictures of one size have the same placeholder ids, so the digest of a token inside a span is made of the span's own
digest and the token's place in it too. Each digest is chained to the one before it, which makes the longest common
prefix of two sequences a binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from hashlib import blake2b

import numpy as np

from iolite.prompt import Prompt, Span

SIZE = 16  # bytes of one digest: a chance of 2^-64 for any collision among 2^32 prefixes


class Chain:
    """The digests of all prefixes of one sequence, 16 bytes a token."""

    def __init__(self, seed: bytes = b"") -> None:
        """seed is what else the sequences must have in common; chains with different seeds share nothing."""
        self._first = blake2b(b"iolite-chain-1" + seed, digest_size=SIZE).digest()
        self._digests = bytearray()

    @classmethod
    def of(cls, prompt: Prompt, seed: bytes = b"") -> Chain:
        """The chain of a whole prompt."""
        chain, done = cls(seed), 0
        for span in prompt.spans:
            chain.extend(prompt.ids[done : span.start])
            chain._extend_span(prompt.ids[span.start : span.stop], span)
            done = span.stop
        chain.extend(prompt.ids[done:])
        return chain

    def with_rows(self, rows: np.ndarray) -> Chain:
        """A chain of the same seed with what `rows` gave. Raises ValueError for anything that is not uint8 [n, 16]."""
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != SIZE:
            raise ValueError(f"a chain is uint8 [tokens, {SIZE}], not {rows.dtype} {list(rows.shape)}")
        chain = copy(self)
        chain._digests = bytearray(rows.tobytes())
        return chain

    def rows(self) -> np.ndarray:
        """uint8 [tokens, 16], a copy."""
        return np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, SIZE)

    def __len__(self) -> int:
        return len(self._digests) // SIZE

    @property
    def end(self) -> bytes:
        """The digest of the whole sequence."""
        return bytes(self._digests[-SIZE:]) or self._first

    def extend(self, ids: Sequence[int]) -> None:
        """More tokens without media, such as those that were drawn."""
        self._extend(np.asarray(ids, "<i8").tobytes(), 8)

    def cut(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        del self._digests[length * SIZE :]

    def shares(self, other: Chain, length: int) -> bool:
        """Whether both begin with the same `length` tokens."""
        end = length * SIZE
        theirs = other._digests[end - SIZE : end] if length else b""
        return len(theirs) == min(end, SIZE) and self._digests.startswith(theirs, max(0, end - SIZE))

    def common(self, other: Chain) -> int:
        """How many tokens both begin with."""
        low, high = 0, min(len(self), len(other))
        if self.shares(other, high):  # one goes on where the other ends
            return high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self.shares(other, middle) else (low, middle)
        return low

    def _extend_span(self, ids: Sequence[int], span: Span) -> None:
        places = np.stack((np.asarray(ids, "<i8"), np.arange(len(ids), dtype="<i8")), axis=1)
        self._extend(places.tobytes(), 16, f"{span.kind} {span.digest}".encode())

    def _extend(self, tokens: bytes, size: int, shared: bytes = b"") -> None:
        """tokens: `size` bytes for each; shared: what follows them in every digest. Only tokens of media have it, and
        theirs are longer, so no token of a text is ever taken for one."""
        last = self.end
        for at in range(0, len(tokens), size):
            last = blake2b(last + tokens[at : at + size] + shared, digest_size=SIZE).digest()
            self._digests += last


def last_cut(prompt: Prompt, length: int) -> int:
    """The last place at or before `length` where a prompt may be cut: pictures and video frames are read in one pass,
    since their tokens look at each other both ways. Sound may be cut."""
    if not prompt.spans:
        return length
    inside = (s for s in prompt.spans if s.kind != "audio" and s.start < length < s.stop)
    return next((span.start for span in inside), length)
