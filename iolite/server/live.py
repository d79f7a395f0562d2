"""`/v1/live`: a WebSocket that hears speech while it is spoken, and answers when the speaker has ended.

The client sends text messages, JSON objects with a `type`, and binary ones: PCM, 16-bit little-endian, mono, 16 kHz.

    start     the fields of a chat request, whose messages come before what is spoken, and those of `Start`
              (`live_fields.py`); first of all, and again for other settings or another conversation
    (sound)   any number of whole samples, at about the speed of speech
    commit    the speaker has ended
    clear     what was heard and is not answered yet is forgotten
    stop      ends the answer that is being drawn

The server sends JSON only: `ready`, `speech_started`, `speech_ended` (with its reason: silence, commit, limit, time),
`delta`, `tool_call`, `done`, `nothing_heard`, `cleared`, and `error`, after which it closes.

Sound that comes during an answer waits for its end. Samples are looked at on threads, and read by the model in the
engine's; on the event loop they are passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from iolite.engine.listening import Listening, frames_that_fit
from iolite.errors import BusyError, UsageError
from iolite.generate.reply import Reply
from iolite.media.speech_end import SpeechEnd
from iolite.prompt import Prompt
from iolite.server.answers import Answer, Ask, ClientGone
from iolite.server.errors import body_of, problem_of
from iolite.server.fields import ignored
from iolite.server.live_fields import Start, parsed, samples_of, settings_of, shown
from iolite.server.service import Service
from iolite.server.wire import to_json

router = APIRouter()
PATH = "/v1/live"
MOST_SESSIONS = 64  # connections at once
MOST_WAITING = 30 * 32_000  # bytes that may wait to be heard: 30 seconds
MOST_MESSAGES = 4096  # that may wait; small ones of 10 ms fill 30 seconds with 3000
SLOWEST = 2  # times as long as its sound is a recording may take to come
Reason = Literal["silence", "commit", "limit", "time"]
_CLOSING = {400: 1007, 413: 1009, 429: 1013, 503: 1012}  # HTTP statuses as WebSockets' codes; else 1011


@router.websocket(PATH)
async def live(socket: WebSocket) -> None:
    service: Service = socket.app.state.service
    await socket.accept()
    await Session(socket, service).run()


class Session:
    """One connection: what comes is taken in by one task and worked on by another, in order."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service, self._answers = socket, service, service.answers
        self._coming: asyncio.Queue[bytes | dict[str, Any]] = asyncio.Queue(MOST_MESSAGES)
        self._waiting = 0  # bytes of sound among them
        self._start: Start | None = None
        self._ear, self._ask, self._template = SpeechEnd(), Ask(), Prompt([], "")  # until there is a start
        self._frame_ms = 0.0
        self._messages: list[Any] = []  # what was said before
        self._listening: Listening | None = None
        self._deadline: float | None = None  # on the loop's clock, of what is being heard
        self._answer: Answer | None = None

    async def run(self) -> None:
        """To the end of the connection, whoever ends it; nothing is kept."""
        self._answers.sessions += 1
        try:
            if self._answers.sessions > MOST_SESSIONS:
                raise BusyError(f"{MOST_SESSIONS} connections listen already", "try again later", retry_after=5.0)
            await self._both()
        except Exception as error:
            with contextlib.suppress(ClientGone):
                await self._fail(error)
        finally:
            self._answers.sessions -= 1
            if self._answer:
                self._answer.close()
            elif self._listening:
                self._forget()

    async def _both(self) -> None:
        """Until one of the two tasks has ended; then neither goes on."""
        tasks = [asyncio.ensure_future(work()) for work in (self._receive, self._work)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _fail(self, error: Exception) -> None:
        """Says what is wrong, and closes."""
        if isinstance(error, ClientGone):
            return
        problem = problem_of(error)
        found = {"type": "error", **body_of(PATH, problem)}
        if problem.retry_after is not None:
            found["retry_after"] = problem.retry_after
        await self._send(found)
        with contextlib.suppress(RuntimeError):  # the client was faster
            await self._socket.close(_CLOSING.get(problem.status, 1011))

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._socket.send_text(to_json(message))
        except (WebSocketDisconnect, RuntimeError):
            raise ClientGone from None

    async def _receive(self) -> None:
        """Takes in what comes. A stop counts for the answer that is being drawn now, and waits for nothing."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise ClientGone
            sound = message.get("bytes")
            if sound is None:
                command = parsed(message.get("text") or "")
                if command["type"] != "stop":
                    self._put(command)
                elif self._answer:
                    self._answer.cancel()
                continue
            if len(sound) % 2:
                raise UsageError("a message holds half a sample", "send whole ones: 16-bit PCM, mono, 16 kHz")
            self._waiting += len(sound)
            if self._waiting > MOST_WAITING:
                raise UsageError(
                    "more sound has come than can wait to be heard",
                    "send it as it is spoken, and none while an answer is drawn for long",
                )
            self._put(sound)

    def _put(self, message: bytes | dict[str, Any]) -> None:
        try:
            self._coming.put_nowait(message)
        except asyncio.QueueFull:
            raise UsageError("more messages have come than can wait", "send sound in pieces of 40 ms or more") from None

    async def _work(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    message = await self._coming.get()
            except TimeoutError:
                await self._finish("time")
                continue
            if isinstance(message, bytes):
                self._waiting -= len(message)
                await self._sound(message)
            elif message["type"] == "start":
                await self._begin(message)
            elif message["type"] == "commit":
                await self._commit()
            elif message["type"] == "clear":
                await self._clear()
            else:
                raise UsageError("there is no such type of message", "there are start, commit, clear and stop")

    async def _begin(self, message: dict[str, Any]) -> None:
        """Checks the settings, before anything is said."""
        if self._listening:
            self._forget()
        self._start = start = await asyncio.to_thread(settings_of, message)
        unknown = [name for name in ignored(start) if name != "type"]
        silence = None if start.silence_ms is None else start.silence_ms / 1000
        processor = self._service.model.processor
        rate, size = processor.sampling_rate, processor.audio_samples_per_token
        self._ear = SpeechEnd(silence, start.faintest_db, rate, size)
        self._frame_ms = 1000 * size / rate
        self._messages = list(start.messages)
        await self._prepare()
        longest = frames_that_fit(self._template, processor.audio_seq_length, self._service.model.context)
        await self._send(
            {
                "type": "ready",
                "sampling_rate": rate,
                "frame_ms": self._frame_ms,
                "longest_ms": longest * self._frame_ms,
                "ignored": unknown,
            }
        )

    async def _prepare(self) -> None:
        """The prompt of what is said next: a frame of silence holds the place of the recording."""
        assert self._start
        silence = np.zeros(self._ear.size, np.float32)
        messages = [*self._messages, self._spoken(silence)]
        self._ask = replace(self._start.ask(self._service.model, self._service.settings), messages=messages)
        self._template = await self._answers.prompt(self._ask)

    def _spoken(self, samples: np.ndarray) -> dict[str, Any]:
        """The message of a recording, float32 [s]."""
        assert self._start
        rate = self._service.model.processor.sampling_rate
        sound = {"type": "audio", "audio": samples, "sampling_rate": rate}
        text = [{"type": "text", "text": self._start.text}] if self._start.text else []
        return {"role": "user", "content": [*text, sound]}

    async def _sound(self, data: bytes) -> None:
        if self._start is None:
            raise UsageError("sound has come before the settings", 'send {"type": "start"} first')
        for frames, ended in await asyncio.to_thread(lambda: self._ear.push(samples_of(data))):
            await self._hear(frames)
            if ended and self._listening:
                await self._end("silence")

    async def _hear(self, frames: np.ndarray) -> None:
        """Has frames [n, samples] read by the model. Where no more may be heard, those that were are answered, and the
        rest begins something new."""
        while len(frames):
            if self._listening is None:
                self._listening = await self._answers.listen(self._ask, self._template)
                seconds = SLOWEST * self._listening.most * self._frame_ms / 1000
                self._deadline = asyncio.get_running_loop().time() + seconds
                await self._send({"type": "speech_started"})
            fit = self._listening.left
            self._listening.hear(frames[:fit])
            frames = frames[fit:]
            if not self._listening.left:
                await self._end("limit")

    async def _commit(self) -> None:
        if self._start is None:
            raise UsageError("there is a commit before the settings", 'send {"type": "start"} first')
        if not await self._finish("commit"):
            await self._send({"type": "nothing_heard"})

    async def _finish(self, reason: Reason) -> bool:
        """What came is all, the frame that was begun included; False where nothing was heard."""
        rest = self._ear.flush()
        heard = self._listening is not None or len(rest) > 0
        await self._hear(rest)
        if self._listening:
            await self._end(reason)
        self._ear.reset()
        return heard

    async def _clear(self) -> None:
        if self._start:
            self._ear.reset()
        self._forget()
        await self._send({"type": "cleared"})

    def _forget(self) -> None:
        if self._listening:
            self._answers.forget(self._listening)
        self._listening = self._deadline = None

    async def _end(self, reason: Reason) -> None:
        """Has what was heard answered, and shows the answer."""
        assert self._listening and self._start
        listening = self._listening
        self._answer = answer = await self._answers.answer_to(self._ask, listening)
        self._listening = self._deadline = None
        heard = listening.whole.spans[-1]
        await self._send({"type": "speech_ended", "reason": reason, "heard_ms": heard.length * self._frame_ms})
        reply = await self._show(answer)
        answer.close()
        self._answer = None
        if self._start.conversation and (reply.text or reply.message.get("tool_calls")):
            self._messages += [self._spoken(heard.array.reshape(-1)), reply.message]
            await self._prepare()

    async def _show(self, answer: Answer) -> Reply:
        """Sends what comes of an answer; its reply."""
        reply: Reply | None = None
        async for _, item in answer:
            if item is not None:
                await self._send(shown(item))
            if isinstance(item, Reply):
                reply = item
        assert reply
        return reply
