"""Connections that ask nothing are closed, so that they do not take the places of those that do.

uvicorn waits without a limit for a request to begin, and anybody may open connections: no key is asked for before a
request's head is there. Between two requests it closes a silent connection after 5 s, but one byte makes it wait again.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 20.0  # seconds in which the whole head of a request must have come, whatever else has


class Connection(H11Protocol):
    """uvicorn's, which waits for the head of a request for so long and no longer. A new connection for which there is
    no more room takes the place of the one that has kept its head back longest."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        super().handle_websocket_upgrade(event)
        self._stop_waiting()  # from here on it is another protocol's

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _watch(self) -> None:
        """Waits while no request is being answered, from the last one's end on and not from the last byte."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None and self in self.connections and not self.transport.is_closing():
            self._waiting = self.loop.call_later(PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._stop_waiting()
        self.transport.close()

    def _make_room(self) -> None:
        waiting = {c._waiting.when(): c for c in self.connections if isinstance(c, Connection) and c._waiting}
        if waiting:
            waiting[min(waiting)]._give_up()
