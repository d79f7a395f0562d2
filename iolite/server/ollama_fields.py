"""The fields of Ollama's requests, brought to an `Ask`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from iolite.errors import MediaError, MessageError, UsageError
from iolite.generate.sampling import MOST_LOGPROBS
from iolite.server.answers import Ask
from iolite.server.embeddings import Text, Texts
from iolite.server.fields import (
    Body,
    Messages,
    Penalty,
    Probability,
    Seed,
    Stop,
    Temperature,
    Tools,
    TopK,
    ignored,
    seed_of,
)
from iolite.server.logprobs import asked_for
from iolite.server.settings import Settings

Format = Literal["json", ""] | dict[str, Any]
Images = Annotated[list[str], Field(max_length=1000)]
Think = bool | Literal["low", "medium", "high"]

_SOUNDS = (b"RIFF", b"ID3", b"fLaC", b"OggS", b"\xff\xfb", b"\xff\xf3", b"\xff\xf1", b"FORM", b".snd")
_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "mirostat": (None, 0),
    "typical_p": (None, 1),
    "tfs_z": (None, 1),
}
_CHANGING: Mapping[str, tuple[Any, ...]] = {"suffix": (None, ""), "context": (None, []), "template": (None, "")}


class Options(Body):
    """What of Ollama's options is honoured; those for the machine (num_ctx, num_gpu, …) are the server's own."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repeat_penalty: Penalty | None = None
    seed: Seed | None = None
    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1)] | None = None
    stop: Stop | None = None

    def sampling(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty,
            "seed": seed_of(self.seed),
            "stop": self.stop or None,
            "max_tokens": self.num_predict if self.num_predict and self.num_predict > 0 else None,
        }


class OllamaRequest(Body):
    """What both have in common. Answers are streamed unless `stream` is false."""

    model: str | None = None
    stream: bool | None = None
    format: Format | None = None
    options: Options | None = None
    think: Think | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def common(self, settings: Settings) -> dict[str, Any]:
        options = self.options or Options()
        schema = {"type": "object"} if self.format == "json" else self.format or None
        thinking = settings.thinking if self.think is None else bool(self.think)
        logprobs = asked_for(bool(self.logprobs), self.top_logprobs, "set logprobs to true as well")
        return {"schema": schema, "thinking": thinking, "sampling": options.sampling() | {"logprobs": logprobs}}

    def unknown(self) -> list[str]:
        """The names of fields and options that are ignored."""
        options = ignored(self.options, _OPTIONS) if self.options else []
        return ignored(self, _CHANGING) + [f"options.{name}" for name in options]


class OllamaChat(OllamaRequest):
    """`POST /api/chat`. Recordings may stand in `images`, as Ollama has it."""

    messages: Annotated[list[dict[str, Any]], Field(max_length=10_000)] | None = None
    tools: Tools | None = None

    def ask(self, settings: Settings) -> Ask:
        return Ask(messages=messages_of(self.messages or []), tools=self.tools or None, **self.common(settings))


class OllamaGenerate(OllamaRequest):
    """`POST /api/generate`. raw: the prompt goes on as it stands."""

    prompt: str = ""
    system: str | None = None
    images: Images | None = None
    raw: bool | None = None

    def ask(self, settings: Settings) -> Ask:
        common = self.common(settings)
        if self.raw:
            if self.images or self.system or common["schema"] or self.think:
                raise UsageError("a raw prompt takes no images, system, format or think", "leave raw out")
            return Ask(texts=(self.prompt,), sampling=common["sampling"])
        messages: Messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += messages_of([{"role": "user", "content": self.prompt, "images": self.images}])
        return Ask(messages=messages, **common)


class EmbedFields(Body):
    """What both ways to ask for vectors have in common. None of Ollama's options changes a vector."""

    model: str | None = None
    options: dict[str, Any] | None = None

    def unknown(self) -> list[str]:
        """The names of fields that are ignored."""
        return ignored(self) + (["options"] if self.options else [])


class OllamaEmbed(EmbedFields):
    """`POST /api/embed`. A text that is too long is refused and never cut, whatever `truncate` says."""

    input: Text | Texts = ""
    truncate: bool | None = None
    dimensions: int | None = None


class OllamaEmbeddings(EmbedFields):
    """`POST /api/embeddings`."""

    prompt: Text = ""


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages. Results name their function, not a call: each is given to the first open call of that name."""
    found: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # name and id of calls without a result
    for number, message in enumerate(messages):
        content, images, calls = message.get("content"), message.get("images") or [], message.get("tool_calls")
        if not isinstance(images, list) or (content is not None and not isinstance(content, str)):
            raise MessageError(f"message {number} has a content that is no text, or images that are no list")
        media = [_medium(data, f"message {number}") for data in images]
        parts = [*media, {"type": "text", "text": content or ""}]
        new: dict[str, Any] = {"role": message.get("role"), "content": parts if media else content or ""}
        if message.get("thinking"):
            new["reasoning_content"] = message["thinking"]
        if calls:
            new["tool_calls"] = [_call(call, f"call_{number}_{index}") for index, call in enumerate(calls)]
            waiting = [(call["function"]["name"], call["id"]) for call in new["tool_calls"]]
        if new["role"] == "tool":
            name = message.get("tool_name") or message.get("name")
            match = next((call for call in waiting if name in (None, call[0])), None)
            if match:
                waiting.remove(match)
                new["tool_call_id"] = match[1]
            new |= {"name": name} if name else {}
        found.append(new)
    return found


def _call(call: Any, identifier: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError("a tool call has no function with a name")
    return {"id": identifier, "type": "function", "function": dict(function)}


def _medium(data: Any, where: str) -> dict[str, Any]:
    """A picture or a recording in base64, told apart by how its bytes begin."""
    if not isinstance(data, str):
        raise MessageError(f"{where} has an image that is no base64")
    try:
        head = base64.b64decode(data.strip()[:16], validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"{where} has an image that is no base64", "paths and URLs are not taken") from None
    sound = head.startswith(_SOUNDS) and head[8:12] != b"WEBP"
    kind = "audio" if sound else "image"
    return {"type": kind, kind: f"data:{kind}/*;base64,{data.strip()}"}
