"""`iolite chat --save`: a chat goes on where it was, and reads only what is new; nothing is lost on the way."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from iolite.checkpoint import safetensors
from iolite.cli import run_command
from iolite.prefix.disk import DiskStore

READ = re.compile(r"prompt: +(\d+) tokens .*tokens/s(?:; (\d+) before them)?")


@pytest.fixture
def kept(piped, here, capsys):
    """lines -> (stdout, stderr, what each prompt read and found) of a chat with the embedded model, kept in c.json."""

    def use(*lines: str, flags: tuple[str, ...] = (), code: int = 0) -> tuple[str, str, list[tuple[int, int]]]:
        piped("\n".join(lines).encode())
        assert run_command(["chat", "nano", "--save", "c.json", "--temp", "0", "--verbose", *flags]) == code
        out, err = capsys.readouterr()
        return out, err, [(int(new), int(old or 0)) for new, old in READ.findall(err)]

    return use


def messages() -> list[dict]:
    return json.loads(Path("c.json").read_text(encoding="utf-8"))["messages"]


def test_a_chat_with_media_goes_on_after_a_restart_and_reads_only_what_is_new(kept, here):
    lines = ("What number is this? a.png", "What is said? talk.wav", "And now?")
    out, _, whole = kept(*lines)
    (here / "c.json").unlink()
    for line in lines[:2]:
        kept(line)
    again, err, (last,) = kept(lines[2])
    assert "Loaded 4 messages from c.json" in err
    assert last == whole[2]  # as if it had never been left
    assert out.splitlines()[2:] == again.splitlines()
    assert 0 < last[0] < 40 < last[1]
    assert len(messages()) == 6
    assert len([*(here / "c.json.cache").iterdir()]) == 1


def test_every_turn_is_there_though_the_program_is_killed(here):
    """Killed while it waits for the next message, without a chance to write anything."""
    command = [sys.executable, "-m", "iolite.cli", "chat", "nano", "--save", "c.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdin.write(b"Hello!\n/show\n")
        program.stdin.flush()
        for line in program.stderr:
            if line.startswith(b"messages"):
                break
        program.kill()
        program.stdin.close()
    assert [message["role"] for message in messages()] == ["user", "assistant"]
    assert len([*(here / "c.json.cache").iterdir()]) == 1


def test_only_the_owner_may_read_what_is_kept(kept, here):
    kept("Hello!")
    assert stat.S_IMODE((here / "c.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((here / "c.json.cache").stat().st_mode) == 0o700


def test_settings_of_the_chat_stay_unless_they_are_given(kept, here):
    kept("Hello!", flags=("--system", "Be kind.", "-n", "3", "--seed", "5"))
    kept("And now?", flags=("--seed", "6"))
    settings = json.loads((here / "c.json").read_text())["settings"]
    assert (settings["system"], settings["max_tokens"], settings["seed"]) == ("Be kind.", 3, 6)


def test_what_is_forgotten_is_gone_from_the_disk_too(kept, here):
    kept("My name is Ada.", "/clear")
    assert messages() == []
    assert [*(here / "c.json.cache").iterdir()] == []


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_cache_is_told_and_the_chat_goes_on(kept, here, place):
    kept("Hello!")
    (file,) = (here / "c.json.cache").iterdir()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    _, err, ((_, found),) = kept("And now?")
    assert "note: " in err and "its prompt is read again" in err
    assert found == 0
    assert kept("And then?")[2][0][1] > 0
    assert len(messages()) == 6


def test_a_cache_of_another_model_is_not_used(kept, here, random_model, piped, capsys):
    kept("Hello!")
    piped(b"And now?")
    assert run_command(["chat", str(random_model), "--save", "c.json", "-n", "3", "--verbose"]) == 0
    err = capsys.readouterr().err
    assert "is of another model" in err
    assert "before them" not in err
    assert len(messages()) == 4


def test_a_cache_over_the_limit_is_not_written(kept, here):
    _, err, _ = kept("Hello!", "And now?", flags=("--cache-limit", "10kB"))
    assert err.count("more than the limit of 10.0 kB: not written") == 1
    assert [*(here / "c.json.cache").iterdir()] == []
    assert len(messages()) == 4


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_the_former_files_stay_when_writing_is_broken_off(kept, here, monkeypatch, fault):
    kept("Hello!")
    before = (here / "c.json").read_bytes()
    caches = {path.name: path.read_bytes() for path in (here / "c.json.cache").iterdir()}

    def broken(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.os, "fsync", broken)
        patch.setattr(DiskStore, "write", lambda *_: True)
        out, err, _ = kept("And now?", "What?")
    assert len(out.splitlines()) == 2  # the chat went on
    assert "(stopped)" in err if fault is KeyboardInterrupt else "No space left on device" in err
    assert (here / "c.json").read_bytes() == before
    assert {path.name: path.read_bytes() for path in (here / "c.json.cache").iterdir()} == caches
    assert sorted(os.listdir(here)) == ["a.png", "c.json", "c.json.cache", "talk.wav"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--save", "gone/c.json"), "there is no folder"),
        (("--save", "a.png"), "cannot be read"),
        (("--cache-limit", "much"), "no amount of memory"),
        (("--save", ""), "which file?"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_chat_begins(kept, here, flags, error):
    _, err, _ = kept("Hello!", flags=flags, code=2)
    assert error in err
    assert sorted(os.listdir(here)) == ["a.png", "talk.wav"]
