"""The chat page's own files, under a policy that lets it load nothing else, run no inline script, and put no string
into the document but through one function."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
OPEN = "/page/static/"  # the part of the addresses that needs no key: anybody can have the same files
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types iolite"
)
PERMISSIONS = "microphone=(self), camera=(), geolocation=(), display-capture=(), usb=(), payment=()"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def static(name: str, status: int = 200) -> Response:
    """One of the files. HTTPException 404 for a name that is none of theirs."""
    path = FOLDER / name
    if path not in FOLDER.iterdir() or path.suffix not in TYPES:
        raise HTTPException(404, "the page has no such file")
    headers = {"Content-Security-Policy": POLICY, "Permissions-Policy": PERMISSIONS}
    return Response(path.read_bytes(), status, headers, media_type=TYPES[path.suffix])
