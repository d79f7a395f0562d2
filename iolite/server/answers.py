"""Between the interfaces and the model: requests in, events out, and never a wait on the event loop.

A request's prompt is made on one of few threads (template, tokenizer, media), its answer drawn elsewhere and read on a
thread of its own, which hands every event to the event loop. All that is open at once is bounded; what would be more
is refused before any of its media is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from starlette.requests import Request

from iolite.engine.engine import Engine
from iolite.engine.listening import Listening
from iolite.engine.running import Running
from iolite.errors import BusyError, UsageError
from iolite.generate.grammar import Constraint
from iolite.generate.logprobs import ScoredDelta
from iolite.generate.model import Model
from iolite.generate.reply import Reply, ToolCall
from iolite.generate.sampling import SamplingParams
from iolite.generate.stream import ReplyStream
from iolite.prompt import Prompt
from iolite.server.errors import StoppingError
from iolite.server.metrics import Meters
from iolite.server.plain import PlainStream, plain_prompt
from iolite.server.settings import Settings
from iolite.server.sources import check_sources, guarded
from iolite.text.stream import ContentDelta, Event, ReasoningDelta, ToolCallEnd

T = TypeVar("T")
B = TypeVar("B", "Answer", Listening)
Item = ContentDelta | ReasoningDelta | ToolCall | Reply
"""Of one answer: text, thoughts, whole calls that may be run, and last the reply."""

PREPARING = 2  # threads that make prompts

_APART = 0.03
"""Seconds between what is handed on of an answer, after its first token. A small model draws many tokens in it, and
each piece by itself costs the server, its client and what lies between them more than drawing does; nobody sees the
difference. Of all answers at the same times, so that drawing is disturbed once and not once for each."""


@dataclass(frozen=True)
class Ask:
    """What every interface's request comes down to. texts: go on with each as it stands, instead of with messages;
    a text may be its token ids. ends: end tokens are told of among the logprobs of such texts.

    sampling: settings as `Model.sampling` takes them, None for what was not given. schema and the like as
    `Model.constraint` takes them.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    texts: Sequence[str | Sequence[int]] = ()
    ends: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = None
    schema: Mapping[str, Any] | None = None
    grammar: str | Mapping[str, str] | None = None
    parallel_tool_calls: bool = True
    thinking: bool = False
    thinking_budget: int | None = None  # tokens
    preserve_thinking: bool = False
    image_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 1  # answers to each text, or to the messages

    @property
    def places(self) -> int:
        """Answers to all of it."""
        return self.choices * max(len(self.texts), 1)


class Stream(Protocol):
    """What `ReplyStream` and `PlainStream` have in common."""

    @property
    def reply(self) -> Reply: ...
    @property
    def stopped_by(self) -> str | None: ...
    def __iter__(self) -> Any: ...


