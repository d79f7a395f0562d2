"""The dispatcher: quick help without torch, exit codes, and errors on stderr in one form."""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys

import click
import pytest

import iolite
from iolite import cli
from iolite.errors import CheckpointError, IoliteError


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of `iolite show`."""

    def put(body):
        monkeypatch.setattr(cli.Dispatcher, "get_command", lambda *_: click.Command("show", callback=body))

    return put


HEAVY = ("torch", "transformers", "numpy", "PIL", "av", "rich", "tokenizers", "jinja2", "huggingface_hub")


def processor_seconds():
    """What the processes that this one started have used, in all."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments, **options):
    command = [sys.executable, "-m", "iolite.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_help_is_quick_and_imports_neither_torch_nor_a_command():
    code = (
        "import sys; from iolite.cli import run_command; code = run_command(['--help']); "
        f"print([m for m in sys.modules if m in {HEAVY} or m.startswith('iolite.cli.')]); "
        "sys.exit(code)"
    )
    begin = processor_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = processor_seconds() - begin
    for name, line in cli.COMMANDS.items():
        assert f"\n  {name} " in done.stdout
        assert line.split()[0] in done.stdout
    assert done.stdout.endswith("[]\n")
    assert seconds < 0.3  # 0.05 s where it was written; processor time, since a busy machine keeps us waiting


def test_the_help_of_a_command_imports_nothing_heavy_either():
    code = (
        "import sys; from iolite.cli import COMMANDS, run_command; "
        "codes = {run_command([name, '--help']) for name in COMMANDS}; "
        f"print(codes, [m for m in sys.modules if m in {HEAVY}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("{0} []\n")


def test_no_arguments_is_help(capsys):
    assert cli.run_command([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys):
    assert cli.run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"iolite {iolite.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["shw"], "there is no command 'shw'", "did you mean `iolite show`?"),
        (["xyzzy"], "there is no command 'xyzzy'", "`iolite --help` lists the commands"),
        (["--flag"], "No such option '--flag'", "`iolite --help` says what it takes"),
        (["show", "--flag"], "No such option '--flag'", "`iolite show --help` says what it takes"),
        (["pull"], "Missing argument 'MODEL'", "`iolite pull --help` says what it takes"),
        (
            ["list", "too", "many"],
            "Got unexpected extra arguments (too many)",
            "`iolite list --help` says what it takes",
        ),
    ],
)
def test_wrong_usage(capsys, arguments, error, hint):
    assert cli.run_command(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\nhint: {hint}\n")


def test_our_errors(command, capsys):
    def fail():
        raise CheckpointError("the file is short", "fetch it again")

    command(fail)
    assert cli.run_command(["show"]) == 2
    assert capsys.readouterr() == ("", "error: the file is short\nhint: fetch it again\n")


def test_an_error_without_a_hint(command, capsys):
    def fail():
        raise IoliteError("no")

    command(fail)
    assert cli.run_command(["show"]) == 2
    assert capsys.readouterr() == ("", "error: no\n")


def test_interrupt(command, capsys):
    def stop():
        raise KeyboardInterrupt

    command(stop)
    assert cli.run_command(["show"]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_our_own_faults_are_not_hidden(command):
    def broken():
        raise ZeroDivisionError

    command(broken)
    with pytest.raises(ZeroDivisionError):
        cli.run_command(["show"])


def test_an_exit_code_of_a_command(command):
    command(lambda: 3)
    assert cli.run_command(["show"]) == 3


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "iolite.cli", "list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=240)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_errors_are_coloured_on_a_terminal_only(variables, coloured):
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | variables
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-m", "iolite.cli", "xyzzy"], stderr=theirs, env=env, timeout=240)
    os.close(theirs)
    text = os.read(ours, 10_000)
    os.close(ours)
    assert (b"\x1b[" in text) is coloured
    assert b"\x1b" not in run("xyzzy", env=env).stderr.encode()


def test_every_command_is_there():
    ctx = click.Context(cli.cli)
    for name in cli.COMMANDS:
        assert isinstance(cli.cli.get_command(ctx, name), click.Command), name
    assert cli.cli.get_command(ctx, "ls") is cli.cli.get_command(ctx, "list")
    assert cli.cli.get_command(ctx, "errors") is None  # only the table's names are imported


def test_errors_are_shown_without_control_characters(capsys):
    cli.print_error("no tensor \x1b[2J\ud800 here", "a\x07b")  # as the names in a checkpoint may have them
    assert capsys.readouterr().err == "error: no tensor �[2J� here\nhint: a�b\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "iolite", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"iolite {iolite.__version__}\n"
