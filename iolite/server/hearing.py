"""A WebSocket over which somebody speaks: sound comes in, is read by the model while it comes, and is answered.

The client sends text messages, JSON objects with a `type`, and binary ones: PCM, 16-bit little-endian, mono, 16 kHz.

    start     what is read before the sound, and how its end is known; first of all
    (sound)   any number of whole samples, at about the speed of speech
    commit    the speaker has ended
    clear     what was heard and is not answered yet is forgotten
    stop      ends the answer that is being drawn

The server sends JSON only: `ready`, `speech_started`, `speech_ended` (with its reason: silence, commit, limit, time),
`nothing_heard`, `cleared`, what an answer is made of, and `error`, after which it closes.

Sound that comes during an answer waits for its end. Samples are looked at on threads, and read by the model in the
engine's; on the event loop they are passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from iolite.engine.listening import Listening, frames_that_fit
from iolite.errors import BusyError, UsageError
from iolite.media.speech_end import SpeechEnd
from iolite.prompt import Prompt
from iolite.server.answers import Answer, Ask, ClientGone
from iolite.server.errors import body_of, problem_of
from iolite.server.live_fields import parsed, samples_of
from iolite.server.service import Service
from iolite.server.wire import to_json

MOST_SESSIONS = 64  # connections at once
MOST_WAITING = 30 * 32_000  # bytes that may wait to be heard: 30 seconds
MOST_MESSAGES = 4096  # that may wait; small ones of 10 ms fill 30 seconds with 3000
SLOWEST = 2  # times as long as its sound is a recording may take to come
Reason = Literal["silence", "commit", "limit", "time"]
_CLOSING = {400: 1007, 404: 1008, 413: 1009, 429: 1013, 503: 1012}  # HTTP statuses as WebSockets' codes; else 1011


class Hearing(ABC):
    """One connection: what comes is taken in by one task and worked on by another, in order.

    Whoever inherits says in `begin` what is read before the sound, and in `answered` what becomes of an answer.
    """

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self.socket, self.service, self.answers = socket, service, service.answers
        self.ear = SpeechEnd()  # of nobody before there is a start
        self.answer: Answer | None = None  # that is being drawn
        self._ask, self._template = Ask(), Prompt([], "")
        self._ready = False
        self._coming: asyncio.Queue[tuple[float, bytes | dict[str, Any]]] = asyncio.Queue(MOST_MESSAGES)
        self._waiting = 0  # bytes of sound among them
        self._came = 0.0  # when what is worked on came, by perf_counter
        self._listening: Listening | None = None
        self._deadline: float | None = None  # on the loop's clock, of what is being heard

    @abstractmethod
    async def begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """Checks the settings, before anything is said, and calls `expect` and `prepare`. Returns what `ready` tells
        beside."""

    @abstractmethod
    async def answered(self, answer: Answer, samples: np.ndarray) -> None:
        """Shows the answer to a recording, float32 [s], to its end. Raises `Over` where no other is heard."""

    async def run(self) -> None:
        """To the end of the connection, whoever ends it; nothing is kept."""
        self.answers.sessions += 1
        try:
            if self.answers.sessions > MOST_SESSIONS:
                raise BusyError(f"{MOST_SESSIONS} connections listen already", "try again later", retry_after=5.0)
            await self._both()
        except Over:
            await self._close(1000)
        except Exception as error:
            with contextlib.suppress(ClientGone):
                await self._fail(error)
        finally:
            self.answers.sessions -= 1
            if self.answer:
                self.answer.close()
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
        found = {"type": "error", **body_of(self.socket.url.path, problem)}
        if problem.retry_after is not None:
            found["retry_after"] = problem.retry_after
        await self.send(found)
        await self._close(_CLOSING.get(problem.status, 1011))

    async def _close(self, code: int) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
            await self.socket.close(code)

    async def send(self, message: dict[str, Any]) -> None:
        try:
            await self.socket.send_text(to_json(message))
        except (WebSocketDisconnect, RuntimeError):
            raise ClientGone from None

    async def _receive(self) -> None:
        """Takes in what comes. A stop counts for the answer that is being drawn now, and waits for nothing."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                raise ClientGone
            sound = message.get("bytes")
            if sound is None:
                command = parsed(message.get("text") or "")
                if command["type"] != "stop":
                    self._put(command)
                elif self.answer:
                    self.stop(self.answer)
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

    def stop(self, answer: Answer) -> None:
        """Ends an answer where it is."""
        answer.cancel()

    def _put(self, message: bytes | dict[str, Any]) -> None:
        try:
            self._coming.put_nowait((time.perf_counter(), message))
        except asyncio.QueueFull:
            raise UsageError("more messages have come than can wait", "send sound in pieces of 40 ms or more") from None

    async def _work(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    self._came, message = await self._coming.get()
            except TimeoutError:
                self._came = time.perf_counter()
                await self._finish("time")
                continue
            if isinstance(message, bytes):
                self._waiting -= len(message)
                await self._sound(message)
            elif message["type"] == "start":
                await self._start(message)
            elif message["type"] == "commit":
                await self._commit()
            elif message["type"] == "clear":
                await self._clear()
            else:
                raise UsageError("there is no such type of message", "there are start, commit, clear and stop")

    async def _start(self, message: dict[str, Any]) -> None:
        if self._listening:
            self._forget()
        more = await self.begin(message)
        self._ready = True
        model = self.service.model
        longest = frames_that_fit(self._template, model.processor.audio_seq_length, model.context)
        told = {"frame_ms": self.frame_ms, "longest_ms": longest * self.frame_ms}
        await self.send({"type": "ready", "sampling_rate": model.processor.sampling_rate, **told, **more})

    def expect(self, silence_ms: int | None, **faintest: float) -> None:
        """How the end of speech is known, as `Start` has it."""
        processor = self.service.model.processor
        silence = None if silence_ms is None else silence_ms / 1000
        rate, size = processor.sampling_rate, processor.audio_samples_per_token
        self.ear = SpeechEnd(silence, **faintest, rate=rate, size=size)

    @property
    def frame_ms(self) -> float:
        return 1000 * self.ear.size / self.service.model.processor.sampling_rate

    async def prepare(self, ask: Ask) -> None:
        """The request that what is said next belongs to: its last message ends with what holds a recording's place."""
        self._ask, self._template = ask, await self.answers.prompt(ask)

    def part(self, samples: np.ndarray | None = None) -> dict[str, Any]:
        """A recording as a part of a message, float32 [s]; None: what holds its place."""
        silence = np.zeros(self.ear.size, np.float32)
        rate = self.service.model.processor.sampling_rate
        return {"type": "audio", "audio": silence if samples is None else samples, "sampling_rate": rate}

    async def _sound(self, data: bytes) -> None:
        if not self._ready:
            raise UsageError("sound has come before the settings", 'send {"type": "start"} first')
        for frames, ended in await asyncio.to_thread(lambda: self.ear.push(samples_of(data))):
            await self._hear(frames)
            if ended and self._listening:
                await self._end("silence")

    async def _hear(self, frames: np.ndarray) -> None:
        """Has frames [n, samples] read by the model. Where no more may be heard, those that were are answered, and the
        rest begins something new."""
        while len(frames):
            if self._listening is None:
                self._listening = await self.answers.listen(self._ask, self._template)
                seconds = SLOWEST * self._listening.most * self.frame_ms / 1000
                self._deadline = asyncio.get_running_loop().time() + seconds
                await self.send({"type": "speech_started", **self.beginning()})
            fit = self._listening.left
            self._listening.hear(frames[:fit])
            frames = frames[fit:]
            if not self._listening.left:
                await self._end("limit")

    def beginning(self) -> dict[str, Any]:
        """What `speech_started` tells beside."""
        return {}

    async def _commit(self) -> None:
        if not self._ready:
            raise UsageError("there is a commit before the settings", 'send {"type": "start"} first')
        if not await self._finish("commit"):
            await self.send({"type": "nothing_heard"})

    async def _finish(self, reason: Reason) -> bool:
        """What came is all, the frame that was begun included; False where nothing was heard."""
        rest = self.ear.flush()
        heard = self._listening is not None or len(rest) > 0
        await self._hear(rest)
        if self._listening:
            await self._end(reason)
        self.ear.reset()
        return heard

    async def _clear(self) -> None:
        self.ear.reset()
        self._forget()
        await self.send({"type": "cleared"})

    def _forget(self) -> None:
        if self._listening:
            self.answers.forget(self._listening)
        self._listening = self._deadline = None

    async def _end(self, reason: Reason) -> None:
        """Has what was heard answered, and shows the answer."""
        assert self._listening
        listening = self._listening
        self.answer = answer = await self.answers.answer_to(self._ask, listening, self._came)
        self._listening = self._deadline = None
        heard = listening.whole.spans[-1]
        await self.send({"type": "speech_ended", "reason": reason, "heard_ms": heard.length * self.frame_ms})
        await self.answered(answer, heard.array.reshape(-1))
        answer.close()
        self.answer = None


class Over(Exception):
    """Nothing more is heard on this connection."""
