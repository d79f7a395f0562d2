"""Sequences that were read, kept in memory: a prompt goes on from the one that it has most in common with.

A conversation's next turn, an edited turn, an answer drawn anew and thoughts that the template drops all begin with
tokens whose keys and values are there already. A cache goes back to where the prompts part and reads on from there; a
prompt that parts early, as another conversation after the same system prompt does, gets a copy instead.

Each sequence has one user at a time: who takes it owns it until it is given back. Bytes are limited; what was used
least recently goes first.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from iolite.cache import KVCache
from iolite.prefix.chain import Chain, last_cut
from iolite.prefix.checkpoint import Checkpoint
from iolite.prompt import Prompt

if TYPE_CHECKING:
    from iolite.prefix.disk import DiskStore

# A template ends a prompt with the beginning of an answer and renders it otherwise once the answer is there: then the
# family's drops an empty thought of four tokens. So far before its end a prompt still counts as gone on with; the
# question of another conversation, with the marks around it, begins farther from the end than that.
ANSWER_BEGINS = 8


@dataclass
class Counters:
    """What was saved so far, in tokens of prompts, and how often something was found."""

    reused: int = 0
    prefilled: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(eq=False)
class Kept:
    """One sequence: its cache, and the digests of the tokens in it."""

    cache: KVCache
    chain: Chain
    turn: int = 0  # tokens that the last prompt found here, so where what it added begins
    asked: int = 0  # tokens of the last prompt
    used: int = 0  # when, counted in takes
    ends: list[int] = field(default_factory=list)  # of prompts, where a next one may want to go back to
    checkpoints: list[Checkpoint] = field(default_factory=list)  # beyond what the rings allow
    name: str = field(default_factory=lambda: secrets.token_hex(8))  # of its file
    written: bytes = b""  # the end of its chain when it was last written to the disk
    written_length: int = 0

    @property
    def num_bytes(self) -> int:
        return self.cache.num_bytes + sum(checkpoint.num_bytes for checkpoint in self.checkpoints)

    def usable(self, prompt: Prompt, chain: Chain) -> int:
        """How many tokens of a prompt need not be read again; one at least must be, for there to be a next one."""
        length = last_cut(prompt, min(chain.common(self.chain), len(prompt.ids) - 1))
        for checkpoint in reversed(self.checkpoints):
            if length < self.cache.earliest and checkpoint.earliest <= length:
                length = last_cut(prompt, min(length, checkpoint.length))
                return length if checkpoint.reaches(length) else 0
        return length if length >= self.cache.earliest else 0

    @torch.inference_mode()
    def go_back(self, length: int) -> None:
        """To a length that is usable."""
        if length == 0 or length >= self.cache.earliest:
            self.cache.rewind(length)
        else:
            next(c for c in reversed(self.checkpoints) if c.reaches(length)).restore(self.cache, length)
        self.ends = [end for end in self.ends if end <= length]
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.length <= length]

    def is_continued_at(self, length: int) -> bool:
        """Whether a prompt with that much in common is this sequence's next turn, or its last one edited or asked anew.

        Otherwise going back would cost another conversation its tokens.
        """
        ends = [self.cache.length, *self.ends, *(checkpoint.length for checkpoint in self.checkpoints)]
        if any(0 <= end - length <= ANSWER_BEGINS for end in ends):
            return True  # ends: since it last went back, so of the last turn
        return self.turn > 0 and 2 * (length - self.turn) > self.asked - self.turn

    def before_pass(self, most: int) -> None:
        """Keeps what is needed to go back to the ends of prompts, before a pass of at most that many tokens overwrites
        it. Of the checkpoints, the first and the last stay: old thoughts may be dropped after many calls of tools."""
        kept_rows = min((ring.limit for ring in self.cache.rings), default=self.cache.max_length)
        after = self.cache.length + most
        if after <= kept_rows:
            return
        for end in [end for end in self.ends if after - self.cache.slack > end - ANSWER_BEGINS]:
            self.ends.remove(end)
            if self.cache.earliest <= end <= self.cache.length:
                self.checkpoints = [*self.checkpoints[:1], Checkpoint.of(self.cache, end, ANSWER_BEGINS)]


class Lease:
    """A sequence while somebody reads on in it."""

    def __init__(self, kept: Kept, prompt: Prompt, chain: Chain, reused: int) -> None:
        self.kept, self.prompt, self.chain, self.reused = kept, prompt, chain, reused
        self.cache = kept.cache
        self.expected = 0  # bytes
        self._most = 1
        self._rooms = self._room()

    def before_pass(self, most: int) -> None:
        """To be called before every pass: all passes so far are whole, and the next has at most that many tokens."""
        end = len(self.prompt.ids)
        if self.cache.length == end and end not in self.kept.ends:
            self.kept.ends.append(end)
        self.kept.before_pass(most)
        self._most = most
        self._rooms = self._room()

    def recover(self) -> bool:
        """After a pass was broken off: forgets what it left. False where it may have damaged what was there before."""
        if self._rooms != self._room():
            return False  # buffers that grew may not have been filled with what they held
        cache = self.cache
        for ring in cache.rings:
            ring.oldest = max(ring.oldest, cache.length + self._most - ring.limit)
        return 0 < cache.length >= cache.earliest

    def _room(self) -> list[int]:
        return [layer.buffers[0].shape[0] if layer.buffers else 0 for layer in self.cache.layers]


class PrefixCache:
    """The sequences of one model, of one adapter. Safe to use from several threads."""

    def __init__(self, make: Callable[[], KVCache], budget_bytes: int | None = None, seed: bytes = b"") -> None:
        """make: an empty cache. budget_bytes: of all sequences, those in use included; None for as many as one cache of
        the whole context takes. seed: what tells these sequences from another adapter's."""
        self.make, self.seed = make, seed
        self.counters = Counters()
        self.disk: DiskStore | None = None
        self._budget = budget_bytes
        self._kept: list[Kept] = []
        self._kept_bytes = 0
        self._out: WeakSet[Lease] = WeakSet()  # weak: one that is forgotten instead of given back counts no longer
        self._rows: list[tuple[int, int]] = []  # (most rows, bytes of one) of each layer, known after the first use
        self._uses = 0
        # Of one thread, too: a generator that is collected gives its sequence back wherever it happens to be.
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Of all sequences; of those in use, at least what their prompts will take."""
        return self._out_bytes() + self._kept_bytes

    def _out_bytes(self) -> int:
        return sum(max(lease.expected, lease.kept.num_bytes) for lease in list(self._out))

    @property
    def budget_bytes(self) -> int | None:
        """None while it is not known what a cache takes."""
        if self._budget is None and self._rows:
            return sum(most * size for most, size in self._rows)
        return self._budget

    @budget_bytes.setter
    def budget_bytes(self, budget: int | None) -> None:
        self._budget = budget

    def __len__(self) -> int:
        """Sequences that are kept and not in use."""
        return len(self._kept)

    def take(self, prompt: Prompt, more: int = 0) -> Lease:
        """The sequence that a prompt goes on from, gone back to what both have in common: the first `lease.reused`
        tokens are in `lease.cache`, the rest is to be read. It is to be given back, or dropped. more: tokens that room
        is kept for beside the prompt's."""
        chain = Chain.of(prompt, self.seed)
        loaded = self._load(prompt, chain)
        with self._lock:
            kept, reused = loaded or self._claim(prompt, chain)
            kept.go_back(reused)
            kept.turn, kept.asked, kept.used = reused, len(prompt.ids), self._now()
            lease = Lease(kept, prompt, chain, reused)
            lease.expected = self._bytes_of(len(prompt.ids) + more)
            self._out.add(lease)
            self._make_room(0)
            if reused:
                self.counters.hits += 1
            else:
                self.counters.misses += 1
        return lease

    def give(self, lease: Lease, ids: Sequence[int]) -> None:
        """Puts a sequence back, with all its passes whole. ids: of the prompt, and what was drawn and read after it."""
        with self._lock:
            if lease not in self._out:
                return
            if lease.cache.length > len(ids):
                lease.cache.rewind(len(ids))  # drafts that nobody has judged
            kept, length = lease.kept, lease.cache.length
            self._out.discard(lease)
            self._count(lease)
            lease.chain.cut(length)
            lease.chain.extend(ids[len(lease.chain) : length])
            kept.chain = lease.chain
            if length == 0:
                return
            self._rows = [(layer.limit, layer.row_bytes) for layer in kept.cache.layers]
            self._keep(kept)
            self._make_room(0)

    def drop(self, lease: Lease) -> None:
        """Forgets a sequence of which it is not known what is in it."""
        with self._lock:
            self._out.discard(lease)
            self._count(lease)

    @contextmanager
    def lend(self, prompt: Prompt, ids: Sequence[int]) -> Iterator[Lease]:
        """A lease for the block. ids: the prompt's, to which what is drawn is appended in the block.

        However the block ends, the sequence is given back if what it holds is known to be whole, else dropped.
        """
        lease = self.take(prompt)
        try:
            yield lease
        except GeneratorExit:  # the reader of an answer had enough, between two passes
            self.give(lease, ids)
            raise
        except KeyboardInterrupt:
            if lease.recover():
                self.give(lease, ids)
            else:
                self.drop(lease)
            raise
        except BaseException:
            self.drop(lease)
            raise
        self.give(lease, ids)

    def clear(self) -> None:
        """Forgets all sequences that are not in use."""
        with self._lock:
            self._kept.clear()
            self._kept_bytes = 0

    def _keep(self, kept: Kept) -> None:
        self._kept.append(kept)
        self._kept_bytes += kept.num_bytes

    def _let_go(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._kept_bytes -= kept.num_bytes

    def _claim(self, prompt: Prompt, chain: Chain) -> tuple[Kept, int]:
        """A sequence and how much of it is usable, taken out of those that are kept."""
        wanted = self._bytes_of(len(prompt.ids))
        kept, reused = self._best(prompt, chain)
        if kept is None:
            self._make_room(wanted)
            return Kept(self.make(), Chain(self.seed)), 0
        # What can only be gone back to through a checkpoint cannot be copied.
        if not kept.is_continued_at(reused) and reused >= kept.cache.earliest and self._has_room(wanted, kept):
            kept.used = self._now()
            self._make_room(wanted)
            with torch.inference_mode():
                return Kept(kept.cache.copy(reused), Chain(self.seed)), reused
        self._let_go(kept)
        return kept, reused

    def _best(self, prompt: Prompt, chain: Chain) -> tuple[Kept | None, int]:
        """What most of a prompt is usable of, and how much; of several the shortest, and then what was used last."""
        best, reused, rank = None, 0, (0, 0)
        for kept in self._kept:
            own = (-len(kept.chain), kept.used)
            if not chain.shares(kept.chain, reused if own > rank else reused + 1):
                continue  # it cannot be better: of hundreds that begin alike few have to be looked at closely
            usable = kept.usable(prompt, chain)
            if usable and (usable, own) > (reused, rank):
                best, reused, rank = kept, usable, own
        return best, reused

    def _load(self, prompt: Prompt, chain: Chain) -> tuple[Kept, int] | None:
        """A sequence from the disk, if one there has more in common with the prompt than all in memory."""
        if self.disk is None:
            return None
        with self._lock:
            here = max((kept.usable(prompt, chain) for kept in self._kept), default=0)
        return self.disk.load(prompt, chain, here, self.make)

    def save(self, most: int | None = None, growth: float = 0.0) -> int:
        """Writes sequences to the disk, those used last first, and returns how many were written.

        most: of them. growth: leaves out what has grown by a smaller share since it was written. What is being written
        is not lent meanwhile. Raises CheckpointError when the disk is full or does not take them.
        """
        assert self.disk is not None, "a PrefixCache without a disk"
        written = 0
        with self._lock:
            chosen = sorted(self._kept, key=lambda kept: -kept.used)[:most]
        for kept in chosen:
            with self._lock:
                if kept not in self._kept or not _worth_writing(kept, growth):
                    continue
                self._let_go(kept)
            try:
                if self.disk.write(kept):
                    kept.written, kept.written_length = kept.chain.end, len(kept.chain)
                    written += 1
            finally:
                with self._lock:
                    self._keep(kept)
        return written

    def _now(self) -> int:
        self._uses += 1
        return self._uses

    def _count(self, lease: Lease) -> None:
        self.counters.reused += lease.reused
        self.counters.prefilled += max(0, min(lease.cache.length, len(lease.prompt.ids)) - lease.reused)

    def _bytes_of(self, tokens: int) -> int:
        """What a sequence of that many tokens takes; 0 while that is not known, and then nothing else is kept."""
        return sum(min(tokens, most) * size for most, size in self._rows)

    def _has_room(self, wanted: int, beside: Kept) -> bool:
        """Whether there would be room beside one sequence and those in use, with everything else gone."""
        return self.budget_bytes is None or self._out_bytes() + beside.num_bytes + wanted <= self.budget_bytes

    def _make_room(self, wanted: int) -> None:
        """Lets go of what was used least recently, until there is room for that many bytes or nothing left."""
        budget = self.budget_bytes
        while budget is not None and self._kept and self.num_bytes + wanted > budget:
            oldest = min(self._kept, key=lambda kept: kept.used)
            self._let_go(oldest)
            if oldest.checkpoints:
                oldest.checkpoints = []
                self._keep(oldest)
            else:
                self.counters.evictions += 1


def _worth_writing(kept: Kept, growth: float) -> bool:
    if kept.written == kept.chain.end:
        return False
    return abs(len(kept.chain) - kept.written_length) >= growth * kept.written_length
