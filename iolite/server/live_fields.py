"""The messages of `/v1/live` as they come in and go out, and what the page's microphone has in common with them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from iolite.errors import UsageError
from iolite.generate.reply import Reply, ToolCall
from iolite.media.speech_end import FAINTEST, SILENCE
from iolite.server.answers import Item
from iolite.server.errors import complaint
from iolite.server.fields import Message
from iolite.server.openai import timings
from iolite.server.openai_fields import ChatRequest
from iolite.text.stream import ContentDelta, ReasoningDelta

Silence = Annotated[int, Field(ge=80, le=10_000)]  # milliseconds
M = TypeVar("M", bound=BaseModel)


class Start(ChatRequest):
    """How what is spoken is understood and answered.

    text: is read before the sound, in the same message. silence_ms: of quiet after speech that end it, null: only
    commit does, and everything is heard. faintest_db: of full scale, what is below is never speech. conversation:
    whether what was said and answered comes before what is said next.
    """

    type: Literal["start"]
    messages: Annotated[list[Message], Field(max_length=10_000)] = Field(default_factory=list)
    text: Annotated[str, Field(max_length=100_000)] | None = None
    silence_ms: Silence | None = round(1000 * SILENCE)
    faintest_db: Annotated[float, Field(ge=-90, le=0)] = FAINTEST
    conversation: bool = True


def parsed(text: str) -> dict[str, Any]:
    """A text message; UsageError for one that is no object with a type."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise UsageError("a message is no JSON object with a type", 'like {"type": "commit"}')
    return message


def checked(kind: type[M], message: dict[str, Any]) -> M:
    """The settings of a `start`; UsageError for a field that is wrong."""
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        raise UsageError(complaint(error.errors())) from None


def samples_of(data: bytes) -> np.ndarray:
    """16-bit PCM as float32 [s] in [-1, 1), as files are decoded."""
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32_768)


def shown(item: Item) -> dict[str, Any]:
    """What the client is told of an answer's next piece; the last is `done`."""
    if isinstance(item, ContentDelta):
        return {"type": "delta", "content": item.text}
    if isinstance(item, ReasoningDelta):
        return {"type": "delta", "reasoning_content": item.text}
    if isinstance(item, ToolCall):
        return {"type": "tool_call", "id": item.id, "name": item.name, "arguments": item.arguments}
    assert isinstance(item, Reply)
    usage = {
        "prompt_tokens": item.usage.prompt_tokens,
        "completion_tokens": item.usage.completion_tokens,
        "reasoning_tokens": item.usage.reasoning_tokens,
        "cached_tokens": item.usage.cached_tokens,
    }
    done = {"type": "done", "text": item.text, "finish_reason": item.finish_reason, "usage": usage}
    return done | {"timings": timings(item.timings)} | ({"notice": item.notice} if item.notice else {})
