"""A request whose last recording is still being made: what is there of it is read as it comes.

    listening = engine.listen(prompt, params)   # the last recording in the prompt holds the place of the one to come
    listening.hear(frames)                      # as often as there are some
    running = listening.commit()                # the rest of the prompt, and the answer

What is read is the very prompt that holds the whole recording: sound is causal, so its frames may be read before it is
known how many there will be.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import numpy as np

from iolite.engine.room import ANSWER
from iolite.engine.running import Running
from iolite.engine.sequence import Sequence
from iolite.errors import ContextError, UsageError
from iolite.generate.continuation import Continuation
from iolite.generate.sampling import Sampler
from iolite.model.prefill import part_of
from iolite.model.unified import Unified
from iolite.prefix.chain import Chain
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt, Span, sound_span


class Listening:
    """Takes what is heard, up to `most` frames, and then has it answered. Used by one thread at a time.

    It has a place and memory in the engine until its answer has ended or it is cancelled.
    """

    def __init__(self, template: Prompt, most: int, context: int, running: Running, wake: Callable[[], None]) -> None:
        """most: frames that may be heard, fewer where the context ends before. wake is called after every change."""
        span = _last_sound(template)
        self.opening = part_of(template, 0, span.start)
        self.mark, self.closing = template.ids[span.start], template.ids[span.stop :]
        self.most = frames_that_fit(template, most, context)
        self.running = running
        self._frames = np.empty((self.most, span.array.shape[1]), np.float32)  # takes memory as it is written to
        self._heard, self._committed, self._context = 0, False, context
        self.committed_at = 0.0  # by perf_counter
        self._wake, self._lock = wake, threading.Lock()

    @property
    def left(self) -> int:
        """Frames that may still be heard."""
        return self.most - self._heard

    def hear(self, frames: np.ndarray) -> None:
        """More of the recording: float32 [n, samples of a token]. UsageError for more than may be heard."""
        if frames.ndim != 2 or frames.shape[1] != self._frames.shape[1]:
            raise UsageError(f"frames of {list(frames.shape)} samples", f"give [n, {self._frames.shape[1]}]")
        if self._committed or len(frames) > self.left:
            raise UsageError(f"{len(frames)} frames are more than may be heard", "commit, and begin another")
        heard = self._heard + len(frames)
        self._frames[self._heard : heard] = frames
        with self._lock:
            self._heard = heard
        self._wake()

    def commit(self) -> Running:
        """Has what was heard answered. UsageError where that is nothing, and the second time."""
        if self._committed or not self._heard:
            raise UsageError("there is no recording to be answered", "let some of it be heard, and commit it once")
        length = len(self.opening.ids) + self._heard + len(self.closing)
        self.running.limit = min(self.running.params.max_tokens, self._context - length)
        self.committed_at = time.perf_counter()
        with self._lock:
            self._committed = True
        self._wake()  # before the digest is made, for which nobody has to wait
        self.running.prompt = self.whole
        return self.running

    def cancel(self) -> None:
        """Forgets it, or ends its answer."""
        self.running.cancel()

    def state(self) -> tuple[int, bool]:
        """How many frames were heard, and whether they are all of them."""
        with self._lock:
            return self._heard, self._committed

    def frames(self, count: int) -> np.ndarray:
        """The first of those that were heard, float32 [count, samples of a token]."""
        return self._frames[:count]

    @functools.cached_property
    def whole(self) -> Prompt:
        """The prompt, once it is committed."""
        span = sound_span(self._frames[: self._heard], len(self.opening.ids))
        ids = [*self.opening.ids, *[self.mark] * self._heard, *self.closing]
        return Prompt(ids, "", (*self.opening.spans, span))


class LiveSequence(Sequence):
    """A `Listening` in the engine's hands. It has no `continuation` before it is committed."""

    def __init__(
        self, listening: Listening, sampler: Sampler, drafts: int | None, bytes: int, network: Unified
    ) -> None:
        super().__init__(listening.running, sampler, drafts, bytes, network)
        self.listening, self.whole = listening, False
        self._source = listening.opening
        self._ids = list(listening.opening.ids)  # those of the source, to which more are added
        self._heard = 0  # frames in the source

    @property
    def unread(self) -> int:
        return super().unread if self._lease else 0

    @property
    def stirs(self) -> bool:
        """Whether there is something to do for it."""
        heard, committed = self.listening.state()
        new = committed or heard > self._heard or self._lease is None
        return new or self.running.cancelled or self.unread > 0

    def listen(self, prefixes: PrefixCache) -> None:
        """Takes over what was heard, and once that is all the rest of the prompt."""
        if self._lease is None:
            self._take(prefixes)
        heard, committed = self.listening.state()
        self._ids += [self.listening.mark] * (heard - self._heard)
        self._heard = heard
        if committed:
            self._ids += self.listening.closing
        opening = self.listening.opening
        sound = Span("audio", len(opening.ids), heard, self.listening.frames(heard), None, "")
        self._source = Prompt(self._ids, "", (*opening.spans, sound) if heard else opening.spans)
        if committed:
            self._begin_answer()

    def _take(self, prefixes: PrefixCache) -> None:
        """The cache that what comes before the recording goes on from."""
        more = self.listening.most + len(self.listening.closing) + min(self.running.limit, ANSWER)
        self._lease = prefixes.take(self.listening.opening, more)

    def _begin_answer(self) -> None:
        run, lease, self.whole = self.running, self.lease, True
        self._continuation = Continuation(
            lease.cache, list(self._ids), self.sampler, run.params.stop_ids, run.limit, self.drafts
        )
        lease.prompt, lease.kept.asked = self._source, len(self._ids)
        run.cached_tokens = lease.cache.length
        self._entered = self._last = self.listening.committed_at

    def restart(self, prefixes: PrefixCache) -> None:
        if self.whole:
            self._source = self.listening.whole  # whose recording has a digest
            super().restart(prefixes)
            return
        self.restarts += 1
        prefixes.drop(self.lease)
        self._take(prefixes)

    def leave(self, prefixes: PrefixCache, whole: bool) -> None:
        if self._lease and self.whole:
            self.lease.chain = Chain.of(self.listening.whole, prefixes.seed)
            super().leave(prefixes, whole)
        elif self._lease:
            # Of a recording that nobody has answered only what came before it is of use again.
            opening, cache = self.listening.opening.ids, self.lease.cache
            if whole and cache.earliest <= min(len(opening), cache.length):
                prefixes.give(self.lease, opening)
            else:
                prefixes.drop(self.lease)
            self._lease = None


def frames_that_fit(template: Prompt, most: int, context: int) -> int:
    """How long the recording may become whose place the last one in a prompt holds: `most` frames, or what the context
    leaves; ContextError where that is nothing."""
    around = len(template.ids) - _last_sound(template).length
    if context - 1 - around < 1:
        raise ContextError(
            f"the conversation has {around} tokens, which leaves no room for a recording in a context of {context}",
            "begin a new one, or load the model with a larger context",
        )
    return min(most, context - 1 - around)


def _last_sound(template: Prompt) -> Span:
    """The span of the recording that is to come."""
    if not template.spans or template.spans[-1].kind != "audio":
        raise UsageError("the prompt does not end with a recording", "put the one to come after all other media")
    return template.spans[-1]
