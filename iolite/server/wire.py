"""JSON as it goes out: ASCII only, so that no half of a surrogate pair in what is echoed can break an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def to_json(data: Any) -> str:
    """One line of JSON."""
    return json.dumps(data, separators=(",", ":"))


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(data), status, headers, media_type="application/json")


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {to_json(data)}\n\n"


PING = ": ping\n\n"
"""A comment: what keeps a connection open, and clients pass over."""
