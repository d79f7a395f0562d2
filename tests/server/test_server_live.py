"""The WebSocket that hears speech while it is spoken: answers, ends of speech, bounds, guards; nothing stays."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest
from support.serving import KEY, asking, serving, wait_for
from support.speaking import DIGITS, SILENCE, connected, heard, idle, refused, send, speak, until, wav
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from iolite.server import hearing, live

CHAT = "/v1/chat/completions"
LONG = "word " * 400
GREEDY = {"type": "start", "temperature": 0, "max_tokens": 24}


@contextlib.contextmanager
def talking(listener, start=GREEDY, headers=None):
    """A connection that is ready to hear, or without settings."""
    with connected(listener, live.PATH, start, headers) as talk:
        yield talk


def text_of(messages):
    return "".join(message.get("content", "") for message in messages if message["type"] == "delta")


def whole(http, data, *before, text=None):
    """What is answered to the recording when it is sent whole, as a file."""
    sound = {"data": base64.b64encode(wav(data)).decode(), "format": "wav"}
    content = [*([{"type": "text", "text": text}] if text else []), {"type": "input_audio", "input_audio": sound}]
    body = {"messages": [*before, {"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}
    found = http.post(CHAT, json=body)
    assert found.status_code == 200
    return found.json()["choices"][0]["message"]


@pytest.mark.parametrize("size", [1280, 1278, 2, 20_000])
def test_the_answer_to_what_was_spoken_is_that_to_the_whole(server, http, size):
    """With messages of any size; the last frame is not complete."""
    data = DIGITS[: 7002 if size == 2 else None]
    start = GREEDY | {"silence_ms": None, "text": "Transcribe the speech."}
    with talking(server, start) as talk:
        speak(talk, data, size)
        send(talk, "commit")
        found = until(talk, "done")
    done, frames = found[-1], -(-len(data) // 1280)
    assert text_of(found) == done["text"] == whole(http, data, text="Transcribe the speech.")["content"]
    assert found[0] == {"type": "speech_started"}
    assert found[1] == {"type": "speech_ended", "reason": "commit", "heard_ms": 40 * frames}
    assert done["usage"]["prompt_tokens"] > frames
    if size == 1280:
        assert done["text"] == "309"
    wait_for(lambda: idle(server))


def test_silence_ends_speech(server):
    """Twice, and the second time what was said before is known; the same as the chat that holds it all."""
    with talking(server) as talk, asking(server) as http:
        speak(talk, SILENCE + DIGITS + SILENCE, 640)
        first = until(talk, "done")
        assert [m["type"] for m in first][:2] == ["speech_started", "speech_ended"]
        ended = first[1]
        assert ended["reason"] == "silence"
        assert 1400 < ended["heard_ms"] < 2400
        assert first[-1]["text"] == "309"
        speak(talk, DIGITS + SILENCE, 640)
        second = until(talk, "done")
        assert second[-1]["usage"]["prompt_tokens"] > first[-1]["usage"]["prompt_tokens"] + ended["heard_ms"] // 40
        send(talk, "clear")
        assert heard(talk)["type"] == "cleared"
        send(talk, GREEDY | {"conversation": False})
        assert heard(talk)["type"] == "ready"
        for _ in range(2):
            speak(talk, DIGITS + SILENCE)
            alone = until(talk, "done")
        assert alone[-1]["usage"]["prompt_tokens"] < second[-1]["usage"]["prompt_tokens"]
        assert http.get("/health").status_code == 200


def test_a_conversation_is_that_of_the_messages(server, http):
    start = GREEDY | {"silence_ms": None, "messages": [{"role": "user", "content": "hi"}]}
    with talking(server, start) as talk:
        answers = []
        for data in (DIGITS, DIGITS[:9000]):
            speak(talk, data)
            send(talk, "commit")
            answers.append(until(talk, "done")[-1]["text"])
    frames = np.frombuffer(DIGITS, "<i2")
    padded = np.pad(frames, (0, -len(frames) % 640)).tobytes()
    first = whole(http, DIGITS, *start["messages"])
    assert answers[0] == first["content"]
    if first["content"]:
        sound = {"data": base64.b64encode(wav(padded)).decode(), "format": "wav"}
        spoken = {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}
        before = [*start["messages"], spoken, {"role": "assistant", "content": first["content"]}]
        assert answers[1] == whole(http, DIGITS[:9000], *before)["content"]


def test_at_the_limit_it_answers_and_hears_on(server):
    """The embedded model hears ten seconds at once."""
    with talking(server, GREEDY | {"silence_ms": None, "conversation": False}) as talk:
        speak(talk, DIGITS * 8, 12_800)
        first = until(talk, "done")
        assert first[1] == {"type": "speech_ended", "reason": "limit", "heard_ms": 10_000}
        send(talk, "commit")
        second = until(talk, "done")
        rest = -(-8 * len(DIGITS) // 1280) - 250
        assert second[1] == {"type": "speech_ended", "reason": "commit", "heard_ms": 40 * rest}


def test_a_recording_that_comes_too_slowly_is_answered(server, monkeypatch):
    monkeypatch.setattr(hearing, "SLOWEST", 0.02)  # 0.2 s
    with talking(server, GREEDY | {"silence_ms": None}) as talk:
        for data, frames in ((DIGITS[:6400], 5), (DIGITS[:6402], 6)):
            talk.send(data)
            found = until(talk, "done")
            assert found[1] == {"type": "speech_ended", "reason": "time", "heard_ms": 40 * frames}
    wait_for(lambda: idle(server))


def test_nothing_to_answer(server):
    with talking(server) as talk:
        for data in (b"", SILENCE):
            talk.send(data)
            send(talk, "commit")
            assert heard(talk) == {"type": "nothing_heard"}
        send(talk, "stop")  # of no answer
        speak(talk, DIGITS)
        assert heard(talk)["type"] == "speech_started"
        send(talk, "clear")
        assert heard(talk)["type"] == "cleared"
        wait_for(lambda: server.app.state.service.answers._places == 0)
        send(talk, "commit")
        assert heard(talk) == {"type": "nothing_heard"}


def test_what_ends_a_connection(server):
    loud = GREEDY | {"silence_ms": None}
    cases = (
        (None, DIGITS[:640], "before the settings"),
        (None, "commit", "before the settings"),
        (loud, DIGITS[:641], "half a sample"),
        (loud, "nonsense", "no such type"),
        (loud, {"no": "type"}, "type"),
        (loud, "{", "JSON"),
        (loud, "[" * 100_000, "JSON"),
        (None, GREEDY | {"silence_ms": 1}, "silence_ms"),
        (None, GREEDY | {"silence_m": 5}, "silence_ms"),
        (None, GREEDY | {"temperature": -1}, "temperature"),
        (None, GREEDY | {"n": 2}, "n must be 1"),
        (None, GREEDY | {"messages": [{"role": "user", "content": "<|audio|>"}]}, "placeholder"),
        (
            None,
            GREEDY | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/x"}]}]},
            "",
        ),
        (None, GREEDY | {"messages": [{"role": "user", "content": "long " * 20_000}]}, "context"),
        (None, GREEDY | {"lora": ["x"]}, "not available"),
    )
    for start, message, told in cases:
        with talking(server, start) as talk:
            if start:
                talk.send(DIGITS[:6400])
            if isinstance(message, bytes) or (isinstance(message, str) and message[0] in "{["):
                talk.send(message)
            else:
                send(talk, message)
            found = refused(talk, 1007)
            assert told in found["error"]["message"], (message, found)
        wait_for(lambda: idle(server))


def test_what_changes_nothing_is_named(server):
    with talking(server, None) as talk:
        send(talk, GREEDY | {"user": "me", "silence_ms": None})
        ready = heard(talk)
        assert ready == {
            "type": "ready", "sampling_rate": 16_000, "frame_ms": 40.0, "longest_ms": 10_000.0, "ignored": ["user"],
        }  # fmt: skip


@pytest.mark.parametrize("flood", [DIGITS * 30, SILENCE * 60])
def test_more_than_can_wait(script, scripted, flood):
    """While an answer is held up, some sound may wait and no more; silence neither."""
    script.say(LONG)
    script.gate.clear()
    with talking(scripted, GREEDY | {"silence_ms": None}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        assert [m["type"] for m in until(talk, "speech_ended")] == ["speech_started", "speech_ended"]
        with contextlib.suppress(ConnectionClosed):
            speak(talk, flood, 32_000)
        assert "more sound" in refused(talk, 1007)["error"]["message"]
    script.gate.set()
    wait_for(lambda: idle(scripted))


def test_more_messages_than_can_wait(script, scripted):
    script.say(LONG)
    script.gate.clear()
    with talking(scripted, GREEDY | {"silence_ms": None}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        until(talk, "speech_ended")
        with contextlib.suppress(ConnectionClosed):
            for _ in range(hearing.MOST_MESSAGES + 10):
                talk.send(b"")
        assert "more messages" in refused(talk, 1007)["error"]["message"]
    script.gate.set()
    wait_for(lambda: idle(scripted))


def test_a_message_that_is_too_large(server):
    with talking(server) as talk:
        with contextlib.suppress(ConnectionClosed):
            talk.send(bytes(2**20 + 2))
        with pytest.raises(ConnectionClosed) as closed:
            until(talk, "done")
        assert closed.value.rcvd.code == 1009
    wait_for(lambda: idle(server))


def test_stop_ends_an_answer_and_sound_that_waits_is_heard(script, scripted):
    script.say(LONG)
    with talking(scripted, {"type": "start", "silence_ms": None, "temperature": 0}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        until(talk, "delta")
        talk.send(DIGITS[:12_800])
        send(talk, "stop")
        done = until(talk, "done")[-1]
        assert done["finish_reason"] == "stop"
        assert done["usage"]["completion_tokens"] < 400
        send(talk, "commit")
        assert until(talk, "speech_ended")[-1]["heard_ms"] == 400
        send(talk, "stop")
        until(talk, "done")
    wait_for(lambda: idle(scripted))


@pytest.mark.parametrize("when", ["before the settings", "silent", "speaking", "answered"])
def test_who_goes_away_leaves_nothing(script, scripted, when):
    script.say(LONG)
    with talking(scripted, None if when == "before the settings" else GREEDY | {"max_tokens": 400}) as talk:
        if when == "silent":
            talk.send(SILENCE)
        if when in ("speaking", "answered"):
            talk.send(DIGITS)
            assert heard(talk)["type"] == "speech_started"
        if when == "answered":
            send(talk, "commit")
            until(talk, "delta")
        talk.socket.close() if when == "speaking" else talk.close()
    wait_for(lambda: idle(scripted))
    assert script.drawn < 400
    with asking(scripted) as http:
        script.say("still here")
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "still here"


def test_as_many_as_there_are_slots_may_speak(nano):
    with serving(nano, slots=1) as listener:
        with talking(listener) as one, talking(listener) as two:
            one.send(DIGITS)
            assert heard(one)["type"] == "speech_started"
            two.send(DIGITS)
            found = refused(two, 1013)
            assert found["retry_after"] > 0
            # Those who speak take no slot, and who is silent nothing.
            with talking(listener), asking(listener) as http:
                assert http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).status_code == 200
            send(one, "commit")
            assert until(one, "done")[-1]["text"] == "309"
        wait_for(lambda: idle(listener))


def test_many_connections(server, monkeypatch):
    monkeypatch.setattr(hearing, "MOST_SESSIONS", 2)
    with talking(server), talking(server), talking(server, None) as third:
        assert "listen already" in refused(third, 1013)["error"]["message"]
    wait_for(lambda: idle(server))


def test_tools_forms_and_thoughts(script, scripted):
    """Fields of chat requests hold here too."""
    tool = {"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {}}}}
    script.say("<|tool_call>call:light{}<tool_call|>", end="<turn|>")
    with talking(scripted, {"type": "start", "silence_ms": None, "tools": [tool]}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        found = until(talk, "done")
        call = next(m for m in found if m["type"] == "tool_call")
        assert (call["name"], call["arguments"]) == ("light", {})
        assert found[-1]["finish_reason"] == "tool_calls"
    script.say("<|channel>thought\nhm<channel|>yes")
    with talking(scripted, {"type": "start", "silence_ms": None, "think": True}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        found = until(talk, "done")
        assert "".join(m.get("reasoning_content", "") for m in found).strip() == "hm"
        assert found[-1]["text"] == "yes"


def test_several_speak_while_others_chat(nano):
    body = {"messages": [{"role": "user", "content": "who are you?"}], "temperature": 0}
    with serving(nano, slots=4, waiting=30) as listener, asking(listener) as http:
        expected, spoken, written = http.post(CHAT, json=body).json()["choices"][0]["message"]["content"], [], []

        def talk_once():
            with talking(listener, GREEDY | {"conversation": False}) as talk:
                for _ in range(3):
                    speak(talk, DIGITS + SILENCE)
                    spoken.append(until(talk, "done")[-1]["text"])

        def chat():
            for _ in range(4):
                answer = httpx.post(listener.url + CHAT, json=body, headers={"x-api-key": KEY}, timeout=60).json()
                written.append(answer["choices"][0]["message"]["content"])

        threads = [threading.Thread(target=work) for work in (talk_once, chat) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert spoken == ["309"] * 12
        assert written == [expected] * 16
        wait_for(lambda: idle(listener))


def test_a_stop_of_the_server_ends_connections(nano):
    with serving(nano) as listener, talking(listener) as talk:
        talk.send(DIGITS)
        assert heard(talk)["type"] == "speech_started"
        listener.should_exit = True
        with pytest.raises(ConnectionClosed):
            until(talk, "done")


def test_an_answer_that_fails(script, scripted, monkeypatch):
    monkeypatch.setattr(script.model.network, "logits", lambda hidden: script.logits(hidden) * float("nan"))
    script.say(LONG)
    with talking(scripted, GREEDY | {"silence_ms": None}) as talk:
        talk.send(DIGITS)
        send(talk, "commit")
        assert "not numbers" in refused(talk, 1011)["error"]["message"]
    wait_for(lambda: idle(scripted))


def test_a_model_that_does_not_hear(nano):
    deaf = replace(nano, builder=replace(nano.builder, config=replace(nano.config, audio=None)))
    with serving(deaf) as listener, talking(listener, None) as talk:
        send(talk, GREEDY)
        assert "cannot take audio" in refused(talk, 1007)["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}", "Origin": "http://evil.example"},
        {"Authorization": f"Bearer {KEY}", "Origin": "null"},
        {"Cookie": "iolite_1=x"},
    ],
)
def test_strangers_are_not_let_in(server, headers):
    with pytest.raises(InvalidStatus) as found, talking(server, None, headers):
        pass
    assert found.value.response.status_code == 403


def test_no_key_in_the_address(server):
    """A link with the key is for pages that are gone to; here it would lie in logs of proxies."""
    url = f"{server.url.replace('http', 'ws', 1)}{live.PATH}?token={KEY}"
    with pytest.raises(InvalidStatus), connect(url, proxy=None):
        pass


def test_names_that_are_not_this_servers(server):
    host, port = server.url.removeprefix("http://").split(":")
    headers = {"Authorization": f"Bearer {KEY}"}
    for name, status in (("evil.example", 403), ("localhost", 101)):
        with socket.create_connection((host, int(port))) as connection:
            url = f"ws://{name}:{port}{live.PATH}"
            try:
                with connect(url, sock=connection, additional_headers=headers, proxy=None) as talk:
                    found = talk.response
            except InvalidStatus as error:
                found = error.response
        assert found.status_code == status


def test_the_browsers_cookie_is_enough(server):
    with httpx.Client(base_url=server.url) as browser:
        browser.get("/", params={"token": KEY})
        ((name, value),) = browser.cookies.items()
    cookie = {"Cookie": f"{name}={value}", "Origin": server.url}
    with talking(server, GREEDY, cookie | {"Sec-Fetch-Site": "same-origin"}):
        pass
    with pytest.raises(InvalidStatus), talking(server, None, cookie | {"Sec-Fetch-Site": "same-site"}):
        pass
