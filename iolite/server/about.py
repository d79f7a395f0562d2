"""What is served, and whether: `/health`, `/v1/models`, `/metrics`, and the tokenizer by itself."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from iolite.errors import UsageError
from iolite.server.fields import MOST_TOKENS, Body
from iolite.server.service import Service, service_of
from iolite.server.wire import json_response

router = APIRouter(tags=["This server"])
MOST_TEXT = 1_000_000  # characters to be tokenized, or tokens to be spelled: JSON of more would hold up everybody


@router.get("/health", summary="Whether the server takes requests; needs no key")
async def health(request: Request) -> Response:
    answers = service_of(request).answers
    status = "broken" if answers.broken else "stopping" if answers.stopping else "ok"
    return json_response({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics", summary="Counters for Prometheus")
async def metrics(request: Request) -> Response:
    return Response(service_of(request).meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def described(service: Service) -> dict[str, Any]:
    """The model as `/v1/models` shows it."""
    model = service.model
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "iolite",
        "meta": {
            "n_ctx": model.context,
            "n_vocab": model.config.text.vocab_size,
            "n_embd": model.config.text.hidden_size,
            "modalities": list(model.config.modalities),
            "image_token_budgets": list(model.processor.image_budgets or ()),
            "quantization": model.scheme,
        },
    }


@router.get("/v1/models", summary="The one model that is served")
async def models(request: Request) -> Response:
    return json_response({"object": "list", "data": [described(service_of(request))]})


@router.get("/v1/models/{name:path}", summary="The same, by its name")
async def one_model(request: Request, name: str) -> Response:
    service = service_of(request)
    if name != service.name:
        raise HTTPException(404, f"there is no such model; this server has {service.name}")
    return json_response(described(service))


class TokenizeRequest(Body):
    """`POST /tokenize`: text -> ids. `content` is llama-server's name for the text, `prompt` vLLM's."""

    text: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    content: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    prompt: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    add_special: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`: ids -> text, special tokens spelled out."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]], Field(max_length=MOST_TEXT, fail_fast=True)]


@router.post("/tokenize", summary="Text to token ids")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    service = service_of(request)
    text = next((t for t in (body.text, body.content, body.prompt) if t is not None), None)
    if text is None:
        raise UsageError("there is no text to tokenize", "send it as `text`")
    ids = await service.answers.prepared(lambda: service.model.tokenizer.encode(text))
    if body.add_special:
        ids = [service.model.config.text.bos_token_id, *ids]
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": service.model.context})


@router.post("/detokenize", summary="Token ids to text")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    service = service_of(request)
    text = await service.answers.prepared(lambda: service.model.tokenizer.decode(body.tokens))
    return json_response({"content": text, "prompt": text})
