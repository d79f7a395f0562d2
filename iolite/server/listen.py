"""A server from its first to its last connection."""

from __future__ import annotations

import _thread
import asyncio
import os
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from iolite.errors import UsageError
from iolite.generate.model import Model
from iolite.media import worker
from iolite.server.app import make_app
from iolite.server.connections import Connection
from iolite.server.settings import Settings

MOST_CONNECTIONS = 1000  # beyond it connections are answered with 503
LAST_WORDS = 0.5  # seconds between the second signal and the end, in which streams are told


class Listener(uvicorn.Server):
    """uvicorn's, which lets answers end before it goes. `url` is there from the start."""

    def __init__(self, model: Model, settings: Settings, name: str | None = None) -> None:
        """Raises UsageError when the address cannot be had."""
        self.socket = _bind(settings)
        port = self.socket.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{port}"
        self.app = make_app(model, settings, name, port)
        super().__init__(
            uvicorn.Config(
                self.app,
                http=Connection,
                log_level="critical",  # errors are told by iolite/server/errors.py; addresses may hold a key
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=1,  # after the answers' own time
                ws_max_size=2**20,
            )
        )

    def run_here(self, ready: Callable[[], None] | None = None) -> None:
        """Serves until a signal or `should_exit` says to stop. ready is called when connections are taken."""
        self._ready = ready
        try:
            self.run([self.socket])
        finally:  # also when it was told to hurry: threads that wait for an answer would keep the process
            self.app.state.service.answers.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:
            listening.close()
        await self.app.state.service.answers.drain()
        await asyncio.sleep(0.05)  # for the last words of those that were ended
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers end, the second ends the process, whatever its threads are doing."""
        if self.should_exit and not self.force_exit:
            self.force_exit = True
            self.app.state.service.answers.hurry()
            _thread.start_new_thread(_end, (sig,))  # takes no lock that what was interrupted may hold
        self.should_exit = True


def _end(sig: int) -> None:
    """Ends the process soon. Python itself would wait for every thread that makes a prompt, and leave the children
    that decode for it. What chats hold is stored already."""
    time.sleep(LAST_WORDS)
    worker.kill_all()
    os._exit(128 + sig)


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named because asyncio sends at once (TCP_NODELAY) only where it is; else answers wait 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        taken = f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}"
        raise UsageError(taken, "give another --port, or 0 for any that is free") from None
    return listening
