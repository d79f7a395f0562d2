"""OpenAI's `/v1/audio/transcriptions`: recordings of any length, cut at silences, each piece heard on its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter, File, Form, UploadFile
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from iolite.errors import BusyError, UsageError
from iolite.generate.transcribe import Segment, cut_at_silences, prompt_for
from iolite.media.audio import decode_audio
from iolite.server.answers import Ask
from iolite.server.errors import body_of, problem_of
from iolite.server.forms import FormRoute
from iolite.server.languages import language_named
from iolite.server.service import Service, service_of
from iolite.server.streaming import with_pings
from iolite.server.wire import PING, event, json_response

router = APIRouter(tags=["OpenAI"], route_class=FormRoute)
PATH = "/v1/audio/transcriptions"
MOST_TOKENS = 512  # of the text of one piece
Format = Literal["json", "text", "verbose_json", "srt", "vtt"]


@router.post(PATH, summary="Write down what is said in a recording or a video")
async def transcriptions(
    request: Request,
    file: Annotated[UploadFile, File()],
    model: Annotated[str | None, Form()] = None,
    language: Annotated[str | None, Form(max_length=40)] = None,
    prompt: Annotated[str | None, Form(max_length=10_000)] = None,
    response_format: Annotated[Format, Form()] = "json",
    temperature: Annotated[float, Form(ge=0, le=100, allow_inf_nan=False)] = 0.0,
    stream: Annotated[bool, Form()] = False,
) -> Response:
    service, form = service_of(request), await request.form()
    if "word" in form.getlist("timestamp_granularities[]"):
        raise UsageError("there are no times of words", "those of segments come with verbose_json, srt and vtt")
    named = language_named(language)
    text = prompt_for(service.model, named) + (f"\n\nThis may be spoken of: {prompt}" if prompt else "")
    limits = service.model.builder.limits
    samples = await service.answers.prepared(lambda: decode_audio(file.file.read(), limits=limits))
    segments = _listen(request, service, samples, text, temperature)
    if stream:
        return _Told(_events(segments, service.settings.ping), media_type="text/event-stream")
    return _page([segment async for segment in segments], response_format, named, service.model.processor.sampling_rate)


async def _listen(
    request: Request, service: Service, samples: np.ndarray, text: str, temperature: float
) -> AsyncGenerator[Segment, None]:
    """Segments of samples, float32 [s], each as soon as it is heard."""
    with service.recordings.holding(samples):
        async with aclosing(_segments(request, service, samples, text, temperature)) as found:
            async for segment in found:
                yield segment


async def _segments(
    request: Request, service: Service, samples: np.ndarray, text: str, temperature: float
) -> AsyncGenerator[Segment, None]:
    processor = service.model.processor
    rate, longest = processor.sampling_rate, processor.audio_seq_length * processor.audio_samples_per_token
    pieces = await service.answers.prepared(lambda: cut_at_silences(samples, longest, rate))
    for number, (start, stop) in enumerate(pieces):
        sound = {"type": "audio", "audio": samples[start:stop], "sampling_rate": rate}
        messages = [{"role": "user", "content": [{"type": "text", "text": text}, sound]}]
        ask = Ask(messages=messages, sampling={"max_tokens": MOST_TOKENS, "temperature": temperature})
        while True:
            try:
                answer = await service.answers.start(ask)
                break
            except BusyError as error:
                if number == 0:
                    raise
                await asyncio.sleep(error.retry_after)  # what has been heard is not thrown away
        (reply,) = await answer.replies(request)
        yield Segment(start / rate, stop / rate, reply.text.strip(), reply.notice)


class _Told(StreamingResponse):
    """A stream that is closed with its connection, and with it all that makes it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[str, None], self.body_iterator)):
            await super().__call__(scope, receive, send)


async def _events(segments: AsyncGenerator[Segment, None], ping: float) -> AsyncGenerator[str, None]:
    texts: list[str] = []
    try:
        yield PING
        async with aclosing(segments), aclosing(with_pings(segments, ping)) as coming:
            async for segment in coming:
                if segment is None:
                    yield PING
                elif segment.text:
                    delta = segment.text if not texts else f" {segment.text}"
                    texts.append(segment.text)
                    yield event({"type": "transcript.text.delta", "delta": delta, **_noticed(segment)})
        yield event({"type": "transcript.text.done", "text": " ".join(texts)})
    except Exception as error:
        yield event(body_of(PATH, problem_of(error)))


def _page(segments: list[Segment], form: Format, language: str, rate: int) -> Response:
    text = " ".join(segment.text for segment in segments if segment.text)
    if form == "text":
        return PlainTextResponse(f"{text}\n")
    if form in ("srt", "vtt"):
        return PlainTextResponse(subtitles([s for s in segments if s.text], form), media_type=_SUBTITLES[form])
    notices = [segment.notice for segment in segments if segment.notice]
    found: dict[str, Any] = {"text": text} | ({"notice": notices[0]} if notices else {})
    if form == "verbose_json":
        parts = [{"id": i, **asdict(segment)} for i, segment in enumerate(segments)]
        found |= {"task": "transcribe", "language": language.lower(), "duration": segments[-1].end, "segments": parts}
    return json_response(found)


_SUBTITLES = {"srt": "application/x-subrip", "vtt": "text/vtt"}


def subtitles(segments: list[Segment], form: str) -> str:
    """SubRip or WebVTT."""
    cues = []
    for number, segment in enumerate(segments, start=1):
        times = f"{_clock(segment.start, form)} --> {_clock(segment.end, form)}"
        text = " ".join(segment.text.split()).replace("-->", "->")  # an arrow would begin a cue
        cues.append(f"{number}\n{times}\n{text}\n")
    return ("WEBVTT\n\n" if form == "vtt" else "") + "\n".join(cues)


def _clock(seconds: float, form: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    mark = "," if form == "srt" else "."
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{thousandths:03}"


def _noticed(segment: Segment) -> dict[str, str]:
    return {"notice": segment.notice} if segment.notice else {}
