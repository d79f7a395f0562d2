"""What the chat page asks for, and how it is shown what there is. Texts are made fit for UTF-8 on the way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from iolite.media.speech_end import SILENCE
from iolite.server.chats import Attached, Chat, File, Message
from iolite.server.fields import MOST_TOKENS, Penalty, Probability, Seed, Temperature, Tokens, Tools, TopK, seed_of
from iolite.server.live_fields import Silence
from iolite.server.markup import to_html

MOST_TEXT = 4_000_000  # characters of one message


def _whole(text: Any) -> Any:
    """Halves of surrogate pairs have no place in UTF-8, which the disk is written in."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


Text = Annotated[str, BeforeValidator(_whole), Field(max_length=MOST_TEXT)]
Name = Annotated[str, BeforeValidator(_whole), Field(max_length=300)]
Id = Annotated[int, Field(ge=1, lt=2**63)]
Whole = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ChatSettings(Strict):
    """Of one chat; what is None is the model's or the server's own."""

    system: Text = ""
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: Penalty | None = None
    seed: Seed | None = None
    max_tokens: Tokens | None = None
    thinking: bool | None = None
    thinking_budget: Whole | None = None
    tools: Tools | None = None

    def sampling(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
        return {name: getattr(self, name) for name in names} | {"seed": seed_of(self.seed)}


class ChatChange(Strict):
    title: Name | None = None
    settings: ChatSettings | None = None
    head: Id | None = None


class SentFile(Strict):
    file: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    name: Name
    tokens: Tokens | None = None


class Result(Strict):
    """What a tool gave, as the person says."""

    call: Name
    text: Text


class Sent(Strict):
    """A message. parent: what it follows, None: nothing."""

    parent: Id | None = None
    text: Text = ""
    files: Annotated[list[SentFile], Field(max_length=64)] = []

    def attached(self) -> list[Attached]:
        return [Attached(sent.file, sent.name, sent.tokens) for sent in self.files]


class Turn(Sent):
    """What is to be answered.

    again: another answer to the parent, which is a message of the user's or results. results: of the parent's calls.
    """

    again: bool = False
    results: Annotated[list[Result], Field(max_length=64)] = []


class Spoken(Sent):
    """A message that somebody is about to say; its text and files come before the sound.

    chat: None for one that begins with it, with these settings. name: of the recording. silence_ms: as in `Start`.
    """

    type: Literal["start"]
    chat: Name | None = None
    settings: ChatSettings = ChatSettings()
    name: Name = "recording.wav"
    silence_ms: Silence | None = round(1000 * SILENCE)


def shown_chat(chat: Chat) -> dict[str, Any]:
    """Without its messages, as a list of chats holds it."""
    names = ("id", "title", "created", "changed", "head", "found")
    return {name: getattr(chat, name) for name in names} | {"settings": dict(chat.settings)}


def shown_message(message: Message, files: Mapping[str, File]) -> dict[str, Any]:
    """Texts of the model's as HTML; the user's stay as they were typed."""
    written = message.role == "assistant"
    return {
        "id": message.id,
        "parent": message.parent,
        "role": message.role,
        "text": message.text,
        "html": to_html(message.text) if written else None,
        "thought": to_html(message.reasoning) if message.reasoning else None,
        "calls": list(message.calls),
        "info": dict(message.info),
        "files": [shown_file(file, files[file.file]) for file in message.files if file.file in files],
        "created": message.created,
    }


def shown_file(attached: Attached, file: File) -> dict[str, Any]:
    return {
        "file": file.id,
        "name": attached.name,
        "tokens": attached.tokens,
        "kind": file.kind,
        "type": file.type,
        "info": dict(file.info),
    }


def in_markdown(chat: Chat, path: Sequence[Message]) -> str:
    """One branch of a chat as a document."""
    parts = [f"# {chat.title or 'Untitled'}\n"]
    if chat.settings.get("system"):
        parts.append(f"> {chat.settings['system']}\n".replace("\n", "\n> ").removesuffix("> "))
    for message in path:
        parts.append(f"## {_ROLES[message.role]}\n")
        parts += [f"*{file.name}*\n" for file in message.files]
        if message.reasoning:
            parts.append(f"<details><summary>Thoughts</summary>\n\n{message.reasoning}\n\n</details>\n")
        parts.append(f"{message.text}\n")
        parts += [f"```json\n{call['name']}({call['arguments']})\n```\n" for call in message.calls]
    return "\n".join(parts)


_ROLES = {"user": "You", "assistant": "Model", "tool": "Tool"}
