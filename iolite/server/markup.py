"""Markdown, code and LaTeX as sanitised HTML: what the chat page shows of an answer.

No HTML of the model's passes, no picture is loaded, links leave in a new tab. What comes out is cleaned once more, so
that a mistake of one library is not an injection.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MOST_TEXT = 100_000  # characters read as Markdown; what is longer is shown as it stands
MOST_CODE = 20_000  # characters of one block that are coloured
MOST_MATH = 4_000  # characters of one formula

_MATH = (
    "math mrow mi mo mn ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts "
    "mprescripts mtable mtr mtd mstyle mpadded mphantom menclose"
)
_TAGS = set(
    f"p br hr h1 h2 h3 h4 h5 h6 strong em s code pre span div ul ol li blockquote a table thead tbody tr th td "
    f"figure figcaption button {_MATH}".split()
)
_ATTRIBUTES = {
    "a": {"href", "title"},
    "ol": {"start"},
    "math": {"display"},
    "mo": {"stretchy", "fence", "separator", "movablelimits", "minsize", "maxsize"},
    "mi": {"mathvariant"},
    "mfrac": {"linethickness"},
    "mspace": {"width"},
    "mtable": {"columnalign", "rowspacing", "columnspacing"},
    "mtd": {"columnalign"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "menclose": {"notation"},
}
_CLASSED = ("span", "div", "pre", "figure", "button", "th", "td")
_ALIGNED = {"text-align:left": "left", "text-align:center": "centre", "text-align:right": "right"}


@functools.lru_cache(maxsize=1024)
def to_html(text: str) -> str:
    """Sanitised HTML of a text in Markdown."""
    if len(text) > MOST_TEXT:
        return f'<pre class="plain">{escape(text)}</pre>'
    try:
        return _clean(_markdown().render(text))
    except RecursionError:  # Markdown's own nesting is bounded, what is in its formulas is not
        return f'<pre class="plain">{escape(text)}</pre>'


class GrowingHtml:
    """The HTML of a text that grows: each block is made once it is certain, the last one again each time.

    A definition that changes earlier blocks, as of a link, does so when the whole text is made. One thread may push
    while another takes.
    """

    def __init__(self) -> None:
        self._new: deque[str] = deque()
        self._open = ""  # of the text: from the beginning of the last block on

    def push(self, text: str) -> None:
        self._new.append(text)

    def take(self) -> tuple[str, str]:
        """HTML to append for good, and HTML of what may still change."""
        while self._new:
            self._open += self._new.popleft()
        made = to_html.__wrapped__  # what is still to change is not asked for again
        if len(self._open) > MOST_TEXT:
            return "", made(self._open)
        at = _last_block(self._open)
        settled, self._open = self._open[:at], self._open[at:]
        return made(settled) if settled.strip() else "", made(self._open)


def _last_block(text: str) -> int:
    """Where the last block of the outermost level begins, or a formula that may yet be closed."""
    starts = [token.map[0] for token in _markdown().parse(text) if token.level == 0 and token.map]
    lines = text.split("\n")
    last = sum(len(line) + 1 for line in lines[: starts[-1]]) if starts else 0
    dollars = text.rfind("$$") if text.count("$$") % 2 else len(text)
    bracket = text.rfind("\\[")
    return min(last, dollars, bracket if bracket >= 0 and "\\]" not in text[bracket:] else len(text))


def _clean(html: str) -> str:
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes={**_ATTRIBUTES, **{tag: {"class"} for tag in _CLASSED}},
        set_tag_attribute_values={"a": {"target": "_blank"}, "button": {"type": "button"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


@functools.cache
def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "breaks": False})
    made.enable(["table", "strikethrough"])
    made.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    made.inline.ruler.before("escape", "math_brackets", _inline_brackets)
    made.block.ruler.before("fence", "math_brackets", _block_brackets, {"alt": ["paragraph", "blockquote", "list"]})
    rules: dict[str, Any] = made.renderer.rules  # type: ignore[attr-defined]
    rules |= {
        "math_inline": functools.partial(_math, False),
        "math_inline_double": functools.partial(_math, True),
        "math_block": functools.partial(_math, True),
        "fence": _code,
        "code_block": _code,
        "image": _picture,
        "th_open": _cell,
        "td_open": _cell,
    }
    return made


def _inline_brackets(state: StateInline, silent: bool) -> bool:
    r"""\( … \) and, within a paragraph, \[ … \]."""
    opening = state.src[state.pos : state.pos + 2]
    if opening not in ("\\(", "\\["):
        return False
    closing = "\\)" if opening == "\\(" else "\\]"
    end = state.src.find(closing, state.pos + 2, min(state.posMax, state.pos + MOST_MATH))
    if end <= state.pos + 2:
        return False
    if not silent:
        token = state.push("math_inline" if closing == "\\)" else "math_inline_double", "math", 0)
        token.content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


def _block_brackets(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    r"""\[ … \] on lines of their own, which hold what would otherwise be lists or headings."""
    begin = state.bMarks[first] + state.tShift[first]
    if state.src[begin : begin + 2] != "\\[" or state.sCount[first] - state.blkIndent >= 4:
        return False
    for line in range(first, min(last, first + 100)):
        end = state.src.rfind("\\]", begin, state.eMarks[line])
        if end < 0:
            continue
        if state.src[end + 2 : state.eMarks[line]].strip(" .,;"):
            return False
        if not silent:
            token = state.push("math_block", "math", 0)
            token.block, token.content, token.map = True, state.src[begin + 2 : end], [first, line + 1]
            state.line = line + 1
        return True
    return False


def _math(display: bool, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """MathML of a formula; the formula itself where it cannot be read."""
    source = tokens[at].content.strip()
    block = display and tokens[at].block
    try:
        if not source or len(source) > MOST_MATH:
            raise ValueError
        made = convert(source, display="block" if display else "inline")
    except Exception:  # the library raises whatever it meets
        made = f"<code>{escape(source)}</code>"
    return f'<div class="formula">{made}</div>\n' if block else made


def _code(tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A block of code with its language, and a button that the page gives its work."""
    code, info = tokens[at].content, tokens[at].info.split()
    language = info[0][:40] if info else ""
    head = f'<figcaption><span>{escape(language or "text")}</span><button class="copy">Copy</button></figcaption>'
    return f'<figure class="code">{head}<pre class="coloured">{_coloured(code, language)}</pre></figure>\n'


def _coloured(code: str, language: str) -> str:
    try:
        if not language or len(code) > MOST_CODE:
            raise ClassNotFound
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return f"<code>{escape(code)}</code>"
    return f"<code>{highlight(code, lexer, HtmlFormatter(nowrap=True))}</code>"


def _picture(tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A picture elsewhere is a link: loading it would tell somebody else of this conversation."""
    attributes: Mapping[str, Any] = tokens[at].attrs
    text = tokens[at].content or "picture"
    return f'<a href="{escape(str(attributes.get("src", "")))}">{escape(text)}</a>'


def _cell(tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A table's cell, its alignment a class: styles within HTML are not allowed on the page."""
    token = tokens[at]
    side = _ALIGNED.get(str(token.attrs.get("style", "")), "left")
    return f'<{token.tag} class="{side}">'
