"""OpenAI's `/v1/chat/completions`.

Beyond OpenAI's fields an answer has `reasoning_content` (and the same as `reasoning`), `timings` under llama-server's
names, and in a choice that is not what it seems a `notice` of one sentence.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iolite.generate.logprobs import ScoredDelta
from iolite.generate.reply import Reply, Timings, ToolCall
from iolite.server.answers import Answer, Item
from iolite.server.errors import body_of
from iolite.server.fields import headers_for, ignored
from iolite.server.logprobs import chat_logprobs
from iolite.server.openai_fields import ChatRequest
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import PING, event, json_response
from iolite.text.stream import ContentDelta, ReasoningDelta

router = APIRouter(tags=["OpenAI"])
DONE = "data: [DONE]\n\n"
CHAT = "/v1/chat/completions"


@router.post(CHAT, summary="Answer a conversation")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    service = service_of(request)
    headers = headers_for(ignored(body))
    answer = await service.answers.start(body.ask(service.model, service.settings))
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        pieces = _chat_chunks(answer, service, body.n or 1, usage)
        return Streamed(answer, pieces, lambda problem: event(body_of(CHAT, problem)), headers=headers)
    replies = await answer.replies(request)
    choices = [_choice(number, reply) for number, reply in enumerate(replies)]
    return json_response(frame_of(service, "chat.completion", choices) | costs(replies), headers=headers)


def _choice(number: int, reply: Reply) -> dict[str, Any]:
    calls = [call for call in reply.tool_calls if call.error is None]
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if calls else "")}
    if reply.reasoning:
        message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    logprobs = None if reply.logprobs is None else chat_logprobs(reply.logprobs)
    choice = {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}
    return choice | ({"notice": reply.notice} if reply.notice else {})


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def frame_of(service: Service, kind: str, choices: list[dict[str, Any]], prefix: str = "chatcmpl") -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
        "choices": choices,
    }


def costs(replies: list[Reply], choices: int | None = None) -> dict[str, Any]:
    """Usage and timings of one or more answers to the same prompt. choices: that many are to each of several, whose
    timings overlap and are not told."""
    firsts = replies[:: choices or len(replies)]
    read = sum(first.usage.prompt_tokens for first in firsts)
    drawn = sum(reply.usage.completion_tokens for reply in replies)
    usage = {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(first.usage.cached_tokens for first in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(reply.usage.reasoning_tokens for reply in replies)},
    }
    return {"usage": usage} | ({"timings": timings(firsts[0].timings)} if len(firsts) == 1 else {})


def timings(taken: Timings) -> dict[str, Any]:
    """Under the names that llama-server gives them; milliseconds, and tokens per second."""
    found: dict[str, Any] = {
        "cache_n": taken.cached_tokens,
        "prompt_n": taken.prefilled_tokens,
        "prompt_ms": 1000 * taken.prefill_seconds,
        "prompt_per_second": taken.prompt_tokens_per_second,
        "predicted_n": taken.completion_tokens,
        "predicted_ms": 1000 * taken.decode_seconds,
        "predicted_per_second": taken.tokens_per_second,
    }
    if taken.drafting:
        found |= {"draft_n": taken.drafting.drafted, "draft_n_accepted": taken.drafting.accepted}
    return found


async def _chat_chunks(answer: Answer, service: Service, count: int, usage: bool) -> AsyncIterator[str]:
    frame = frame_of(service, "chat.completion.chunk", [])
    replies, calls = dict[int, Reply](), [0] * count
    for choice in range(count):
        yield event(frame | {"choices": [_delta(choice, {"role": "assistant", "content": ""})]})
    async for choice, item in answer:
        if item is None:
            yield PING
        elif isinstance(item, Reply):
            replies[choice] = item
            last = _delta(choice, {}, item.finish_reason) | ({"notice": item.notice} if item.notice else {})
            taken = {} if usage else {"timings": timings(item.timings)}
            yield event(frame | {"choices": [last]} | taken)
        else:
            logprobs = chat_logprobs(item.logprobs) if isinstance(item, ScoredDelta) else None
            yield event(frame | {"choices": [_delta(choice, _delta_of(item, calls[choice]), logprobs=logprobs)]})
            calls[choice] += isinstance(item, ToolCall)
    if usage:
        yield event(frame | {"choices": []} | costs([replies[choice] for choice in sorted(replies)]))
    yield DONE


def _delta(
    choice: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _delta_of(item: Item, index: int) -> dict[str, Any]:
    """index: how many calls came before."""
    if isinstance(item, ContentDelta):
        return {"content": item.text}
    if isinstance(item, ReasoningDelta):
        return {"reasoning_content": item.text, "reasoning": item.text}
    assert isinstance(item, ToolCall)
    return {"tool_calls": [{"index": index, **_call(item)}]}
