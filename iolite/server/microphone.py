"""The chat page's microphone: a WebSocket that hears one message of a chat while it is spoken, and answers it.

Messages are those of `hearing.py`. A `start` has the fields of `Spoken` (`page_fields.py`), an answer is made of the
events of `writing.py`, and then the server closes. Nothing is stored before the speaker has ended.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket
from starlette.exceptions import HTTPException

from iolite.server.answers import Answer, Ask
from iolite.server.attachments import recording
from iolite.server.chats import Attached, Chat, Chats, Message
from iolite.server.hearing import Hearing, Over
from iolite.server.live_fields import checked
from iolite.server.page_fields import Spoken
from iolite.server.service import Service
from iolite.server.turns import ask_for, parent_of, store
from iolite.server.writing import Writing

router = APIRouter()
PATH = "/page/live"


@router.websocket(PATH)
async def live(socket: WebSocket) -> None:
    state = socket.app.state
    await socket.accept()
    await Microphone(socket, state.service, state.chats, state.writings).run()


class Microphone(Hearing):
    """One connection, and one message."""

    _spoken: Spoken

    def __init__(self, socket: WebSocket, service: Service, chats: Chats, writings: dict[int, Writing]) -> None:
        super().__init__(socket, service)
        self._chats, self._writings = chats, writings
        self._writing: Writing | None = None

    async def begin(self, message: dict[str, Any]) -> dict[str, Any]:
        self._spoken = await asyncio.to_thread(checked, Spoken, message)
        self.expect(self._spoken.silence_ms)
        await self.prepare(await asyncio.to_thread(self._ask_for))
        return {}

    def beginning(self) -> dict[str, Any]:
        """Where in the sound that came it begins, so that the page can keep the same."""
        return {"from_ms": 1000 * self.ear.began / self.service.model.processor.sampling_rate}

    def stop(self, answer: Answer) -> None:
        self._writing.stop() if self._writing else answer.cancel()

    def _ask_for(self) -> Ask:
        """On a thread: what was said and written before, and the recording's place."""
        chat, parent = self._chat(), self._spoken.parent
        parent_of(chat, parent)
        ask = ask_for(self.service, self._chats, chat, parent, [self._message()])
        *before, last = ask.messages
        return replace(ask, messages=[*before, {**last, "content": [*last["content"], self.part()]}])

    def _chat(self) -> Chat:
        """As it is now; one that begins is in no file yet."""
        if self._spoken.chat is None:
            return Chat("", "", 0.0, 0.0, self._spoken.settings.model_dump(exclude_none=True), None)
        chat = self._chats.chat(self._spoken.chat)
        if chat is None:
            raise HTTPException(404, "there is no such chat")
        return chat

    def _message(self, *recordings: Attached) -> Message:
        files = [*self._spoken.attached(), *recordings]
        return Message(0, self._spoken.parent, "user", self._spoken.text, files=files)

    async def answered(self, answer: Answer, samples: np.ndarray) -> None:
        begin, reply = await asyncio.to_thread(self._store, samples)
        begin["prompt_tokens"] = answer.prompt_tokens
        self._writing = writing = Writing(self._chats, answer, reply, begin, self.service.settings.ping)
        self._writings[reply.id] = writing
        try:
            async with aclosing(writing.events()) as events:
                async for change in events:
                    if change is not None:
                        await self.send(change)
        finally:
            del self._writings[reply.id]
            writing.end()
        raise Over

    def _store(self, samples: np.ndarray) -> tuple[dict[str, Any], Message]:
        """On a thread: the message with its recording, in a chat that may begin with it."""
        chat = self._chat()
        kept = self._chats.keep(**vars(recording(self.service.model, samples)))
        if self._spoken.chat is None:
            chat = self._chats.create("", chat.settings)
        message = self._message(Attached(kept.id, self._spoken.name))
        begin, reply = store(self._chats, chat, self._spoken.parent, [message], spoken=True)
        return begin | {"chat": chat.id}, reply
