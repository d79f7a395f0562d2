"""Somebody who speaks through a WebSocket of a server, and hears what it answers."""

from __future__ import annotations

import contextlib
import io
import json
import wave

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from support.serving import DEMO, KEY

with wave.open(str(DEMO / "digits.wav")) as _file:
    DIGITS = _file.readframes(10**7)  # 1.6 s: "three zero nine"
SILENCE = bytes(32_000)  # 1 s


@contextlib.contextmanager
def connected(listener, path, start=None, headers=None):
    """A connection that is ready to hear, or without settings."""
    headers = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
    url = listener.url.replace("http", "ws", 1) + path
    with connect(url, additional_headers=headers, proxy=None, open_timeout=30) as talk:
        if start:
            send(talk, start)
            assert heard(talk)["type"] == "ready"
        yield talk


def send(talk, message):
    talk.send(json.dumps({"type": message} if isinstance(message, str) else message))


def heard(talk):
    return json.loads(talk.recv(timeout=60))


def until(talk, last):
    """Messages up to the first of that type."""
    found = [heard(talk)]
    while found[-1]["type"] != last:
        assert found[-1]["type"] != "error", found[-1]
        found.append(heard(talk))
    return found


def speak(talk, data, size=1280):
    for at in range(0, len(data), size):
        talk.send(data[at : at + size])


def idle(listener):
    answers = listener.app.state.service.answers
    stats = answers._engine.stats()
    taken = answers._places or answers._open or answers.sessions or list(answers._engine.prefixes._out)
    return not (stats.running or stats.waiting or stats.listening or taken)


def refused(talk, code):
    """The error that ends a connection."""
    message = heard(talk)
    while message["type"] in ("speech_started", "speech_ended", "delta", "done"):
        message = heard(talk)
    assert message["type"] == "error"
    with pytest.raises(ConnectionClosed) as closed:
        talk.recv(timeout=30)
    assert closed.value.rcvd.code == code
    return message


def wav(data):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(data)
    return file.getvalue()
