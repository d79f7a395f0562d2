"""`/v1/live`: a WebSocket that hears speech while it is spoken, and answers when the speaker has ended.

Messages are those of `hearing.py`. A `start` has the fields of a chat request, whose messages come before what is
spoken, and those of `Start` (`live_fields.py`); it may come again, for other settings or another conversation. An
answer is made of `delta` and `tool_call`, and ends with `done`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket

from iolite.errors import UsageError
from iolite.generate.reply import Reply
from iolite.server.answers import Answer, Ask
from iolite.server.fields import ignored
from iolite.server.hearing import Hearing
from iolite.server.live_fields import Start, checked, shown
from iolite.server.service import Service

router = APIRouter()
PATH = "/v1/live"


@router.websocket(PATH)
async def live(socket: WebSocket) -> None:
    service: Service = socket.app.state.service
    await socket.accept()
    await Session(socket, service).run()


class Session(Hearing):
    """One connection, and with it one conversation."""

    _settings: Start
    _messages: list[Any]  # what was said before

    async def begin(self, message: dict[str, Any]) -> dict[str, Any]:
        self._settings = start = await asyncio.to_thread(checked, Start, message)
        if start.n not in (None, 1):
            raise UsageError("n must be 1 here", "leave it out")
        self._messages = list(start.messages)
        self.expect(start.silence_ms, faintest=start.faintest_db)
        await self.prepare(self._next())
        return {"ignored": [name for name in ignored(start) if name != "type"]}

    def _next(self) -> Ask:
        ask = self._settings.ask(self.service.model, self.service.settings)
        return replace(ask, messages=[*self._messages, self._spoken()])

    def _spoken(self, samples: np.ndarray | None = None) -> dict[str, Any]:
        text = [{"type": "text", "text": self._settings.text}] if self._settings.text else []
        return {"role": "user", "content": [*text, self.part(samples)]}

    async def answered(self, answer: Answer, samples: np.ndarray) -> None:
        reply: Reply | None = None
        async for _, item in answer:
            if item is not None:
                await self.send(shown(item))
            if isinstance(item, Reply):
                reply = item
        answer.close()  # its place is free for what is said next
        if self._settings.conversation and reply and (reply.text or reply.message.get("tool_calls")):
            self._messages += [self._spoken(samples), reply.message]
            await self.prepare(self._next())
