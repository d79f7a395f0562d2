"""OpenAI's and Transformers' message shapes, brought to the one that chat templates know.

A content part becomes `{"type": "text" | "image" | "audio" | "video" | "document", ...}`, its media taken out into an
`Attachment` (`iolite.documents` makes texts and pictures of documents before a template sees them);
tool call arguments that come as a JSON string become the object the template needs, and a tool's result that comes as
an object becomes a JSON string (the template has no other place for it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iolite.errors import MessageError

ROLES = ("system", "developer", "user", "assistant", "model", "tool")

# type of a part -> (kind, keys that may hold its source, in the order they are looked at)
_MEDIA_PARTS = {
    "image": ("image", ("image", "image_url", "url", "path", "data", "bytes")),
    "image_url": ("image", ("image_url", "url", "image")),
    "input_image": ("image", ("image_url", "image", "url", "data")),
    "audio": ("audio", ("audio", "audio_url", "input_audio", "url", "path", "data", "array", "bytes")),
    "audio_url": ("audio", ("audio_url", "url", "audio")),
    "input_audio": ("audio", ("input_audio", "audio", "data", "url")),
    "video": ("video", ("video", "video_url", "frames", "url", "path", "data", "bytes")),
    "video_url": ("video", ("video_url", "url", "video")),
    "input_video": ("video", ("input_video", "video", "data", "url")),
    "document": ("document", ("document", "url", "path", "data", "bytes")),
    "file": ("document", ("file", "file_data", "url", "path", "data")),
    "input_file": ("document", ("file_data", "file_url", "file", "data", "url")),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_BASE64 = {"data": "*", "file_data": "pdf"}  # keys that may hold base64 alone -> the format, when none is named
PAGES = ("auto", "text", "pictures")


@dataclass(frozen=True)
class Attachment:
    """One picture, recording, video or document (a PDF, a text) of a message, not yet opened."""

    kind: str  # "image" | "audio" | "video" | "document"
    source: Any  # path, bytes, data URI, NumPy array, PIL image, list of frames; None: only announced
    sampling_rate: int | None = None  # of an array of samples
    max_soft_tokens: int | None = None  # of this picture, or of each frame or page
    num_frames: int | None = None
    fps: float | None = None
    sound: bool = False  # of a video: hear its sound track too
    name: str | None = None  # of a document
    pages: str = "auto"  # of a PDF: their "text", "pictures" of them, or pictures of those that hold no text ("auto")


def normalise(messages: str | Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Attachment]]:
    """Messages as the template wants them, and their media in the order in which they stand.

    A string is one message of the user. Raises MessageError and names the message and part at fault.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}], []
    if not isinstance(messages, Sequence) or not messages:
        raise MessageError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    attachments: list[Attachment] = []
    found = [_message(m, f"message {i}", attachments) for i, m in enumerate(messages)]  # type: ignore[arg-type]
    return found, attachments


def _message(message: Mapping[str, Any], where: str, attachments: list[Attachment]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{where} is not an object with a role and a content")
    role = message.get("role")
    if role not in ROLES:
        raise MessageError(f"{where} has the role {role!r}; known roles are {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and not message.get("tool_calls") and role not in ("assistant", "model"):
        raise MessageError(f"{where} ({role}) has no content")
    if isinstance(content, Mapping) and role == "tool":
        try:
            content = json.dumps(content, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise MessageError(f"{where}: the tool's result holds something that JSON has no form for") from None
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = [_part(p, f"{where}, part {i}", attachments) for i, p in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise MessageError(f"{where}: content must be a string or a list of parts, not {type(content).__name__}")
    result = {**message, "content": content}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise MessageError(f"{where}: tool_calls must be a list, not {type(calls).__name__}")
        if isinstance(content, list) and any(part["type"] != "text" for part in content):
            # Templates write the content after the calls' results, whose media would then change places with these.
            raise MessageError(f"{where} has both media and tool_calls", "make two messages of it")
        result["tool_calls"] = [_tool_call(c, f"{where}, tool call {i}") for i, c in enumerate(calls)]
    return result


def check_tools(tools: Any) -> None:
    """Raises MessageError unless tools is None or a list of functions, in OpenAI's form or their inner objects."""
    if tools is None:
        return
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise MessageError(f"tools must be a list, not {type(tools).__name__}")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageError(f"tool {i} has no function with a name")


def _part(part: Any, where: str, attachments: list[Attachment]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS:
        if not isinstance(part.get("text"), str):
            raise MessageError(f"{where} is of type {kind!r} but has no string under 'text'")
        return {"type": "text", "text": part["text"]}
    if not isinstance(kind, str) or kind not in _MEDIA_PARTS:
        known = ", ".join((*_TEXT_PARTS[:1], *_MEDIA_PARTS))
        raise MessageError(f"{where} has the type {kind!r}; known types are {known}")
    attachment = _attachment(part, where, *_MEDIA_PARTS[kind])
    attachments.append(attachment)
    return {"type": attachment.kind}


def _attachment(part: Mapping[str, Any], where: str, kind: str, keys: Sequence[str]) -> Attachment:
    settings: Mapping[str, Any] = part
    source = next((part[k] for k in keys if part.get(k) is not None), None)
    if isinstance(source, Mapping):  # {"url": …}, {"data": base64, "format": "wav"}, {"array": …, "sampling_rate": …}
        settings = {**part, **source}
        inner = ("array", "bytes", "url", "path", "data", "file_data", "file_url")
        source = next((source[k] for k in inner if source.get(k) is not None), None)
        if source is None and settings.get("file_id") is None:
            raise MessageError(f"{where}: no source under any of {', '.join(inner)}")
    if source is None and settings.get("file_id") is not None:
        raise MessageError(f"{where} names a file by its id, and no files are kept", "send its bytes, as base64")
    key = next((key for key in _BASE64 if isinstance(source, str) and settings.get(key) is source), None)
    if key and ":" not in str(source)[:16]:  # no URI, which base64 cannot be
        source = f"data:{kind}/{settings.get('format', _BASE64[key])};base64,{source}"
    return Attachment(
        kind,
        source,
        sampling_rate=_whole(settings, "sampling_rate", where),
        max_soft_tokens=_whole(settings, "max_soft_tokens", where),
        num_frames=_whole(settings, "num_frames", where),
        fps=_positive(settings, "fps", where),
        sound=_switch(settings, "sound", where),
        name=next((str(settings[key]) for key in ("filename", "name", "title") if settings.get(key)), None),
        pages=_pages(settings, where),
    )


def _pages(settings: Mapping[str, Any], where: str) -> str:
    value = settings.get("pages", PAGES[0])
    if value not in PAGES:
        raise MessageError(f"{where}: pages must be one of {', '.join(PAGES)}")
    return str(value)


def _switch(settings: Mapping[str, Any], key: str, where: str) -> bool:
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise MessageError(f"{where}: {key} must be true or false, not {value!r}")
    return value


def _whole(settings: Mapping[str, Any], key: str, where: str) -> int | None:
    value = settings.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise MessageError(f"{where}: {key} must be a positive whole number, not {value!r}")
    return value


def _positive(settings: Mapping[str, Any], key: str, where: str) -> float | None:
    value = settings.get(key)
    if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
        raise MessageError(f"{where}: {key} must be a positive number, not {value!r}")
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(f"{where} has no function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise MessageError(f"{where}: arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}
