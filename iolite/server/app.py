"""The application: guards around, routes inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from iolite import __version__
from iolite.errors import IoliteError
from iolite.generate.model import Model
from iolite.server import (
    about,
    anthropic,
    completions,
    embeddings,
    live,
    manual,
    microphone,
    ollama,
    openai,
    page,
    responses,
    transcriptions,
)
from iolite.server.answers import Answers, ClientGone
from iolite.server.bodies import Bodies
from iolite.server.chats import Chats
from iolite.server.errors import Faults, handle
from iolite.server.heads import Heads
from iolite.server.metrics import Counting, Meters
from iolite.server.security import Guard
from iolite.server.service import Service
from iolite.server.settings import Settings

ROUTERS = (
    openai.router,
    completions.router,
    responses.router,
    transcriptions.router,
    live.router,
    embeddings.router,
    anthropic.router,
    ollama.router,
    about.router,
    page.router,
    microphone.router,
    manual.router,
)


def make_app(model: Model, settings: Settings, name: str | None = None, port: int | None = None) -> FastAPI:
    """The application that serves a model. name: what it is called in answers, by default what it was loaded as.
    port: that is listened on, where the settings leave it open."""
    meters, chats = Meters(), Chats(settings.chats)
    answers = Answers(model, settings, meters)
    service = Service(answers.model, settings, answers, meters, name or Path(model.name).name or model.name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answers.close)
        chats.close()

    app = FastAPI(
        title="iolite",
        version=__version__,
        summary=f"{service.name}, served by iolite",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere; ours is plain HTML
        redoc_url=None,
        middleware=[
            Middleware(Heads),
            Middleware(Counting, meters=meters),
            Middleware(Guard, settings=settings, port=port or settings.port),
            *_cors(settings),
            Middleware(Bodies, settings=settings),
            Middleware(Faults),
        ],
    )
    app.state.service, app.state.chats, app.state.writings = service, chats, {}
    for router in ROUTERS:
        app.include_router(router)
    for error in (IoliteError, HTTPException, RequestValidationError, RecursionError):
        app.add_exception_handler(error, handle)
    app.add_exception_handler(ClientGone, _nobody)
    return app


def _cors(settings: Settings) -> list[Middleware]:
    """Answers to browsers' questions, for the origins that were named and no others."""
    if not settings.origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,  # a site of the Internet that asks this machine
            expose_headers=["Retry-After", "X-Iolite-Ignored"],
        )
    ]


async def _nobody(request: Request, error: Exception) -> Response:
    """To a client that has gone; the status is nginx's for it."""
    return Response(status_code=499)
