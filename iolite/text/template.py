"""The checkpoint's chat template: messages and tools -> the text of a prompt.

A template is a program that came with the weights, so it runs in Jinja's sandbox (no attribute that begins with an
underscore, nothing that changes an argument) and on a budget: of source, of loop steps and calls, of characters, of
list entries. What can write much from little (`replace`, `join`, formats) is charged before it is done. The environment
is the one that templates are written for: trimmed blocks, `break` and `continue`, `raise_exception`, and a `tojson`
that escapes nothing; of Jinja's filters and of Python's methods it has those that serve a chat.
"""

from __future__ import annotations

import functools
import json
import re
import string
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from iolite.errors import CheckpointError, MessageError

MAX_SOURCE = 1 << 20  # characters; published templates have some 20,000
MAX_STEPS = 2_000_000  # loop steps of one rendering: 1,500 messages, each looking back at all before it, and more
CALL_STEPS = 20  # what one call (of a macro, a method) costs, about its share of time
MAX_OUTPUT = 16 << 20  # characters written by one rendering, in macros too; 262,144 tokens are about a million
MAX_ENTRIES = (
    4_000_000  # of all lists that one rendering makes: 1,500 messages, the list of them copied for each, twice
)
MUCH = 32 << 10  # characters of messages and tools, from which on an honest template may run into the above
ITEM_SIZE = 32  # characters that an item of a list is taken to need beside its own text
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
            if isinstance(error, _BudgetError) and _is_much(messages, tools):
                raise MessageError(
                    "the messages are more than a chat template can write down", "send fewer or shorter ones"
                ) from None
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


def _is_much(*values: Any) -> bool:
    """Whether what is to be rendered explains by itself that a rendering has used up its budget."""
    size, waiting = 0, list(values)
    while waiting and size <= MUCH:
        item = waiting.pop()
        size += len(item) if isinstance(item, str) else ITEM_SIZE
        waiting += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return size > MUCH


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


class _BudgetError(Exception):
    """A rendering took more steps or wrote more characters than any honest one does."""


class _Budget(threading.local):
    """What the rendering that runs in this thread may still do."""

    steps = 0
    characters = 0
    entries = 0

    def begin(self) -> None:
        self.steps, self.characters, self.entries = MAX_STEPS, MAX_OUTPUT, MAX_ENTRIES

    def step(self, number: int = 1) -> None:
        self.steps -= number
        if self.steps < 0:
            raise _BudgetError

    def spend(self, characters: int) -> None:
        self.characters -= max(characters, 0)
        if self.characters < 0:
            raise _BudgetError

    def write(self, value: Any) -> Any:
        """value, new and charged: text by its characters, a container by its entries."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.entries -= len(value)
            if self.entries < 0:
                raise _BudgetError
        return value

    def items(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """iterable, each item of it charged as an entry: nobody knows what it will be gathered in."""
        for item in iterable:
            self.entries -= 1
            if self.entries < 0:
                raise _BudgetError
            yield item


_budget = _Budget()


def _size(value: Any, *rest: Any) -> int:
    """About how many characters str(value) has; refused where they are more than may be written."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        parts: Collection[Any] = ()
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, (list, tuple)):
            parts = item
        elif item is None or isinstance(item, (int, float, range)):
            continue
        elif isinstance(item, Mapping):
            parts = item.items()
        elif isinstance(item, Collection):  # the values of a mapping, say
            parts = item
        elif isinstance(item, Namespace):  # shows what it holds
            raise _BudgetError
        size += len(parts) * ITEM_SIZE
        if size > MAX_OUTPUT:  # asked before the parts are gathered
            raise _BudgetError
        waiting.extend(parts)
    return size


def _text(value: Any) -> str:
    """str(value), charged."""
    if not isinstance(value, str):
        _size(value)
    text: str = _budget.write(str(value))
    return text


