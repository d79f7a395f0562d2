"""The fields of Anthropic's requests, brought to an `Ask` over OpenAI's messages."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from iolite.errors import MessageError, UsageError
from iolite.server.answers import Ask
from iolite.server.fields import MOST_TOKENS, Body, Messages, Probability, StopText, Temperature, Tokens, Tools, TopK
from iolite.server.openai_fields import schema_of
from iolite.server.settings import Settings


class OutputConfig(Body):
    """format: {"type": "json_schema", "schema": {…}}. effort: nothing here has degrees of it."""

    format: dict[str, Any] | None = None
    effort: str | None = None


class MessagesRequest(Body):
    """`POST /v1/messages`. Blocks: text, image, tool_use, tool_result, thinking, document."""

    messages: Messages
    max_tokens: Tokens
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Probability | None = None
    tools: Tools | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    image_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None

    def ask(self, settings: Settings) -> Ask:
        thinks, budget = thinking_of(self.thinking, settings)
        choice, form = self.tool_choice or {}, self.output_config and self.output_config.format
        return Ask(
            messages=messages_of(self.system, self.messages),
            tools=[tool_of(tool) for tool in self.tools or []] or None,
            tool_choice=choice_of(choice),
            parallel_tool_calls=not choice.get("disable_parallel_tool_use"),
            schema=schema_of({"type": form.get("type"), "json_schema": form}, "output_config.format") if form else None,
            thinking=thinks,
            thinking_budget=budget,
            image_tokens=self.image_tokens,
            sampling={
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
                "stop": self.stop_sequences or None,
            },
        )


class CountRequest(Body):
    """`POST /v1/messages/count_tokens`."""

    messages: Messages
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: Tools | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def ask(self, settings: Settings) -> Ask:
        thinks, _ = thinking_of(self.thinking, settings)
        tools = [tool_of(tool) for tool in self.tools or []] or None
        return Ask(messages=messages_of(self.system, self.messages), tools=tools, thinking=thinks)


def thinking_of(asked: Mapping[str, Any] | None, settings: Settings) -> tuple[bool, int | None]:
    """Whether to think, and for how many tokens."""
    if asked is None:
        return settings.thinking, None
    kind, budget = asked.get("type"), asked.get("budget_tokens")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise UsageError("thinking has no type that is known", 'like {"type": "enabled", "budget_tokens": 1024}')
    if budget is not None and (type(budget) is not int or not 0 <= budget <= MOST_TOKENS):
        raise UsageError("thinking.budget_tokens is not a number of tokens")
    return kind != "disabled", budget if kind == "enabled" else None


def choice_of(choice: Mapping[str, Any]) -> Any:
    kind = choice.get("type", "auto")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in ("auto", "any", "none"):
        raise UsageError("tool_choice has no type that is known", "there are auto, any, tool and none")
    return {"auto": None, "any": "required", "none": "none"}[kind]


def tool_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise UsageError("tools that run at the provider are not available here", "name tools of your own")
    schema = tool.get("input_schema") or {"type": "object", "properties": {}}
    function = {"name": tool.get("name"), "description": tool.get("description") or "", "parameters": schema}
    return {"type": "function", "function": function}


def messages_of(system: str | list[dict[str, Any]] | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages with the same content in the same order; a tool's result becomes a message of its own."""
    found: list[dict[str, Any]] = []
    if system:
        parts = system if isinstance(system, str) else [_part(block, "system") for block in system]
        found.append({"role": "system", "content": parts})
    for number, message in enumerate(messages):
        where, role, content = f"message {number}", message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system") or not isinstance(content, str | list):
            raise MessageError(f"{where} has no role (user, assistant) with a content")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        elif role == "assistant":
            found.append(_assistant(content, where))
        else:
            found += _user(content, role, where)
    return found


def _user(blocks: list[Any], role: str, where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            content = block.get("content") or ""
            if not isinstance(content, str | list):
                raise MessageError(f"{where} has a tool_result whose content is neither a text nor a list of blocks")
            parts = content if isinstance(content, str) else [_part(inner, where) for inner in content]
            found.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts})
        elif found and found[-1]["role"] == role:
            found[-1]["content"].append(_part(block, where))
        else:
            found.append({"role": role, "content": [_part(block, where)]})
    return found


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(_part(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": texts}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _part(block: Any, where: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    source = block.get("source") if isinstance(block, Mapping) else None
    if kind in ("image", "audio", "video", "document") and isinstance(source, Mapping):
        data = source.get("data") if source.get("type") in ("base64", "text") else source.get("url")
        if isinstance(data, str):
            media_type = source.get("media_type", f"{kind}/*")
            if source.get("type") == "text":
                data = base64.b64encode(data.encode("utf-8", "replace")).decode()
            part = {"type": kind, kind: data if source.get("type") == "url" else f"data:{media_type};base64,{data}"}
            return part | (_document_fields(block) if kind == "document" else {})
    raise MessageError(f"{where} has a block of type {str(kind)[:40]!r} that is not known or not complete")


def _document_fields(block: Mapping[str, Any]) -> dict[str, Any]:
    """What a document is called and how it is to be read."""
    citations = block.get("citations")
    if isinstance(citations, Mapping) and citations.get("enabled"):
        raise UsageError("citations are not available here", "leave them out")
    return {key: block[key] for key in ("title", "pages", "max_soft_tokens") if block.get(key) is not None}
