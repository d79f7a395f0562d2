"""One answer after the other, in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from iolite.errors import BusyError
from iolite.generate.loop import Decoding, Drawn
from iolite.generate.model import Model
from iolite.generate.sampling import SamplingParams
from iolite.prompt import Prompt


class Running:
    """A `Decoding` that waits for its turn, and can be cancelled from any thread."""

    def __init__(self, engine: Engine, decoding: Decoding) -> None:
        self._engine, self._decoding, self._cancelled = engine, decoding, threading.Event()
        self._begun = False
        decoding.progress = self._check

    def __getattr__(self, name: str) -> object:
        return getattr(self._decoding, name)

    def __iter__(self) -> Iterator[Drawn]:
        self._begun = True
        try:
            if not self._engine.wait(self, self._cancelled):
                return
            for drawn in self._decoding:
                if self._cancelled.is_set():
                    return
                yield drawn
        except _Cancelled:
            return
        finally:
            self._engine.leave(self)

    def cancel(self) -> None:
        self._cancelled.set()
        self._engine.wake() if self._begun else self._engine.leave(self)

    def _check(self, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled


class _Cancelled(Exception):
    """Ends a prefill."""


class Engine:
    def __init__(self, model: Model, *, slots: int, waiting: int) -> None:
        self._model, self._most = model, slots + waiting
        self._turns = deque[Running]()
        self._changed = threading.Condition()

    def submit(self, prompt: Prompt, params: SamplingParams) -> Running:
        decoding = self._model._decoding(prompt, params, None, None)
        with self._changed:
            if len(self._turns) >= self._most:
                raise BusyError("too many requests wait", "ask again a little later", retry_after=5.0)
            running = Running(self, decoding)
            self._turns.append(running)
        return running

    def wait(self, running: Running, cancelled: threading.Event) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: cancelled.is_set() or self._turns[0] is running)
        return not cancelled.is_set()

    def leave(self, running: Running) -> None:
        with self._changed:
            if running in self._turns:
                self._turns.remove(running)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        for running in list(self._turns):
            running.cancel()
