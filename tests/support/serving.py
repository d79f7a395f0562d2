"""Real servers on threads of the test's process, asked over real sockets, and a model that says what it is told to."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from iolite.server.listen import Listener
from iolite.server.settings import Settings

KEY = "key-of-the-tests-0123456789"
DEMO = Path(__file__).parents[2] / "docs" / "demo"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until something has become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(model, **settings) -> Iterator[Listener]:
    """A server of the model on a port of its own, until the block is left."""
    listener = Listener(model, Settings(**{"port": 0, "key": KEY, "grace": 5.0} | settings))
    thread = threading.Thread(target=listener.run_here)
    thread.start()
    try:
        wait_for(lambda: listener.started or not thread.is_alive())
        yield listener
    finally:
        listener.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def asking(listener: Listener, key: str = KEY, **more) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=listener.url, headers={"Authorization": f"Bearer {key}"}, timeout=60, **more) as client:
        yield client


def raw(listener, text: bytes) -> bytes:
    """What comes back for bytes that no client library would send."""
    host, port = listener.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def data_uri(name: str) -> str:
    kind = "audio/wav" if name.endswith("wav") else "image/png"
    return f"data:{kind};base64,{base64_of(name)}"


def base64_of(name: str) -> str:
    return base64.b64encode((DEMO / name).read_bytes()).decode()


class Script:
    """What a model says: `text`, whose special tokens are tokens, again and again. `step` is held before each token
    while `gate` is clear."""

    def __init__(self, model) -> None:
        self.model, self.gate, self.drawn = model, threading.Event(), 0
        self.gate.set()
        self.ids: list[int] = []

    def say(self, text: str, end: str = "<turn|>") -> None:
        self.ids, self.drawn = [*self.model.tokenizer.encode(text), self.model.tokenizer.token_id(end)], 0

    def logits(self, hidden):
        import torch

        assert self.gate.wait(60)
        rows = torch.full((hidden.shape[0], self.model.config.text.vocab_size), -30.0)
        rows[-1, self.ids[self.drawn % len(self.ids)]] = 30.0
        self.drawn += 1
        return rows
