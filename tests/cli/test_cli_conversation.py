"""A chat's settings and messages, and their file."""

from __future__ import annotations

import json

import pytest

from iolite.cli.attachments import Attachment
from iolite.cli.conversation import Conversation, missing_media
from iolite.errors import UsageError


def test_settings_are_read_from_text():
    talk = Conversation()
    for line in ("temp 0.5", "top_k 7", "thinking on", "verbose", "system You are kind.", 'stop """END"""', "seed 3"):
        name, _, text = line.partition(" ")
        talk.set(name, text)
    assert talk.generation() == {
        "temperature": 0.5,
        "top_k": 7,
        "thinking": True,
        "stop": "END",
        "seed": 3,
        "max_tokens": 2048,
    }
    assert talk.settings["verbose"] is True
    assert talk.ask("Hi", [])[0] == {"role": "system", "content": "You are kind."}
    talk.set("nothink", "")
    talk.set("temperature", "")
    talk.set("max_tokens", "")
    assert talk.generation() == {"top_k": 7, "thinking": False, "stop": "END", "seed": 3, "max_tokens": 2048}


@pytest.mark.parametrize(("name", "text"), [("heat", "1"), ("top_k", "1.5"), ("temp", "hot"), ("thinking", "maybe")])
def test_what_does_not_fit_is_refused_and_changes_nothing(name, text):
    talk = Conversation()
    before = dict(talk.settings)
    with pytest.raises(UsageError):
        talk.set(name, text)
    assert talk.settings == before


def test_a_question_is_kept_only_with_its_answer(tmp_path):
    picture = Attachment("image", str(tmp_path / "a.png"))
    talk = Conversation(waiting=[picture])
    messages = talk.ask("What?", talk.waiting)
    assert talk.messages == [] and talk.waiting == [picture]
    talk.keep(messages[-1], {"role": "assistant", "content": "A dog."})
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.waiting == []
    assert missing_media(talk) == [picture.source]
    (tmp_path / "a.png").touch()
    assert missing_media(talk) == []


def test_a_saved_chat_comes_back_whole():
    talk = Conversation()
    talk.set("seed", "4")
    talk.keep(talk.ask("Grüße", [Attachment("audio", "/x/a.wav")])[-1], {"role": "assistant", "content": "Ja"})
    other = Conversation(waiting=[Attachment("image", "/y.png")])
    other.load(talk.to_json("nano"))
    assert (other.settings, other.messages, other.waiting) == (talk.settings, talk.messages, [])
    talk.clear()
    assert talk.messages == [] and talk.settings["seed"] == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": "other"}',
        json.dumps({"format": "iolite-chat-1", "settings": {}, "messages": [{"role": "user"}]}),
        json.dumps({"format": "iolite-chat-1", "settings": {}, "messages": [{"role": "system", "content": "x"}]}),
        json.dumps({"format": "iolite-chat-1", "settings": {"heat": 1}, "messages": []}),
        json.dumps({"format": "iolite-chat-1", "settings": {}}),
    ],
)
def test_another_file_is_refused_and_changes_nothing(text):
    talk = Conversation(messages=[{"role": "user", "content": "kept"}])
    with pytest.raises(UsageError, match="saved chat"):
        talk.load(text)
    assert talk.messages == [{"role": "user", "content": "kept"}]
