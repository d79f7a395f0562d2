"""Conversations of the chat page in one SQLite file: trees of messages, what was attached to them, search, export.

A message's parent is the one that it answers or follows, so an edited question or another answer is a branch beside
the first. What is committed survives a killed process. Everything here waits for the disk: call it from threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from iolite.errors import MessageError, UsageError

VERSION = 1  # of the tables below, kept in the file
MOST_FOUND = 200  # chats in a list
_UNSENT_FOR = 86_400.0  # seconds after which a file that was never sent is forgotten
MOST_UNSENT = 2**30  # bytes of such files; beyond it the oldest are forgotten

_TABLES = """
CREATE TABLE chats (id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, changed REAL NOT NULL,
    settings TEXT NOT NULL DEFAULT '{}', head INTEGER);
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL REFERENCES chats ON DELETE CASCADE,
    parent INTEGER REFERENCES messages ON DELETE CASCADE, role TEXT NOT NULL, text TEXT NOT NULL,
    reasoning TEXT NOT NULL DEFAULT '', calls TEXT NOT NULL DEFAULT '[]', info TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL);
CREATE INDEX messages_of_chat ON messages (chat);
CREATE TABLE files (id TEXT PRIMARY KEY, kind TEXT NOT NULL, type TEXT NOT NULL, data BLOB NOT NULL,
    text TEXT, info TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL);
CREATE TABLE attachments (message INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE, place INTEGER NOT NULL,
    file TEXT NOT NULL REFERENCES files, name TEXT NOT NULL, tokens INTEGER, PRIMARY KEY (message, place));
