"""A turn of the chat page: what it adds to a chat, how the model reads it, and how it is stored.

Everything here waits for the disk: call it from threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iolite.errors import MessageError
from iolite.server.answers import Ask
from iolite.server.attachments import part_of
from iolite.server.chats import Chat, Chats, Message
from iolite.server.page_fields import ChatSettings, Turn, shown_message
from iolite.server.service import Service

TITLE = 60  # characters of a first message that name its chat


def new_messages(chats: Chats, chat: Chat, turn: Turn) -> list[Message]:
    """The messages of a turn, not yet stored: none when it only asks again."""
    parent = parent_of(chat, turn.parent)
    if turn.again:
        if parent is None or parent.role == "assistant":
            raise MessageError("there is no question to answer again", "reload the page")
        return []
    if turn.results:
        known = {call["id"]: call for call in (parent.calls if parent else ())}
        if any(result.call not in known for result in turn.results):
            raise MessageError("there is no such call", "reload the page")
        return [
            Message(0, None, "tool", r.text, info={"call": r.call, "name": known[r.call]["name"]}) for r in turn.results
        ]
    if not turn.text.strip() and not turn.files:
        raise MessageError("the message is empty", "write something, or attach a file")
    return [Message(0, turn.parent, "user", turn.text, files=turn.attached())]


def parent_of(chat: Chat, id: int | None) -> Message | None:
    """What a turn follows, None for a first one."""
    parent = next((message for message in chat.messages if message.id == id), None)
    if id is not None and parent is None:
        raise MessageError("the chat has no such message to go on from", "reload the page")
    return parent


def ask_for(service: Service, chats: Chats, chat: Chat, parent: int | None, asked: list[Message]) -> Ask:
    """The request that new messages behind `parent` are to the model."""
    settings = ChatSettings.model_validate(chat.settings)
    return Ask(
        messages=_as_messages(chats, settings, chat.path(parent) + asked),
        tools=settings.tools or None,
        thinking=service.settings.thinking if settings.thinking is None else settings.thinking,
        thinking_budget=settings.thinking_budget,
        sampling=settings.sampling(),
    )


def _as_messages(chats: Chats, settings: ChatSettings, path: list[Message]) -> list[dict[str, Any]]:
    """A branch as the model reads it: pictures and texts before the words, sound after them."""
    messages: list[dict[str, Any]] = []
    if settings.system.strip():
        messages.append({"role": "system", "content": settings.system})
    for message in path:
        if message.role == "user":
            messages.append({"role": "user", "content": _parts(chats, message)})
        elif message.role == "tool":
            messages.append({"role": "tool", "tool_call_id": message.info["call"], "name": message.info["name"],
                             "content": message.text})  # fmt: skip
        elif message.text or message.calls:
            calls = [
                {"id": call["id"], "type": "function",
                 "function": {"name": call["name"], "arguments": call["arguments"]}}
                for call in message.calls
            ]  # fmt: skip
            more = {"tool_calls": calls, "reasoning_content": message.reasoning} if calls else {}
            messages.append({"role": "assistant", "content": message.text, **more})
    return messages


def _parts(chats: Chats, message: Message) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for attached in message.files:
        kept = chats.file(attached.file)
        if kept is None:
            raise MessageError(f"the file {attached.name} is not here any more", "attach it again")
        parts.append(part_of(kept, attached))
    text = [{"type": "text", "text": message.text}] if message.text.strip() else []
    return [p for p in parts if p["type"] != "audio"] + text + [p for p in parts if p["type"] == "audio"]


def store(
    chats: Chats, chat: Chat, parent: int | None, asked: list[Message], **info: Any
) -> tuple[dict[str, Any], Message]:
    """Keeps new messages, each behind the one before, and an empty answer to them, of which `info` is known already.
    Returns what the page is told of them, and the answer."""
    title, stored = _named(chats, chat, chat.path(parent) + asked), list[Message]()
    for message in asked:
        stored.append(chats.add(chat.id, replace(message, parent=parent)))
        parent = stored[-1].id
    reply = chats.add(chat.id, Message(0, parent, "assistant", "", info={"state": "writing", **info}))
    files = chats.files_of(chat)
    told = {
        "asked": [shown_message(message, files) for message in stored],
        "message": shown_message(reply, {}),
        "title": title,
    }
    return told, reply


def _named(chats: Chats, chat: Chat, path: list[Message]) -> str:
    """A chat's title; one that has none is called by how it begins."""
    if chat.title or not path:
        return chat.title
    words = " ".join(path[0].text.split()) or ", ".join(file.name for file in path[0].files)
    title = words if len(words) <= TITLE else words[:TITLE].rsplit(" ", 1)[0] + " …"
    chats.change(chat.id, title=title)
    return title
