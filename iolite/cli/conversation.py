"""The state of a chat: settings, messages and media waiting for the next one; saved and loaded as JSON.

No terminal and no model here. Media are kept as absolute paths, never copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iolite.cli.attachments import ENDINGS, Attachment, user_message
from iolite.errors import UsageError

FORMAT = "iolite-chat-1"


def _switch(text: str) -> bool:
    words = {"": True, "on": True, "true": True, "yes": True, "1": True}
    words |= {"off": False, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _text(text: str) -> str:
    return text.strip().removeprefix('"""').removesuffix('"""').strip()


# name -> (how its text is read, what it is). An empty text puts a value back to the model's own.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (float, "0 always takes the likeliest token"),
    "top_p": (float, "draw from the tokens that make up this probability"),
    "top_k": (int, "draw from this many tokens"),
    "min_p": (float, "leave out what is less likely than this times the likeliest"),
    "repetition_penalty": (float, "above 1: repeat less"),
    "seed": (int, "same seed, same answer"),
    "max_tokens": (int, "longest answer, in tokens"),
    "stop": (_text, "end an answer before this text"),
    "image_tokens": (int, "budget of one picture, in tokens"),
    "system": (_text, "system prompt"),
    "thinking": (_switch, "on: the model thinks before it answers"),
    "verbose": (_switch, "on: time and tokens per second after each answer"),
}
_ALIASES = {"temp": "temperature", "think": "thinking", "repeat_penalty": "repetition_penalty"}
_NOT_FOR_THE_MODEL = ("system", "verbose")
_BLANK: dict[str, Any] = {"max_tokens": 2048, "thinking": False, "verbose": False}


@dataclass
class Conversation:
    """What has been said, what is set, and what waits to be sent along."""

    settings: dict[str, Any] = field(default_factory=lambda: dict(_BLANK))
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Attachment] = field(default_factory=list)

    def generation(self) -> dict[str, Any]:
        """The settings that `Model.chat` takes."""
        return {k: v for k, v in self.settings.items() if k not in _NOT_FOR_THE_MODEL}

    def ask(self, text: str, attachments: list[Attachment]) -> list[dict[str, Any]]:
        """All messages with a new one of the user at the end; nothing is kept before `keep`."""
        system = self.settings.get("system")
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *self.messages, user_message(text, attachments)]

    def keep(self, question: dict[str, Any], reply: dict[str, Any]) -> None:
        """Notes a turn that is done; what waited has been sent."""
        self.messages += [question, reply]
        self.waiting = []

    def clear(self) -> None:
        """Forgets what was said and what waits; settings stay."""
        self.messages, self.waiting = [], []

    def set(self, name: str, text: str) -> None:
        """Sets one setting from its text. UsageError for an unknown name or a text that does not fit."""
        if name == "nothink":
            name, text = "thinking", "off"
        name = _ALIASES.get(name, name)
        if name not in SETTINGS:
            raise UsageError(f"there is no setting {name!r}", f"there are {', '.join(SETTINGS)}")
        read = SETTINGS[name][0]
        if not text and read is not _switch:
            self.settings.pop(name, None)
            self.settings |= {k: v for k, v in _BLANK.items() if k == name}
            return
        try:
            self.settings[name] = read(text)
        except ValueError:
            kind = {int: "a whole number", float: "a number", _switch: "on or off"}[read]
            raise UsageError(f"{name} takes {kind}, not {text!r}") from None

    def to_json(self, model: str) -> str:
        """What `/save` writes."""
        data = {"format": FORMAT, "model": model, "settings": self.settings, "messages": self.messages}
        return json.dumps(data, ensure_ascii=False, indent=2) + "\n"

    def write(self, path: Path, model: str) -> None:
        """Writes a file that only its owner may read, beside its place and renamed: what was there stays until all of
        it is on the disk. Raises CheckpointError where that is not possible."""
        from iolite.checkpoint.files import replacing

        with replacing(path) as file:
            os.chmod(file.name, 0o600)
            # Halves of characters, as a broken paste has them, are written as JSON escapes them.
            file.write(self.to_json(model).encode("utf-8", "backslashreplace"))

    def load(self, text: str) -> None:
        """Takes over what `/save` wrote; raises UsageError, and changes nothing, for anything else."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UsageError("this file is not a saved chat", "a chat is saved with /save FILE")
        settings, messages = data.get("settings"), data.get("messages")
        if not isinstance(settings, dict) or not isinstance(messages, list) or set(settings) - set(SETTINGS):
            raise UsageError("this saved chat is damaged: its settings or messages are not as /save writes them")
        for message in messages:
            known = isinstance(message, dict) and message.get("role") in ("user", "assistant")
            if not known or not isinstance(message.get("content"), str | list):
                raise UsageError("this saved chat is damaged: a message has no role or no content")
        self.settings, self.messages, self.waiting = settings, messages, []

    def media(self) -> Iterator[str]:
        """The paths of all media in the messages."""
        for message in self.messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in ENDINGS and isinstance(part.get(kind), str):
                    yield part[kind]


def missing_media(conversation: Conversation) -> list[str]:
    """Those of its files that are no longer there."""
    return [path for path in conversation.media() if not path.startswith("data:") and not os.path.isfile(path)]
