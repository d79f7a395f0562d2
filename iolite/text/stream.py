"""Token ids as they are drawn -> text, and -> events: content, thoughts and tool calls apart.

One state machine over ids, not over text: only a token can open or close a thought, a call or a string, so nothing that
the model writes in letters is mistaken for structure. The order of a full answer:

    <|channel>thought\\n … \\n<channel|>  content  <|tool_call>call:NAME{…}<tool_call|> …  <|tool_response>

Whatever the cut of the stream, the events add up to the same: text is passed on character by character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iolite.text.calls import CallReader, schemas_of
from iolite.text.tokenizer import Tokenizer

Mode = Literal["content", "reasoning", "tool_call", "ended"]


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call has begun and its function is known. Calls of one answer count from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments as JSON text: whole keys with their values."""

    index: int
    arguments_json_fragment: str


@dataclass(frozen=True)
class ToolCallEnd:
    """A call is over. Only a complete one may be run; error says what is wrong with any other.

    The fragments of a complete call make the JSON of arguments; of an incomplete one, arguments are those keys whose
    values were read to the end.
    """

    index: int
    name: str
    arguments: dict[str, Any]
    complete: bool
    error: str | None


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


class TokenStream:
    """Text of ids given one by one. The bytes of a character are held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; special tokens are spelled out."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at an end: nothing, or U+FFFD for a character that never became whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


_NAME = re.compile(r"[a-z_]{0,32}")  # of a channel; the family writes only "thought"


class EventParser:
    """Turns the ids of one answer into events. `mode` says what the next token will be part of.

    start is "reasoning" when the prompt ends inside an open thought; `for_prompt` finds that out. tools give the
    schemas that arguments are coerced by. Nothing that a model writes makes it raise.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        start: Literal["content", "reasoning"] = "content",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.mode: Mode = start
        self._specials = {i: tokenizer.id_to_token(i) for i in tokenizer.special_ids}
        self._stream = TokenStream(tokenizer)
        self._schemas = schemas_of(tools)
        self._outer: Literal["content", "reasoning"] = start  # what a call returns to
        self._header: str | None = None  # beginning of a channel, while it may still be its name
        self._newline = ""  # held back: the one before <channel|> belongs to the grammar
        self._call: CallReader | None = None
        self._string: list[str] | None = None  # the open string of a call
        self._calls = 0
        self._announced = False

    @classmethod
    def for_prompt(
        cls, tokenizer: Tokenizer, ids: Sequence[int], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> EventParser:
        """The parser of what comes after a prompt, whose open thought, if any, goes on."""
        parser = cls(tokenizer, start=prompt_start(tokenizer, ids), tools=tools)
        if parser.mode == "reasoning":
            opened = len(ids) - 1 - list(reversed(ids)).index(tokenizer.token_id("<|channel>") or 0)
            parser._header = ""
            parser._think(tokenizer.decode(ids[opened + 1 :]))
            parser._newline = ""
        return parser

    def push(self, token_id: int) -> list[Event]:
        """The events that one more token makes certain; often none or one."""
        if self.mode == "ended":
            return []
        special = self._specials.get(token_id)
        if self._string is not None:
            return self._push_string(token_id, special)
        if special is None:
            return self._text(self._stream.push(token_id))
        return self._text(self._stream.flush()) + self._structure(special)

    def finish(self) -> list[Event]:
        """The events of an answer that ends here, by a stop token that was not pushed or for want of tokens.

        An open thought stays a thought; a call without its closing token is incomplete.
        """
        events = [] if self._string is not None else self._text(self._stream.flush())
        events += self._close_header()
        if self.mode == "reasoning" and self._newline:  # nobody has said that it was the grammar's
            events.append(ReasoningDelta(self._newline))
        return events + self._end(closed=False)

    # ---- structure: what a special token does ----

    def _structure(self, token: str) -> list[Event]:
        if token in ("<turn|>", "<|tool_response>", "<eos>"):
            return self._end(closed=True)
        if token == "<|channel>":
            return self._open_channel()
        if token == "<channel|>" and self.mode != "tool_call":
            return self._close_channel()
        if token == "<|tool_call>":
            return self._open_call()
        if token == "<tool_call|>":
            return self._close_call(closed=True)
        if token == '<|"|>':
            return self._open_string()
        return []  # padding, media, a stray closing token: not text, and nothing to act on

    def _end(self, closed: bool) -> list[Event]:
        events = self._close_header() + self._close_call(closed)
        self.mode = "ended"
        return events

    def _open_channel(self) -> list[Event]:
        """Also inside a thought, where the model repeats itself, and inside a call, which is lost by it."""
        events = self._close_header() + self._close_call(closed=True)
        self.mode = self._outer = "reasoning"
        self._header = ""
        return events

    def _close_channel(self) -> list[Event]:
        events = self._close_header()
        self.mode = self._outer = "content"
        return events

    def _open_call(self) -> list[Event]:
        events = self._close_header() + self._close_call(closed=True)
        self._call, self._announced = CallReader(self._schemas), False
        self.mode = "tool_call"
        return events

    def _close_call(self, closed: bool) -> list[Event]:
        """closed: the model went on to something else; otherwise its tokens ended."""
        call, index = self._call, self._calls
        if call is None:
            return []
        if self._string is not None:
            self._string = None
            self._stream.flush()
        call.end(closed)
        events = self._read_call()
        name = call.name or ""
        events.append(ToolCallEnd(index, name, call.arguments, call.error is None, call.error))
        self._call, self._calls, self.mode = None, index + 1, self._outer
        return events

    # ---- text, by mode ----

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        if self.mode == "content":
            return [ContentDelta(text)]
        if self.mode == "reasoning":
            return self._think(text)
        assert self._call is not None
        self._call.text(text)
        return self._read_call()

    def _think(self, text: str) -> list[Event]:
        if self._header is not None:
            text = self._header + text
            name, line_end, rest = text.partition("\n")
            if not _NAME.fullmatch(name):
                self._header = None
            elif not line_end:
                self._header = text
                return []
            else:
                self._header, text = None, rest
        if not text:
            return []
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        return [ReasoningDelta(text)] if text else []

    def _close_header(self) -> list[Event]:
        """A channel is over, or its stream: what looked like its name was all it said."""
        header, self._header = self._header, None
        return [] if header is None or "thought".startswith(header) else self._think(header)

    def _read_call(self) -> list[Event]:
        """Events for what the call's reader has found out."""
        assert self._call is not None
        events: list[Event] = []
        if self._call.name is not None and not self._announced:
            self._announced = True
            events.append(ToolCallStart(self._calls, self._call.name))
        fragment = self._call.take_fragment()
        return [*events, ToolCallDelta(self._calls, fragment)] if fragment else events

    # ---- strings: between two quote tokens everything is literal ----

    def _open_string(self) -> list[Event]:
        if self.mode == "tool_call":
            self._string = []
            return []
        return self._text('"')

    def _push_string(self, token_id: int, special: str | None) -> list[Event]:
        assert self._string is not None and self._call is not None
        if special != '<|"|>':
            self._string.append(self._stream.push(token_id))
            return []
        value = "".join((*self._string, self._stream.flush()))
        self._string = None
        self._call.string(value)
        return self._read_call()


def prompt_start(tokenizer: Tokenizer, ids: Sequence[int]) -> Literal["content", "reasoning"]:
    """Whether what follows the prompt is content or, the prompt ending inside an open channel, a thought."""
    opener = tokenizer.token_id("<|channel>")
    others = {tokenizer.token_id(t) for t in ("<channel|>", "<|turn>", "<turn|>", "<tool_response|>")}
    for token_id in reversed(ids):
        if token_id == opener:
            return "reasoning"
        if token_id in others:
            break
    return "content"


def parse_events(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    *,
    start: Literal["content", "reasoning"] = "content",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Event]:
    """The events of a whole answer, neighbouring deltas joined."""
    parser = EventParser(tokenizer, start=start, tools=tools)
    return join_deltas([event for i in ids for event in parser.push(i)] + parser.finish())


def join_deltas(events: Iterable[Event]) -> list[Event]:
    """The same events with each run of deltas as one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta):
            joined[-1] = ToolCallDelta(event.index, last.arguments_json_fragment + event.arguments_json_fragment)
        else:
            joined.append(event)
    return joined
