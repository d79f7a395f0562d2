"""How much a request may carry: counted while it comes, whatever its headers say.

JSON is taken whole, so that a small body which would become millions of objects is refused before it is parsed.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.server.errors import Problem, problem_of, response_of
from iolite.server.settings import Settings

MOST_VALUES = 1_000_000  # lists, objects and commas of a JSON body, those in its texts too; 262,144 tokens have fewer
PATIENCE = 60.0  # seconds that a client may be silent within its body


class Bodies:
    """Refuses bodies that are too large, too rich or too slow."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        multipart = headers.get("content-type", "").lower().startswith("multipart/")
        counted = self._counted(receive, self.settings.max_upload if multipart else self.settings.max_body)
        if multipart:
            await self.app(scope, counted, send)
            return
        # `curl -d` says that its JSON is a form. Keys and origins keep out the pages that such a request could be from.
        headers["content-type"] = "application/json"
        try:
            body = await self._whole(counted)
        except HTTPException as error:
            await response_of(scope["path"], problem_of(error))(scope, receive, send)
            return
        if sum(body.count(mark) for mark in b"[{,") > MOST_VALUES:
            problem = Problem(413, f"the request holds more than {MOST_VALUES:,} values")
            await response_of(scope["path"], problem)(scope, receive, send)
            return
        await self.app(scope, self._again(body, receive), send)

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

    async def _whole(self, receive: Receive) -> bytes:
        pieces = []
        while True:
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {PATIENCE:.0f} s") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the request broke off")
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(pieces)

    def _again(self, body: bytes, receive: Receive) -> Receive:
        given = False

        async def receiving() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receiving
