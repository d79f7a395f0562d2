"""OpenAI's `/v1/embeddings`: the mean of the final hidden states of a text's tokens, brought to length 1.

No model of this family was trained to be used so: such vectors compare texts roughly, and are no substitute for those
of a model made for it. The answer says so in `note`.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from iolite.cache import KVCache
from iolite.errors import UsageError
from iolite.generate.loop import check_fits
from iolite.generate.model import Model
from iolite.model.prefill import prefill
from iolite.prompt import Prompt
from iolite.server.answers import until_gone
from iolite.server.fields import Body, headers_for, ignored
from iolite.server.service import Service, service_of
from iolite.server.wire import json_response

router = APIRouter(tags=["OpenAI"])
NOTE = "means of final hidden states; the model was not trained to embed"
MOST_TEXTS = 256

Text = Annotated[str, Field(max_length=4_000_000)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1_000_000, fail_fast=True)]


Texts = Annotated[list[Text], Field(max_length=MOST_TEXTS)]
IdLists = Annotated[list[Ids], Field(max_length=MOST_TEXTS)]


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`: one text or several, or their token ids."""

    input: Text | Ids | Texts | IdLists
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


@router.post("/v1/embeddings", summary="Vectors of texts, not what the model was trained for")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    service = service_of(request)
    model = service.model
    headers = headers_for(ignored(body))
    check_dimensions(model, body.dimensions)
    vectors, count = await vectors_of(request, service, _texts(body.input))
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, body.encoding_format == "base64")}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response(
        {"object": "list", "data": data, "model": service.name, "usage": usage, "note": NOTE}, headers=headers
    )


def check_dimensions(model: Model, asked: int | None) -> None:
    """UsageError for vectors of another length than there is."""
    if asked not in (None, model.config.text.hidden_size):
        raise UsageError(f"the vectors have {model.config.text.hidden_size} dimensions", "leave dimensions out")


def _shown(vector: np.ndarray, packed: bool) -> str | list[float]:
    return base64.b64encode(vector.tobytes()).decode() if packed else vector.tolist()


async def vectors_of(
    request: Request, service: Service, texts: Sequence[str | list[int]]
) -> tuple[list[np.ndarray], int]:
    """The vectors of texts, or of their ids, and how many tokens they are of. UsageError for an empty text. Ends with
    the text that is being read when the client goes away."""
    if not all(texts):
        raise UsageError("a text to embed is empty")
    service.answers.enter(1)
    try:
        prompts = await service.answers.prepared(lambda: [_prompt(service.model, text) for text in texts])
        vectors: list[np.ndarray] = []

        async def embed_all() -> None:
            for prompt in prompts:
                vectors.append(await service.answers.beside(functools.partial(embed, service.model, prompt)))

        await until_gone(request, embed_all())
    finally:
        service.answers.leave(1)
    return vectors, sum(len(prompt.ids) for prompt in prompts)


def _texts(given: Any) -> list[Any]:
    """One text or more, of which a list of ids is one."""
    texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not texts:
        raise UsageError("there is no text to embed", "send it as `input`")
    return texts


def _prompt(model: Model, text: str | list[int]) -> Prompt:
    ids = model.tokenizer.encode(text) if isinstance(text, str) else text
    if max(ids, default=0) >= model.config.text.vocab_size:
        raise UsageError("a token id is outside the vocabulary", f"there are {model.config.text.vocab_size}")
    c = model.config
    if set(ids) & {c.image_token_id, c.audio_token_id, c.video_token_id}:
        raise UsageError("a text to embed holds a placeholder of media", "only text is embedded")
    prompt = Prompt([c.text.bos_token_id, *ids], "")
    check_fits(prompt, model.context + 1)
    return prompt


@torch.inference_mode()
def embed(model: Model, prompt: Prompt) -> np.ndarray:
    """Float32 [M] of length 1: the mean over the prompt's tokens but the first, which begins every text."""
    cache = KVCache(model.config.text, len(prompt.ids), model.kv_dtype)
    total = torch.zeros(model.config.text.hidden_size)
    first = True
    for hidden in prefill(model.network, prompt, cache, chunk_size=model.chunk):
        total += hidden[int(first) :].float().sum(0).cpu()
        first = False
    vector: np.ndarray = (total / total.norm().clamp_min(1e-12)).numpy()
    return vector
