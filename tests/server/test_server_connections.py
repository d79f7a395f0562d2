"""Connections that send no request do not stay, and keep nobody out; those that do are left alone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from support.serving import KEY, asking, serving, wait_for
from support.speaking import DIGITS, connected, send, speak, until

from iolite.server import connections, listen, live

CHAT = "/v1/chat/completions"
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def opened(listener, first: bytes = b"") -> socket.socket:
    host, port = listener.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(first)
    return connection


def held(listener) -> int:
    return len(listener.server_state.connections)


@pytest.fixture
def hasty(nano, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with serving(nano) as listener:
        yield listener


@pytest.mark.parametrize("first", [b"", b"G", HEAD, HEAD + b"X: "])
def test_who_sends_no_whole_head_is_hung_up_on(hasty, first):
    with opened(hasty, first) as connection:
        assert connection.recv(100) == b""


def test_bytes_one_at_a_time_win_no_time(hasty):
    with opened(hasty, HEAD + b"X: ") as connection, contextlib.suppress(ConnectionError):
        for _ in range(3000):
            connection.sendall(b"a")
            time.sleep(0.02)
        pytest.fail("it was waited for")


def test_the_head_of_a_second_request_is_not_waited_for_either(hasty):
    for first in (HEAD + b"\r\n", b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n"):
        with opened(hasty, first) as connection:  # the second is refused without its body, for it has no key
            assert connection.recv(10_000).startswith(b"HTTP/1.1 ")
            connection.sendall(b"G")
            while connection.recv(10_000):
                pass


def test_answers_and_open_connections_take_their_time(script, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    with serving(script.model) as listener, asking(listener) as http:
        script.say("at last")
        script.gate.clear()
        found = []
        asked = {"messages": [{"role": "user", "content": "hm"}]}
        waiting = threading.Thread(target=lambda: found.append(http.post(CHAT, json=asked)))
        waiting.start()
        with opened(listener) as idle:
            assert idle.recv(100) == b""  # so the limit has passed
        script.gate.set()
        waiting.join(60)
        assert found[0].json()["choices"][0]["message"]["content"] == "at last"
        assert http.get("/health").status_code == 200
    script.say("at last")
    with (
        serving(script.model) as listener,
        connected(listener, live.PATH, {"type": "start", "silence_ms": None}) as talk,
    ):
        with opened(listener) as idle:
            assert idle.recv(100) == b""
        speak(talk, DIGITS)
        send(talk, "commit")
        assert until(talk, "done")[-1]["text"] == "at last"


def test_idle_connections_keep_nobody_out(nano, monkeypatch):
    monkeypatch.setattr(listen, "MOST_CONNECTIONS", 20)
    with serving(nano) as listener, contextlib.ExitStack() as stack:
        first = stack.enter_context(opened(listener))
        wait_for(lambda: held(listener) == 1)
        for _ in range(40):
            stack.enter_context(opened(listener))
        for _ in range(3):
            with asking(listener, KEY) as http:
                assert http.get("/health").status_code == 200
        assert held(listener) <= 20
        assert first.recv(1) == b""  # the one that had waited longest
