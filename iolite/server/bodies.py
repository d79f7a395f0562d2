"""How much a request may carry: counted while it comes, whatever its headers say.

JSON is taken whole, so that a small body which would become millions of objects is refused before it is parsed.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.errors import BusyError
from iolite.server.errors import problem_of, response_of
from iolite.server.settings import Settings

UPLOADS = frozenset({"/v1/audio/transcriptions", "/page/files"})  # the routes that take forms
MOST_VALUES = 1_000_000  # lists, objects and commas of a JSON body, those in its texts too; 262,144 tokens have fewer
PATIENCE = 60.0  # seconds that a client may be silent within its body
MOST_LARGEST = 8  # bodies of the largest size that may be here at once, or as much in smaller ones


class Bodies:
    """Refuses bodies that are too large, too rich or too slow."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.held = 0  # bytes of all bodies that are here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        multipart = scope["path"] in UPLOADS and headers.get("content-type", "").lower().startswith("multipart/")
        counted = self._counted(receive, self.settings.max_upload if multipart else self.settings.max_body)
        if multipart:  # goes to a file as it comes
            await self.app(scope, counted, send)
            return
        # `curl -d` says that its JSON is a form. Keys and origins keep out the pages that such a request could be from.
        headers["content-type"] = "application/json"
        pieces: list[bytes] = []
        try:
            await self._read(counted, pieces)
            pieces[:] = [b"".join(pieces)]  # once in memory, not twice
            if sum(pieces[0].count(mark) for mark in b"[{,") > MOST_VALUES:
                raise HTTPException(413, f"the request holds more than {MOST_VALUES:,} values")
        except (HTTPException, BusyError) as error:
            await response_of(scope["path"], problem_of(error))(scope, receive, send)
        else:
            await self.app(scope, self._again(pieces[0], receive), send)
        finally:
            self.held -= sum(map(len, pieces))

    def _counted(self, receive: Receive, limit: int) -> Receive:
        count = 0

        async def receiving() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                raise HTTPException(413, f"the request has more than {limit:,} bytes")
            return message

        return receiving

    async def _read(self, receive: Receive, pieces: list[bytes]) -> None:
        """Adds what comes to the pieces, to its end."""
        more = True
        while more:
            try:
                async with asyncio.timeout(PATIENCE):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {PATIENCE:.0f} s") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the request broke off")
            pieces.append(message.get("body", b""))
            self.held += len(pieces[-1])
            if self.held > MOST_LARGEST * self.settings.max_body:
                raise BusyError("too many large requests are being answered", "send it again later", retry_after=5.0)
            more = message.get("more_body", False)

    def _again(self, body: bytes, receive: Receive) -> Receive:
        given = False

        async def receiving() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receiving
