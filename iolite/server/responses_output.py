"""A response of `/v1/responses` that grows item by item, and the events that tell of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from iolite.generate.logprobs import ScoredDelta
from iolite.generate.reply import Reply, ToolCall
from iolite.server.answers import Item
from iolite.server.errors import Problem
from iolite.server.logprobs import token_list
from iolite.server.openai import timings
from iolite.server.responses_fields import PREFIXES
from iolite.server.wire import event
from iolite.text.stream import ContentDelta, ReasoningDelta


class Output:
    """A response that grows item by item, and the events that tell of it."""

    def __init__(self, frame: dict[str, Any]) -> None:
        self.frame, self.items = frame, list[dict[str, Any]]()
        self._open: dict[str, Any] | None = None
        self._number = -1

    def begin(self) -> Iterator[str]:
        yield self._event("response.created", response=self.frame)
        yield self._event("response.in_progress", response=self.frame)

    def push(self, item: Item) -> Iterator[str]:
        """More of the answer."""
        kind = _KINDS[type(item)]
        if self._open is not None and (self._open["type"] != kind or isinstance(item, ToolCall)):
            yield from self.close()
        if self._open is None:
            yield from self._begin_item(item, kind)
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        if isinstance(item, ToolCall):
            self.items[-1]["arguments"] = json.dumps(item.arguments, ensure_ascii=False)
            yield self._event("response.function_call_arguments.delta", **at, delta=self.items[-1]["arguments"])
            return
        assert isinstance(item, ContentDelta | ReasoningDelta)
        part = self.items[-1]["content"][0]
        part["text"] += item.text
        more: dict[str, Any] = {}
        if kind == "message":
            more["logprobs"] = token_list(item.logprobs) if isinstance(item, ScoredDelta) else []
            part["logprobs"] += more["logprobs"]
        yield self._event(f"response.{part['type']}.delta", **at, content_index=0, delta=item.text, **more)

    def end(self, response: dict[str, Any]) -> str:
        """The event of the whole response."""
        return self._event(f"response.{response['status']}", response=response)

    def whole(self, item: Item) -> None:
        """An item that is complete, with nobody listening to its events."""
        for _ in (*self.push(item), *self.close()):
            pass

    def finished(self, reply: Reply) -> dict[str, Any]:
        """The whole response."""
        usage, cut = reply.usage, reply.finish_reason == "length"
        return self.frame | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.total_tokens,
            },
            "timings": timings(reply.timings),
            "notice": reply.notice,
        }

    def failed(self, problem: Problem) -> str:
        error = {"code": problem.code or "server_error", "message": problem.message}
        response = self.frame | {"status": "failed", "error": error, "output": self.items}
        return self._event("response.failed", response=response)

    def _begin_item(self, item: Item, kind: str) -> Iterator[str]:
        new: dict[str, Any] = {"id": f"{PREFIXES[kind]}_{secrets.token_hex(12)}", "type": kind}
        if isinstance(item, ToolCall):
            new |= {"call_id": item.id, "name": item.name, "arguments": ""}
        elif kind == "message":
            new |= {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}],
            }
        else:
            new |= {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        self._open = new | {"status": "in_progress"}
        self.items.append(self._open)
        empty = self._open | ({"content": []} if "content" in new else {})
        yield self._event("response.output_item.added", output_index=len(self.items) - 1, item=empty)
        if "content" in new:
            at = {"item_id": new["id"], "output_index": len(self.items) - 1, "content_index": 0}
            yield self._event("response.content_part.added", **at, part=new["content"][0])

    def close(self) -> Iterator[str]:
        """The item that is open, if one is, is complete."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = "completed"
        at = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"]
            )
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._event(f"response.{part['type']}.done", **at, content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", **at, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _event(self, name: str, /, **fields: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields}, name)


_KINDS: dict[type, str] = {
    ContentDelta: "message",
    ScoredDelta: "message",
    ReasoningDelta: "reasoning",
    ToolCall: "function_call",
}
