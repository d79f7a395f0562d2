"""The chat page at `/`, and what it asks for under `/page/`: chats, files, answers."""

from __future__ import annotations

import asyncio
import urllib.parse
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Query, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from iolite import __version__
from iolite.errors import MessageError
from iolite.server.attachments import OTHER, budgets, longest, take
from iolite.server.chats import Chat, Chats
from iolite.server.chats import File as Kept
from iolite.server.forms import FormRoute
from iolite.server.page_fields import ChatChange, Turn, in_markdown, shown_chat, shown_message
from iolite.server.service import service_of
from iolite.server.static_files import OPEN, static
from iolite.server.turns import ask_for, new_messages, store
from iolite.server.wire import json_response
from iolite.server.writing import Writing, WritingResponse

router = APIRouter(include_in_schema=False, route_class=FormRoute)


@router.get("/")
async def root() -> Response:
    return static("index.html")


@router.get(OPEN + "{name}")
async def static_file(name: str) -> Response:
    return static(name)


@router.get("/page/about")
async def about(request: Request) -> Response:
    """What the page has to know of the model."""
    service = service_of(request)
    model, defaults = service.model, service.model.defaults
    return json_response(
        {
            "name": service.name,
            "version": __version__,
            "context": model.context,
            "modalities": list(model.config.modalities),
            "budgets": budgets(model) if model.config.vision else [],
            "budget": model.processor.image_max_soft_tokens,
            "longest": longest(model),
            "sampling_rate": model.processor.sampling_rate,
            "thinking": service.settings.thinking,
            "drafts": model.speculator is not None,
            "kept": service.settings.chats is not None,
            "defaults": {
                "temperature": defaults.temperature if defaults.do_sample else 0.0,
                "top_p": defaults.top_p,
                "top_k": defaults.top_k,
                "max_tokens": service.settings.max_tokens,
            },
        }
    )


# ---- chats ----


def chats_of(request: Request) -> Chats:
    chats: Chats = request.app.state.chats
    return chats


async def found(request: Request, id: str) -> Chat:
    chat = await asyncio.to_thread(chats_of(request).chat, id)
    if chat is None:
        raise HTTPException(404, "there is no such chat")
    return chat


@router.get("/page/chats")
async def listed(request: Request, q: Annotated[str, Query(max_length=300)] = "") -> Response:
    chats = await asyncio.to_thread(chats_of(request).listed, q)
    return json_response([shown_chat(chat) for chat in chats])


@router.post("/page/chats")
async def create(request: Request, body: ChatChange) -> Response:
    settings = body.settings.model_dump(exclude_none=True) if body.settings else {}
    return json_response(shown_chat(await asyncio.to_thread(chats_of(request).create, body.title or "", settings)), 201)


@router.get("/page/chats/{id}")
async def one(request: Request, id: str) -> Response:
    chat, writings = await found(request, id), request.app.state.writings

    def shown() -> dict[str, Any]:
        files = chats_of(request).files_of(chat)
        messages = [shown_message(message, files) for message in chat.messages]
        for message in messages:
            if message["info"].get("state") == "writing" and message["id"] not in writings:
                message["info"]["state"] = "stopped"  # when the server was
        return shown_chat(chat) | {"messages": messages}

    return json_response(await asyncio.to_thread(shown))


@router.patch("/page/chats/{id}")
async def change(request: Request, id: str, body: ChatChange) -> Response:
    chat = await found(request, id)
    values: dict[str, Any] = {}
    if body.title is not None:
        values["title"] = body.title
    if body.settings is not None:
        values["settings"] = body.settings.model_dump(exclude_none=True)
    if body.head is not None:
        if all(message.id != body.head for message in chat.messages):
            raise MessageError("the chat has no such message")
        values["head"] = body.head
    await asyncio.to_thread(lambda: chats_of(request).change(id, **values))
    return await one(request, id)


@router.delete("/page/chats/{id}")
async def delete(request: Request, id: str) -> Response:
    chat = await found(request, id)
    for message in chat.messages:
        if message.id in request.app.state.writings:
            request.app.state.writings[message.id].stop()
    await asyncio.to_thread(chats_of(request).delete, id)
    return Response(status_code=204)


@router.get("/page/chats/{id}/export")
async def export(request: Request, id: str, form: Literal["json", "markdown"] = "json") -> Response:
    """JSON holds every branch, Markdown the one that is shown."""
    chat = await found(request, id)
    ending = {"json": "json", "markdown": "md"}[form]
    name = urllib.parse.quote(f"{chat.title or 'chat'}.{ending}", safe="")
    headers = {"Content-Disposition": f"attachment; filename=\"chat.{ending}\"; filename*=UTF-8''{name}"}
    if form == "json":
        return json_response(asdict(chat), headers=headers)
    return PlainTextResponse(in_markdown(chat, chat.path(chat.head)), headers=headers, media_type="text/markdown")


# ---- files ----


@router.post("/page/files")
async def attach(request: Request, file: Annotated[UploadFile, File()]) -> Response:
    """Checks a file and says what it costs; it is sent with a message by its id."""
    service, chats = service_of(request), chats_of(request)

    def work() -> Kept:  # its bytes are in memory only here
        return chats.keep(**vars(take(service.model, file.file.read(), file.content_type or "")))

    kept = await service.answers.prepared(work)
    return json_response({"file": kept.id, "kind": kept.kind, "type": kept.type, "info": dict(kept.info)}, 201)


@router.get("/page/files/{id}")
async def file(request: Request, id: str) -> Response:
    """The bytes of a file; what a browser would not merely show or play is for saving."""
    kept = await asyncio.to_thread(chats_of(request).file, id)
    if kept is None:
        raise HTTPException(404, "there is no such file")
    shown = kept.kind in ("image", "audio", "video") and kept.type != OTHER
    headers = {
        "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
        "Content-Disposition": "inline" if shown else "attachment",
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    return Response(kept.data, headers=headers, media_type=kept.type if shown else OTHER)


# ---- answers ----


@router.post("/page/chats/{id}/answers")
async def answer(request: Request, id: str, body: Turn) -> Response:
    """Stores a message and streams the answer to it."""
    service, chats, chat = service_of(request), chats_of(request), await found(request, id)
    asked = await asyncio.to_thread(new_messages, chats, chat, body)
    begun = await service.answers.start(await asyncio.to_thread(ask_for, service, chats, chat, body.parent, asked))
    try:
        begin, reply = await asyncio.to_thread(store, chats, chat, body.parent, asked)
    except BaseException:
        begun.close()
        raise
    begin["prompt_tokens"] = begun.prompt_tokens
    writing = Writing(chats, begun, reply, begin, service.settings.ping)
    writings: dict[int, Writing] = request.app.state.writings
    writings[reply.id] = writing
    return WritingResponse(writing, begun, lambda: writings.pop(reply.id, None))


@router.post("/page/answers/{id}/stop")
async def stop(request: Request, id: int) -> Response:
    """Ends an answer where it is. One that has ended already stays as it is."""
    writing = request.app.state.writings.get(id)
    if writing:
        writing.stop()
    return Response(status_code=204)
