"""Ollama's `/api/chat`, `/api/generate`, `/api/embed`, `/api/embeddings`,
`/api/tags`, `/api/show`, `/api/ps` and `/api/version`.

Streams are lines of JSON. Durations are in nanoseconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from iolite import __version__
from iolite.checkpoint.names import expected_shapes
from iolite.generate.logprobs import ScoredDelta
from iolite.generate.model import Model
from iolite.generate.reply import Reply, ToolCall
from iolite.server.answers import Answer, Ask
from iolite.server.embeddings import NOTE, check_dimensions, vectors_of
from iolite.server.errors import Problem, body_of
from iolite.server.fields import Body, headers_for
from iolite.server.logprobs import token_list
from iolite.server.ollama_fields import OllamaChat, OllamaEmbed, OllamaEmbeddings, OllamaGenerate, OllamaRequest
from iolite.server.service import Service, service_of
from iolite.server.streaming import Streamed
from iolite.server.wire import json_response, to_json
from iolite.text.stream import ContentDelta, ReasoningDelta

router = APIRouter(tags=["Ollama"])
INTERFACE = "0.12.11"  # the version of Ollama whose requests are answered here: it brought `logprobs`
_NEVER = "9999-12-31T23:59:59Z"  # that is when the model is let go
Fields = Callable[[str, str, list[ToolCall]], dict[str, Any]]
"""text, thoughts and calls -> the fields that hold them."""


@router.post("/api/chat", summary="Answer a conversation")
async def chat(request: Request, body: OllamaChat) -> Response:
    service = service_of(request)
    if not body.messages:
        return _loaded(service, {"message": {"role": "assistant", "content": ""}})
    return await _answer(request, body, body.ask(service.settings), _in_message)


@router.post("/api/generate", summary="Answer one text")
async def generate(request: Request, body: OllamaGenerate) -> Response:
    service = service_of(request)
    if not body.prompt and not body.images:
        return _loaded(service, {"response": ""})
    return await _answer(request, body, body.ask(service.settings), _in_response)


async def _answer(request: Request, body: OllamaRequest, ask: Ask, fields: Fields) -> Response:
    service, begin, headers = service_of(request), time.perf_counter_ns(), headers_for(body.unknown())
    answer = await service.answers.start(ask)
    if body.stream is not False:
        lines = _lines(answer, service, fields, begin)
        return Streamed(answer, lines, _failed, "application/x-ndjson", headers)
    (reply,) = await answer.replies(request)
    calls = [call for call in reply.tool_calls if call.error is None]
    content = fields(reply.text, reply.reasoning, calls)
    if reply.logprobs is not None:
        content["logprobs"] = token_list(reply.logprobs)
    return json_response(_line(service, content) | _end(reply, begin), headers=headers)


def _loaded(service: Service, content: dict[str, Any]) -> Response:
    """The answer to a request without a question, which asks that the model be loaded: it is."""
    return json_response(_line(service, content) | {"done": True, "done_reason": "load"})


async def _lines(answer: Answer, service: Service, fields: Fields, begin: int) -> AsyncIterator[str]:
    async for _, item in answer:
        if isinstance(item, Reply):
            yield to_json(_line(service, fields("", "", [])) | _end(item, begin)) + "\n"
        elif item is not None:  # there is no line that says nothing
            text = item.text if isinstance(item, ContentDelta) else ""
            thought = item.text if isinstance(item, ReasoningDelta) else ""
            calls = [item] if isinstance(item, ToolCall) else []
            likely = {"logprobs": token_list(item.logprobs)} if isinstance(item, ScoredDelta) else {}
            yield to_json(_line(service, fields(text, thought, calls)) | likely | {"done": False}) + "\n"


def _failed(problem: Problem) -> str:
    return to_json(body_of("/api/chat", problem)) + "\n"


def _in_message(text: str, thought: str, calls: list[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        message["tool_calls"] = [{"function": function} for function in functions]
    return {"message": message}


def _in_response(text: str, thought: str, calls: list[ToolCall]) -> dict[str, Any]:
    return {"response": text} | ({"thinking": thought} if thought else {})


def _line(service: Service, content: dict[str, Any]) -> dict[str, Any]:
    return {"model": service.name, "created_at": _now(), **content}


def _end(reply: Reply, begin: int) -> dict[str, Any]:
    taken = reply.timings
    end = {
        "done": True,
        "done_reason": "length" if reply.finish_reason == "length" else "stop",
        "total_duration": time.perf_counter_ns() - begin,
        "load_duration": 0,
        "prompt_eval_count": taken.prompt_tokens,
        "prompt_eval_duration": round(1e9 * taken.prefill_seconds),
        "eval_count": taken.completion_tokens,
        "eval_duration": round(1e9 * taken.decode_seconds),
        "cached_tokens": taken.cached_tokens,
    }
    return end | ({"notice": reply.notice} if reply.notice else {})


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _parameters(model: Model) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(model.config).values())


def _described(service: Service) -> dict[str, Any]:
    model, network = service.model, service.model.network
    parameters = _parameters(model)
    size = sum(weight.nbytes for weight in (*network.parameters(), *network.buffers()))
    details = {
        "parent_model": "",
        "format": "iolite",
        "family": "gemma4",
        "families": ["gemma4"],
        "parameter_size": f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M",
        "quantization_level": model.scheme or model.choice.dtype_name,
    }
    named = {"name": service.name, "model": service.name, "size": size, "digest": "", "details": details}
    return named | {"modified_at": datetime.fromtimestamp(service.started, UTC).isoformat()}


@router.get("/api/tags", summary="The one model that is served")
async def tags(request: Request) -> Response:
    return json_response({"models": [_described(service_of(request))]})


@router.get("/api/ps", summary="The same: it is always loaded")
async def running(request: Request) -> Response:
    service = service_of(request)
    found = _described(service)
    loaded = {"expires_at": _NEVER, "context_length": service.model.context}
    loaded["size_vram"] = found["size"] if service.model.choice.device.type != "cpu" else 0
    return json_response({"models": [found | loaded]})


@router.post("/api/embed", summary="Vectors of texts, not what the model was trained for")
async def embed(request: Request, body: OllamaEmbed) -> Response:
    service, begin, headers = service_of(request), time.perf_counter_ns(), headers_for(body.unknown())
    check_dimensions(service.model, body.dimensions)
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors, count = await vectors_of(request, service, texts) if body.input else ([], 0)
    found = {"model": service.name, "embeddings": [vector.tolist() for vector in vectors], "note": NOTE}
    taken = {"total_duration": time.perf_counter_ns() - begin, "load_duration": 0, "prompt_eval_count": count}
    return json_response(found | taken, headers=headers)


@router.post("/api/embeddings", summary="The same of one text, as it was asked for before")
async def embeddings(request: Request, body: OllamaEmbeddings) -> Response:
    headers = headers_for(body.unknown())
    vectors, _ = await vectors_of(request, service_of(request), [body.prompt]) if body.prompt else ([], 0)
    vector = vectors[0].tolist() if vectors else []
    return json_response({"embedding": vector, "note": NOTE}, headers=headers)


class ShowRequest(Body):
    """`POST /api/show`."""

    model: str | None = None


@router.post("/api/show", summary="What the model is and can")
async def show(request: Request, body: ShowRequest) -> Response:
    service = service_of(request)
    text = service.model.config.text
    kinds = {"image": "vision", "audio": "audio"}
    can = [kinds[kind] for kind in service.model.config.modalities if kind in kinds]
    info = {
        "general.architecture": "gemma4",
        "general.basename": service.name,
        "general.parameter_count": _parameters(service.model),
        "gemma4.context_length": service.model.context,
        "gemma4.embedding_length": text.hidden_size,
        "gemma4.block_count": text.num_hidden_layers,
        "gemma4.attention.head_count": text.num_attention_heads,
    }
    return json_response(
        {
            "modelfile": "",
            "parameters": "",
            "template": service.model.builder.template.source,
            "details": _described(service)["details"],
            "model_info": info,
            "capabilities": ["completion", *can, "tools", "thinking"],
            "modified_at": _described(service)["modified_at"],
        }
    )


@router.get("/api/version", summary="The version of Ollama whose interface this is, and iolite's")
async def version(request: Request) -> Response:
    return json_response({"version": INTERFACE, "iolite": __version__})
