"""`iolite serve`: a model as a local service for the clients that people have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from iolite.cli import options
from iolite.cli.terminal import put, say

PORT = 8640


@click.command(short_help="Serve a model to other programs.")
@click.argument("model", default="nano", metavar="[MODEL]")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; other than loopback needs a key."
)
@click.option("--port", type=click.IntRange(0, 65_535), default=PORT, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key", "key", envvar="IOLITE_API_KEY", metavar="KEY",
    help="What requests must bring; safer in IOLITE_API_KEY, as command lines can be read. By default a new one.",
)  # fmt: skip
@click.option("--no-key", "open_to_all", is_flag=True, help="Ask for no key; on a loopback address only.")
@click.option("--name", help="What the model is called in answers; by default the last part of MODEL.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Another name of this server, as a proxy's.")
@click.option("--allow-origin", "origins", multiple=True, metavar="ORIGIN", help="A site whose pages may ask (CORS).")
@click.option("--allow-urls", is_flag=True, help="Fetch media that requests name by http(s) URLs, public ones only.")
@click.option("--media-path", type=click.Path(path_type=Path), help="Folder whose files requests may name by file://.")
@click.option("-np", "--parallel", "slots", type=click.IntRange(1, 256), default=4, show_default=True,
              help="Answers drawn at once.")  # fmt: skip
@click.option("--queue", "waiting", type=click.IntRange(0, 4096), default=64, show_default=True,
              help="Requests that may wait; more are told to come back.")  # fmt: skip
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=8192, show_default=True,
              help="Longest answer to a request that names no limit.")  # fmt: skip
@click.option("--chats", envvar="IOLITE_CHATS", metavar="FILE|none",
              help="Where the page keeps its chats; by default ~/.local/share/iolite/chats.sqlite.")  # fmt: skip
@options.add(options.THINKING, *options.LOADING)
def command(model: str, name: str | None, chats: str | None, **settings: Any) -> None:
    """Serve MODEL (by default nano) under the interfaces of OpenAI, Anthropic and Ollama, with a page to chat on.

    What is printed first is the link to the page, with the key. Ctrl+C lets answers end for ten seconds; a second one
    does not.

    \b
    iolite serve google/gemma-4-12B-it --quantize int4
    IOLITE_API_KEY=… iolite serve ./my-model --host 0.0.0.0 --port 8000
    """
    loading = options.take_loading(settings)
    from iolite.server.settings import Settings

    chosen = Settings(chats=_chats_file(chats), **settings)
    loaded = options.load_model(model, **loading)
    from iolite.server.listen import Listener

    listener = Listener(loaded, chosen, name)
    say(f"{loaded.name}: {loaded.choice.reason}, {loaded.context} tokens of context. Ctrl+C stops.")

    def ready() -> None:
        query = "" if chosen.open_to_all or chosen.key else f"?token={chosen.secret}"
        put(f"{listener.url}/{query}\n")
        if query:
            say(f"clients: base URL {listener.url}/v1, key {chosen.secret}")

    listener.run_here(ready)


def _chats_file(asked: str | None) -> Path | None:
    """The file that the page's chats are kept in, None for none."""
    if asked is not None:
        return None if asked == "none" else Path(asked).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "iolite" / "chats.sqlite"
