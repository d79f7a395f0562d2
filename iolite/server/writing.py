"""An answer on its way from the model to the chat page and to the disk.

The page gets events, sent by the server or through a WebSocket: `begin` with what was stored, `text` and `thought` with
HTML that stays and HTML that may still change, `call`, and `end` with the whole message. What there is of the answer is
stored as it grows.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from starlette.types import Receive, Scope, Send

from iolite.generate.reply import Reply, ToolCall
from iolite.server.answers import Answer, Item
from iolite.server.chats import Chats, Message
from iolite.server.errors import Problem, problem_of
from iolite.server.markup import GrowingHtml
from iolite.server.page_fields import shown_message
from iolite.server.streaming import Streamed
from iolite.server.wire import PING, event
from iolite.text.stream import ContentDelta, ReasoningDelta

TICK = 0.06  # seconds between two views of a growing answer
SAVE = 2.0  # seconds between two copies on the disk


class Writing:
    """One answer while it is drawn. `message` is what there is of it."""

    def __init__(self, chats: Chats, answer: Answer, message: Message, begin: dict[str, Any], ping: float) -> None:
        self.message, self._chats, self._answer = message, chats, answer
        self._begin, self._ping, self._stopped, self._ended = begin, ping, False, False
        self._text, self._thought = GrowingHtml(), GrowingHtml()
        self._grown: set[str] = set()
        self._calls: list[dict[str, Any]] = []  # that the page has not been told of
        self._news = asyncio.Event()
        self._last = self._saved = time.monotonic()
        self._thinking: float | None = None  # since when

    def stop(self) -> None:
        """Ends the answer where it is."""
        self._stopped = True
        self._answer.cancel()

    async def events(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """What the page is told; None: nothing is new for a while."""
        yield {"type": "begin", **self._begin}
        reading = asyncio.ensure_future(self._read())
        reading.add_done_callback(lambda _: self._news.set())
        try:
            over = False
            while not over:
                try:
                    await asyncio.wait_for(self._news.wait(), self._ping)
                except TimeoutError:
                    yield None
                    continue
                self._news.clear()
                over = reading.done()
                begin = time.perf_counter()
                grown, self._grown = self._grown, set()
                calls, self._calls = self._calls, []
                for change in await asyncio.to_thread(self._changes, grown, calls):
                    yield change
                if not over:
                    await asyncio.sleep(max(TICK, 3 * (time.perf_counter() - begin)))
            reading.result()
            await asyncio.to_thread(self.end)
            yield {"type": "end", "message": await asyncio.to_thread(shown_message, self.message, {})}
        finally:
            reading.cancel()

    async def _read(self) -> None:
        try:
            async for _, item in self._answer:
                if item is not None:
                    self._take(item)
                    self._news.set()
        except Exception as error:
            self._note(state="failed", notice=problem_of(error).message)
            raise

    def _take(self, item: Item) -> None:
        now = time.monotonic()
        if self._thinking is not None and not isinstance(item, ReasoningDelta):
            self._note(thought_seconds=round(now - self._thinking, 2))
            self._thinking = None
        if isinstance(item, ReasoningDelta):
            self._thinking = self._last if self._thinking is None else self._thinking
            self.message = replace(self.message, reasoning=self.message.reasoning + item.text)
            self._thought.push(item.text)
            self._grown.add("thought")
        elif isinstance(item, ContentDelta):
            self.message = replace(self.message, text=self.message.text + item.text)
            self._text.push(item.text)
            self._grown.add("text")
        elif isinstance(item, ToolCall):
            arguments = json.dumps(item.arguments, ensure_ascii=False)
            call = {"id": item.id, "name": item.name, "arguments": arguments, "seconds": round(now - self._last, 2)}
            self.message = replace(self.message, calls=[*self.message.calls, call])
            self._calls.append(call)
        else:
            self._finish(item)
        self._last = now

    def _finish(self, reply: Reply) -> None:
        taken = reply.timings
        self.message = replace(self.message, text=reply.text, reasoning=reply.reasoning)
        self._note(
            state="stopped" if self._stopped else "done",
            finish_reason=reply.finish_reason,
            notice=None if self._stopped else reply.notice,
            tokens=reply.usage.completion_tokens,
            thought_tokens=reply.usage.reasoning_tokens,
            prompt_tokens=reply.usage.prompt_tokens,
            cached_tokens=reply.usage.cached_tokens,
            first_token=round(taken.time_to_first_token, 3),
            tokens_per_second=round(taken.tokens_per_second, 1),
            gain=round(taken.drafting.speedup, 2) if taken.drafting and taken.drafting.drafted else None,
        )

    def _note(self, **info: Any) -> None:
        self.message = replace(self.message, info={**self.message.info, **info})

    def _changes(self, grown: set[str], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """On a thread: what is new, as events."""
        found: list[dict[str, Any]] = []
        for name, html in (("thought", self._thought), ("text", self._text)):
            if name in grown:
                settled, tail = html.take()
                found.append({"type": name, "settled": settled, "tail": tail})
        if time.monotonic() - self._saved > SAVE:
            self._saved = time.monotonic()
            self._chats.update(self.message)
        return found + [{"type": "call", "call": call} for call in calls]

    def end(self) -> None:
        """Stores the answer as it is; one that was left in the middle is as good as stopped."""
        if self._ended:
            return
        self._ended = True
        if self.message.info.get("state") == "writing":
            self._note(state="stopped")
        self._chats.update(self.message)


class WritingResponse(Streamed):
    """The events of a `Writing`, which is stored however the connection ends."""

    def __init__(self, writing: Writing, answer: Answer, left: Callable[[], object]) -> None:
        super().__init__(answer, _pieces(writing), _failed)
        self._writing, self._left = writing, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()
            self._writing.end()


async def _pieces(writing: Writing) -> AsyncIterator[str]:
    async for change in writing.events():
        yield PING if change is None else event(change)


def _failed(problem: Problem) -> str:
    return event({"type": "error", "message": problem.message})
