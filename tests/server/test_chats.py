"""The file of chats: branches, search, what is deleted, and that nothing stored is lost by a killed process."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pytest

from iolite.errors import MessageError, UsageError
from iolite.server.chats import Attached, Chats, Message


@pytest.fixture
def chats():
    with_memory = Chats()
    yield with_memory
    with_memory.close()


def say(chats, chat, parent, text, role="user", files=()):
    return chats.add(chat.id, Message(0, parent, role, text, files=files))


def test_branches(chats):
    chat = chats.create("colours")
    first = say(chats, chat, None, "which?")
    red = say(chats, chat, first.id, "red", "assistant")
    blue = say(chats, chat, first.id, "blue", "assistant")
    found = chats.chat(chat.id)
    assert found.head == blue.id
    assert [m.text for m in found.path(red.id)] == ["which?", "red"]
    assert [m.text for m in found.path(found.head)] == ["which?", "blue"]
    chats.change(chat.id, head=red.id, settings={"system": "be brief"})
    assert chats.chat(chat.id).head == red.id
    assert chats.chat(chat.id).settings == {"system": "be brief"}
    assert chats.chat("none") is None


def test_an_answer_that_grows(chats):
    chat = chats.create()
    answer = say(chats, chat, None, "", "assistant")
    chats.update(Message(answer.id, None, "assistant", "violet", "hm", [{"name": "f"}], {"state": "done"}))
    (kept,) = chats.chat(chat.id).messages
    assert (kept.text, kept.reasoning, kept.calls, kept.info) == ("violet", "hm", [{"name": "f"}], {"state": "done"})
    assert [c.id for c in chats.listed("violet")] == [chat.id]


def test_search(chats):
    stone, wine = chats.create("A stone"), chats.create("Wine")
    say(chats, stone, None, "Welche Farbe hat Iolith? Größe: 12 µm")
    say(chats, wine, None, "which colour has it")
    for words, expected in (
        ("farb", [stone]), ("GRÖSSE", []), ("größe", [stone]), ("grosse", []), ("colour which", [wine]),
        ("ston", [stone]), ("wine", [wine]), ("colour stone", []), ("", [wine, stone]), ('"', [wine, stone]),
        ("AND OR NOT", []), ("title:wine", []), ("fa*", [stone]), ("'; DROP TABLE chats", []), ("h", [stone, wine]),
    ):  # fmt: skip
        assert {c.id for c in chats.listed(words)} == {c.id for c in expected}, words
    assert "Farbe" in chats.listed("farb")[0].found
    chats.change(wine.id, title="Whisky")
    assert [c.title for c in chats.listed("whisk")] == ["Whisky"]
    assert chats.listed("wine") == []


def test_what_is_deleted_is_gone(tmp_path):
    chats = Chats(tmp_path / "chats.sqlite")
    chat, other = chats.create("secret-title"), chats.create("other")
    shared, own = (chats.keep("text", "text/plain", data, data.decode(), {}) for data in (b"shared-file", b"own-file"))
    say(chats, chat, None, "zebrasecret", files=[Attached(shared.id, "a"), Attached(own.id, "b")])
    say(chats, other, None, "other", files=[Attached(shared.id, "a")])
    chats.delete(chat.id)
    assert chats.chat(chat.id) is None and chats.listed("zebrasecret") == []
    assert chats.file(own.id) is None and chats.file(shared.id).data == b"shared-file"
    chats.close()
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"shared-file" in left
    for gone in (b"zebrasecret", b"secret-title", b"own-file"):
        assert gone not in left, "deleted bytes are still in the file"


def test_the_same_file_is_kept_once(chats):
    first = chats.keep("image", "image/png", b"x", None, {"costs": {}})
    assert chats.keep("image", "image/png", b"x", None, {"costs": {"1": 1}}).id == first.id
    assert chats.file(first.id).info == {"costs": {"1": 1}}
    assert chats.keep("audio", "audio/wav", b"x", None, {}).id != first.id


def test_files_that_nobody_sends(chats, monkeypatch):
    """While the server runs: their bytes are bounded, and a day is enough."""
    monkeypatch.setattr("iolite.server.chats.MOST_UNSENT", 250)
    sent = chats.keep("text", "text/plain", b"sent" * 50, "", {})
    say(chats, chats.create(), None, "hm", files=[Attached(sent.id, "a")])
    unsent = [chats.keep("text", "text/plain", bytes([i]) * 100, "", {}) for i in range(3)]
    assert [chats.file(file.id) is not None for file in (sent, *unsent)] == [True, False, True, True]
    later = time.time() + 90_000
    monkeypatch.setattr(time, "time", lambda: later)
    new = chats.keep("text", "text/plain", b"new", "", {})
    assert [chats.file(file.id) is not None for file in (sent, *unsent, new)] == [True, False, False, False, True]


def test_what_is_deleted_before_it_is_answered(chats):
    chat, gone = chats.create(), chats.create()
    file = chats.keep("text", "text/plain", b"x", "x", {})
    say(chats, gone, None, "hm", files=[Attached(file.id, "a")])
    chats.delete(gone.id)
    for where, parent, files in ((gone, None, ()), (chat, 12345, ()), (chat, None, [Attached(file.id, "a")])):
        with pytest.raises(MessageError, match="deleted"):
            say(chats, where, parent, "hm", files=files)
    assert chats.chat(chat.id).messages == [] and chats.listed("hm") == []


def test_only_the_owner_can_read_it(tmp_path):
    path = tmp_path / "deep" / "chats.sqlite"
    Chats(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_killed_process_loses_nothing(tmp_path):
    path = tmp_path / "chats.sqlite"
    code = (
        "import sys, time\nfrom iolite.server.chats import Chats, Message\n"
        f"chats = Chats({str(path)!r})\nchat = chats.create('kept')\nparent = None\n"
        "for i in range(50):\n    parent = chats.add(chat.id, Message(0, parent, 'user', f'word{i}')).id\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    chats = Chats(path)
    (chat,) = chats.listed("word49")
    assert [m.text for m in chats.chat(chat.id).path(chat.head)] == [f"word{i}" for i in range(50)]
    chats.close()


def test_two_servers_with_one_file(tmp_path):
    one, other = Chats(tmp_path / "c"), Chats(tmp_path / "c")
    chat = one.create("from one")
    say(other, chat, None, "from the other")
    assert [m.text for m in one.chat(chat.id).messages] == ["from the other"]
    one.close()
    other.close()


def test_files_that_are_not_ours(tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    later = tmp_path / "later"
    with sqlite3.connect(later) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for path in (wrong, later, tmp_path):
        with pytest.raises(UsageError) as caught:
            Chats(path)
        assert "--chats" in caught.value.hint
