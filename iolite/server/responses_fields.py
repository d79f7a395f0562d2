"""The fields of OpenAI's Responses interface, brought to an `Ask`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from iolite.errors import MessageError, UsageError
from iolite.generate.model import Model
from iolite.generate.sampling import MOST_LOGPROBS
from iolite.server.answers import Ask
from iolite.server.fields import Body, Probability, Temperature, Tokens, Tools, ignored
from iolite.server.logprobs import asked_for
from iolite.server.openai_fields import allowed, schema_of, with_details
from iolite.server.settings import Settings

LOGPROBS = "message.output_text.logprobs"  # the only one of `include` that there is
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
"""What ids begin with, by the type of the item."""
_CHANGING: dict[str, tuple[Any, ...]] = {
    "conversation": (None,),
    "prompt": (None,),
    "background": (None, False),
    "max_tool_calls": (None,),
}


class ResponsesRequest(Body):
    """`POST /v1/responses`. input is all of a conversation, or what is new since the response that is named.

    As with OpenAI, instructions and tools hold for this response alone.
    """

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
    store: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=200)] | None = None
    include: Annotated[list[str], Field(max_length=32)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def items(self) -> list[dict[str, Any]]:
        """The input as items, each with an id."""
        if isinstance(self.input, str):
            return [with_id({"type": "message", "role": "user", "content": self.input})]
        return [with_id(item) for item in self.input]

    def unknown(self) -> list[str]:
        """The names of what is ignored."""
        others = any(name != LOGPROBS for name in self.include or ())
        return ignored(self, _CHANGING) + (["include"] if others else [])

    def ask(self, model: Model, settings: Settings, items: list[dict[str, Any]]) -> Ask:
        """items: of the whole conversation."""
        messages = messages_of(items)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        effort = (self.reasoning or {}).get("effort")
        tools, choice = allowed([tool_of(tool) for tool in self.tools or []], self.tool_choice)
        if isinstance(choice, Mapping):
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        return Ask(
            messages=with_details(messages, model),
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            schema=schema_of(format_of(self.text)),
            thinking=settings.thinking if effort is None else effort not in ("none", "minimal"),
            sampling={
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self._logprobs(),
            },
        )

    def _logprobs(self) -> int | None:
        return asked_for(LOGPROBS in (self.include or ()), self.top_logprobs, f'add "{LOGPROBS}" to include')


def with_id(item: dict[str, Any]) -> dict[str, Any]:
    """An item under an id, its own if it has one."""
    if isinstance(item.get("id"), str):
        return item
    prefix = PREFIXES.get(str(item.get("type", "message")), "item")
    return {"id": f"{prefix}_{secrets.token_hex(12)}", **{key: value for key, value in item.items() if key != "id"}}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is shown: a message has a list of parts."""
    item = {"type": "message", **item}
    if item["type"] != "message":
        return item
    content = item.get("content")
    if isinstance(content, str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        content = [{"type": kind, "text": content} | ({"annotations": []} if kind == "output_text" else {})]
    return {"status": "completed", **item, "content": content}


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
