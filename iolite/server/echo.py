"""Prompts that are said again before their answers, and how likely the model finds each of their tokens.

That is read off a pass of its own, as embeddings are, and not off the engine's, which need the scores of the last token
of a prompt only and may know the others from before: a prompt that is scored and answered is read twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.requests import Request

from iolite.cache import KVCache
from iolite.generate.logprobs import Logprobs, logprobs_of
from iolite.generate.loop import check_fits
from iolite.generate.model import Model
from iolite.generate.reply import TokenLogprobs
from iolite.model.prefill import prefill
from iolite.prompt import Prompt
from iolite.server.answers import until_gone
from iolite.server.logprobs import TextLogprobs
from iolite.server.plain import plain_prompt
from iolite.server.service import Service
from iolite.text.stream import TokenStream

ROWS = 32  # tokens whose scores are held at once: 32 MiB of the 12B's


@dataclass(frozen=True)
class Echo:
    """A prompt as it is said again. tokens: of its text, which the token that was added before it is no part of; the
    value of the first is of no use. None where they are not asked for."""

    prompt: Prompt
    text: str
    tokens: Sequence[TokenLogprobs] | None = None

    def logprobs(self, spelled: TextLogprobs) -> dict[str, Any] | None:
        """In the shape of the interface: nothing is known of the first. spelled: goes on with the answer."""
        found = spelled(self.tokens)
        if found and found["tokens"]:
            found["token_logprobs"][0] = found["top_logprobs"][0] = None
        return found


async def echoes_of(
    request: Request, service: Service, prompts: Sequence[str | list[int]], count: int | None
) -> list[Echo]:
    """Of each prompt. count: of the likeliest tokens in each place, None for no logprobs at all. Ends with the prompt
    that is being read when the client goes away."""
    model, answers = service.model, service.answers
    answers.enter(1)
    try:
        made = await answers.prepared(lambda: [_echo(model, text) for text in prompts])
        if count is None:
            return made
        found: list[Echo] = []

        async def score_all() -> None:
            for echo in made:
                found.append(await answers.beside(functools.partial(_scored, model, echo, count)))

        await until_gone(request, score_all())
        return found
    finally:
        answers.leave(1)


def _echo(model: Model, text: str | list[int]) -> Echo:
    prompt = plain_prompt(model, text)
    check_fits(prompt, model.context + 1)
    if isinstance(text, str):
        return Echo(prompt, text)
    stream = TokenStream(model.tokenizer)
    return Echo(prompt, "".join(map(stream.push, text)) + stream.flush())


def _scored(model: Model, echo: Echo, count: int) -> Echo:
    ids, tokenizer = echo.prompt.ids, model.tokenizer
    scores = [Logprobs(0.0), *score(model, echo.prompt, count)]
    tokens = [found.spelled(token, tokenizer) for token, found in zip(ids, scores, strict=True)]
    first = tokenizer.id_to_token(ids[0]) or ""
    return Echo(echo.prompt, echo.text, tokens if echo.text.startswith(first) else tokens[1:])


@torch.inference_mode()
def score(model: Model, prompt: Prompt, count: int) -> list[Logprobs]:
    """Of every token of a prompt but the first, in what comes before it."""
    cache = KVCache(model.config.text, len(prompt.ids), model.kv_dtype)
    found: list[Logprobs] = []
    following = iter(prompt.ids[1:])
    for hidden in prefill(model.network, prompt, cache, chunk_size=model.chunk):
        for rows in hidden.split(ROWS):
            scores = model.network.logits(rows)
            found += [logprobs_of(row, token, count) for row, token in zip(scores, following)]  # noqa: B905
    return found
