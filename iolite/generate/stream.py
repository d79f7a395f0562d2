"""An answer as it comes: tokens in, events out, and the complete `Reply` after the last one."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from iolite.errors import UsageError
from iolite.generate.logprobs import ScoredDelta, Scores
from iolite.generate.loop import Drawn, StopStrings
from iolite.generate.reply import Drafting, Reply, Timings, ToolCall, Usage, explain
from iolite.generate.sampling import SamplingParams
from iolite.prompt import Prompt
from iolite.text.stream import ContentDelta, Event, EventParser, ReasoningDelta, ToolCallEnd
from iolite.text.tokenizer import Tokenizer


class Drawing(Protocol):
    """An answer that is being drawn: `Decoding`, or what an engine runs."""

    prompt: Prompt
    params: SamplingParams
    count: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    drafting: Drafting | None

    def __iter__(self) -> Iterator[Drawn]: ...


class ReplyStream:
    """Iterates once over the events of one answer (`iolite.text.stream`), thoughts, text and tool calls apart. Where
    logprobs are asked for, the text comes as `ScoredDelta`.

    `reply` is there when the iteration has ended. Stopping early is allowed: `close()` then makes a reply of what has
    come so far, with finish_reason "stop".
    """

    def __init__(
        self,
        decoding: Drawing,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] | None,
        prepare_seconds: float = 0.0,
    ) -> None:
        self._decoding, self._tokenizer = decoding, tokenizer
        self._parser = EventParser.for_prompt(tokenizer, decoding.prompt.ids, tools=tools)
        self._stops = StopStrings(decoding.params.stop)
        self._prepare_seconds = prepare_seconds
        self._scores = None if decoding.params.logprobs is None else Scores()
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._reasoning_tokens = 0
        self._reply: Reply | None = None
        self._events = self._run()

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def reply(self) -> Reply:
        """The whole answer. UsageError while there are events to come."""
        if self._reply is None:
            raise UsageError("the answer is not complete yet", "read the stream to its end, or close() it")
        return self._reply

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that have come to their end so far; each is here when its `ToolCallEnd` comes."""
        return tuple(self._calls)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that the answer ended at, if it did."""
        return self._stops.match

    def run(self) -> Reply:
        """Reads to the end."""
        for _ in self._events:
            pass
        return self.reply

    def close(self) -> None:
        """Ends the answer here."""
        self._events.close()
        if self._reply is None:
            self._finish("stop")

    def _run(self) -> Generator[Event]:
        reason = "stop"
        for drawn in self._decoding:
            reason = drawn.finish_reason or reason
            ended = drawn.id in self._decoding.params.stop_ids
            mode = self._parser.mode
            self._reasoning_tokens += not ended and mode == "reasoning"
            events = [] if ended else self._parser.push(drawn.id)
            # Some checkpoints' settings do not name every token that ends a turn; nothing after one could be shown.
            over = self._parser.mode == "ended"
            if drawn.finish_reason:
                events += self._parser.finish()
            if self._scores:
                self._note(self._scores, drawn, events, is_text=mode == "content" and not ended)
            for event in events:
                yield from self._take(event)
            if self._stops.found or over:
                reason = "stop"
                break
        yield from self._show(self._stops.flush())
        self._finish(reason)

    def _note(self, scores: Scores, drawn: Drawn, events: Sequence[Event], is_text: bool) -> None:
        """What is known of a token of the text; is_text: not of thoughts or calls."""
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        known = None
        if drawn.logprobs and is_text and drawn.id not in self._tokenizer.special_ids:
            known = drawn.logprobs.spelled(drawn.id, self._tokenizer)
        scores.came(text, known)

    def _take(self, event: Event) -> Iterator[Event]:
        """Notes the event for the reply and passes it on; of the answer's text only what no stop string can claim."""
        if isinstance(event, ContentDelta):
            yield from self._show(self._stops.push(event.text))
            return
        if self._stops.found:
            return
        yield from self._show(self._stops.flush())
        if isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCallEnd):
            error = event.error or (None if event.complete else "it was cut off")
            # Ids are drawn, not counted: the template finds a result's function by id, over all turns.
            self._calls.append(ToolCall(f"call_{secrets.token_hex(6)}", event.name, event.arguments, error))
        yield event

    def _show(self, text: str) -> Iterator[Event]:
        if text:
            self._text.append(text)
            yield ScoredDelta(text, self._scores.shown(text)) if self._scores else ContentDelta(text)

    def _finish(self, reason: str) -> None:
        text, reasoning = "".join(self._text), "".join(self._reasoning).strip()
        if reason == "stop" and any(call.error is None for call in self._calls):
            reason = "tool_calls"
        run, prompt_tokens, cached = self._decoding, len(self._decoding.prompt.ids), self._decoding.cached_tokens
        self._reply = Reply(
            text=text,
            reasoning=reasoning,
            finish_reason=reason,
            usage=Usage(prompt_tokens, run.count, self._reasoning_tokens, cached),
            timings=Timings(
                self._prepare_seconds,
                run.prefill_seconds,
                run.decode_seconds,
                prompt_tokens,
                run.count,
                cached,
                run.drafting,
            ),
            tool_calls=self._calls,
            notice=explain(text, reason, self._calls, reasoning, run.count),
            logprobs=self._scores.told if self._scores else None,
        )
