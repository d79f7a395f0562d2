"""The command line: a dispatcher, and one file per command, each imported only when it is used.

`iolite --help` reads the table below and imports neither torch nor any command. stdout carries data, stderr
carries talk. Exit codes: 0 done, 2 the input is at fault (`error: …`, then `hint: …`), 130 interrupted, 141 the
reader of our output went away; a traceback with code 1 is a bug of iolite.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from iolite import __version__
from iolite.errors import IoliteError

# name -> one line of help. Each is defined as `command` in the module iolite.cli.NAME. (Importing iolite.cli.list
# makes `list` that module in this file, so the built-in of that name is not used here.)
COMMANDS = {
    "run": "Ask once, with text, pictures, sound or video, and print the answer",
    "chat": "Talk in the terminal, turn by turn",
    "serve": "Serve a model to other programs: the interfaces of OpenAI, Anthropic and Ollama",
    "transcribe": "Write down what is said in a sound or video file",
    "train": "Train a drafter for a model, or the embedded model anew",
    "eval": "Measure a model on tasks",
    "bench": "Measure how fast a model is on this machine",
    "init": "Make a model of random weights and the true shape, for benchmarks",
    "convert": "Write a model in another format: GGUF or safetensors",
    "quantize": "Write a model with weights of 4 or 8 bits",
    "pull": "Download a model into the Hugging Face cache",
    "list": "List the models on this machine",
    "show": "Describe a model, or this machine",
}
_ALIASES = {"ls": "list"}


class Dispatcher(click.Group):
    """A click group whose help comes from COMMANDS and whose commands are imported when called."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout once more on its way out; give it somewhere to write.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise click.exceptions.Exit(141) from None
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"iolite.cli.{name}").command
        assert isinstance(command, click.Command), f"iolite.cli.{name} defines no command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and _ALIASES.get(args[0], args[0]) not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean `iolite {near[0]}`?" if near else "`iolite --help` lists the commands"
            raise IoliteError(f"there is no command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.group(cls=Dispatcher, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iolite", message="%(prog)s %(version)s")
def cli() -> None:
    """Run and train encoder-free multimodal models (Gemma 4 Unified) on this computer.

    MODEL is `nano` (the one inside the package), a folder, or a Hugging Face id that was pulled.

    `iolite COMMAND --help` says what a command takes.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `iolite` command; always leaves through SystemExit."""
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def run_command(argv: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; what a user can cause is printed, never raised."""
    try:
        code = cli.main(args=[*argv] or ["--help"], prog_name="iolite", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except IoliteError as error:
        print_error(str(error), error.hint)
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "iolite"
        print_error(error.format_message().rstrip("."), f"`{path} --help` says what it takes")
        return 2
    except click.ClickException as error:
        print_error(error.format_message())
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130


def print_error(message: str, hint: str | None = None) -> None:
    """`error: …` and `hint: …` on stderr, coloured only on a terminal that allows it."""
    from iolite.cli.terminal import harmless

    color = False if os.environ.get("NO_COLOR") else None
    click.echo(click.style("error: ", fg="red", bold=True) + harmless(message), err=True, color=color)
    if hint:
        click.echo(click.style("hint: ", fg="cyan") + harmless(hint), err=True, color=color)
