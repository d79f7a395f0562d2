"""What an answer must look like, and when: after its thought, or in its calls of tools.

A `Constraint` belongs to one answer. It says before every token which ones are possible, and is told which was drawn:
only what was drawn, never a draft. The order of an answer is that of `iolite.text.stream`:

    thought    any text and the token that closes the thought, where something is asked for after it
    start      the thought, a call or the text begins
    text       by a grammar; the tokens that end an answer where it is fulfilled, and then the answer ends
    call       by the tool's schema, in the model's own syntax
    called     another call, or the end
    free       anything, when nothing is asked of the text
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from iolite.errors import UsageError
from iolite.generate.matcher import Bits, Grammars, Matcher
from iolite.generate.tool_grammar import call_grammar, chosen_tools
from iolite.text.stream import prompt_start

Phase = Literal["thought", "start", "text", "call", "called", "free"]
ToolChoice = str | Mapping[str, Any]
"""none, auto, required, or {"type": "function", "function": {"name": …}}."""


class Constraint:
    """Which tokens one answer may go on with."""

    def __init__(
        self,
        grammars: Grammars,
        *,
        text: Matcher | None = None,
        call: Matcher | None = None,
        must_call: bool = False,
        one_call: bool = False,
        in_thought: bool = False,
        may_think: bool = False,
        thinking_budget: int | None = None,
        ends: Collection[int] = (),
    ) -> None:
        """text: of the answer, None for any. call: of a call, between its tokens; None: there must be none. must_call:
        nothing but calls; one_call: no second one. thinking_budget: tokens, after which a thought is closed. ends: the
        tokens that end the answer."""
        self._grammars, self._text, self._call = grammars, text, call
        self._asked = text is not None or must_call
        self._must_call, self._one_call, self._may_think = must_call, one_call, may_think
        self._budget = thinking_budget
        self._calling: Matcher | None = None
        self._thought = 0  # tokens
        names = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
        ids = [grammars.tokenizer.token_id(name) for name in names]
        self._open_thought, self._close_thought, self._open_call, self._close_call, quote = ids
        self._ends = grammars.bits(*ends)
        self._plain = grammars.text & ~self._ends
        self._in_call = self._plain | self._bits(quote)
        self._phase: Phase = "thought" if in_thought else self._after_thought

    @property
    def phase(self) -> Phase:
        """What the next token belongs to."""
        return self._phase

    def mask(self) -> NDArray[np.bool_] | None:
        """bool [V] of the tokens that may be drawn next, None for all. UsageError where there are none."""
        bits = self._allowed()
        if bits is None:
            return None
        if not bits.any():
            raise UsageError(
                "nothing that the model could write goes on with the grammar here", "look for what it cannot end"
            )
        return self._grammars.mask(bits)

    def saw(self, token: int) -> None:
        """token was drawn."""
        if self._phase == "call":
            self._saw_in_call(token)
        elif token == self._open_call and self._call is not None and self._phase != "text":
            self._phase, self._calling = "call", self._call.fresh()
        elif token == self._open_thought and self._phase in ("start", "free"):
            self._phase, self._may_think = "thought", False
        elif self._phase == "thought":
            self._thought += 1
            if token == self._close_thought:
                self._phase = self._after_thought
        elif self._phase in ("start", "text") and self._text is not None and not self._is_end(token):
            self._text.push(token)
            self._phase = "text"

    def _saw_in_call(self, token: int) -> None:
        assert self._calling is not None
        if token != self._close_call:
            self._calling.push(token)
            return
        self._calling = None
        self._phase = "called" if self._asked or self._one_call else "free"

    @property
    def _after_thought(self) -> Phase:
        return "start" if self._asked else "free"

    def _allowed(self) -> Bits | None:
        if self._phase == "thought" and self._budget is not None and self._thought >= self._budget:
            return self._bits(self._close_thought)
        if self._phase == "thought" and self._asked:
            return self._plain | self._bits(self._close_thought)
        if self._phase == "start":
            return self._at_start()
        if self._phase == "text":
            return self._of_text()
        if self._phase == "call":
            assert self._calling is not None
            bits, complete = self._calling.allowed()
            return bits & self._in_call | self._bits(self._close_call if complete else None)
        if self._phase == "called":
            return self._ends | self._bits(None if self._one_call else self._open_call)
        banned = self._bits(self._open_call) if self._call is None else self._bits(None)
        if self._budget == 0:
            banned |= self._bits(self._open_thought)
        return ~banned if banned.any() else None

    def _at_start(self) -> Bits:
        bits = self._bits(None) if self._must_call else self._of_text()
        if self._may_think and self._budget != 0:
            bits = bits | self._bits(self._open_thought)
        return bits | self._bits(self._open_call) if self._call is not None else bits

    def _of_text(self) -> Bits:
        assert self._text is not None
        bits, complete = self._text.allowed()
        bits = bits & self._plain
        return bits | self._ends if complete else bits

    def _bits(self, token: int | None) -> Bits:
        return self._grammars.bits(token)

    def _is_end(self, token: int) -> bool:
        return bool(self._ends[token // 8] >> token % 8 & 1)


def constrain(
    grammars: Grammars,
    prompt: Sequence[int],
    ends: Collection[int],
    *,
    schema: Mapping[str, Any] | None = None,
    grammar: str | Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice | None = None,
    parallel_tool_calls: bool = True,
    thinking: bool = False,
    thinking_budget: int | None = None,
) -> Constraint | None:
    """The constraint of the answer to a prompt, None when nothing is asked of it.

    ends: ids that end an answer. grammar: a Lark grammar, or {"regex": …} or {"lark": …}. thinking: the model may begin
    with a thought. Raises UsageError for what cannot be honoured.
    """
    if schema is not None and grammar is not None:
        raise UsageError("a schema and a grammar are both given", "give one of them")
    if thinking_budget is not None and (type(thinking_budget) is not int or thinking_budget < 0):
        raise UsageError(f"thinking_budget is {thinking_budget!r}", "give a number of tokens, 0 for no thought at all")
    chosen = chosen_tools(tools, tool_choice)
    if schema is None and grammar is None and not tools and thinking_budget is None:
        return None
    names = ("<turn|>", "<eos>")  # for want of others
    known = [i for i in map(grammars.tokenizer.token_id, names) if i is not None]
    return Constraint(
        grammars,
        text=_text(grammars, schema, grammar),
        call=grammars.calls(call_grammar(chosen.tools, grammars.accepts)) if chosen.tools else None,
        must_call=chosen.required,
        one_call=chosen.one or not parallel_tool_calls,
        in_thought=prompt_start(grammars.tokenizer, prompt) == "reasoning",
        may_think=thinking,
        thinking_budget=thinking_budget,
        ends=ends or known,
    )


def _text(
    grammars: Grammars, schema: Mapping[str, Any] | None, grammar: str | Mapping[str, str] | None
) -> Matcher | None:
    if schema is not None:
        return grammars.schema(schema)
    if isinstance(grammar, str):
        return grammars.lark(grammar)
    if grammar is None:
        return None
    if isinstance(grammar, Mapping) and len(grammar) == 1:
        ((kind, text),) = grammar.items()
        if isinstance(text, str) and kind in ("regex", "lark"):
            return grammars.regex(text) if kind == "regex" else grammars.lark(text)
    raise UsageError("the grammar is of no known kind", 'give Lark as a string, or {"regex": "…"}')
