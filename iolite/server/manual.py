"""`/docs`: the OpenAPI document as a page of plain HTML, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code,h3{font-family:ui-monospace,monospace}h3{margin:2rem 0 0;font-size:1rem}td{padding:.1rem 1rem .1rem 0;"
    "vertical-align:top}table{border-spacing:0;font-size:.9rem}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@router.get("/docs")
async def docs(request: Request) -> Response:
    page = "".join(_page(request.app.openapi()))
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info, schemas = document["info"], document.get("components", {}).get("schemas", {})
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
    yield f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
    yield f"<p>{escape(info.get('summary', ''))}. Send the key as <code>Authorization: Bearer KEY</code>. "
    yield "The same for programs: <a href=/openapi.json>/openapi.json</a>.</p>"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h3>{escape(method.upper())} {escape(path)}</h3><p>{escape(operation.get('summary', ''))}</p>"
            yield from _fields(operation, schemas)
    yield "</html>"


def _fields(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    """A table of what the body takes."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = schemas.get(str(content["schema"].get("$ref", "")).rpartition("/")[2], {})
        required = schema.get("required", [])
        if schema.get("description"):
            yield f"<p>{escape(schema['description'])}</p>"
        yield "<table>"
        for name, field in schema.get("properties", {}).items():
            needed = "needed" if name in required else ""
            yield f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{needed}</tr>"
        yield "</table>"


def _kind(field: Mapping[str, Any]) -> str:
    """A field's type in a few words."""
    if "anyOf" in field:
        kinds = [_kind(option) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    return str(field.get("type") or field.get("$ref", "").rpartition("/")[2] or "any")
