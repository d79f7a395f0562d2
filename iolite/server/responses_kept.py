"""Responses that can be asked for again and gone on from by their id, in memory and in a bounded number of bytes.

What was said before is shared by the responses that go on from one another; so a response stays whole when those before
it are forgotten.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iolite.server.errors import UnknownError

MOST_RESPONSES = 1000
MOST_BYTES = 256 * 2**20

Items = Sequence[dict[str, Any]]
"""Of a conversation, as the interface has them: messages, calls, their outputs, thoughts."""


class Part:
    """Some items of a conversation, which nobody changes any more."""

    def __init__(self, items: Items) -> None:
        self.items, self.bytes = items, bytes_of(items)


@dataclass(frozen=True)
class Kept:
    """A response, and the conversation it belongs to: in turns what was asked and what was answered, itself last."""

    parts: tuple[Part, ...]
    response: dict[str, Any]

    def input_items(self) -> list[dict[str, Any]]:
        """All that it was an answer to."""
        return [item for part in self.parts[:-1] for item in part.items]

    def conversation(self) -> list[dict[str, Any]]:
        """All that may be gone on from."""
        return [item for part in self.parts for item in part.items]

    @property
    def own_bytes(self) -> int:
        """Besides those of its parts."""
        return bytes_of({key: value for key, value in self.response.items() if key != "output"})


def bytes_of(value: Any) -> int:
    """About what a value of JSON takes in memory, and rather more."""
    total, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        total += sys.getsizeof(value) + 16  # by which an allocation may be rounded up
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return total


class Responses:
    """The last responses, by id. Those that were longest not used are forgotten first."""

    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._uses: Counter[Part] = Counter()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: dict[str, Any], asked: Items, before: Kept | None) -> None:
        """Keeps a finished response to some items. before: the one it went on from."""
        parts = (*(before.parts if before else ()), Part(asked), Part(response["output"]))
        kept = self._kept[response["id"]] = Kept(parts, response)
        self.bytes += kept.own_bytes
        for part in parts:
            self.bytes += 0 if self._uses[part] else part.bytes
            self._uses[part] += 1
        while len(self) > self._most or self.bytes > self._most_bytes:
            self.forget(next(iter(self._kept)))

    def find(self, name: str) -> Kept:
        """Raises UnknownError where it is not kept."""
        if name not in self._kept:
            raise UnknownError(
                "no response of this id is kept",
                "they are in memory, the longest unused are forgotten first, and all when the server ends: "
                "send the conversation whole",
            )
        self._kept.move_to_end(name)
        return self._kept[name]

    def forget(self, name: str) -> None:
        """Raises UnknownError where it is not kept."""
        kept = self.find(name)
        del self._kept[name]
        self.bytes -= kept.own_bytes
        for part in kept.parts:
            self._uses[part] -= 1
            if not self._uses[part]:
                del self._uses[part]
                self.bytes -= part.bytes
