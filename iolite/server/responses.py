"""OpenAI's `/v1/responses`, without its store."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iolite.generate.reply import Reply, ToolCall
from iolite.server.answers import Answer, Item
from iolite.server.errors import Problem
from iolite.server.fields import headers_for, ignored
from iolite.server.openai import timings
from iolite.server.responses_fields import ResponsesRequest
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import PING, event, json_response
from iolite.text.stream import ContentDelta, ReasoningDelta

router = APIRouter(tags=["OpenAI"])
_CHANGING: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "max_tool_calls": (None,),
    "top_logprobs": (None, 0),
}


@router.post("/v1/responses", summary="Answer a conversation")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    service = service_of(request)
    headers = headers_for(ignored(body, _CHANGING))
    answer = await service.answers.start(body.ask(service.model, service.settings))
    output = Output(_frame(service, body))
    if body.stream:
        return Streamed(answer, _events(answer, output), output.failed, headers=headers)
    (reply,) = await answer.replies(request)
    if reply.reasoning:
        output.whole(ReasoningDelta(reply.reasoning))
    if reply.text:
        output.whole(ContentDelta(reply.text))
    for call in reply.tool_calls:
        if call.error is None:
            output.whole(call)
    return json_response(output.finished(reply), headers=headers)


async def _events(answer: Answer, output: Output) -> AsyncIterator[str]:
    for piece in output.begin():
        yield piece
    async for _, item in answer:
        if item is None:
            yield PING
        elif isinstance(item, Reply):
            for piece in output.end(item):
                yield piece
        else:
            for piece in output.push(item):
                yield piece


def _frame(service: Service, body: ResponsesRequest) -> dict[str, Any]:
    """The response before anything of it is there."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": service.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class Output:
    """A response that grows item by item, and the events that tell of it."""

    def __init__(self, frame: dict[str, Any]) -> None:
        self.frame, self.items = frame, list[dict[str, Any]]()
        self._open: dict[str, Any] | None = None
        self._number = -1

    def begin(self) -> Iterator[str]:
        yield self._event("response.created", response=self.frame)
        yield self._event("response.in_progress", response=self.frame)

    def push(self, item: Item) -> Iterator[str]:
        """More of the answer."""
        kind = _KINDS[type(item)]
        if self._open is not None and (self._open["type"] != kind or isinstance(item, ToolCall)):
            yield from self._close()
        if self._open is None:
            yield from self._begin_item(item, kind)
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        if isinstance(item, ToolCall):
            self.items[-1]["arguments"] = json.dumps(item.arguments, ensure_ascii=False)
            yield self._event("response.function_call_arguments.delta", **at, delta=self.items[-1]["arguments"])
            return
        assert isinstance(item, ContentDelta | ReasoningDelta)
        part = self.items[-1]["content"][0]
        part["text"] += item.text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{part['type']}.delta", **at, content_index=0, delta=item.text, **more)

    def end(self, reply: Reply) -> Iterator[str]:
        yield from self._close()
        whole = self.finished(reply)
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self, item: Item) -> None:
        """An item that is complete, with nobody listening to its events."""
        for _ in (*self.push(item), *self._close()):
            pass

    def finished(self, reply: Reply) -> dict[str, Any]:
        """The whole response."""
        usage, cut = reply.usage, reply.finish_reason == "length"
        return self.frame | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.total_tokens,
            },
            "timings": timings(reply.timings),
            "notice": reply.notice,
        }

    def failed(self, problem: Problem) -> str:
        error = {"code": problem.code or "server_error", "message": problem.message}
        response = self.frame | {"status": "failed", "error": error, "output": self.items}
        return self._event("response.failed", response=response)

    def _begin_item(self, item: Item, kind: str) -> Iterator[str]:
        new: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{secrets.token_hex(12)}", "type": kind}
        if isinstance(item, ToolCall):
            new |= {"call_id": item.id, "name": item.name, "arguments": ""}
        elif kind == "message":
            new |= {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": []}]}
        else:
            new |= {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        self._open = new | {"status": "in_progress"}
        self.items.append(self._open)
        empty = self._open | ({"content": []} if "content" in new else {})
        yield self._event("response.output_item.added", output_index=len(self.items) - 1, item=empty)
        if "content" in new:
            at = {"item_id": new["id"], "output_index": len(self.items) - 1, "content_index": 0}
            yield self._event("response.content_part.added", **at, part=new["content"][0])

    def _close(self) -> Iterator[str]:
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = "completed"
        at = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"]
            )
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", **at, content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", **at, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _event(self, name: str, /, **fields: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields}, name)


_KINDS: dict[type, str] = {ContentDelta: "message", ReasoningDelta: "reasoning", ToolCall: "function_call"}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
