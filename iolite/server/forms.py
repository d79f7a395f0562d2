"""Forms that bring one file and a few fields. The framework would take a thousand of each, and every file of more than
1 MiB is an open one of the process."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

MOST_FIELDS = 64


class FormRoute(APIRoute):
    """A route whose forms are no larger than that."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answering(request: Request) -> Response:
            return await answer(_FormRequest(request.scope, request.receive))

        return answering


class _FormRequest(Request):
    def form(self, **limits: Any) -> Any:
        return super().form(max_files=1, max_fields=MOST_FIELDS)
