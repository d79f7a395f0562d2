"""What an answer is made of: text, thoughts, tool calls, why it ended, what it cost and how long it took."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. `error` says what is wrong with a call that must not be run."""

    id: str
    name: str
    arguments: dict[str, Any]
    error: str | None = None

    def to_message(self) -> dict[str, Any]:
        """The form that an assistant message's `tool_calls` takes."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Usage:
    """Tokens: in the prompt (media expanded), drawn (the end token included), how many of those were thoughts, and how
    many of the prompt's had been read before and were not read again."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Drafting:
    """How drafting went. An answer's first token is the prefill's and counts nowhere here."""

    passes: int = 0  # of the model
    drafted: int = 0  # tokens that were proposed to it
    accepted: int = 0
    tokens: int = 0  # drawn
    seconds: float = 0.0  # of drafts and passes
    plain_seconds: float = 0.0  # what as many tokens take one by one, by the measured cost of a pass

    def add(self, drafted: int, accepted: int, tokens: int, seconds: float = 0.0, plain_seconds: float = 0.0) -> None:
        """One pass: how long it took with its drafts, and how long a plain one takes; both 0 if it was not timed."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += tokens
        self.seconds += seconds
        self.plain_seconds += tokens * plain_seconds

    @property
    def mean_accepted_length(self) -> float:
        """Tokens drawn in a pass, the model's own included; 0.0 before the first."""
        return self.tokens / max(1, self.passes)

    @property
    def drafts_per_pass(self) -> float:
        return self.drafted / max(1, self.passes)

    @property
    def speedup(self) -> float:
        """Against plain decoding, as estimated from the measured costs; 1.0 before the first pass."""
        return self.plain_seconds / self.seconds if self.seconds else 1.0

    def to_dict(self) -> dict[str, float]:
        names = ("mean_accepted_length", "drafts_per_pass", "speedup")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock. The prefill's hold the first token, whose logits they end with."""

    prepare_seconds: float  # template, tokenizer, reading media
    prefill_seconds: float
    decode_seconds: float  # all tokens but the first
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: found in memory or on the disk
    drafting: Drafting | None = None  # None: the model has nothing to draft with

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that were read."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def time_to_first_token(self) -> float:
        return self.prepare_seconds + self.prefill_seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of those that were read."""
        return self.prefilled_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; 0.0 when the prefill's token was the only one."""
        later = self.completion_tokens - 1
        return later / max(self.decode_seconds, 1e-9) if later > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        names = ("prefilled_tokens", "time_to_first_token", "prompt_tokens_per_second", "tokens_per_second")
        found = asdict(self) | {name: getattr(self, name) for name in names}
        return found | {"drafting": self.drafting and self.drafting.to_dict()}


@dataclass(frozen=True)
class Alternative:
    """A token that an answer might have gone on with, and the natural logarithm of its probability."""

    id: int
    bytes: bytes  # of its text; a part of a character, perhaps
    logprob: float

    @property
    def text(self) -> str:
        return self.bytes.decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "bytes": list(self.bytes), "logprob": self.logprob}


@dataclass(frozen=True)
class TokenLogprobs(Alternative):
    """The token that was drawn, and the likeliest in its place, best first, itself perhaps among them.

    By the model's own scores, before temperature, penalties, filters and constraints.
    """

    top: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"top": [other.to_dict() for other in self.top]}


@dataclass(frozen=True)
class Reply:
    """One answer.

    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens or the context ran out) or
    "tool_calls". `notice` is set when the answer is not what it seems: empty, cut off, or with a broken tool call.
    `logprobs` are of the tokens that the text is made of, None where they were not asked for.
    """

    text: str
    reasoning: str
    finish_reason: str
    usage: Usage
    timings: Timings
    tool_calls: list[ToolCall] = field(default_factory=list)
    notice: str | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message to append to the conversation. Broken tool calls are left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        calls = [call.to_message() for call in self.tool_calls if call.error is None]
        if calls:
            message["tool_calls"] = calls
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `iolite run --json` prints them."""
        found: dict[str, Any] = {
            "text": self.text,
            "reasoning": self.reasoning,
            "tool_calls": [asdict(call) for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "notice": self.notice,
            "usage": asdict(self.usage) | {"total_tokens": self.usage.total_tokens},
            "timings": self.timings.to_dict(),
        }
        if self.logprobs is not None:
            found["logprobs"] = [token.to_dict() for token in self.logprobs]
        return found

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


def explain(text: str, finish_reason: str, calls: list[ToolCall], reasoning: str, tokens: int) -> str | None:
    """The notice of an answer: None for an ordinary one, else one sentence on what is missing and why."""
    broken = next((call for call in calls if call.error), None)
    if broken:
        return f"the call of {broken.name or 'a tool'} is not usable: {broken.error}"
    if finish_reason == "length":
        if not text and reasoning:
            return f"all {tokens} tokens went into thinking, before an answer began; raise max_tokens"
        return f"the answer was cut off after {tokens} tokens; raise max_tokens for more"
    if not text and not calls:
        return "the model ended its turn without an answer"
    return None
