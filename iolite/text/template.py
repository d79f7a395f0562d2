"""The checkpoint's chat template: messages and tools -> the text of a prompt.

A template is a program that came with the weights, so it runs in Jinja's sandbox (no attribute that begins with an
underscore, nothing that changes an argument) and on a budget: of source, of loop steps and calls, of characters. The
environment is the one that templates are written for: trimmed blocks, `break` and `continue`, `raise_exception`, and
a `tojson` that escapes nothing.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from iolite.errors import CheckpointError, MessageError

MAX_SOURCE = 1 << 20  # characters; published templates have some 20,000
MAX_STEPS = 2_000_000  # loop steps of one rendering: 1,500 messages, each looking back at all before it, and more
CALL_STEPS = 20  # what one call (of a macro, a method) costs, about its share of time
MAX_OUTPUT = 16 << 20  # characters written by one rendering, in macros too; 262,144 tokens are about a million
MAX_NUMBER = 1_000_000  # of a repetition, a power or a width

# What a base model is for: the first message as it stands, after the token that begins every text.
COMPLETION_TEMPLATE = """
{%- if messages | length > 1 or messages[0].role != 'user' or tools -%}
  {{- raise_exception('it is a base model without a chat template, which goes on with one text and cannot chat') -}}
{%- endif -%}
{{- bos_token -}}
{%- if messages[0].content is string -%}
  {{- messages[0].content -}}
{%- else -%}
  {%- for part in messages[0].content -%}
    {{- part.text if part.type == 'text' else '<|' ~ part.type ~ '|>' -}}
  {%- endfor -%}
{%- endif -%}
"""


class ChatTemplate:
    """A compiled chat template.

    Raises CheckpointError for a source that is too long or does not parse. Safe to use from many threads.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"the chat template has {len(source)} characters; {MAX_SOURCE} are allowed")
        self.source = source
        try:
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, OverflowError) as error:
            line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(f"the chat template does not parse{line}") from error

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTemplate:
        """The template of a checkpoint: chat_template.jinja, or the one in one of two JSON files.

        A base model has none. It gets `COMPLETION_TEMPLATE`: one text, with or without media, to be gone on with.
        """
        folder = Path(path)
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(_read(file))
        for name in ("tokenizer_config.json", "chat_template.json"):
            if (folder / name).is_file():
                source = _from_json(folder / name)
                if source is not None:
                    return cls(source)
        return cls(COMPLETION_TEMPLATE)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
        bos_token: str = "<bos>",
    ) -> str:
        """The prompt's text, one placeholder (`<|image|>`, `<|audio|>`, `<|video|>`) for each media part.

        thinking lets the model think before it answers; preserve_thinking keeps the thoughts of earlier tool calls.
        Raises MessageError when the template refuses the messages, CheckpointError when it misbehaves.
        """
        if not messages:
            raise MessageError("there are no messages to render")
        variables = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "bos_token": bos_token,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": thinking,
            "preserve_thinking": preserve_thinking,
        }
        _budget.begin()
        try:
            return _collect(self._template.generate(variables))
        except (SecurityError, OverflowError, MemoryError, _BudgetError) as error:
            raise CheckpointError(
                "the checkpoint's chat template does what no chat template needs to do and was stopped",
                "get the checkpoint from its publisher again, or replace its chat_template.jinja",
            ) from error
        except RecursionError as error:
            raise MessageError("messages or tools are nested too deeply for the chat template") from error
        except jinja2.TemplateError as error:
            message = (error.message or "no reason given").removeprefix("chat_template: ")
            raise MessageError(f"the chat template refuses these messages: {message}", _HINT) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise MessageError(f"the chat template cannot render these messages: {error}", _HINT) from error


