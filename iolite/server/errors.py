"""What is wrong with a request, said in the shape of the interface that it was made in.

An error of iolite's says what is wrong and what to do; anything else is our bug, of which the client learns nothing and
stderr all.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.errors import BusyError, ContextError, IoliteError, MediaError, MessageError, UsageError
from iolite.server.wire import json_response

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FIELD = re.compile(r"(?!(?:str|bool|int|float)$)[A-Za-z_]\w*")
_OPENAI = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Problem:
    """What went wrong: an HTTP status, one or two sentences, and OpenAI's code for it where it has one."""

    status: int
    message: str
    code: str | None = None
    retry_after: float | None = None  # seconds
    headers: Mapping[str, str] | None = None


class StoppingError(IoliteError):
    """The server is about to stop, and takes or finishes nothing more."""


class UnknownError(IoliteError):
    """What is asked for by an id is not here."""


def problem_of(error: BaseException) -> Problem:
    """The problem behind an exception; of one that is no error of iolite's it tells nothing, and stderr the rest."""
    if isinstance(error, IoliteError):
        message = f"{error}; {error.hint}" if error.hint else str(error)
        if isinstance(error, BusyError):
            return Problem(429, message, "rate_limit_exceeded", error.retry_after)
        if isinstance(error, StoppingError):
            return Problem(503, message, "unavailable", 5.0)
        if isinstance(error, UnknownError):
            return Problem(404, message, "not_found")
        if isinstance(error, ContextError):
            return Problem(400, message, "context_length_exceeded")
        if isinstance(error, MessageError | UsageError | MediaError):
            return Problem(400, message, "invalid_value")
        return Problem(500, message, "model_error")
    if isinstance(error, HTTPException):
        code = "rate_limit_exceeded" if error.status_code == 429 else None
        return Problem(error.status_code, str(error.detail), code, headers=error.headers)  # what is allowed, of a 405
    if isinstance(error, RequestValidationError):
        return Problem(400, _first(error), "invalid_value")
    if isinstance(error, RecursionError):
        return Problem(400, "the request is nested too deeply", "invalid_value")
    traceback.print_exception(error)
    return Problem(500, "an error inside the server; its log on stderr has more", "internal_error")


def _first(error: RequestValidationError) -> str:
    """The first complaint about a request, without the value that it is about."""
    return complaint(error.errors())


def complaint(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors. Where a field may be of several types, one about the value is worth more than
    that it is not of the first type."""
    first = errors[0]
    field = _field(first)[:1]
    told = [e for e in errors if _field(e)[:1] == field and not e["type"].endswith(("_type", "_parsing"))]
    told = told or [first]
    where = ".".join(map(str, _field(told[0])))[:200]
    return f"{where}: {told[0]['msg']}" if where else str(told[0]["msg"])


def _field(error: Any) -> list[str | int]:
    """Where in a request it is, without the names that pydantic has for the types of a choice."""
    first, *rest = [part for part in error["loc"] if part != "body"] or [""]
    return [first, *(part for part in rest if isinstance(part, int) or _FIELD.fullmatch(part))] if first != "" else []


def body_of(path: str, problem: Problem) -> dict[str, Any]:
    """The error object of the interface that the path belongs to."""
    if path.startswith("/api/"):
        return {"error": problem.message}
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(problem.status, "api_error" if problem.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": problem.message}}
    kind = _OPENAI.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    return {"error": {"message": problem.message, "type": kind, "param": None, "code": problem.code}}


def response_of(path: str, problem: Problem) -> Response:
    """The answer that tells of a problem."""
    headers = dict(problem.headers or {})
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(problem.retry_after)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body_of(path, problem), problem.status, headers)


async def handle(request: Request, error: Exception) -> Response:
    """FastAPI's handler of the exceptions that requests cause."""
    return response_of(request.url.path, problem_of(error))


class Faults:
    """Answers a request that meets a bug of ours. Left to the framework, the connection would be closed behind the
    answer, and a client that keeps it would lose its next request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            problem = problem_of(error)
            if begun or scope["type"] != "http":
                raise
            await response_of(scope["path"], problem)(scope, receive, send)