class Answers:
    """Starts answers, and knows those that are open."""

    def __init__(self, model: Model, settings: Settings, meters: Meters) -> None:
        self.model, self.settings, self.meters = guarded(model, settings), settings, meters
        self._engine = Engine(self.model, slots=settings.slots, waiting=settings.waiting, listeners=settings.slots)
        self._most = settings.slots + settings.waiting
        self._preparing = ThreadPoolExecutor(PREPARING, "prompt")
        self._reading = ThreadPoolExecutor(self._most, "answer")
        self._beside = ThreadPoolExecutor(1, "beside")
        self._open: set[Answer] = set()
        meters.watch(self._engine.stats)
        self._places = 0  # taken by answers that are open or on their way
        self.sessions = 0  # WebSockets that are open
        self.stopping = False
        self._hurried = False

    async def start(self, ask: Ask) -> Answer:
        """Begins to answer. Every mistake in the request is raised here, BusyError when there is no room."""
        if ask.places > self._most:
            raise UsageError(f"the request asks for {ask.places} answers; there may be {self._most}", "ask for fewer")
        loop = asyncio.get_running_loop()
        answer = await self._begun(ask.places, lambda: self._begin(ask, loop))
        self._open.add(answer)
        return answer

    async def listen(self, ask: Ask, template: Prompt) -> Listening:
        """Begins to hear what takes the place of the last recording in a prompt. Whoever has it gives it to
        `answer_to` or `forget`; a mistake is raised here, BusyError when there is no room."""

        def begin() -> Listening:
            params = self.sampling(ask)
            return self._engine.listen(template, params, constraint=self._constraint(ask, template, params))

        return await self._begun(1, begin)

    async def answer_to(self, ask: Ask, listening: Listening, came: float) -> Answer:
        """What was heard is all, and is answered. came: when the last of it did, by perf_counter."""
        seconds = time.perf_counter() - came
        running = await asyncio.to_thread(listening.commit)
        answer = Answer(self, asyncio.get_running_loop(), [running])
        self._open.add(answer)
        self._reading.submit(answer.read, 0, self._stream(ask, running, seconds))
        return answer

    def forget(self, listening: Listening) -> None:
        """It is not answered."""
        listening.cancel()
        self.leave(1)

    async def _begun(self, places: int, begin: Callable[[], B]) -> B:
        """What begin() makes on one of the threads that make prompts, in that many places of its own."""
        self.enter(places)
        begun = asyncio.get_running_loop().run_in_executor(self._preparing, begin)
        try:
            return await asyncio.shield(begun)
        except BaseException:
            begun.add_done_callback(_abandon)
            self.leave(places)
            raise

    async def prompt(self, ask: Ask) -> Prompt:
        """The prompt of messages that ask for no answer."""
        return await self.prepared(lambda: self._prompts(ask)[0])

    async def beside(self, work: Callable[[], T]) -> T:
        """Does some work of the model that is no answer; one at a time, since each takes a cache of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._beside, work)

    async def prepared(self, work: Callable[[], T]) -> T:
        """Does some work on one of the threads that make prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def enter(self, places: int) -> None:
        """Takes places, which are to be left; BusyError where there are not as many."""
        if self.stopping:
            raise StoppingError("the server is about to stop")
        if self._places + places > self._most:
            raise BusyError(f"all {self._most} places are taken", "ask again a little later", retry_after=5.0)
        self._places += places

    def leave(self, places: int, answer: Answer | None = None) -> None:
        if answer:
            self._open.discard(answer)
        self._places -= places

    def _begin(self, ask: Ask, loop: asyncio.AbstractEventLoop) -> Answer:
        """On a thread: the prompts, and their answers on their way, those to the first text first."""
        begin = time.perf_counter()
        prompts, params, runnings = self._prompts(ask), self.sampling(ask), list[Running]()
        try:
            for prompt, choice in itertools.product(prompts, range(ask.choices)):
                seed = None if params.seed is None else (params.seed + choice) % 2**64
                constraint = self._constraint(ask, prompt, params)
                runnings.append(self._engine.submit(prompt, replace(params, seed=seed), constraint=constraint))
        except BaseException:
            for running in runnings:
                running.cancel()
            raise
        answer, seconds = Answer(self, loop, runnings), time.perf_counter() - begin
        for choice, running in enumerate(runnings):
            self._reading.submit(answer.read, choice, self._stream(ask, running, seconds))
        return answer

    def _prompts(self, ask: Ask) -> list[Prompt]:
        if ask.texts:
            return [plain_prompt(self.model, text) for text in ask.texts]
        check_sources(ask.messages, self.settings)
        return [self.model.prompt(ask.messages, ask.tools, ask.thinking, ask.preserve_thinking, ask.image_tokens)]

    def _constraint(self, ask: Ask, prompt: Prompt, params: SamplingParams) -> Constraint | None:
        if ask.texts:
            return None
        return self.model.constraint(
            prompt,
            params,
            schema=ask.schema,
            grammar=ask.grammar,
            tools=ask.tools,
            tool_choice=ask.tool_choice,
            parallel_tool_calls=ask.parallel_tool_calls,
            thinking=ask.thinking,
            thinking_budget=ask.thinking_budget,
        )

    def sampling(self, ask: Ask) -> SamplingParams:
        asked = {"max_tokens": self.settings.max_tokens} | {k: v for k, v in ask.sampling.items() if v is not None}
        return self.model.sampling(**asked)

    def _stream(self, ask: Ask, running: Running, seconds: float) -> Stream:
        if ask.texts:
            return PlainStream(running, self.model.tokenizer, seconds, ask.ends)
        return ReplyStream(running, self.model.tokenizer, ask.tools, prepare_seconds=seconds)

    async def drain(self) -> None:
        """Takes nothing new, lets what is open end for as long as the settings say, and then ends it."""
        self.stopping = True
        deadline = time.monotonic() + self.settings.grace
        while self._open and not self._hurried and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for answer in list(self._open):
            answer.fail(StoppingError("the server was stopped before the answer was complete"))

    def hurry(self) -> None:
        """From now on nothing is waited for."""
        self._hurried = True

    @property
    def broken(self) -> bool:
        """Whether the engine has stopped by itself."""
        return self._engine.stats().broken

    def close(self) -> None:
        for answer in list(self._open):
            answer.close()
        self._engine.close()
        self._preparing.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)
        self._beside.shutdown(cancel_futures=True)


