"""`iolite chat`: a conversation in the terminal, or line by line through a pipe.

On a terminal: Enter sends, Alt+Enter or a message that begins with \"\"\" takes more lines, Ctrl+C stops the answer,
Ctrl+D leaves. A mistake never ends the chat, and what was typed is offered again.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from iolite.cli import options
from iolite.cli.attachments import attach, pick_paths
from iolite.cli.conversation import SETTINGS, Conversation, missing_media
from iolite.cli.keeping import Keeper
from iolite.cli.terminal import report, say, show
from iolite.errors import IoliteError, UsageError
from iolite.memory import parse_bytes

if TYPE_CHECKING:
    from iolite.generate.model import Model

FENCE = '"""'


@click.command(short_help="Talk, turn by turn.")
@click.argument("name", required=False, metavar="[MODEL]")
@click.option("-m", "--model", metavar="MODEL", help="The same as the argument.")
@options.add(
    options.SYSTEM,
    options.THINKING,
    *options.SAMPLING,
    options.IMAGE_TOKENS,
    *options.LOADING,
    options.VERBOSE,
    click.option(
        "--save",
        metavar="FILE",
        help="Keep the chat in FILE and what the model has read in FILE.cache; go on with it if FILE is there.",
    ),
    click.option(
        "--cache-limit", metavar="SIZE", default="4GB", show_default=True, help="Most that FILE.cache may take."
    ),
)
def command(name: str | None, model: str | None, save: str | None, cache_limit: str, **settings: Any) -> None:
    """Talk with MODEL (by default nano). Type /help for what the chat understands.

    Sampling flags that are not given are the model's own, or those of the chat that is gone on with.
    """
    if name is not None and model is not None:
        raise UsageError(f"two models: {name!r} and {model!r}", "name one of them")
    loading = options.take_loading(settings)
    limit = parse_bytes(cache_limit)
    loaded = options.load_model(next((n for n in (name, model) if n is not None), "nano"), **loading)
    chat = Chat(loaded, Conversation())
    kept = _file(save, "--save FILE") if save is not None else None
    if kept and kept.exists():
        chat.load(str(kept))
        settings = {key: value for key, value in settings.items() if _is_given(key)}
    chat.talk.settings |= {key: value for key, value in settings.items() if value not in (None, ())}
    chat.check()
    chat.keeper = Keeper(kept, loaded, limit) if kept else None
    say(f"{loaded.name}: {loaded.choice.reason}, {loaded.context} tokens of context. /help explains, Ctrl+D leaves.")
    try:
        chat.run(make_reader())
    finally:
        if chat.keeper:
            chat.keeper.close()


