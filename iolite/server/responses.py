"""OpenAI's `/v1/responses`: answers, and what was answered before, by its id."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from iolite.errors import UsageError
from iolite.generate.logprobs import ScoredDelta
from iolite.generate.reply import Reply
from iolite.server.answers import Answer
from iolite.server.errors import UnknownError
from iolite.server.fields import headers_for
from iolite.server.responses_fields import ResponsesRequest, listed
from iolite.server.responses_output import Output
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import PING, json_response
from iolite.text.stream import ContentDelta, ReasoningDelta

router = APIRouter(tags=["OpenAI"])
Keep = Callable[[dict[str, Any]], None]


@router.post("/v1/responses", summary="Answer a conversation")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    service = service_of(request)
    headers = headers_for(body.unknown())
    before = None if body.previous_response_id is None else service.responses.find(body.previous_response_id)
    asked = body.items()
    items = [*(before.conversation() if before else ()), *asked]
    answer = await service.answers.start(body.ask(service.model, service.settings, items))
    output = Output(_frame(service, body))

    def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            service.responses.keep(response, asked, before)

    if body.stream:
        return Streamed(answer, _events(answer, output, keep), output.failed, headers=headers)
    (reply,) = await answer.replies(request)
    response = _whole(output, reply)
    keep(response)
    return json_response(response, headers=headers)


def _whole(output: Output, reply: Reply) -> dict[str, Any]:
    """The response to which a reply is all."""
    if reply.reasoning:
        output.whole(ReasoningDelta(reply.reasoning))
    if reply.text:
        scored = reply.logprobs is not None
        output.whole(ScoredDelta(reply.text, tuple(reply.logprobs or ())) if scored else ContentDelta(reply.text))
    for call in reply.tool_calls:
        if call.error is None:
            output.whole(call)
    return output.finished(reply)


async def _events(answer: Answer, output: Output, keep: Keep) -> AsyncIterator[str]:
    for piece in output.begin():
        yield piece
    async for _, item in answer:
        if item is None:
            yield PING
        elif isinstance(item, Reply):
            for piece in output.close():
                yield piece
            response = output.finished(item)
            keep(response)  # before it is told of, so that the next request may go on from it at once
            yield output.end(response)
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
        "previous_response_id": body.previous_response_id,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


@router.get("/v1/responses/{response_id}", summary="A response that is kept")
async def kept(request: Request, response_id: str, stream: bool = False) -> Response:
    if stream:
        raise UsageError("a response that is kept has no stream", "leave stream out")
    return json_response(service_of(request).responses.find(response_id).response)


@router.delete("/v1/responses/{response_id}", summary="Forget a response")
async def forget(request: Request, response_id: str) -> Response:
    service_of(request).responses.forget(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items", summary="What a response was an answer to")
async def input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """after: the id of an item, to go on behind it."""
    items = [listed(item) for item in service_of(request).responses.find(response_id).input_items()]
    if order == "desc":
        items.reverse()
    names = [item["id"] for item in items]
    if after is not None and after not in names:
        raise UnknownError("the response has no item of this id to go on from", "leave after out")
    first = 0 if after is None else names.index(after) + 1
    page = items[first : first + limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": page, "has_more": first + limit < len(items), **ends})
