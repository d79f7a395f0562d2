"""How much a request may carry, and how long that may take: counted while it comes, whatever its headers say.

JSON is taken whole, so that a small body which would become millions of objects is refused before it is parsed. An
upload goes to a file as it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.server.errors import problem_of, response_of
from iolite.server.settings import Settings

UPLOADS = frozenset({"/v1/audio/transcriptions", "/page/files"})  # the routes that take forms
MOST_VALUES = 1_000_000  # lists, objects and commas of a JSON body, those in its texts too; 262,144 tokens have fewer
PATIENCE = 60.0  # seconds that a client may be silent within its body
SLOWEST = 1000  # bytes in each second after so many, of a body that takes longer: a modem sends more
MOST_LARGEST = 8  # bodies of the largest size that may be here at once, or as much in smaller ones
MOST_UPLOADS = 4  # the same of uploads; two of them are in memory, one for each thread that decodes


class Bodies:
    """Refuses bodies that are too large, too rich or too slow."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.whole = Room(settings.max_body, MOST_LARGEST)
        self.uploads = Room(settings.max_upload, MOST_UPLOADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        if scope["path"] in UPLOADS and headers.get("content-type", "").lower().startswith("multipart/"):
            with self.uploads.counted(receive) as counted:
                await self.app(scope, counted, send)
            return
        # `curl -d` says that its JSON is a form. Keys and origins keep out the pages that such a request could be from.
        headers["content-type"] = "application/json"
        with self.whole.counted(receive) as counted:
            try:
                body = await self._read(counted)
            except HTTPException as error:
                await response_of(scope["path"], problem_of(error))(scope, receive, send)
            else:
                await self.app(scope, self._again(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        pieces, more = list[bytes](), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the request broke off")
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(pieces)
        if sum(body.count(mark) for mark in b"[{,") > MOST_VALUES:
            raise HTTPException(413, f"the request holds more than {MOST_VALUES:,} values")
        return body

    def _again(self, body: bytes, receive: Receive) -> Receive:
        given = False

        async def receiving() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receiving


class Room:
    """What there is for bodies of one kind. largest: bytes of one; most: so many of that size may be here at once."""

    def __init__(self, largest: int, most: int) -> None:
        self.largest, self.total = largest, most * largest
        self.held = 0  # bytes of all that are here

    @contextmanager
    def counted(self, receive: Receive) -> Iterator[Receive]:
        """`receive`, which raises HTTPException for more than there is room for, and for a client that lets it wait.
        What came takes its room until the block is left."""
        count, more, began = 0, True, asyncio.get_running_loop().time()

        async def receiving() -> Message:
            nonlocal count, more
            if not more:  # waits for the client to go away
                return await receive()
            message = await _soon(receive, began + count / SLOWEST)
            came, more = len(message.get("body", b"")), message.get("more_body", False)
            count, self.held = count + came, self.held + came
            if count > self.largest:
                raise HTTPException(413, f"the request has more than {self.largest:,} bytes")
            if self.held > self.total:
                told = "too many large requests are being answered; send it again later"
                raise HTTPException(429, told, {"Retry-After": "5"})
            return message

        try:
            yield receiving
        finally:
            self.held -= count


async def _soon(receive: Receive, due: float) -> Message:
    """The next piece of a body, in time. due: when on the loop's clock it would have come at the slowest pace."""
    try:
        async with asyncio.timeout_at(PATIENCE + min(due, asyncio.get_running_loop().time())):
            return await receive()
    except TimeoutError:
        told = f"the request came too slowly: nothing for {PATIENCE:.0f} s, or less than {SLOWEST:,} bytes a second"
        raise HTTPException(408, told) from None
