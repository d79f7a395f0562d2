"""Grammars compiled for one tokenizer by llguidance: which tokens a text may go on with.

A set of tokens is a row of bits, uint8 [B] with B enough for the V tokens of the vocabulary and one more, the end,
which no tokenizer has: a grammar that allows it is fulfilled. What really ends an answer is the caller's business.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from iolite.errors import BusyError, UsageError
from iolite.text.tokenizer import Tokenizer

Bits = NDArray[np.uint8]
T = TypeVar("T")

KEPT = 64  # grammars that are compiled already
# llguidance follows rules into one another by recursion, up to 5.3 KB of stack for each, and a stack that is full ends
# the process. Of 500,000 characters at most 50,000 rules can be made, each of which names the next: 265 MB.
MOST_CHARACTERS = 500_000
MOST_OF_CALLS = 3_000_000  # of a grammar of ours, which takes 60 for each argument
SECONDS = 30.0  # for one; what an answer asks for takes less than one of them
STACK = 512 * 2**20  # of which only what is used takes memory
# What people write between values, and no more: a model that has lost its way goes on with blanks for ever.
_WHITESPACE = r" |\n {0,40}|\n\t{0,10}"
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)  # fmt: skip
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("enum", "const", "default", "example", "examples", "required")
_EXACT = 2**53  # llguidance keeps numbers as doubles, which tell whole numbers apart up to here


class Grammars:
    """Compiles grammars for one vocabulary, each once. Safe to use from several threads.

    A vocabulary of 262,144 tokens takes a second or two and 150 MB, when the first grammar is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: V, that of the model's scores."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(KEPT)(self._compile)

    def schema(self, schema: Mapping[str, Any]) -> Matcher:
        """JSON texts that a JSON Schema describes. UsageError for one that is wrong or that no grammar can express."""
        if not isinstance(schema, Mapping):
            raise UsageError(f"the schema is a {type(schema).__name__}", "give a JSON Schema as an object")
        try:
            text = json.dumps(_without_unknown_formats(schema))
            large = _beyond_exact(schema)
        except (TypeError, ValueError, RecursionError):
            raise UsageError(
                "the schema is not JSON", "a JSON Schema is made of objects, lists, texts and numbers"
            ) from None
        if large is not None:
            raise UsageError(f"the schema cannot be used: the value {large} is beyond 2^53", "give it as a string")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise UsageError(f"the schema cannot be used: {_first_line(str(error))}", "nest it less deeply") from None
        return self._get(grammar, "the schema", "see docs/guides/structured-output.md for what a schema may say")

    def lark(self, grammar: str) -> Matcher:
        """Texts of a grammar in llguidance's form of Lark. UsageError for one that is wrong or names special tokens."""
        token = self._named_token(grammar)
        if token:
            raise UsageError(f"the grammar names the token {token}", "a grammar describes text, not special tokens")
        return self._get(LLMatcher.grammar_from_lark(grammar), "the grammar", "it begins with a rule `start: …`")

    def regex(self, pattern: str) -> Matcher:
        """Texts that a regular expression matches from end to end. UsageError for one that is wrong."""
        grammar = LLMatcher.grammar_from_regex(pattern)
        return self._get(grammar, "the regular expression", "there is no looking ahead or behind, and no \\b")

    def calls(self, grammar: str) -> Matcher:
        """What stands in a call, by a Lark grammar of ours, which may name the quote token."""
        grammar = LLMatcher.grammar_from_lark(grammar)
        return self._get(grammar, "a tool's parameters", "they are a JSON Schema", MOST_OF_CALLS)

    def accepts(self, terminal: str) -> bool:
        """Whether a terminal's definition, in Lark, can be compiled."""
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(f"start: T\nT: {terminal}"))

    def bits(self, *ids: int | None) -> Bits:
        """The set of these tokens; None, and those outside the vocabulary, are left out."""
        found = np.zeros(self.num_words * 4, np.uint8)
        for i in ids:
            if i is not None and 0 <= i < self.vocab_size:
                found[i // 8] |= 1 << i % 8
        return found

    def mask(self, bits: Bits) -> NDArray[np.bool_]:
        """bool [V] of a set."""
        return np.unpackbits(bits, count=self.vocab_size, bitorder="little").view(np.bool_)

    @property
    def num_words(self) -> int:
        return (self.vocab_size + 1 + 31) // 32

    @cached_property
    def text(self) -> Bits:
        """All tokens that are text."""
        special = self.tokenizer.special_ids
        known = min(self.vocab_size, self.tokenizer.vocab_size)
        return self.bits(*(i for i in range(known) if i not in special and self.tokenizer.token_bytes(i)))

    def _get(self, grammar: str, what: str, hint: str, most: int = MOST_CHARACTERS) -> Matcher:
        if len(grammar) > most:
            raise UsageError(f"{what} cannot be used: that is more than {most:,} characters of a grammar", hint)
        with self._lock:
            vocabulary = self._vocabulary
        try:
            inner, error = self._compiled(vocabulary, grammar)
        except TimeoutError:
            raise UsageError(f"{what} cannot be used: to compile it takes more than {SECONDS:.0f} s", hint) from None
        if error:
            raise UsageError(f"{what} cannot be used: {_first_line(error)}", hint)
        return Matcher(inner.deep_copy(), self)

    @staticmethod
    def _compile(vocabulary: LLTokenizer, grammar: str) -> tuple[LLMatcher, str]:
        def work() -> tuple[LLMatcher, str]:
            inner = LLMatcher(vocabulary, grammar, log_level=0)
            if not inner.is_error():
                inner.compute_bitmask()  # where a grammar that is too much shows
            return inner, inner.get_error()

        return _deeply(work)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocab_size)))

    def _named_token(self, grammar: str) -> str | None:
        """A special token that a Lark grammar names, which it does outside strings, expressions and remarks."""
        code = re.sub(r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*', " ", grammar)
        if re.search(r"<\[", code):
            return "<[…]>"
        names = (self.tokenizer.id_to_token(i) for i in self.tokenizer.special_ids)
        return next((name for name in names if name and name in code), None)


class Matcher:
    """One text that is being written by a grammar."""

    def __init__(self, inner: LLMatcher, grammars: Grammars) -> None:
        self._inner, self._grammars = inner, grammars
        self._words = np.zeros(grammars.num_words, np.int32)

    def fresh(self) -> Matcher:
        """The same grammar, as far as it is now, for another text."""
        return Matcher(self._inner.deep_copy(), self._grammars)

    def allowed(self) -> tuple[Bits, bool]:
        """The tokens that may come next, and whether the text may end here. The next call overwrites the bits.

        Raises UsageError where the grammar has become more than llguidance takes.
        """
        self._inner.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = self._words.view(np.uint8)
        end = self._grammars.vocab_size
        return bits, bool(bits[end // 8] >> end % 8 & 1)

    def push(self, token: int) -> None:
        """token is the text's next."""
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            raise UsageError(f"the grammar has failed: {_first_line(self._inner.get_error())}", "make it simpler")


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, and texts that a grammar forces as ids."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        special = {i: tokenizer.id_to_token(i) or "" for i in tokenizer.special_ids if i < vocab_size}
        self.tokens = [special[i].encode() if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.tokens.append(b"<end of the text>")
        self.eos_token_id, self.bos_token_id = vocab_size, None
        self.special_token_ids = [*sorted(special), vocab_size]
        # A text may spell a special token's name and must not become that token: it is cut after the first character.
        names = [name for name in special.values() if len(name) > 1]
        self._cuts = [re.compile(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})") for name in names]

    def __call__(self, text: str) -> list[int]:
        pieces = [text]
        for cut in self._cuts:
            pieces = [part for piece in pieces for part in cut.split(piece)]
        return [i for piece in pieces for i in self.tokenizer.encode(piece)]


def _deeply(work: Callable[[], T]) -> T:
    """Does some work on a thread that has stack for it, and waits for it so long and no longer. Nothing can end it."""
    found = Future[T]()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)
        finally:
            _RUNNING.release()

    if not _RUNNING.acquire(timeout=SECONDS):
        raise BusyError("grammars are being compiled that take very long", "ask again later", retry_after=30.0)
    with _STACKS:
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        except RuntimeError:  # where the system promises no more than there is
            _RUNNING.release()
            raise BusyError("there is no memory to compile a grammar in", "ask again later", retry_after=30.0) from None
        finally:
            threading.stack_size(usual)
    return found.result(SECONDS)


_STACKS = threading.Lock()  # their size is the process's
_RUNNING = threading.Semaphore(8)  # grammars that are being compiled, those for which nobody waits any more included


def _without_unknown_formats(schema: Any) -> Any:
    """The schema without the formats that llguidance does not know: they are remarks, and say nothing of validity."""
    if isinstance(schema, list | tuple):
        return [_without_unknown_formats(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in _FORMATS:
            continue
        if key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _without_unknown_formats(item) for name, item in value.items()}
        else:
            found[key] = value if key in _NO_SCHEMAS else _without_unknown_formats(value)
    return found


def _beyond_exact(schema: Any, chosen: bool = False) -> int | None:
    """A whole number among the values that a schema gives to choose from that another could be written for, or None."""
    if isinstance(schema, list | tuple):
        inner = [(item, chosen) for item in schema]
    elif isinstance(schema, Mapping):
        named = [schema[key] for key in _NAMED_SCHEMAS if isinstance(schema.get(key), Mapping) and not chosen]
        inner = [(item, False) for schemas in named for item in schemas.values()]
        rest = schema if chosen else schema.keys() - _NAMED_SCHEMAS
        inner += [(schema[key], chosen or key in ("enum", "const")) for key in rest]
    else:
        return schema if chosen and isinstance(schema, int) and abs(schema) > _EXACT else None
    return next((found for item in inner if (found := _beyond_exact(*item)) is not None), None)


def _first_line(error: str) -> str:
    """What llguidance says is wrong, without its listing of all tokens and of its own state."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    return lines[0].split("; following special tokens")[0][:300]