_HINT = "a content is a string or a list of parts, arguments are an object, and a tool's result is a string"


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(MAX_SOURCE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8 text") from error


def _from_json(file: Path) -> str | None:
    """The value of chat_template: a string, or a list of named templates of which "default" is taken."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON") from error
    source = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _collect(pieces: Any) -> str:
    found, length = [], 0
    for piece in pieces:
        found.append(piece)
        length += len(piece)
        if length > MAX_OUTPUT:
            raise _BudgetError
    return "".join(found)


_WIDE = re.compile(r"[%:{][^a-zA-Z%}]*(\*|\d{5}|\{)")  # a format whose width is large, or given from outside


class _BudgetError(Exception):
    """A rendering took more steps or wrote more characters than any honest one does."""


class _Budget(threading.local):
    """What the rendering that runs in this thread may still do."""

    steps = 0
    characters = 0

    def begin(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_OUTPUT

    def step(self, number: int = 1) -> None:
        self.steps -= number
        if self.steps < 0:
            raise _BudgetError

    def write(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.characters -= len(value)
            if self.characters < 0:
                raise _BudgetError
        return value


_budget = _Budget()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, metered: loop steps, calls, joined strings and all that is written count against the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_finalize
        )
        self.filters |= {"tojson": _to_json, "metered": _metered, "written": _written}
        self.filters |= {name: _narrow(self.filters[name]) for name in ("center", "format", "indent")}
        self.globals["raise_exception"] = _raise
        del self.globals[
            "lipsum"
        ]  # Jinja's blind text, of any length in one call: no template of a chat has use for it

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(cast(nodes.Expr, loop.iter), "metered")
        for output in tree.find_all(nodes.Output):  # as constants, plain text passes through `finalize` too
            output.nodes = [_constant(n) if isinstance(n, nodes.TemplateData) else n for n in output.nodes]
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [_filtered(n, "written") for n in concat.nodes]
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.step(CALL_STEPS)
        _check_arguments((*args, *kwargs.values()))
        if getattr(obj, "__name__", None) in ("format", "format_map"):
            method = getattr(obj, "__wrapped__", obj)  # Jinja puts a safe formatter of its own around str's
            _check_arguments((getattr(method, "__self__", None), *args, *kwargs.values()), formats=True)
        return _budget.write(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            sizes = [abs(v) if isinstance(v, int | float) else len(v) for v in (left, right)]
            if max(sizes) > MAX_NUMBER or sizes[0] * sizes[1] > MAX_NUMBER:
                raise _BudgetError
        if operator == "%" and isinstance(left, str):
            _check_arguments((left,), formats=True)
        return _budget.write(super().call_binop(context, operator, left, right))


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _constant(data: nodes.TemplateData) -> nodes.Const:
    return nodes.Const(data.data, lineno=data.lineno)


@jinja2.pass_context  # so that nothing is computed, and nothing charged, while compiling
def _finalize(context: Context, value: Any) -> str:
    text: str = _budget.write(str(value))
    return text


@jinja2.pass_context
def _written(context: Context, value: Any) -> Any:
    return _budget.write(value)


def _check_arguments(values: tuple[Any, ...], *, formats: bool = False) -> None:
    """Refuses widths and repetitions that only serve to fill the memory."""
    for value in values:
        wide = isinstance(value, int) and abs(value) > MAX_NUMBER
        if wide or (formats and isinstance(value, str) and _WIDE.search(value)):
            raise _BudgetError


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes widths, kept to sane ones."""

    def narrow(*args: Any, **kwargs: Any) -> Any:
        _check_arguments((*args, *kwargs.values()), formats=True)
        return _budget.write(function(*args, **kwargs))

    return narrow


@jinja2.pass_context
def _metered(context: Context, iterable: Any) -> Any:
    """iterable, each step over it charged to the budget."""
    if isinstance(iterable, Undefined) or not hasattr(iterable, "__iter__"):
        return iterable  # Jinja's own answer to it
    return _Sized(iterable) if hasattr(iterable, "__len__") else _charged(iterable)


class _Sized:
    """A metered iterable that still tells `loop` its length."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return _charged(self.items)


def _charged(iterable: Any) -> Iterator[Any]:
    for item in iterable:
        _budget.step()
        yield item


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 16:
        raise _BudgetError
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
