"""Who enters and what is read, for any requests: order, bounds, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iolite.engine.scheduler import Scheduler


@dataclass(eq=False)
class Request:
    """A prompt of runs: 1 for a token that may be cut off, more for a picture. Then it draws for some steps."""

    runs: list[int]
    draws: int
    bytes: int = 1
    read: int = 0
    read_in: list[int] = field(default_factory=list)  # steps

    @property
    def unread(self) -> int:
        return sum(self.runs) - self.read

    def reach(self, tokens: int) -> int:
        """As `chunk_end` has it."""
        start, stop, at = self.read, min(self.read + tokens, sum(self.runs)), 0
        for run in self.runs:
            if at < stop < at + run:
                stop = at if at > start else at + run
            at += run
        return stop - start


LARGEST = 9
RUNS = st.lists(st.one_of(st.just(1), st.integers(2, LARGEST)), min_size=1, max_size=30)
REQUESTS = st.lists(st.builds(Request, RUNS, st.integers(1, 20), st.integers(0, 10)), min_size=1, max_size=12)


def play(requests, slots, room, tokens, arrivals=1):
    """Runs all of them to their ends; yields (scheduler, entered, shares) of each step, before it is done."""
    scheduler, coming, step = Scheduler(slots, len(requests), room), list(requests), 0
    while coming or len(scheduler):
        for request in coming[:arrivals]:
            assert scheduler.add(request)
        coming = coming[arrivals:]
        entered = scheduler.enter()
        drawing = [request for request in scheduler.running if not request.unread]
        shares = scheduler.share(tokens)
        yield scheduler, entered, shares, drawing
        for request, count in shares:
            request.read += count
            request.read_in.append(step)
        for request in drawing:
            request.draws -= 1
            if not request.draws:
                scheduler.remove(request)
        step += 1
        assert step < 5000, "somebody waits for ever"


@given(REQUESTS, st.integers(1, 5), st.integers(0, 25), st.integers(1, 12), st.integers(1, 4))
def test_requests_enter_in_order_and_within_bounds(requests, slots, room, tokens, arrivals):
    order = []
    for scheduler, entered, shares, _ in play(requests, slots, room, tokens, arrivals):
        order += entered
        running = scheduler.running
        assert 0 < len(running) <= slots
        assert len(running) == 1 or sum(request.bytes for request in running) <= room
        if scheduler.waiting and len(running) < slots:  # only memory keeps the next one out
            assert sum(request.bytes for request in running) + scheduler.waiting[0].bytes > room
        assert all(0 < count <= request.unread for request, count in shares)
        assert sum(count for _, count in shares) < tokens + LARGEST
        assert [r for r, _ in shares] == [r for r in running if r in {r for r, _ in shares}]
    assert order == requests
    assert all(request.unread == request.draws == 0 for request in requests)


@given(REQUESTS, st.integers(1, 5), st.integers(1, 12))
def test_those_who_draw_wait_for_no_more_than_their_share(requests, slots, tokens):
    """While somebody draws, prompts have `tokens` a step on average, and each prompt at most one picture in advance."""
    read = steps = 0
    for _, _, shares, drawing in play(requests, slots, 1000, tokens):
        if not drawing:
            read = steps = 0  # nobody is waiting
            continue
        steps += 1
        read += sum(count for _, count in shares)
        assert read <= steps * tokens + len(requests) * LARGEST


@given(REQUESTS, st.integers(1, 5), st.integers(1, 12))
def test_no_step_is_idle(requests, slots, tokens):
    for _, _, shares, drawing in play(requests, slots, 1000, tokens):
        assert shares or drawing


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.integers(1, 40))
def test_prompts_share_a_step_by_arrival(lengths, tokens):
    """Of prompts without pictures: nothing is left over, and each has at least as much as all behind it."""
    scheduler = Scheduler(len(lengths), 0, 1000)
    requests = [Request([1] * length, 1) for length in lengths]
    for request in requests:
        scheduler.add(request)
    scheduler.enter()
    shares = [count for _, count in scheduler.share(tokens)]
    assert sum(shares) == min(tokens, sum(lengths))
    for i, count in enumerate(shares):
        assert count == lengths[i] or count >= sum(shares[i + 1 :])


def test_a_short_prompt_behind_a_long_one_is_read_soon():
    long, short = Request([1] * 10_000, 1), Request([1] * 20, 1)
    steps = 0
    for _ in play([long, short], 2, 1000, 16):
        if not short.unread:
            break
        steps += 1
    assert steps <= 5 < long.unread / 16


def test_a_long_video_does_not_hold_up_a_short_prompt():
    """The video's pictures are larger than a step, and somebody draws."""
    drawing, video, short = Request([1], 10_000), Request([70] * 50, 1), Request([1] * 20, 1)
    steps = 0
    for _ in play([drawing, video, short], 3, 1000, 16):
        if not short.unread:
            break
        steps += 1
    assert steps <= 8 < video.unread / 70


def test_a_full_queue_refuses():
    scheduler = Scheduler(2, 1, 1000)
    requests = [Request([1], 1) for _ in range(4)]
    assert [scheduler.add(request) for request in requests] == [True, True, True, False]
    assert scheduler.enter() == requests[:2]
    assert not scheduler.add(requests[3])
    scheduler.remove(requests[2])  # whoever waits may leave
    assert scheduler.add(requests[3])
    scheduler.remove(requests[0])
    assert scheduler.enter() == [requests[3]]


@pytest.mark.parametrize("large", [0, 1, 2])
def test_nobody_overtakes_a_large_request(large):
    """One that is larger than all the room runs by itself, after those before it and before those behind it."""
    requests = [Request([1], 3, bytes=100 if i == large else 4) for i in range(3)]
    seen = [list(scheduler.running) for scheduler, *_ in play(requests, 3, 10, 8, arrivals=3)]
    assert [requests[large]] in seen
    assert not any(requests[large] in running and len(running) > 1 for running in seen)
