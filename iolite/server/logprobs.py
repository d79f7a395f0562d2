"""How likely tokens were, in the shapes of OpenAI's interfaces and Ollama's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from iolite.errors import UsageError
from iolite.generate.reply import Alternative, TokenLogprobs


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a choice of `/v1/chat/completions`."""
    return {"content": token_list(tokens), "refusal": None}


def token_list(tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """`logprobs` of a text of `/v1/responses`, and of Ollama's answers."""
    return [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top]} for token in tokens]


def asked_for(logprobs: bool, top: int | None, how: str) -> int | None:
    """The number of alternatives to tell of each token; None: nothing. UsageError for alternatives alone, which how
    says how to ask for."""
    if top and not logprobs:
        raise UsageError("top_logprobs are asked for without logprobs", how)
    return (top or 0) if logprobs else None


def _entry(token: Alternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


class TextLogprobs:
    """`logprobs` of a choice of `/v1/completions`, called with the tokens of its text a part at a time."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0  # of the text so far

    def __call__(self, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        """None for None. Offsets count the characters of the text before each token."""
        if tokens is None:
            return None
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def _offset(self, token: TokenLogprobs) -> int:
        before = self._characters
        self._characters += len(self._decoder.decode(token.bytes))
        return before


def _top(token: TokenLogprobs) -> dict[str, float]:
    """The likeliest, and the one that was drawn; of several with the same text the likeliest."""
    found: dict[str, float] = {}
    for each in (*token.top, token):
        found.setdefault(_name(each), each.logprob)
    return found


def _name(token: Alternative) -> str:
    """Its text, or its bytes where they are a part of a character."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
