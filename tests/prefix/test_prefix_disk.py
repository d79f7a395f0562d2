"""Sequences on the disk: what comes back is what was written, and whatever else lies there is never used."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.oracle import Audio, Image, Text
from support.prefix import SLACK, Reader, prompt_of, text, with_media

from iolite.cache import KVCache
from iolite.checkpoint import safetensors
from iolite.checkpoint.files import WriteError
from iolite.checkpoint.safetensors import SafetensorsFile, StreamWriter, save_safetensors
from iolite.errors import UsageError
from iolite.model.prefill import prefill
from iolite.prefix import disk
from iolite.prefix.disk import DiskStore
from iolite.prefix.fingerprint import fingerprint
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt

# Newer Pythons warn of forks beside threads; these children only write files.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

IDENTITY = {"model": "a", "adapter": "", "dtype": "float32", "kv": "None"}
PROMPT = with_media(Text(9), Image(4, 3), Text(30), Audio(8), Text(20))
ANSWER = text((1, 12))
WHOLE = Prompt([*PROMPT.ids, *ANSWER, *text((2, 5))], "", PROMPT.spans)
LENGTH = len(PROMPT.ids) + len(ANSWER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def start(network, make, folder, notes) -> Callable[..., Reader]:
    """A program that starts anew: nothing in memory, a store over the same folder."""

    def use(limit: int = 10**9, kind: Callable[[], KVCache] = make, **changed: str) -> Reader:
        prefixes = PrefixCache(kind)
        prefixes.disk = DiskStore(folder, IDENTITY | changed, limit, notes.append)
        return Reader(network, prefixes)

    return use


@pytest.fixture
def written(start, folder) -> Path:
    """The file of one conversation."""
    read = start()
    read(PROMPT, ANSWER)
    assert read.prefixes.save() == 1
    (path,) = folder.iterdir()
    return path


def test_a_conversation_goes_on_after_a_restart(start, written, notes):
    read = start()
    assert read(WHOLE) == LENGTH
    assert read.prefixes.save() == 1
    assert [*written.parent.iterdir()] == [written]  # one file for each conversation
    assert start()(WHOLE) == len(WHOLE.ids) - 1
    assert notes == []


def test_only_the_owner_may_read_it(written):
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE(written.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [3, 30, 90])
def test_every_format_of_a_cache_comes_back_as_it_was(network, start, dtype, tokens):
    def make():
        return KVCache(network.config.text, 1024, dtype, slack=SLACK)

    def fill(prefixes: PrefixCache, prompt: Prompt):
        with prefixes.lend(prompt, prompt.ids) as lease, torch.inference_mode():
            for _ in prefill(network, prompt, lease.cache, chunk_size=7):
                pass
        return lease.cache.state(), lease.cache.earliest

    prompt = prompt_of((1, tokens))
    read = start(kind=make)
    state, earliest = fill(read.prefixes, prompt)
    read.prefixes.save()
    lease = start(kind=make).prefixes.take(Prompt([*prompt.ids, 30], ""))
    assert lease.reused == len(prompt.ids)
    assert lease.cache.earliest == earliest
    again = lease.cache.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_what_an_answer_longer_than_the_slack_left_behind_is_kept_too(start):
    first = prompt_of((1, 60))
    read = start()
    read(first, text((2, 3 * SLACK)))
    assert read.prefixes.save() == 1
    read = start()
    assert read(Prompt([*first.ids[:-5], *text((3, 20))], "")) == len(first.ids) - 5
    assert start()(Prompt([*first.ids, *text((2, 3 * SLACK), (3, 20))], "")) == len(first.ids) + 3 * SLACK


def test_the_disk_is_asked_only_for_more_than_memory_has(start, written, monkeypatch):
    read = start()
    assert read(WHOLE) == LENGTH
    monkeypatch.setattr(DiskStore, "_read", lambda *_: pytest.fail("read again"))
    assert read(Prompt([*WHOLE.ids, 30], "", WHOLE.spans)) == len(WHOLE.ids)
    assert read(prompt_of((9, 20))) <= 1


def refused(start, folder: Path, notes: list[str], data: bytes, name: str) -> bool:
    """Puts bytes in the place of a file and looks for the conversation there: whether it is not found. Whatever is
    found must be what was written."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / name).write_bytes(data)
    notes.clear()
    found = start().prefixes.take(WHOLE)
    if found.reused == 0:
        # Either it was damaged, and is gone, or it says that it is somebody else's.
        assert len(notes) == 1
        assert ("removed" in notes[0]) != (folder / name).exists()
        return True
    return False


