"""An answer that the engine is drawing, as its reader sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from iolite.errors import UsageError
from iolite.generate.loop import Drawn
from iolite.generate.reply import Drafting
from iolite.generate.sampling import SamplingParams
from iolite.prompt import Prompt


class Running:
    """Iterates once over the tokens of one answer, from any thread, the end token included, like `Decoding`.

    The engine draws whether they are read or not; counts and times are of what was read. Closing the iterator early
    cancels the answer. What went wrong with it is raised where its tokens would have come.
    """

    def __init__(self, prompt: Prompt, params: SamplingParams, limit: int) -> None:
        """limit: tokens that may be drawn."""
        self.prompt, self.params, self.limit = prompt, params, limit
        self.wait_seconds = 0.0  # before it had a place; in none of the others
        self.prefill_seconds = 0.0  # up to and including the first token
        self.decode_seconds = 0.0
        self.count = 0
        self.cached_tokens = 0  # of the prompt, that were read before
        self.drafting: Drafting | None = None  # how that went
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None  # called in the thread that cancels, every time
        self.before_wait: Callable[[], None] | None = None  # called by the reader when it has read all that there is
        self._ended = threading.Event()
        self._coming: SimpleQueue[tuple[Drawn, float] | BaseException | None] = SimpleQueue()
        self._iterated = False

    def __iter__(self) -> Iterator[Drawn]:
        if self._iterated:
            raise UsageError("the answer has been read already", "an answer is iterated once")
        self._iterated = True
        return self._run()

    def _run(self) -> Iterator[Drawn]:
        try:
            while (came := self._next()) is not None:
                if isinstance(came, BaseException):
                    raise came
                drawn, seconds = came
                if self.count == 0:
                    self.prefill_seconds = seconds
                else:
                    self.decode_seconds += seconds
                self.count += 1
                yield drawn
                if drawn.finish_reason:
                    return
        finally:
            self.cancel()

    def _next(self) -> tuple[Drawn, float] | BaseException | None:
        if self.before_wait and self._coming.empty():
            self.before_wait()
        return self._coming.get()

    def gather(self, seconds: float) -> None:
        """Waits for so long, in which tokens may come together, but not longer than until the last one is there."""
        self._ended.wait(seconds)

    def cancel(self) -> None:
        """Ends the answer here: whoever iterates over it gets no more, and its place is free after the step that is
        under way. Of an answer that has ended nothing changes."""
        self.cancelled = True
        self.end(None)
        if self.on_cancel:
            self.on_cancel()

    def put(self, drawn: Drawn, seconds: float) -> None:
        """The engine's: one more token, and how long after the last."""
        self._coming.put((drawn, seconds))
        if drawn.finish_reason:
            self._ended.set()

    def end(self, error: BaseException | None) -> None:
        """The engine's: there will be no more tokens, because of an error or because nobody wants them."""
        self._coming.put(error)
        self._ended.set()
