"""The fields of OpenAI's Responses interface, brought to an `Ask`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from iolite.errors import MessageError, UsageError
from iolite.generate.model import Model
from iolite.server.answers import Ask
from iolite.server.fields import Body, Probability, Temperature, Tokens, Tools
from iolite.server.openai_fields import schema_of, with_details
from iolite.server.settings import Settings


class ResponsesRequest(Body):
    """`POST /v1/responses`. Nothing is stored: a conversation is sent whole each time."""

    input: str | Annotated[list[dict[str, Any]], Field(max_length=10_000)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None

    def ask(self, model: Model, settings: Settings) -> Ask:
        messages = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else messages_of(self.input)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        effort = (self.reasoning or {}).get("effort")
        choice = self.tool_choice
        if isinstance(choice, Mapping):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        return Ask(
            messages=with_details(messages, model),
            tools=[tool_of(tool) for tool in self.tools or []] or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            schema=schema_of(format_of(self.text)),
            thinking=settings.thinking if effort is None else effort not in ("none", "minimal"),
            sampling={
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
            },
        )


def format_of(text: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The format as chat completions have it."""
    found = (text or {}).get("format")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise UsageError("text.format is not an object", 'like {"type": "json_schema", "name": …, "schema": {…}}')
    return {"type": found.get("type"), "json_schema": found}


def tool_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise UsageError("tools that run at the provider are not available here", "name functions of your own")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "strict")}}


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages of a list of items. Calls that follow each other, and a thought before them, are one message."""
    found: list[dict[str, Any]] = []
    thought: list[str] = []
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "reasoning":
            parts = [*(item.get("summary") or []), *(item.get("content") or [])]
            thought += [str(part.get("text") or "") for part in parts if isinstance(part, Mapping)]
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not found or "tool_calls" not in found[-1]:
                found.append({"role": "assistant", "content": None, "tool_calls": [], **_thought(thought)})
            found[-1]["tool_calls"].append(call)
        elif kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "message":
            role = item.get("role")
            more = _thought(thought) if role == "assistant" else {}
            found.append({"role": role, "content": item.get("content"), **more})
        else:
            raise MessageError(f"item {number} has the type {str(kind)[:40]!r}, which is not known here")
    return found


def _thought(texts: list[str]) -> dict[str, str]:
    """The field of a message for what was thought before it."""
    thought = "\n".join(texts)
    texts.clear()
    return {"reasoning_content": thought} if thought else {}