def _replace_size(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    found = str(text).count(str(old)) if _size(text) + _size(old) else 1
    return _size(text) + found * _size(new)


def _join_size(items: Any, separator: Any = "", attribute: Any = None) -> int:
    return _size(list(items)) + len(items) * _size(separator)


def _indent_size(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    lines = len(str(text).splitlines()) + 1 if _size(text) else 1
    return _size(text) + lines * (width if isinstance(width, int) else len(width))


def _percent_size(text: Any, *values: Any, **named: Any) -> int:
    """Of text % values: each field may be as wide as the largest number in text, and show everything."""
    if not isinstance(text, str):
        return _size(text)
    if re.search(r"%[-+ #0-9.]*\*", text):  # a width among the values
        raise _BudgetError
    width = max(map(int, re.findall(r"\d+(?=[.a-zA-Z])", text)), default=0)
    return len(text) + text.count("%") * (width + _size((values, named)))


def _braces_size(text: str, *values: Any, **named: Any) -> int:
    """Of text.format(*values, **named): each field has its width, and may show everything."""
    specs = [spec for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    if any("{" in spec for spec in specs if spec):  # a width among the values
        raise _BudgetError
    widths = [int(number) for spec in specs if spec for number in re.findall(r"\d+", spec)]
    return len(text) + sum(widths) + len(specs) * _size((values, named))


def _list_size(items: Any) -> int:
    return 8 * len(items) if isinstance(items, str) else 0


# The filters of chat templates. All are charged for their results; a function tells, from the filter's arguments, what
# is charged before it is called: about the size of what it will make.
_FILTERS: dict[str, Callable[..., int] | None] = {
    **dict.fromkeys(("abs", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length")),
    **dict.fromkeys(("map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique")),
    **dict.fromkeys(("capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "upper"), _size),
    "format": _percent_size,
    "indent": _indent_size,
    "join": _join_size,
    "list": _list_size,
    "replace": _replace_size,
}
# The same for methods of strings.
_METHODS: dict[str, Callable[..., int]] = {
    "format": _braces_size,
    "format_map": _braces_size,
    "join": lambda separator, items: _join_size(items, separator),
    "replace": _replace_size,
}
# Methods that write much from little, and that no chat has use for.
_NO_METHODS = frozenset(
    ("center", "encode", "expandtabs", "ljust", "maketrans", "rjust", "to_bytes", "translate", "zfill")
)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, metered: loop steps, calls, lists and all that is written count against the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=_finalize,
            optimized=False,  # nothing is computed while compiling, where no budget is
        )
        self.filters = {name: _charged_filter(self.filters[name], size) for name, size in _FILTERS.items()}
        self.filters |= {"tojson": _to_json, "metered": _metered, "text": _text, "written": _budget.write}
        self.globals["raise_exception"] = _raise
        del self.globals["lipsum"]  # blind text, of any length in one call
        del self.tests["lower"], self.tests["upper"]  # of the text of anything

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Meters().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return cast(nodes.Template, tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _size(argument)  # a missing key is shown in the error
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.step(CALL_STEPS)
        if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in (*args, *kwargs.values())):
            raise _BudgetError
        method = getattr(obj, "__wrapped__", obj)  # Jinja puts a safe formatter of its own around str's
        owner, size = getattr(method, "__self__", None), _METHODS.get(getattr(method, "__name__", ""))
        if isinstance(owner, str) and size:
            args = _gathered(args)
            _budget.spend(size(owner, *args, **kwargs))
        return _budget.write(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            sizes = [abs(v) if isinstance(v, int | float) else len(v) for v in (left, right)]
            if max(sizes) > MAX_NUMBER or sizes[0] * sizes[1] > MAX_NUMBER:
                raise _BudgetError
        if operator == "%" and isinstance(left, str):
            _budget.spend(_percent_size(left, right))
        return _budget.write(super().call_binop(context, operator, left, right))


class _Meters(NodeTransformer):
    """Puts the meters into a parsed template: at loops, at what is written or joined, at new lists and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "metered")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)  # as constants, plain text passes through `finalize` too
        node.nodes = [
            nodes.Const(n.data, lineno=n.lineno) if isinstance(n, nodes.TemplateData) else n for n in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(n, "text") for n in node.nodes]
        return node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "written")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "written") if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "written") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _gathered(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """values, those that can be read once as lists, so that their sizes can be asked for."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _charged_filter(function: Callable[..., Any], size: Callable[..., int] | None) -> Callable[..., Any]:
    """A filter that charges for what it makes: beforehand where size tells how much, and by its result."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's argument, before the template's

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        if size:
            args = _gathered(args)
            _budget.spend(size(*args[own:], **kwargs))
        found = function(*args, **kwargs)
        return _budget.items(found) if isinstance(found, Iterator) else _budget.write(found)

    return charged


@jinja2.pass_context  # which keeps Jinja from doing it while compiling
def _finalize(context: Context, value: Any) -> str:
    return _text(value)


def _metered(iterable: Any) -> Any:
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


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(_text(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (indent if isinstance(indent, int) else len(indent or "")) > 16:
        raise _BudgetError
    _size(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return cast(str, _budget.write(_collect(encoder.iterencode(value))))
