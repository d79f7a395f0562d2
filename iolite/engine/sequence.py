"""A request in the engine's hands: first its prompt is read, chunk by chunk, then it is drawn on."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

from torch import Tensor

from iolite.engine.room import ANSWER
from iolite.engine.running import Running
from iolite.generate.continuation import Continuation
from iolite.generate.loop import Drawn
from iolite.generate.passes import Passes
from iolite.generate.sampling import Sampler
from iolite.model.prefill import chunk_end, part_of
from iolite.model.unified import Unified
from iolite.prefix.memory import Lease, PrefixCache
from iolite.prompt import Prompt


class Sequence:
    """What the engine knows of one request; its `Scheduler` sees the first three attributes."""

    def __init__(self, running: Running, sampler: Sampler, drafts: int | None, bytes: int, network: Unified) -> None:
        self.running, self.sampler, self.drafts, self.bytes = running, sampler, drafts, bytes
        self.alone = Passes(network)  # for steps in which nobody else takes part
        self.restarts = 0
        self.whole = True  # there will be no more to read than there is
        self._source = running.prompt  # what is read before the next token is drawn
        self._lease: Lease | None = None
        self._continuation: Continuation | None = None
        self._drawing = False
        self._arrived = self._entered = self._last = time.perf_counter()

    @property
    def unread(self) -> int:
        return 0 if self._drawing else len(self._source.ids) - self.lease.cache.length

    def reach(self, tokens: int) -> int:
        start = self.lease.cache.length
        return chunk_end(start, len(self._source.ids), self._source.spans, tokens) - start

    @property
    def seconds(self) -> float:
        """Since it has a place."""
        return time.perf_counter() - self._entered

    @property
    def lease(self) -> Lease:
        assert self._lease is not None, "a request that has not entered"
        return self._lease

    @property
    def continuation(self) -> Continuation:
        assert self._continuation is not None, "a request that has not entered"
        return self._continuation

    def enter(self, prefixes: PrefixCache) -> None:
        """Takes the cache that the prompt goes on from."""
        self._lease = prefixes.take(self._source, min(self.running.limit, ANSWER))
        run, ids = self.running, list(self._source.ids)
        self._continuation = Continuation(
            self._lease.cache, ids, self.sampler, run.params.stop_ids, run.limit, self.drafts
        )
        run.cached_tokens = self._lease.reused
        self._entered = self._last = time.perf_counter()
        run.wait_seconds = self._entered - self._arrived

    def restart(self, prefixes: PrefixCache) -> None:
        """Begins again, with another cache, by reading what there is so far; what was drawn stays drawn."""
        self.restarts += 1
        prefixes.drop(self.lease)
        self._source = Prompt(list(self.continuation.ids), self._source.text, self._source.spans)
        self._lease = prefixes.take(self._source, min(self.continuation.left, ANSWER))
        self.continuation.cache = self._lease.cache
        self._drawing = False

    def leave(self, prefixes: PrefixCache, whole: bool) -> None:
        """Gives its cache back; whole: what is in it is known."""
        if self._lease is None:
            return
        if whole:
            prefixes.give(self._lease, self.continuation.ids)
        else:
            prefixes.drop(self._lease)
        self._lease = None

    def part(self, tokens: int) -> Prompt:
        """The next chunk of what is to be read."""
        start = self.lease.cache.length
        return part_of(self._source, start, start + tokens)

    def begin(self, hidden: Tensor, logits: Tensor) -> list[int]:
        """Draws the first token after everything was read: hidden [1, M] and logits [1, V] of the last one."""
        self._drawing = True
        self.lease.before_pass(1)  # notes where the prompt ends
        return self.continuation.take((), hidden, logits)

    def put(self, tokens: Items[int]) -> None:
        """Hands tokens that were just drawn to the reader."""
        now = time.perf_counter()
        for at, (token, logprobs) in enumerate(zip(tokens, self.continuation.logprobs, strict=True)):
            reason = None
            if token in self.running.params.stop_ids:
                reason = "stop"
            elif self.continuation.left == 0 and at == len(tokens) - 1:
                reason = "length"
            self.running.put(Drawn(token, reason, logprobs), now - self._last)
            self._last = now
