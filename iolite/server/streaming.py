"""A body that comes piece by piece, and whose answer ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from iolite.server.answers import Answer
from iolite.server.errors import Problem, problem_of

T = TypeVar("T")


class Streamed(StreamingResponse):
    """Server-sent events, or another kind of pieces, made of one `Answer`.

    failed(problem) is the last piece of an answer that ends in an error after its stream has begun.
    """

    def __init__(
        self,
        answer: Answer,
        pieces: AsyncIterator[str],
        failed: Callable[[Problem], str],
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Proxies such as nginx hold answers back to send them at once, unless told not to.
        headers = {**(headers or {}), "X-Accel-Buffering": "no"}
        super().__init__(_whole(pieces, failed), media_type=media_type, headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def with_pings(items: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None, None]:
    """The items, and None whenever none has come for so long."""
    coming = asyncio.ensure_future(_next(items))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=seconds)
            if not done:
                yield None
                continue
            found = coming.result()
            if not found:
                return
            yield found[0]
            coming = asyncio.ensure_future(_next(items))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _next(items: AsyncIterator[T]) -> list[T]:
    """The next item, or nothing at their end."""
    async for item in items:
        return [item]
    return []


async def _whole(pieces: AsyncIterator[str], failed: Callable[[Problem], str]) -> AsyncIterator[str]:
    """The pieces, or what there was of them and then the error."""
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:
        yield failed(problem_of(error))