def test_a_changed_byte_anywhere_is_refused(start, written, notes):
    data = written.read_bytes()
    file = SafetensorsFile(written)
    begin, entries = file._data_start, [*file._entries.values()]
    header = len(data[:begin].rstrip())
    places = {begin + place for e in entries for place in (e.begin, (e.begin + e.end) // 2, e.end - 1)}
    places |= {*range(0, 8), *range(8, header, 41), header - 1}
    rng = random.Random(0)
    for place in sorted(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        assert refused(start, written.parent, notes, bytes(flipped), written.name), place
    assert not refused(start, written.parent, notes, data, written.name)
    assert len(places) > 100


def test_a_digit_of_the_header_that_still_makes_sense_is_refused(start, written, notes):
    data = written.read_bytes()
    file = SafetensorsFile(written)
    for old, new in (
        (f'"length":"{LENGTH}"', f'"length":"{LENGTH - 1}"'),
        (f'"earliest":"{file.metadata["earliest"]}"', '"earliest":"00"'),
        ('"model":"a"', '"model":"b"'),
        ('"checkpoints":"[]"', '"checkpoints":"{}"'),
        ('"dtype":"F32"', '"dtype":"I32"'),
        ("layers.0.k", "layers.0.x"),
        ("layers.0.k", "layers.1.q"),
    ):
        assert data.count(old.encode()) >= 1, old
        changed = data.replace(old.encode(), new.encode(), 1)
        assert len(changed) == len(data)
        assert refused(start, written.parent, notes, changed, written.name), new


def test_a_truncated_file_is_refused(start, written, notes):
    data = written.read_bytes()
    file = SafetensorsFile(written)
    begin = file._data_start
    ends = [begin + entry.end for entry in file._entries.values()]
    for length in {0, 1, 7, 8, 9, begin // 2, begin - 1, begin, *ends, *(end - 1 for end in ends)} - {len(data)}:
        assert refused(start, written.parent, notes, data[:length], written.name), length
    assert refused(start, written.parent, notes, data + b"\0", written.name)


@pytest.mark.parametrize("name", ["model", "adapter", "dtype", "kv"])
def test_another_models_sequence_is_left_alone(start, written, notes, name):
    assert start(**{name: "other"})(WHOLE) == 0
    assert "is of another model" in notes[0]
    assert start()(WHOLE) == LENGTH


def test_a_cache_of_another_shape_is_refused(network, start, written, notes):
    """Everything that the header says fits, and the cache does not."""
    other = start(kind=lambda: KVCache(network.config.text, 1024, slack=SLACK, shared=False))
    assert other.prefixes.take(WHOLE).reused == 0
    assert "not the tensors of this cache" in notes[0]
    assert not written.exists()


def test_a_sequence_longer_than_the_context_is_refused(network, start, written, notes):
    other = start(kind=lambda: KVCache(network.config.text, 40, slack=SLACK))
    assert other.prefixes.take(WHOLE).reused == 0
    assert "40 at most" in notes[0]


def test_files_that_are_none_of_ours_do_no_harm(start, written, notes):
    folder = written.parent
    (folder / "text.safetensors").write_text("hello, this is not a checkpoint")
    (folder / "empty.safetensors").touch()
    save_safetensors(folder / "other.safetensors", {"a": torch.zeros(3)}, {"format": "pt"})
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    assert start()(WHOLE) == LENGTH
    assert len(notes) == 3
    assert sorted(path.name for path in folder.iterdir()) == sorted([written.name, "notes.txt", "sub"])


def test_the_best_of_several_is_taken_and_the_next_when_it_is_damaged(start, folder, notes):
    read = start()
    read(prompt_of((1, 30), (2, 15)))
    read(prompt_of((1, 30), (3, 15)), text((4, 4)))
    assert read.prefixes.save() == 2
    wanted = prompt_of((1, 30), (3, 15), (4, 4), (5, 3))
    assert start()(wanted) == 50
    longest = max(folder.iterdir(), key=lambda path: int(SafetensorsFile(path).metadata["length"]))
    data = bytearray(longest.read_bytes())
    data[-40] ^= 1
    longest.write_bytes(data)
    assert start()(wanted) == 31
    assert len(notes) == 1


def test_the_folder_is_limited(start, folder, notes):
    read = start()
    for seed in (1, 2, 3):
        read(prompt_of((seed, 60)))
    assert read.prefixes.save() == 3
    size = read.prefixes.disk.num_bytes() // 3
    names = {seed: read.prefixes._kept[n].name for n, seed in enumerate((3, 2, 1))}
    for age, seed in enumerate((2, 3, 1)):  # 2 was used last
        os.utime(folder / f"{names[seed]}.safetensors", (1000 - age, 1000 - age))
    small = start(limit=int(3.5 * size))
    small(prompt_of((4, 60)))
    assert small.prefixes.save() == 1
    assert len([*folder.iterdir()]) == 3
    assert not (folder / f"{names[1]}.safetensors").exists()
    assert notes == []
    tiny = start(limit=size // 2)
    tiny(prompt_of((5, 60)))
    assert tiny.prefixes.save() == 0
    assert "more than the limit" in notes[0]
    assert len([*folder.iterdir()]) == 3


def test_only_what_has_changed_is_written(start, folder):
    read = start()
    read(PROMPT, ANSWER)
    read(prompt_of((7, 30)))
    assert read.prefixes.save(most=1) == 1
    assert read.prefixes.save() == 1
    assert read.prefixes.save() == 0
    read(prompt_of((7, 30), (8, 2)))
    assert read.prefixes.save(growth=0.2) == 0
    assert read.prefixes.save() == 1
    assert len([*folder.iterdir()]) == 2


def test_what_is_being_written_is_not_lent(start, monkeypatch):
    read = start()
    read(PROMPT, ANSWER)
    (kept,) = read.prefixes._kept
    write = DiskStore.write

    def and_take(self, *args):
        lease = read.prefixes.take(WHOLE)
        assert lease.cache is not kept.cache
        read.prefixes.drop(lease)
        return write(self, *args)

    monkeypatch.setattr(DiskStore, "write", and_take)
    assert read.prefixes.save() == 1
    assert read(WHOLE) == LENGTH


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "kept"):
        with pytest.raises(UsageError, match="cannot be used as a folder"):
            DiskStore(path, IDENTITY, 10, print)


# Programs that die, and disks that are full


def in_a_child(work: Callable[[], None]) -> int:
    """Runs work in a fork of this process; its number."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


def fails_after(monkeypatch, calls: int, act: Callable[[], None]) -> None:
    """The n-th time that a tensor is written, something happens."""
    append, left = StreamWriter.append, [calls]

    def counted(self, raw):
        left[0] -= 1
        if left[0] == 0:
            act()
        append(self, raw)

    monkeypatch.setattr(StreamWriter, "append", counted)


def test_a_program_killed_in_the_middle_of_a_write_leaves_what_was_there(start, written, monkeypatch):
    """Killed before each tensor, before the header, before the new name, and at random moments of many writes."""
    read = start()
    assert read(WHOLE) == LENGTH
    (kept,) = read.prefixes._kept
    before, store = written.read_bytes(), read.prefixes.disk

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    stages: list[Callable] = [lambda patch, n=n: fails_after(patch, n, die) for n in range(1, 15, 3)]
    stages.append(lambda patch: patch.setattr(StreamWriter, "finish", lambda *_: die()))
    stages.append(lambda patch: patch.setattr(safetensors.os, "replace", lambda *_: die()))
    for stage in stages:
        with monkeypatch.context() as patch:
            stage(patch)
            child = in_a_child(lambda: store.write(kept))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert written.read_bytes() == before
        assert len([*written.parent.iterdir()]) == 2
        assert start()(WHOLE) == LENGTH
        assert [*written.parent.iterdir()] == [written]
    rng = random.Random(1)
    for _ in range(8):

        def forever() -> None:
            while True:
                store.write(kept)

        child = in_a_child(forever)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert start()(WHOLE) in (LENGTH, len(WHOLE.ids) - 1)
        assert [*written.parent.iterdir()] == [written]


@pytest.mark.parametrize("calls", [1, 7])
def test_a_full_disk_is_told_and_the_former_file_stays(start, written, monkeypatch, calls):
    read, before = start(), written.read_bytes()
    read(WHOLE)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        fails_after(patch, calls, full)
        with pytest.raises(WriteError, match="No space left"):
            read.prefixes.save()
    assert written.read_bytes() == before
    assert [*written.parent.iterdir()] == [written]
    assert read(Prompt([*WHOLE.ids, 30], "", WHOLE.spans)) == len(WHOLE.ids)  # nothing in memory was lost
    assert read.prefixes.save() == 1


def test_a_limit_on_the_size_of_files_leaves_the_former_file(start, written):
    read, before = start(), written.read_bytes()
    read(WHOLE)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            read.prefixes.save()
        except WriteError:
            os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(limited), 0)[1]) == 7
    assert written.read_bytes() == before
    assert [*written.parent.iterdir()] == [written]


def test_ctrl_c_in_the_middle_of_a_write_leaves_the_former_file(start, written, monkeypatch):
    read, before = start(), written.read_bytes()
    read(WHOLE)

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fails_after(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            read.prefixes.save()
    assert written.read_bytes() == before
    assert [*written.parent.iterdir()] == [written]
    assert len(read.prefixes) == 1


def test_only_what_dead_programs_left_is_removed(start, folder, monkeypatch):
    start()
    dead = in_a_child(lambda: None)
    os.waitpid(dead, 0)
    own, parent = os.getpid(), os.getppid()
    names = [f".a.safetensors.{n}.partial" for n in (dead, parent, own)] + [f".x.{dead}.partial", "b.partial"]
    for name in names:
        (folder / name).touch()
    start()
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[1:])
    monkeypatch.setattr(disk, "_STARTED", time.time() + 60)  # as if somebody had had our number before
    start()
    assert sorted(path.name for path in folder.iterdir()) == sorted([names[1], *names[3:]])
    os.utime(folder / names[1], (1, 1))
    start()
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[3:])


# Fingerprints


def test_a_fingerprint_is_of_the_weights_and_the_settings(network, load_tiny):
    own = fingerprint(network, network.config)
    assert own == fingerprint(deepcopy(network), network.config)
    assert own != fingerprint(load_tiny("own-values"), network.config)
    assert own != fingerprint(network, load_tiny("narrow").config)
    assert own != fingerprint(deepcopy(network).bfloat16(), network.config)
    for name in ("language_model.layers.3.self_attn.q_proj.weight", "language_model.norm.weight"):
        other = deepcopy(network)
        with torch.no_grad():
            other.get_parameter(name).add_(1e-6 * torch.rand_like(other.get_parameter(name)))  # as a merged adapter
        assert fingerprint(other, network.config) != own


def test_large_tensors_are_sampled_over_their_whole_length():
    def of(tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer("weight", tensor)
        return fingerprint(module, None)

    zeros = torch.zeros(1_000_003, dtype=torch.uint8)
    own = of(zeros)
    for first in range(0, 1_000_003, 62_500):
        other = zeros.clone()
        other[first : first + 70_000] = 1
        assert of(other) != own
    last = zeros.clone()
    last[-1] = 1
    assert of(last) != own