CREATE INDEX attachments_of_file ON attachments (file);
CREATE VIRTUAL TABLE words USING fts5 (title, text, chat UNINDEXED, message UNINDEXED, tokenize = 'unicode61');
CREATE TRIGGER chat_goes AFTER DELETE ON chats BEGIN DELETE FROM words WHERE chat = old.id; END;
"""


@dataclass(frozen=True)
class File:
    """Something attached. kind: "image", "audio", "video", "text" or "document" (a PDF); text: of the last two."""

    id: str  # SHA-256 of its bytes and kind
    kind: str
    type: str  # the media type that it is sent back as
    data: bytes = field(repr=False)
    text: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)  # sizes and costs, for the page


@dataclass(frozen=True)
class Attached:
    """A file in its place in a message. tokens: the most that a picture may become, None: the model's own
    number; of a PDF the most that each page may become as a picture, None: its text is read."""

    file: str
    name: str
    tokens: int | None = None


@dataclass(frozen=True)
class Message:
    """One turn. role: "user", "assistant" or "tool". info: how an answer ended, what it cost, how long it took."""

    id: int
    parent: int | None
    role: str
    text: str
    reasoning: str = ""
    calls: Sequence[Mapping[str, Any]] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Attached] = ()
    created: float = 0.0  # Unix time


@dataclass(frozen=True)
class Chat:
    """A conversation. head: the message that it was left at, the last of the branch that is shown."""

    id: str
    title: str
    created: float
    changed: float
    settings: Mapping[str, Any]
    head: int | None
    messages: Sequence[Message] = ()
    found: str | None = None  # by a search: the words around what was looked for

    def path(self, last: int | None) -> list[Message]:
        """From the first message to this one."""
        by_id, found = {message.id: message for message in self.messages}, list[Message]()
        while last is not None and last in by_id:
            found.append(by_id[last])
            last = by_id[last].parent
        return found[::-1]


class Chats:
    """All conversations of one server. May be used from several threads."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """path: the file, made when missing and readable for its owner only; None keeps everything in memory.
        UsageError for a file that is none of ours, or a later version's."""
        if path is not None:
            with contextlib.suppress(OSError):
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path or ":memory:", timeout=10, check_same_thread=False, isolation_level=None)
            self._open()
        except sqlite3.Error as error:
            raise UsageError(f"the chats in {path} cannot be opened: {error}", "give another file by --chats") from None

    def _open(self) -> None:
        self._db.row_factory = sqlite3.Row
        for pragma in ("foreign_keys=ON", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        with self._change() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise sqlite3.DatabaseError("they were written by a later version of iolite")
            if version == 0:
                for statement in re.split(r";\n(?=CREATE|$)", _TABLES.strip() + "\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            _forget_unsent(db)

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it, or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _stored(self) -> Iterator[sqlite3.Connection]:
        """A transaction that refers to what somebody else may just have deleted."""
        try:
            with self._change() as db:
                yield db
        except sqlite3.IntegrityError:
            raise MessageError("the chat, or a file of the message, has just been deleted", "reload the page") from None

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ---- chats ----

    def create(self, title: str = "", settings: Mapping[str, Any] | None = None) -> Chat:
        chat = Chat(str(uuid.uuid4()), title, time.time(), time.time(), dict(settings or {}), None)
        with self._change() as db:
            values = (chat.id, chat.title, chat.created, chat.changed, _json(chat.settings))
            db.execute("INSERT INTO chats (id, title, created, changed, settings) VALUES (?, ?, ?, ?, ?)", values)
            db.execute("INSERT INTO words (title, text, chat) VALUES (?, '', ?)", (title, chat.id))
        return chat

    def listed(self, words: str = "") -> list[Chat]:
        """Chats without their messages, the last changed one first; those only that hold all the words, or words that
        begin with them."""
        sought = " ".join(f'"{word}"*' for word in re.findall(r"\w+", words))
        if not sought:
            return [_chat(row) for row in self._all(f"{_LIST} LIMIT ?", MOST_FOUND)]
        found: dict[str, str] = {}
        for row in self._all(_SEARCH, sought, 5 * MOST_FOUND):
            found.setdefault(row["chat"], row["found"])
        return [replace(_chat(row), found=found[row["id"]]) for row in self._all(_LIST) if row["id"] in found]

    def chat(self, id: str) -> Chat | None:
        """A chat with all its messages; None when there is none."""
        with self._lock:
            rows = self._all("SELECT * FROM chats WHERE id = ?", id)
            messages = self._all("SELECT * FROM messages WHERE chat = ? ORDER BY id", id)
            attached = self._all(
                "SELECT a.* FROM attachments a JOIN messages m ON m.id = a.message WHERE m.chat = ? ORDER BY place", id
            )
        files: dict[int, list[Attached]] = {}
        for row in attached:
            files.setdefault(row["message"], []).append(Attached(row["file"], row["name"], row["tokens"]))
        found = [_message(row, files.get(row["id"], [])) for row in messages]
        return _chat(rows[0], found) if rows else None

    def change(self, id: str, **values: Any) -> None:
        """Sets a chat's title, settings or head."""
        with self._change() as db:
            for name, value in values.items():
                assert name in ("title", "settings", "head"), name
                stored = _json(value) if name == "settings" else value
                db.execute(f"UPDATE chats SET {name} = ? WHERE id = ?", (stored, id))
            if "title" in values:
                db.execute("UPDATE words SET title = ? WHERE chat = ? AND message IS NULL", (values["title"], id))

    def delete(self, id: str) -> None:
        """A chat, its messages, and the files that no other chat has. Their bytes are overwritten."""
        with self._change() as db:
            held = [r[0] for r in db.execute("SELECT DISTINCT file FROM attachments a JOIN messages m ON m.id = "
                                             "a.message WHERE m.chat = ?", (id,))]  # fmt: skip
            db.execute("DELETE FROM chats WHERE id = ?", (id,))
            for file in held:
                db.execute(f"DELETE FROM files WHERE id = ? AND {_UNUSED}", (file,))
            db.execute("INSERT INTO words (words) VALUES ('optimize')")  # an index keeps what is deleted until then
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log held them too

    # ---- messages ----

    def add(self, chat: str, message: Message) -> Message:
        """Keeps a new message, whose id is given here, and makes it the chat's head. MessageError where the chat, the
        parent or a file has been deleted meanwhile."""
        now = time.time()
        with self._stored() as db:
            values = (chat, message.parent, message.role, message.text, message.reasoning, _json(message.calls))
            id = db.execute(
                "INSERT INTO messages (chat, parent, role, text, reasoning, calls, info, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, _json(message.info), now),
            ).lastrowid
            assert id is not None
            for place, file in enumerate(message.files):
                row = (id, place, file.file, file.name, file.tokens)
                db.execute("INSERT INTO attachments VALUES (?, ?, ?, ?, ?)", row)
            db.execute("INSERT INTO words (title, text, chat, message) VALUES ('', ?, ?, ?)", (message.text, chat, id))
            db.execute("UPDATE chats SET head = ?, changed = ? WHERE id = ?", (id, now, chat))
        return replace(message, id=id, created=now)

    def update(self, message: Message) -> None:
        """Text, thoughts, calls and info of a message as they are now."""
        values = (message.text, message.reasoning, _json(message.calls), _json(message.info), message.id)
        with self._change() as db:
            db.execute("UPDATE messages SET text = ?, reasoning = ?, calls = ?, info = ? WHERE id = ?", values)
            db.execute("UPDATE words SET text = ? WHERE message = ?", (message.text, message.id))

    # ---- files ----

    def keep(self, kind: str, type: str, data: bytes, text: str | None, info: Mapping[str, Any]) -> File:
        """Keeps a file, once however often it comes."""
        id = hashlib.sha256(kind.encode() + b"\0" + data).hexdigest()
        with self._change() as db:
            db.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " text = excluded.text, info = excluded.info, created = excluded.created",
                (id, kind, type, data, text, _json(info), time.time()),
            )
            _forget_unsent(db)
        return File(id, kind, type, data, text, info)

    def file(self, id: str) -> File | None:
        rows = self._all("SELECT * FROM files WHERE id = ?", id)
        if not rows:
            return None
        row = rows[0]
        return File(row["id"], row["kind"], row["type"], row["data"], row["text"], json.loads(row["info"]))

    def files_of(self, chat: Chat) -> dict[str, File]:
        """What the page says of a chat's files, by id; without their bytes."""
        query = (
            "SELECT DISTINCT f.id, f.kind, f.type, f.info FROM files f JOIN attachments a ON a.file = f.id "
            "JOIN messages m ON m.id = a.message WHERE m.chat = ?"
        )
        return {
            row["id"]: File(row["id"], row["kind"], row["type"], b"", None, json.loads(row["info"]))
            for row in self._all(query, chat.id)
        }


def _forget_unsent(db: sqlite3.Connection) -> None:
    """Of the files that no message has: those that are old, and those before which enough newer ones came."""
    db.execute(f"DELETE FROM files WHERE created < ? AND {_UNUSED}", (time.time() - _UNSENT_FOR,))
    sizes = f"SELECT id, sum(length(data)) OVER (ORDER BY created DESC, id) AS newer FROM files WHERE {_UNUSED}"
    db.execute(f"DELETE FROM files WHERE id IN (SELECT id FROM ({sizes}) WHERE newer > ?)", (MOST_UNSENT,))


_UNUSED = "NOT EXISTS (SELECT 1 FROM attachments WHERE attachments.file = files.id)"
_LIST = "SELECT * FROM chats ORDER BY changed DESC"
_SEARCH = (
    "SELECT chat, snippet(words, -1, '', '', '…', 12) AS found FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?"
)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _chat(row: sqlite3.Row, messages: Sequence[Message] = ()) -> Chat:
    values = {name: row[name] for name in ("id", "title", "created", "changed", "head")}
    return Chat(**values, settings=json.loads(row["settings"]), messages=messages)


def _message(row: sqlite3.Row, files: Sequence[Attached]) -> Message:
    values = {name: row[name] for name in ("id", "parent", "role", "text", "reasoning", "created")}
    return Message(**values, calls=json.loads(row["calls"]), info=json.loads(row["info"]), files=files)
