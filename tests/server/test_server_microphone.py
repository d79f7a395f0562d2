"""The page's WebSocket: a message that is heard while it is spoken, its answer, and what is kept of both."""

from __future__ import annotations

import contextlib

import httpx
import numpy as np
import pytest
from support.serving import DEMO, KEY, asking, serving, wait_for
from support.speaking import DIGITS, SILENCE, connected, heard, idle, refused, send, speak, until, wav
from websockets.exceptions import ConnectionClosed, InvalidStatus

from iolite.server import hearing, microphone

LONG = "on and on " * 200
GREEDY = {"temperature": 0, "max_tokens": 24}


def microphone_of(listener, headers=None, **start):
    """A connection to the page's microphone that is ready to hear."""
    return connected(listener, microphone.PATH, {"type": "start", **start}, headers)


def said(listener, data=DIGITS, **start):
    """What the page is told of one message; the last is the whole answer."""
    with microphone_of(listener, **{"silence_ms": None} | start) as talk:
        speak(talk, data)
        send(talk, "commit")
        found = until(talk, "end")
        with pytest.raises(ConnectionClosed) as closed:
            heard(talk)
        assert closed.value.rcvd.code == 1000
    return found


@contextlib.contextmanager
def answering(script, listener, http):
    """A chat, the connection through which something was said in it, and what that was told up to the first words of
    an answer that does not end soon."""
    script.say(LONG)
    chat = new(http, max_tokens=2000)
    with microphone_of(listener, chat=chat, silence_ms=None) as talk:
        speak(talk, DIGITS)
        send(talk, "commit")
        yield chat, talk, until(talk, "text")


def new(http, **settings):
    return http.post("/page/chats", json={"settings": settings}).json()["id"]


def messages_of(http, chat):
    return http.get(f"/page/chats/{chat}").json()["messages"]


def written(http, chat, **turn):
    """The same in writing: the answer to a turn."""
    found = http.post(f"/page/chats/{chat}/answers", json=turn)
    assert found.status_code == 200, found.text
    return [m for m in messages_of(http, chat) if m["role"] == "assistant"][-1]


def attached(http, data, name):
    file = http.post("/page/files", files={"file": (name, data, "")}).json()
    return {"file": file["file"], "name": name}


