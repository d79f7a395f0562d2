"""Who enters, and how much of which prompt is read in a step. Numbers only: no tensors, no threads.

Requests enter in order of arrival, as long as a place is free and there is room for their caches; nobody overtakes, so
a large request waits only for those before it. Prompts share the tokens of a step: in order of arrival each takes half
of what is left, the last all of it. So who came first is read first, and a short prompt need not wait until a long one
before it is done. A picture is read whole, however large; who thereby takes more than its share, while others are
drawing, leaves out the next steps until the others have had as much.

A prompt that is still growing, because somebody speaks it, waits in no queue: it has a place of another kind until its
answer is complete, and is read before the others, as it grows by little.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Job(Protocol):
    """What the scheduler knows of a request."""

    @property
    def bytes(self) -> int:
        """What its cache is expected to take."""
        ...

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are still to be read, 0 once it is drawing. Asked after it has entered."""
        ...

    def reach(self, tokens: int) -> int:
        """How many tokens a chunk of about that many takes: fewer at the end of the prompt and before a picture, more
        where it begins with one; one at least."""
        ...


J = TypeVar("J", bound=Job)


class Scheduler(Generic[J]):
    """The requests of one engine: `waiting` for a place, and `running` in one, both in order of arrival; and `live`
    ones, whose prompts are still growing."""

    def __init__(self, slots: int, waiting: int, room: int, listeners: int = 0) -> None:
        """At most `slots` run, and as many wait for a place as there are `waiting`; room: bytes that all caches in use
        may take together. The first of them may take any number. listeners: that may be live, and then run beside the
        others."""
        self.slots, self.most, self.room, self.listeners = slots, slots + waiting, room, listeners
        self.waiting: deque[J] = deque()
        self.running: list[J] = []
        self.live: list[J] = []
        self._heard: list[J] = []  # of those that run, the ones that were live
        self._debts: dict[int, int] = {}  # by id: tokens that a prompt has had beyond its shares

    def __len__(self) -> int:
        """Those that are live left out."""
        return len(self.waiting) + len(self.running)

    def add(self, job: J) -> bool:
        """Takes a place in the queue; False where it is full."""
        if len(self) >= self.most:
            return False
        self.waiting.append(job)
        return True

    def remove(self, job: J) -> None:
        """Of a request that is live, waiting or running."""
        for jobs in (self.running, self.live, self._heard, self.waiting):
            if job in jobs:
                jobs.remove(job)
        self._debts.pop(id(job), None)

    def listen(self, job: J) -> bool:
        """Takes in a request whose prompt is still growing; False where the places for those or the room are taken."""
        if len(self.live) + len(self._heard) >= self.listeners or not self._has_room(job):
            return False
        self.live.append(job)
        return True

    def heard(self, job: J) -> None:
        """The prompt of a live request is whole."""
        self.live.remove(job)
        self.running.append(job)
        self._heard.append(job)

    def enter(self) -> list[J]:
        """Those who may run from now on."""
        entered = []
        while self.waiting and self._has_slot() and self._has_room(self.waiting[0]):
            entered.append(self.waiting.popleft())
            self.running.append(entered[-1])
        return entered

    def _has_slot(self) -> bool:
        return len(self.running) - len(self._heard) < self.slots

    def _has_room(self, job: J) -> bool:
        others = [*self.running, *self.live]
        return not others or sum(other.bytes for other in others) + job.bytes <= self.room

    def share(self, tokens: int) -> list[tuple[J, int]]:
        """Whose prompts are read in a step that has so many tokens for them, and how many of each.

        Together they exceed that number by less than one picture. Nobody may be read while others draw: the debt of
        the only prompt is to those.
        """
        drawing = any(not job.unread for job in self.running)
        reading = [job for job in (*self.live, *self.running) if job.unread]
        rest, left, found = sum(job.unread for job in reading), tokens, []
        for job in reading:
            if left <= 0:
                break
            rest -= job.unread  # of those behind, who have no use for more
            own = max(left - left // 2, left - rest)
            debt = self._debts.get(id(job), 0)
            if drawing and debt:
                self._debts[id(job)] = max(0, debt - own)
                continue
            taken = job.reach(own)
            self._debts[id(job)] = max(0, taken - own)
            left -= taken
            found.append((job, taken))
        return found
