"""`iolite run`: one question, one answer."""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iolite.cli import options
from iolite.cli.attachments import Attachment, attach, pick_paths, user_message
from iolite.cli.terminal import harmless, put, report, say, show, working
from iolite.errors import UsageError

if TYPE_CHECKING:
    from iolite.generate.model import Model
    from iolite.generate.reply import Reply


@click.command(short_help="Ask once and print the answer.")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", metavar="MODEL", help="The model; every argument is then part of the prompt.")
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; the one argument left is then the model.")
@click.option("--image", multiple=True, metavar="FILE", help="A picture; - is stdin. May be repeated.")
@click.option("--audio", multiple=True, metavar="FILE", help="A recording; - is stdin. May be repeated.")
@click.option("--video", multiple=True, metavar="FILE", help="A video; - is stdin. May be repeated.")
@click.option("--file", multiple=True, metavar="FILE", help="A PDF or a text; - is stdin. May be repeated.")
@click.option(
    "--pages",
    type=click.Choice(["auto", "text", "pictures"]),
    default="auto",
    help="Of a PDF: its text, pictures of its pages, or (auto) its text, and pictures of pages that have none.",
)
@click.option("--schema", metavar="FILE|JSON", help="A JSON Schema: the answer is JSON that it describes.")
@click.option("--grammar", metavar="FILE", help="A Lark grammar: the answer is a text of it.")
@click.option(
    "--thinking-budget",
    "--reasoning-budget",
    "thinking_budget",
    type=int,
    metavar="TOKENS",
    help="With --thinking: close the thought after so many tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the reply as one JSON object.")
@options.add(
    options.SYSTEM,
    options.THINKING,
    *options.SAMPLING,
    options.IMAGE_TOKENS,
    *options.LOADING,
    options.VERBOSE,
)
def command(
    words: tuple[str, ...],
    model: str | None,
    prompt: str | None,
    image: tuple[str, ...],
    audio: tuple[str, ...],
    video: tuple[str, ...],
    file: tuple[str, ...],
    pages: str,
    schema: str | None,
    grammar: str | None,
    thinking_budget: int | None,
    as_json: bool,
    system: str | None,
    thinking: bool,
    image_tokens: int | None,
    verbose: bool,
    **settings: Any,
) -> None:
    """Ask MODEL (by default nano) a question and print the answer.

    The paths of pictures, recordings, videos and PDFs inside the prompt are picked up too. What is piped in is added to
    the prompt, or is the prompt when there is no other. Sampling flags that are not given are the model's own.

    \b
    iolite run "What is 17 times 23?"
    iolite run nano "Which number is this? digits.png"
    iolite run google/gemma-4-12B-it "Summarise this." < report.txt
    iolite run google/gemma-4-12B-it "Who is named here? letter.png" --schema '{"type": "object"}'
    """
    name, text = split_words(words, model, prompt)
    flags = (("image", image), ("video", video), ("audio", audio), ("document", file))
    named = [(kind, path) for kind, paths in flags for path in paths]
    text, picked = pick_paths(text)
    attached = gather(named)
    if all(path != "-" for _, path in named):
        text = "\n\n".join(part for part in (text, piped_text(waits=bool(text or named or picked))) if part)
    for found in picked:
        say(f"Added {found.kind} {found.name}")
    if not text.strip() and not attached and not picked:
        raise UsageError("there is no prompt", f'ask something: iolite run {name} "…", or pipe text into it')
    settings |= {"thinking": thinking, "thinking_budget": thinking_budget, "image_tokens": image_tokens}
    settings |= {"schema": schema and read_schema(schema), "grammar": grammar and read_text("--grammar", grammar)}
    loading = options.take_loading(settings)
    loaded = options.load_model(name, **loading)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append(user_message(text, [replace(found, pages=pages) for found in (*attached, *picked)]))
    reply = answer(loaded, messages, as_json, settings)
    if reply.notice:
        say(f"note: {reply.notice}")
    if verbose:
        report(loaded, reply)


def split_words(words: Sequence[str], model: str | None, prompt: str | None) -> tuple[str, str]:
    """(model, prompt text) of the arguments: [MODEL] PROMPT, where one argument alone is the prompt unless it is
    plainly a model."""
    if model is not None and prompt is not None and words:
        raise UsageError(f"what is {words[0]!r}?", "the model and the prompt are both given by flags already")
    if model is not None:
        return model, prompt if prompt is not None else " ".join(words)
    if prompt is not None:
        if len(words) > 1:
            raise UsageError(f"{len(words)} arguments beside --prompt", "only the model may stand beside --prompt")
        return (words[0] if words else "nano"), prompt
    if len(words) == 1 and not options.looks_like_model(words[0]):
        return "nano", words[0]
    if not words:
        return "nano", ""
    return words[0], " ".join(words[1:])


def gather(named: Sequence[tuple[str, str]]) -> list[Attachment]:
    """The media that flags name; one of them may be the bytes on stdin."""
    if sum(path == "-" for _, path in named) > 1:
        raise UsageError("stdin is named twice", "only one file can come through stdin")
    return [Attachment(kind, sys.stdin.buffer.read()) if path == "-" else attach(kind, path) for kind, path in named]


def read_schema(text: str) -> dict[str, Any]:
    """The JSON Schema that a flag holds or names the file of."""
    if not text.lstrip().startswith("{"):
        text = read_text("--schema", text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the schema is not JSON: {error}", "give a JSON Schema, or the path of a file of one"
        ) from None
    if not isinstance(found, dict):
        raise UsageError("the schema is no JSON object", 'any object at all is {"type": "object"}')
    return found


def read_text(flag: str, path: str) -> str:
    """A file's text. UsageError for what cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8 text"
        raise UsageError(f"{flag} {path!r} cannot be read: {why}") from None


def piped_text(waits: bool) -> str:
    """The text on stdin, to its end, unless that is a terminal. waits: there is a question already, so someone who
    forgot an open pipe is told what is being waited for."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return ""
    try:
        if waits and not select.select([sys.stdin], [], [], 2)[0]:
            say("Reading stdin to its end (use `< /dev/null` when nothing comes) …")
    except (OSError, ValueError):
        pass  # not something that can be waited for
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UsageError(
            "what comes through stdin is not UTF-8 text", "for media use --image -, --audio -, --video - or --file -"
        ) from None


def answer(model: Model, messages: list[dict[str, Any]], as_json: bool, settings: dict[str, Any]) -> Reply:
    """Asks, shows, and returns the reply."""
    if as_json:
        with working("Answering") as progress:
            reply = model.chat(messages, progress=progress, **settings)
        put(reply.to_json() + "\n")
        return reply
    reply = show(lambda progress: model.chat(messages, stream=True, progress=progress, **settings)).reply
    for call in reply.tool_calls:
        say(f"the model asks for the tool {harmless(call.name)}({harmless(str(call.arguments))})")
    return reply