def test_what_was_spoken_is_a_message_like_others(server, http):
    chat = new(http, **GREEDY)
    found = said(server, chat=chat, text="Transcribe the speech.", name="mine.wav")
    assert [m["type"] for m in found[:3]] == ["speech_started", "speech_ended", "begin"]
    assert found[0]["from_ms"] == 0
    begin, end = found[2], found[-1]["message"]
    assert begin["chat"] == chat
    assert end["text"] == "309" and end["html"] == "<p>309</p>\n"
    assert end["info"]["state"] == "done" and end["info"]["spoken"] and end["info"]["first_token"] > 0
    assert messages_of(http, chat) == [begin["asked"][0], end]
    assert http.get(f"/page/chats/{chat}").json()["title"] == begin["title"] == "Transcribe the speech."
    (file,) = begin["asked"][0]["files"]
    assert (file["name"], file["kind"], file["type"]) == ("mine.wav", "audio", "audio/wav")
    padded = np.pad(np.frombuffer(DIGITS, "<i2"), (0, -len(DIGITS) // 2 % 640)).tobytes()
    assert http.get(f"/page/files/{file['file']}").content == wav(padded)
    # The same file, were it sent as one: costs, and the answer.
    same = http.post("/page/files", files={"file": ("x.wav", wav(padded), "audio/wav")}).json()
    assert same["file"] == file["file"] and same["info"] == file["info"]
    again = written(http, chat, parent=begin["asked"][0]["id"], again=True)
    assert again["text"] == "309"
    assert again["info"]["prompt_tokens"] == end["info"]["prompt_tokens"] == begin["prompt_tokens"]
    assert again["info"]["cached_tokens"] >= end["info"]["prompt_tokens"] - 1, "nothing of it is read twice"
    wait_for(lambda: idle(server))


@pytest.mark.parametrize("size", [1280, 1278, 20_000])
def test_the_answer_is_that_to_the_recording_sent_whole(server, http, size):
    """In company: a system prompt, what was said before, text and a picture in the same message."""
    chat = new(http, **GREEDY, system="be brief")
    first = written(http, chat, text="who are you?")
    files = [attached(http, (DEMO / "number.png").read_bytes(), "number.png")]
    with microphone_of(server, chat=chat, parent=first["id"], text="Read it.", files=files, silence_ms=None) as talk:
        speak(talk, DIGITS, size)
        send(talk, "commit")
        end = until(talk, "end")[-1]["message"]
    files = [*files, attached(http, wav(DIGITS), "x.wav")]
    whole = written(http, chat, parent=first["id"], text="Read it.", files=files)
    assert (end["text"], end["info"]["prompt_tokens"]) == (whole["text"], whole["info"]["prompt_tokens"])
    one, other = (m for m in messages_of(http, chat) if m["role"] == "user" and m["parent"] == first["id"])
    assert [file["name"] for file in one["files"]] == ["number.png", "recording.wav"]
    assert one["text"] == other["text"] == "Read it."


def test_silence_sends_it(server, http):
    """And of the sound only speech is kept."""
    chat = new(http, **GREEDY)
    with microphone_of(server, chat=chat) as talk:
        speak(talk, SILENCE + DIGITS + SILENCE, 1600)
        found = until(talk, "end")
    assert found[1]["reason"] == "silence"
    assert 700 < found[0]["from_ms"] < 1300
    file = messages_of(http, chat)[0]["files"][0]
    sent = np.frombuffer(SILENCE + DIGITS + SILENCE, "<i2")
    kept = np.frombuffer(http.get(f"/page/files/{file['file']}").content[44:], "<i2")
    at = round(16 * found[0]["from_ms"])
    assert (kept == sent[at : at + len(kept)]).all() and len(kept) == 16 * found[1]["heard_ms"]


def test_a_chat_begins_with_it_and_not_before(server, http):
    before = {chat["id"] for chat in http.get("/page/chats").json()}
    with microphone_of(server, settings=GREEDY | {"system": "be brief"}, name="14.03.wav") as talk:
        speak(talk, SILENCE + DIGITS)
        assert heard(talk)["type"] == "speech_started"
        assert {chat["id"] for chat in http.get("/page/chats").json()} == before
        send(talk, "commit")
        chat = until(talk, "end")[1]["chat"]
    kept = http.get(f"/page/chats/{chat}").json()
    assert kept["title"] == "14.03.wav" and kept["settings"]["system"] == "be brief" and len(kept["messages"]) == 2


def test_a_branch(server, http):
    chat = new(http, **GREEDY)
    first = written(http, chat, text="who are you?")
    said(server, chat=chat, parent=first["id"])
    edited = said(server, chat=chat, parent=None)[-1]["message"]
    spoken = [m for m in messages_of(http, chat) if m["role"] == "user"]
    assert [m["parent"] for m in spoken] == [None, first["id"], None]
    assert edited["parent"] == spoken[2]["id"] == http.get(f"/page/chats/{chat}").json()["head"] - 1


def test_the_longest_that_the_model_hears(server, http):
    chat = new(http, **GREEDY)
    with microphone_of(server, chat=chat, silence_ms=None) as talk:
        speak(talk, DIGITS * 8, 12_800)
        found = until(talk, "end")
        assert found[1] == {"type": "speech_ended", "reason": "limit", "heard_ms": 10_000}
    assert messages_of(http, chat)[0]["files"][0]["info"]["seconds"] == 10.0
    assert len(messages_of(http, chat)) == 2, "what came after is in no message"


@pytest.mark.parametrize("how", ["close", "break off", "clear"])
def test_cancel_leaves_nothing(script, scripted, how):
    with asking(scripted) as http:
        chat, before = new(http), len(http.get("/page/chats").json())
        for start in ({"chat": chat}, {}):
            with microphone_of(scripted, **start) as talk:
                speak(talk, DIGITS)
                assert heard(talk)["type"] == "speech_started"
                if how == "clear":
                    send(talk, "clear")
                    assert heard(talk)["type"] == "cleared"
                    send(talk, "commit")
                    assert heard(talk)["type"] == "nothing_heard"
                talk.socket.close() if how == "break off" else talk.close()
            wait_for(lambda: idle(scripted))
        assert messages_of(http, chat) == [] and len(http.get("/page/chats").json()) == before
        assert not scripted.app.state.chats._all("SELECT id FROM files")


@pytest.mark.parametrize("how", ["close", "break off"])
def test_who_goes_away_during_the_answer_finds_what_there_was(script, scripted, how):
    with asking(scripted) as http:
        with answering(script, scripted, http) as (chat, talk, _):
            talk.socket.close() if how == "break off" else talk.close()
        wait_for(lambda: not scripted.app.state.writings and idle(scripted))
        question, answer = messages_of(http, chat)
        assert question["files"] and answer["info"]["state"] == "stopped"
        assert answer["text"] and LONG.startswith(answer["text"])


def test_a_client_that_hangs_up_first_is_no_fault(server, capfd):
    for _ in range(20):  # it is a race
        with microphone_of(server, settings=GREEDY, silence_ms=None) as talk:
            talk.send(DIGITS[:6400])
            send(talk, "commit")
            until(talk, "end")
    wait_for(lambda: idle(server))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["route", "message"])
def test_stop(script, scripted, how):
    with asking(scripted) as http:
        with answering(script, scripted, http) as (chat, talk, told):
            answer = told[2]["message"]["id"]
            if how == "route":
                assert http.post(f"/page/answers/{answer}/stop", json={}).status_code == 204
            else:
                send(talk, "stop")
            end = until(talk, "end")[-1]["message"]
        assert end["info"]["state"] == "stopped" and LONG.startswith(end["text"])
        assert messages_of(http, chat)[-1] == end


def test_an_answer_that_fails_is_told_and_kept(script, scripted, monkeypatch):
    monkeypatch.setattr(script.model.network, "logits", lambda hidden: script.logits(hidden) * float("nan"))
    script.say(LONG)
    with asking(scripted) as http:
        chat = new(http)
        with microphone_of(scripted, chat=chat, silence_ms=None) as talk:
            speak(talk, DIGITS)
            send(talk, "commit")
            assert [m["type"] for m in until(talk, "begin")] == ["speech_started", "speech_ended", "begin"]
            assert "not numbers" in refused(talk, 1011)["error"]["message"]
        wait_for(lambda: idle(scripted))
        question, answer = messages_of(http, chat)
        assert question["files"] and answer["info"]["state"] == "failed"


def test_what_is_refused(server, http):
    chat = new(http)
    no_file = [{"file": "0" * 64, "name": "x"}]
    cases = (
        ({"chat": "x"}, 1008, "no such chat"),
        ({"chat": chat, "parent": 999_999}, 1007, "no such message"),
        ({"chat": chat, "files": no_file}, 1007, "not here any more"),
        ({"chat": chat, "text": "one two three " * 5000}, 1007, "no room for a recording"),
        ({"chat": chat, "silence_ms": 1}, 1007, "silence_ms"),
        ({"chat": chat, "more": 1}, 1007, "more"),
        ({"settings": {"temperature": -1}}, 1007, "temperature"),
    )
    for start, code, told in cases:
        with connected(server, microphone.PATH) as talk:
            send(talk, {"type": "start", **start})
            found = refused(talk, code)
            assert told in found["error"]["message"], (start, found)
    with connected(server, microphone.PATH) as talk:
        talk.send(DIGITS[:640])
        refused(talk, 1007)
    assert messages_of(http, chat) == []
    wait_for(lambda: idle(server))


def test_a_chat_that_is_deleted_meanwhile(server, http):
    chat = new(http)
    with microphone_of(server, chat=chat, silence_ms=None) as talk:
        speak(talk, DIGITS)
        assert heard(talk)["type"] == "speech_started"
        assert http.delete(f"/page/chats/{chat}").status_code == 204
        send(talk, "commit")
        assert "no such chat" in refused(talk, 1008)["error"]["message"]
    wait_for(lambda: idle(server))


def test_too_many_at_once(nano):
    with serving(nano, slots=1) as listener, microphone_of(listener) as one, microphone_of(listener) as two:
        for talk in (one, two):
            talk.send(DIGITS)
            if talk is one:
                assert heard(one)["type"] == "speech_started"
        assert refused(two, 1013)["retry_after"] > 0


def test_nothing_stays_of_who_only_connects(server, monkeypatch):
    monkeypatch.setattr(hearing, "MOST_SESSIONS", 1)
    with connected(server, microphone.PATH), connected(server, microphone.PATH) as second:
        refused(second, 1013)
    wait_for(lambda: idle(server))


def test_who_may_speak(server):
    with httpx.Client(base_url=server.url) as browser:
        browser.get("/", params={"token": KEY})
        ((name, value),) = browser.cookies.items()
    cookie = {"Cookie": f"{name}={value}", "Origin": server.url}
    with microphone_of(server, cookie | {"Sec-Fetch-Site": "same-origin"}):
        pass
    for headers in ({}, cookie | {"Origin": "http://evil.example"}, cookie | {"Sec-Fetch-Site": "same-site"}):
        with pytest.raises(InvalidStatus) as found, connected(server, microphone.PATH, headers=headers):
            pass
        assert found.value.response.status_code == 403
