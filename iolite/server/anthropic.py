"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iolite.generate.reply import Reply, ToolCall
from iolite.server.answers import Answer, Item
from iolite.server.anthropic_fields import CountRequest, MessagesRequest
from iolite.server.errors import body_of
from iolite.server.fields import headers_for, ignored
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import event, json_response, to_json
from iolite.text.stream import ContentDelta, ReasoningDelta

router = APIRouter(tags=["Anthropic"])
MESSAGES = "/v1/messages"
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHANGING: dict[str, tuple[Any, ...]] = {
    "container": (None,),
    "mcp_servers": (None, []),
    "output_format": (None,),
}


@router.post(MESSAGES, summary="Answer a conversation")
async def messages(request: Request, body: MessagesRequest) -> Response:
    service = service_of(request)
    names = ignored(body, _CHANGING)
    if body.output_config:
        names += [f"output_config.{name}" for name in ignored(body.output_config)]
        names += ["output_config.effort"] if body.output_config.effort else []
    headers = headers_for(names)
    answer = await service.answers.start(body.ask(service.settings))
    if body.stream:
        failed = lambda problem: event(body_of(MESSAGES, problem), "error")  # noqa: E731
        return Streamed(answer, _events(answer, service), failed, headers=headers)
    (reply,) = await answer.replies(request)
    message = _message(service, _blocks(reply), _usage(reply)) | _end(reply, answer)
    return json_response(message, headers=headers)


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation, media included")
async def count_tokens(request: Request, body: CountRequest) -> Response:
    service = service_of(request)
    ask = body.ask(service.settings)
    prompt = await service.answers.prompt(ask)
    names = ignored(body, _CHANGING, common={})  # how answers are drawn changes no count
    return json_response({"input_tokens": len(prompt.ids)}, headers=headers_for(names))


def _message(service: Service, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": service.name,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(reply: Reply) -> dict[str, int]:
    read = reply.usage.prompt_tokens - reply.usage.cached_tokens
    return {
        "input_tokens": read,
        "cache_read_input_tokens": reply.usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": reply.usage.completion_tokens,
    }


def _end(reply: Reply, answer: Answer) -> dict[str, Any]:
    sequence = answer.stopped_by[0]
    stopped = sequence is not None and reply.finish_reason == "stop"
    reason = "stop_sequence" if stopped else _REASONS[reply.finish_reason]
    end = {"stop_reason": reason, "stop_sequence": sequence}
    return end | ({"notice": reply.notice} if reply.notice else {})


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if reply.reasoning:
        found.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.text:
        found.append({"type": "text", "text": reply.text})
    calls = [call for call in reply.tool_calls if call.error is None]
    return found + [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.arguments} for c in calls]


def _opening(item: Item) -> dict[str, Any]:
    """A block as it begins."""
    if isinstance(item, ToolCall):
        return {"type": "tool_use", "id": item.id, "name": item.name, "input": {}}
    if isinstance(item, ReasoningDelta):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(item: Item) -> dict[str, Any]:
    if isinstance(item, ToolCall):
        return {"type": "input_json_delta", "partial_json": to_json(item.arguments)}
    if isinstance(item, ReasoningDelta):
        return {"type": "thinking_delta", "thinking": item.text}
    assert isinstance(item, ContentDelta)
    return {"type": "text_delta", "text": item.text}


async def _events(answer: Answer, service: Service) -> AsyncIterator[str]:
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": 0}
    yield _event("message_start", message=_message(service, [], usage))
    index, kind = -1, ""
    async for _, item in answer:
        if item is None:
            yield _event("ping")
            continue
        opening = {} if isinstance(item, Reply) else _opening(item)
        # A call is a block of its own, even after another; pieces of text or thought go on in theirs.
        if kind and (opening.get("type") != kind or isinstance(item, ToolCall)):
            if kind == "thinking":
                yield _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
            yield _event("content_block_stop", index=index)
            kind = ""
        if isinstance(item, Reply):
            yield _event("message_delta", delta=_end(item, answer), usage=_usage(item))
            continue
        if not kind:
            index, kind = index + 1, opening["type"]
            yield _event("content_block_start", index=index, content_block=opening)
        yield _event("content_block_delta", index=index, delta=_delta(item))
    yield _event("message_stop")


def _event(name: str, **fields: Any) -> str:
    return event({"type": name, **fields}, name)