def _is_given(name: str) -> bool:
    """Whether a flag stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


Reader = Callable[[str], str]
"""Asks for one message, offering a text to start from; EOFError at the end, KeyboardInterrupt on Ctrl+C."""


class Chat:
    """One conversation with one model: reads lines, obeys commands, shows answers."""

    def __init__(self, model: Model, talk: Conversation) -> None:
        self.model, self.talk = model, talk
        self.keeper: Keeper | None = None  # where turns are kept as they are done
        self.unsent = ""  # a message that could not be answered, offered again
        self.over = False

    def run(self, read: Reader) -> None:
        """Turn after turn until /bye or the end of the input."""
        while not self.over:
            try:
                offered, self.unsent = self.unsent, ""
                line = read(offered).strip()
            except KeyboardInterrupt:
                say("Ctrl+D or /bye leaves")
                continue
            except EOFError:
                return
            if line:
                self.turn(line)

    def turn(self, line: str) -> None:
        """One command or one message; what a person can cause is printed and the chat goes on."""
        from iolite.cli import print_error

        try:
            if not self.obey(line):
                self.ask(line)
        except IoliteError as error:
            print_error(str(error), error.hint)
        except KeyboardInterrupt:
            say("(stopped)")

    def obey(self, line: str) -> bool:
        """Runs a line that is a command. A line that begins with the path of a file is a message."""
        word, _, rest = line.partition(" ")
        action = COMMANDS.get(word)
        if action is None:
            if not line.startswith("/") or "/" in word[1:] or os.path.exists(word):
                return False
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            raise UsageError(f"there is no command {word!r}", f"did you mean {near[0]}?" if near else "see /help")
        action[0](self, rest.strip())
        return True

    def ask(self, line: str) -> None:
        """Sends a message and shows the answer. The message is kept only with an answer to it."""
        self.unsent = line
        text, picked = pick_paths(unfence(line))
        for found in picked:
            say(f"Added {found.kind} {found.name}")
        messages = self.talk.ask(text, [*self.talk.waiting, *picked])
        started: list[Any] = []

        def start(progress: Callable[[int, int], None]) -> Any:
            stream = self.model.chat(messages, stream=True, progress=progress, **self.talk.generation())
            started.append(stream)
            return stream

        try:
            show(start)
        except KeyboardInterrupt:
            if not started or not started[0].reply.text:
                raise
            say("(stopped)")
        reply = started[0].reply
        self.unsent = ""
        self.talk.keep(messages[-1], reply.message)
        if reply.notice:
            say(f"note: {reply.notice}")
        if self.talk.settings.get("verbose"):
            report(self.model, reply)
        if self.keeper:
            self.keeper.save(self.talk)

    def check(self) -> None:
        """Raises UsageError when the settings are not possible for this model."""
        wanted = self.talk.generation()
        wanted.pop("thinking", None)
        image_tokens = wanted.pop("image_tokens", None)
        self.model.sampling(**wanted)
        if image_tokens is not None:
            self.model.builder.image_budget(image_tokens)

    def help(self, _: str) -> None:
        for name, (_action, text) in COMMANDS.items():
            say(f"  {name:<10} {text}")
        say(f"  {FENCE} begins and ends a message of several lines. Paths of media in a message are picked up.")

    def attach(self, kind: str, path: str) -> None:
        if not path:
            raise UsageError(f"which {kind}?", f"/{kind} FILE")
        found = attach(kind, path.strip("'\"").replace("\\ ", " "))
        self.talk.waiting.append(found)
        say(f"Added {kind} {found.name}; it goes with your next message")

    def set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            for known, (_read, what) in SETTINGS.items():
                say(f"  /set {known:<19} {what}")
            return
        before = dict(self.talk.settings)
        self.talk.set(name, text.strip())
        try:
            self.check()
        except UsageError:
            self.talk.settings = before
            raise

    def show(self, _: str) -> None:
        m = self.model
        say(f"model     {m.name}, {m.choice.reason}")
        say(f"takes     {', '.join(m.config.modalities)}; {m.context} tokens of context")
        say(f"messages  {len(self.talk.messages)}")
        for attachment in self.talk.waiting:
            say(f"waiting   {attachment.kind} {attachment.source!r}")
        own = {"temperature": m.defaults.temperature, "top_p": m.defaults.top_p, "top_k": m.defaults.top_k}
        for name in SETTINGS:
            if name in self.talk.settings:
                say(f"set       {name} = {self.talk.settings[name]!r}")
            elif name in own:
                say(f"default   {name} = {own[name]!r}")

    def clear(self, _: str) -> None:
        self.talk.clear()
        self.model.prefixes.clear()
        if self.keeper:
            self.keeper.forget(self.talk)
        say("Forgotten. Settings stay.")

    def save(self, path: str) -> None:
        where = _file(path, "/save FILE")
        self.talk.write(where, self.model.name)
        say(f"Saved {len(self.talk.messages)} messages in {where}")

    def load(self, path: str) -> None:
        where = _file(path, "/load FILE")
        try:
            text = where.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"{where} cannot be read: {why}") from None
        before = (self.talk.settings, self.talk.messages, self.talk.waiting)
        self.talk.load(text)
        try:
            self.check()
        except UsageError:
            self.talk.settings, self.talk.messages, self.talk.waiting = before
            raise UsageError("this saved chat has settings that are not possible here") from None
        say(f"Loaded {len(self.talk.messages)} messages from {where}")
        for gone in missing_media(self.talk):
            say(f"note: {gone} is no longer there; the chat cannot go on without it (/clear forgets it)")

    def bye(self, _: str) -> None:
        self.over = True


def _file(path: str, usage: str) -> Path:
    if not path:
        raise UsageError("which file?", usage)
    return Path(os.path.expanduser(path.strip("'\"")))


def _attach(kind: str) -> Callable[[Chat, str], None]:
    return lambda chat, path: chat.attach(kind, path)


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "/help": (Chat.help, "this list"),
    "/image": (_attach("image"), "FILE: send a picture with the next message"),
    "/audio": (_attach("audio"), "FILE: send a recording with the next message"),
    "/video": (_attach("video"), "FILE: send a video with the next message"),
    "/file": (_attach("document"), "FILE: send a PDF or a text with the next message"),
    "/set": (Chat.set, "NAME VALUE: change a setting; alone, list them"),
    "/show": (Chat.show, "the model, the settings and what waits to be sent"),
    "/clear": (Chat.clear, "forget what was said"),
    "/save": (Chat.save, "FILE: write the chat as JSON"),
    "/load": (Chat.load, "FILE: go on with a saved chat"),
    "/bye": (Chat.bye, "leave"),
}


def unfence(text: str) -> str:
    """A message without the triple quotes around it."""
    if text.startswith(FENCE) and text.endswith(FENCE) and len(text) >= 2 * len(FENCE):
        text = text[len(FENCE) : -len(FENCE)]
    return text.strip()


def is_open(text: str) -> bool:
    """Whether a message began with triple quotes that have not been closed: more lines belong to it."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) >= 2 * len(FENCE) and text.endswith(FENCE))


def make_reader() -> Reader:
    """The editor on a terminal, plain lines from a pipe."""
    return editor() if sys.stdin.isatty() and sys.stdout.isatty() else read_lines


def read_lines(offered: str) -> str:
    """One message from a pipe; there is nobody to offer a text to."""
    lines = [_line()]
    while is_open("\n".join(lines)):
        try:
            lines.append(_line())
        except EOFError:
            break
    return "\n".join(lines)


def _line() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise UsageError(
            "what comes through stdin is not UTF-8 text", "name media with /image, /audio, /video or /file"
        ) from None
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def editor() -> Reader:
    """prompt_toolkit's line editor with history, Alt+Enter and triple quotes."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def add_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=history(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="... ",
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
    )
    return lambda offered: session.prompt(">>> ", default=offered)


def history() -> Any:
    """What was typed before, in a file that only its owner can read; in memory where no file can be made."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "iolite" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