class Answer:
    """The answers to one request as they come: `async for choice, item in answer`, ended by one Reply for each.

    item None: nothing has come for a while. Whoever has started it must close it.
    """

    def __init__(self, answers: Answers, loop: asyncio.AbstractEventLoop, runnings: Sequence[Running]) -> None:
        self._answers, self._loop, self._runnings = answers, loop, runnings
        self._items: asyncio.Queue[tuple[int, Item | BaseException]] = asyncio.Queue()
        self._closed = False
        self.stopped_by: dict[int, str | None] = {}  # which stop string ended the answers that are complete

    @property
    def prompt_tokens(self) -> int:
        return len(self._runnings[0].prompt.ids)

    def read(self, choice: int, stream: Stream) -> None:
        """On a thread of its own: every event of one answer."""
        running, items = self._runnings[choice], list[Item]()

        def hand_over() -> None:
            if items:
                self._put(choice, _joined(items))
                items.clear()
                running.gather(_APART - time.monotonic() % _APART)

        running.before_wait = hand_over
        try:
            for event in stream:
                item = _item(event, stream)
                if item is not None:
                    items.append(item)
            self.stopped_by[choice] = stream.stopped_by
            self._put(choice, [*_joined(items), stream.reply])
        except BaseException as error:
            self._put(choice, [*_joined(items), error])
        finally:
            running.cancel()

    def _put(self, choice: int, items: Sequence[Item | BaseException]) -> None:
        def take() -> None:
            for item in items:
                self._items.put_nowait((choice, item))

        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
            self._loop.call_soon_threadsafe(take)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Item | None]]:
        left = len(self._runnings)
        while left:
            try:
                # Not `wait_for`, which in Python 3.11 forgets that it was cancelled when an item comes just then.
                async with asyncio.timeout(self._answers.settings.ping):
                    choice, item = await self._items.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Reply):
                left -= 1
                self._answers.meters.count(item)
            yield choice, item

    async def replies(self, request: Request) -> list[Reply]:
        """All of them, complete, in order. Ends the answers when the client goes away."""
        found = dict[int, Reply]()

        async def collect() -> None:
            async for choice, item in self:
                if isinstance(item, Reply):
                    found[choice] = item

        try:
            await until_gone(request, collect())
        finally:
            self.close()
        return [found[choice] for choice in sorted(found)]

    def fail(self, error: Exception) -> None:
        """Ends the answers with an error."""
        self._items.put_nowait((0, error))

    def close(self) -> None:
        """Ends what has not ended yet. May be called again."""
        if not self._closed:
            self._closed = True
            self.cancel()
            self._answers.leave(len(self._runnings), self)

    def cancel(self) -> None:
        for running in self._runnings:
            running.cancel()


def _item(event: Event, stream: Stream) -> Item | None:
    """What clients see of an event: a call when it is complete, so that none is begun which must not be run."""
    if isinstance(event, ToolCallEnd):
        assert isinstance(stream, ReplyStream)
        return stream.tool_calls[-1] if event.complete and event.error is None else None
    return event if isinstance(event, ContentDelta | ReasoningDelta) else None


def _joined(items: Sequence[Item]) -> list[Item]:
    """The same with each run of text, and of thoughts, as one item."""
    joined: list[Item] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, ScoredDelta) and isinstance(last, ScoredDelta):
            joined[-1] = ScoredDelta(last.text + item.text, last.logprobs + item.logprobs)
        elif isinstance(item, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + item.text)
        elif isinstance(item, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + item.text)
        else:
            joined.append(item)
    return joined


def _abandon(begun: asyncio.Future[B]) -> None:
    """Ends what was begun for somebody who has left meanwhile."""
    if not begun.cancelled() and not begun.exception():
        begun.result().cancel()


async def until_gone(request: Request, work: Any) -> None:
    """Awaits work, and breaks it off when the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""
