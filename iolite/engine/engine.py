"""The engine: takes requests from any thread, draws all answers in one of its own.

    engine = Engine(model, slots=4)
    running = engine.submit(model.prompt(messages), model.sampling(max_tokens=100))
    for drawn in running: ...

`listen` is `submit` for a prompt that somebody is still speaking (`iolite/engine/listening.py`).

Every answer is the one that `Decoding` gives, whoever else is drawing: each has a cache and a sampler of its own, and a
pass computes every token from its own sequence only.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from iolite.engine.listening import Listening, LiveSequence
from iolite.engine.pace import Pace
from iolite.engine.room import ANSWER, cache_bytes, room_for
from iolite.engine.running import Running
from iolite.engine.scheduler import Scheduler
from iolite.engine.sequence import Sequence
from iolite.engine.step import Done, Step
from iolite.errors import BusyError, UsageError
from iolite.generate.grammar import Constraint
from iolite.generate.loop import check_fits
from iolite.generate.model import Model
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.generate.speculative import check_drafts
from iolite.prompt import Prompt

_LONGEST_RETRY = 60.0  # seconds
_SETTLES = 0.2  # share of what one more answer changes of the usual duration


@dataclass(frozen=True)
class Stats:
    """Counters of an engine since it was made, and what it is doing."""

    running: int = 0
    waiting: int = 0
    listening: int = 0
    submitted: int = 0  # = finished + cancelled + failed + running + waiting + listening
    refused: int = 0  # because there were too many
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # that were read
    cached_tokens: int = 0  # that need not be read
    drawn_tokens: int = 0
    cache_bytes: int = 0  # of all sequences, those that are only kept included
    broken: bool = False  # by an error of its own: it takes no more requests


class Engine:
    """Answers of one model, up to `slots` at a time. `close` it, or use it as a context manager."""

    def __init__(self, model: Model, *, slots: int = 4, waiting: int = 64, listeners: int = 4) -> None:
        """waiting: how many more requests may wait for a place. listeners: how many may be spoken at once, from their
        first sound to the end of their answers; they take no slots."""
        for name, value, least in (("slots", slots, 1), ("waiting", waiting, 0), ("listeners", listeners, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}", f"give a whole number from {least} on")
        self.model, self.prefixes = model, model.prefixes
        room = room_for(model, slots)
        if model.prefix_bytes is None:
            self.prefixes.budget_bytes = room
        self._scheduler: Scheduler[Sequence] = Scheduler(slots, waiting, room, listeners)
        self._step = Step(model.network, self.prefixes, model.speculator, Pace(model.chunk))
        self._counts = Counter[str]()  # of those of Stats that only grow
        self._usual = 1.0  # seconds that an answer has a place for
        self._closes: float | None = None  # when what is not complete is ended
        self._broken: BaseException | None = None
        self._changed = threading.Condition()  # guards all of the above but what `step` alone uses
        self._thread = threading.Thread(target=self._run, name="iolite-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread in the middle of a pass would crash the interpreter at its end

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, prompt: Prompt, params: SamplingParams, *, drafts: int | None = None, constraint: Constraint | None = None
    ) -> Running:
        """Queues a request. drafts: as of `Model.generate`; constraint: what may be drawn, for this answer only.

        Raises at once: ContextError for a prompt that does not fit, UsageError for settings that cannot be used,
        BusyError where too many are waiting or the engine is being closed.
        """
        check_fits(prompt, self.model.context)
        check_drafts(drafts, self.model.speculator)
        limit = min(params.max_tokens, self.model.context - len(prompt.ids))
        sampler = Sampler(params, constraint)
        running = Running(prompt, params, limit)
        size = cache_bytes(self.model, len(prompt.ids) + min(limit, ANSWER))
        sequence = Sequence(running, sampler, drafts, size, self.model.network)
        running.on_cancel = self._canceller(sequence)
        with self._changed:
            self._check_open()
            if not self._scheduler.add(sequence):
                self._count(refused=1)
                after = min(_LONGEST_RETRY, max(1.0, self._usual / self._scheduler.slots))
                waiting = len(self._scheduler.waiting)
                raise BusyError(
                    f"{waiting} requests are waiting already", f"try again in {after:.0f} s", retry_after=after
                )
            self._count(submitted=1)
            self._changed.notify()
        return running

    def listen(
        self,
        template: Prompt,
        params: SamplingParams,
        *,
        drafts: int | None = None,
        constraint: Constraint | None = None,
        most: int | None = None,
    ) -> Listening:
        """Begins to read a prompt whose last recording is still to come: the one in `template` only holds its place.

        most: frames of it, by default as many as the model was made for. Whoever has it commits or cancels it. Raises
        as `submit` does; it never waits, so BusyError comes where the listeners' places or their memory are taken.
        """
        check_drafts(drafts, self.model.speculator)
        sampler = Sampler(params, constraint)
        running = Running(template, params, params.max_tokens)
        most = self.model.processor.audio_seq_length if most is None else most
        listening = Listening(template, most, self.model.context, running, self._wake)
        size = cache_bytes(self.model, len(template.ids) + listening.most + min(params.max_tokens, ANSWER))
        sequence = LiveSequence(listening, sampler, drafts, size, self.model.network)
        running.on_cancel = self._canceller(sequence)
        with self._changed:
            self._check_open()
            if not self._scheduler.listen(sequence):
                self._count(refused=1)
                hint = "try again when one of them has ended"
                after = min(_LONGEST_RETRY, max(1.0, self._usual))
                raise BusyError("as many speak already as are listened to", hint, retry_after=after)
            self._count(submitted=1)
            self._changed.notify()
        return listening

    def stats(self) -> Stats:
        with self._changed:
            return Stats(
                **self._counts,
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                listening=len(self._scheduler.live),
                broken=self._broken is not None,
                cache_bytes=self.prefixes.num_bytes,
            )

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, gives those that there are so many seconds to end, and ends the rest with BusyError.

        Returns when the engine's thread has ended. Called again it may shorten the time and waits as well.
        """
        with self._changed:
            closes = time.monotonic() + seconds
            self._closes = closes if self._closes is None else min(closes, self._closes)
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _check_open(self) -> None:
        if self._broken:
            raise _stopped(self._broken)
        if self._closes is not None:
            raise BusyError("the engine is being closed", "ask again when it has been started anew", retry_after=5.0)

    def _canceller(self, sequence: Sequence) -> Callable[[], None]:
        """What an answer calls that is cancelled. It does not keep the sequence: in a cycle with its answer that would
        keep the cache, too, until the garbage is next collected."""
        kept = weakref.ref(sequence)

        def cancel() -> None:
            if (found := kept()) is not None:
                self._cancel(found)

        return cancel

    def _cancel(self, sequence: Sequence) -> None:
        """Called by whoever cancels. What runs is let go by the next step."""
        with self._changed:
            if sequence in self._scheduler.waiting:
                self._scheduler.remove(sequence)
                self._count(cancelled=1)
            self._changed.notify()

    def _wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._goes_on():
                self.step()
        except BaseException as error:
            self._broken = error
            raise  # to where errors of threads are told of
        finally:
            self._end_all()

    def _goes_on(self) -> bool:
        """Waits until there is something to do; False when it is time to end."""
        with self._changed:
            while not self._stirs() and self._closes is None:
                self._changed.wait()
            return self._stirs() and (self._closes is None or time.monotonic() < self._closes)

    def _stirs(self) -> bool:
        """Whether a step would do anything: nothing is done for somebody who is silent."""
        return len(self._scheduler) > 0 or any(sequence.stirs for sequence in self._live())

    def step(self) -> None:
        """One pass: the engine's thread does nothing else."""
        for sequence in (*self._live(), *self._running()):
            if sequence.running.cancelled:
                self._leave(sequence, whole=True, cancelled=1)
        self._enter()
        self._listen()
        drawing = [sequence for sequence in self._running() if not sequence.unread]
        self._settle(self._step(drawing, self._scheduler.share))

    def _running(self) -> list[Sequence]:
        return list(self._scheduler.running)

    def _live(self) -> list[LiveSequence]:
        return [sequence for sequence in list(self._scheduler.live) if isinstance(sequence, LiveSequence)]

    def _listen(self) -> None:
        """Takes over what was heard since the last step."""
        for sequence in self._live():
            try:
                sequence.listen(self.prefixes)
            except Exception as error:
                self._fail(sequence, error)
                continue
            if sequence.whole:
                self._note(sequence)
                with self._changed:
                    self._scheduler.heard(sequence)

    def _enter(self) -> None:
        with self._changed:
            entered = self._scheduler.enter()
        for sequence in entered:
            try:
                sequence.enter(self.prefixes)
            except Exception as error:
                self._fail(sequence, error)
                continue
            self._note(sequence)

    def _note(self, sequence: Sequence) -> None:
        """Of one that has all it needs to be drawn."""
        if self.model.speculator and sequence.drafts != 0:
            sequence.running.drafting = sequence.continuation.drafting
        with self._changed:
            self._count(cached_tokens=sequence.lease.reused)

    def _settle(self, done: Done) -> None:
        """Lets go of those who are through with a step."""
        with self._changed:
            drawn_tokens = sum(len(tokens) for _, tokens in done.drawn)
            self._count(steps=1, prompt_tokens=done.read, drawn_tokens=drawn_tokens)
        for sequence, tokens in done.drawn:
            if sequence.continuation.over:  # before its reader, who may go on with the conversation, knows of it
                self._usual += _SETTLES * (sequence.seconds - self._usual)
                self._leave(sequence, whole=True, finished=1)
            sequence.put(tokens)
        for sequence, error in done.failed:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._leave(sequence, whole=False, failed=1)
        sequence.running.end(error)

    def _leave(self, sequence: Sequence, whole: bool, **counted: int) -> None:
        sequence.leave(self.prefixes, whole)
        with self._changed:
            self._scheduler.remove(sequence)
            self._count(**counted)

    def _end_all(self) -> None:
        """Nobody waits for an answer that will not come."""
        with self._changed:
            self._closes = self._closes or time.monotonic()
            left = [*self._scheduler.running, *self._scheduler.waiting, *self._scheduler.live]
            for sequence in left:
                self._scheduler.remove(sequence)
            cancelled = sum(sequence.running.cancelled for sequence in left)
            self._count(failed=len(left) - cancelled, cancelled=cancelled)
        for sequence in left:
            hint = "ask again when it has been started anew"
            closed = BusyError("the engine was closed before the answer was complete", hint, retry_after=5.0)
            sequence.running.end(_stopped(self._broken) if self._broken else closed)
            sequence.leave(self.prefixes, whole=self._broken is None)

    def _count(self, **more: int) -> None:
        for name, n in more.items():
            self._counts[name] += n


def _stopped(error: BaseException) -> RuntimeError:
    """A new one for every thread that it is raised in."""
    stopped = RuntimeError(f"the engine has stopped because of an error of its own: {type(error).__name__}: {error}")
    stopped.__cause__ = error
    return stopped
