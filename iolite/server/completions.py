"""OpenAI's `/v1/completions`: texts go on as they stand; no template, thoughts or calls."""

from __future__ import annotations

import collections
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from iolite.errors import UsageError
from iolite.generate.logprobs import ScoredDelta
from iolite.generate.reply import Reply
from iolite.generate.sampling import MOST_LOGPROBS
from iolite.server.answers import Answer, Ask
from iolite.server.echo import Echo, echoes_of
from iolite.server.embeddings import IdLists, Ids, Text, Texts
from iolite.server.errors import body_of
from iolite.server.fields import headers_for, ignored
from iolite.server.logprobs import TextLogprobs
from iolite.server.openai import DONE, costs, frame_of
from iolite.server.openai_fields import Limit, SamplingFields
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import PING, event, json_response
from iolite.text.stream import ContentDelta

router = APIRouter(tags=["OpenAI"])
PATH = "/v1/completions"


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. prompt: a text or several, or their token ids; choices are numbered with the answers to
    the first prompt first. echo: each answer begins with its prompt; max_tokens may then be 0."""

    prompt: Text | Ids | Texts | IdLists
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    max_tokens: Limit | Literal[0] | None = None

    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not prompts or [] in prompts:
            raise UsageError("a prompt has no tokens", "send a text, or a list of ids that is not empty")
        return prompts


@router.post(PATH, summary="Go on with a text")
async def completions(request: Request, body: CompletionRequest) -> Response:
    service, prompts, choices = service_of(request), body.prompts(), body.n or 1
    headers = headers_for(ignored(body))
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise UsageError("max_tokens of 0 is for echo without a stream", "ask for 1 token or more")
    echoes = await echoes_of(request, service, prompts, body.logprobs) if body.echo else []
    if body.max_tokens == 0:
        return json_response(_echoed(service, echoes, choices), headers=headers)
    sampling = body.sampling() | {"logprobs": body.logprobs}
    ask = Ask(texts=prompts, ends=bool(body.echo), sampling=sampling, choices=choices)
    answer = await service.answers.start(ask)
    heads = [echo for echo in echoes for _ in range(choices)]  # one for each choice, or none
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        pieces = _chunks(answer, service, heads, choices, usage)
        return Streamed(answer, pieces, lambda problem: event(body_of(PATH, problem)), headers=headers)
    replies = await answer.replies(request)
    found = [_whole(number, reply, heads) for number, reply in enumerate(replies)]
    return json_response(frame_of(service, "text_completion", found, "cmpl") | costs(replies, choices), headers=headers)


def _choice(
    index: int, text: str, finish_reason: str | None, notice: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    return choice | ({"notice": notice} if notice else {})


def _whole(number: int, reply: Reply, heads: Sequence[Echo]) -> dict[str, Any]:
    """A choice, behind its prompt where that is asked for."""
    spelled, text, before = TextLogprobs(), reply.text, None
    if heads:
        text, before = heads[number].text + text, heads[number].logprobs(spelled)
    logprobs = spelled(reply.logprobs)
    if before and logprobs:
        logprobs = {name: before[name] + logprobs[name] for name in logprobs}
    return _choice(number, text, reply.finish_reason, reply.notice, logprobs)


def _echoed(service: Service, echoes: Sequence[Echo], choices: int) -> dict[str, Any]:
    """The prompts alone."""
    read = sum(len(echo.prompt.ids) for echo in echoes)
    heads = [echo for echo in echoes for _ in range(choices)]
    found = [
        _choice(number, echo.text, "length", logprobs=echo.logprobs(TextLogprobs()))
        for number, echo in enumerate(heads)
    ]
    usage = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
    return frame_of(service, "text_completion", found, "cmpl") | {"usage": usage}


async def _chunks(
    answer: Answer, service: Service, heads: Sequence[Echo], choices: int, usage: bool
) -> AsyncIterator[str]:
    frame, replies = frame_of(service, "text_completion", [], "cmpl"), dict[int, Reply]()
    spelled = collections.defaultdict[int, TextLogprobs](TextLogprobs)
    told = collections.Counter[int]()  # tokens of each choice whose logprobs were sent
    for number, echo in enumerate(heads):
        yield event(frame | {"choices": [_choice(number, echo.text, None, logprobs=echo.logprobs(spelled[number]))]})
    async for number, item in answer:
        if item is None:
            yield PING
        elif isinstance(item, Reply):
            replies[number] = item
            rest = (item.logprobs or [])[told[number] :]
            last = _choice(number, "", item.finish_reason, item.notice, spelled[number](rest) if rest else None)
            yield event(frame | {"choices": [last]})
        elif isinstance(item, ContentDelta):
            tokens = item.logprobs if isinstance(item, ScoredDelta) else None
            told[number] += len(tokens or ())
            yield event(frame | {"choices": [_choice(number, item.text, None, logprobs=spelled[number](tokens))]})
    if usage:
        yield event(frame | {"choices": []} | costs([replies[number] for number in sorted(replies)], choices))
    yield DONE
