"""What run, chat and transcribe show: the answer on stdout, everything else on stderr.

Text that a model wrote, or names out of a file, may hold escape sequences; on a terminal their control characters are
shown as U+FFFD.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iolite.generate.model import Model
    from iolite.generate.reply import Reply
    from iolite.generate.stream import ReplyStream

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and halves of characters, as JSON has them


def harmless(text: str) -> str:
    """The text without control characters other than newline and tab, and without what UTF-8 cannot write."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def say(text: str, *, dim: bool = False, end: str = "\n") -> None:
    """Talk: to stderr, dimmed only on a terminal that allows it."""
    styled = f"\x1b[2m{text}\x1b[0m" if dim and sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text
    sys.stderr.write(styled + end)
    sys.stderr.flush()


def put(text: str) -> None:
    """Data: to stdout, at once; as it is into a file or a pipe, harmless on a terminal."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@contextmanager
def working(what: str, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A spinner on stderr while the body runs, where that is a terminal; it yields a function that shows progress."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …") as status:
        yield lambda done, total: status.update(f"{what}: {done} of {total} {unit}")


@contextmanager
def loading(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """As `working`, for loading a model: what is shown is its share of the whole, and what is being worked on."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"Loading {name} …") as status:
        yield lambda done, total, what: status.update(f"Loading {name}: {100 * done // total} %, {harmless(what)}")


def show(start: Callable[[Callable[[int, int], None]], ReplyStream]) -> ReplyStream:
    """Runs an answer to its end or to Ctrl+C, showing it as it comes, and returns its stream, which is then over.

    start makes the stream from a progress function; the prompt is read under a spinner until the first event.
    """
    with working("Reading the prompt") as progress:
        stream = start(progress)
        try:
            first = next(stream, None)
        except KeyboardInterrupt:
            stream.close()
            raise
    try:
        if first is not None:
            _show_events(first, stream)
    except KeyboardInterrupt:
        stream.close()
        put("\n")
        raise
    if stream.reply.text and not stream.reply.text.endswith("\n"):
        put("\n")
    return stream


def _show_events(first: object, stream: ReplyStream) -> None:
    from itertools import chain

    from iolite.text.stream import ContentDelta, ReasoningDelta

    thinking = False
    for event in chain([first], stream):
        if isinstance(event, ReasoningDelta):
            say(harmless(event.text), dim=True, end="")
            thinking = True
        elif isinstance(event, ContentDelta):
            if thinking:
                say("", end="\n")
                thinking = False
            put(event.text)
    if thinking:
        say("", end="\n")


def report(model: Model, reply: Reply) -> None:
    """Where the time went, in a few lines on stderr."""
    t = reply.timings
    say(f"load:        {model.load_seconds:.2f} s, {model.choice.reason}")
    say(
        f"prompt:      {t.prefilled_tokens} tokens in {t.prefill_seconds:.2f} s, "
        f"{t.prompt_tokens_per_second:.1f} tokens/s"
        + (f"; {t.cached_tokens} before them had been read already" if t.cached_tokens else "")
    )
    say(f"first token: {t.time_to_first_token:.2f} s")
    say(
        f"answer:      {t.completion_tokens} tokens in {t.prefill_seconds + t.decode_seconds:.2f} s, "
        f"{t.tokens_per_second:.1f} tokens/s after the first"
    )
    if model.drafting:
        say(f"drafting:    {model.drafting}")
    if (d := t.drafting) and d.drafted:
        say(
            f"drafts:      {d.accepted} of {d.drafted} accepted in {d.passes} passes, {d.mean_accepted_length:.2f} "
            f"tokens a pass; about {d.speedup:.2f} times the speed without"
        )
