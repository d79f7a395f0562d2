"""Packing while reading, and the cache of packed weights: the same bits every way, and never half a file."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.compressed import change_tensors, compress_folder
from support.folder import random_folder

import iolite
from iolite.checkpoint import packing
from iolite.checkpoint.folder import save_folder
from iolite.checkpoint.names import expected_shapes
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.safetensors import SafetensorsFile, StreamWriter
from iolite.checkpoint.source import FolderSource
from iolite.errors import CheckpointError
from iolite.model.unified import Unified
from iolite.quant.formats import PackedMatrix
from iolite.quant.linear import quantize_

SCHEMES = ("int4", "int8")


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("float"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that small models use too."""
    monkeypatch.setattr(packing, "SMALL", 0)
    monkeypatch.setenv("IOLITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed_names(monkeypatch):
    """The names of the tensors that were packed, as it happens."""
    from iolite.quant import schemes

    found = []
    true = schemes.quantise_named

    def noted(name, weight, format):
        found.append(name)
        return true(name, weight, format)

    monkeypatch.setattr(schemes, "quantise_named", noted)
    return found


def files_in(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, weight in first.items():
        if isinstance(weight, PackedMatrix):
            assert second[name].shape == weight.shape
            assert torch.equal(second[name].data, weight.data), name
        else:
            assert torch.equal(second[name], weight), name


# The same bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_memory_through_the_cache_and_out_of_it_are_the_same_bits(float_folder, cache, packed_names, scheme):
    source = FolderSource(float_folder)
    network = Unified(source.config)
    network.load_state_dict({name: source.weight(name) for name in source.names()})
    quantize_(network, scheme)
    wanted = network.state_dict()
    packed_names.clear()

    progress = []
    first = read_weights(source, scheme, lambda *step: progress.append(step))
    assert len(packed_names) == len(set(packed_names)) == sum(isinstance(w, PackedMatrix) for w in first.values()) > 30
    assert [(done, of) for done, of, what in progress if what.startswith("packing ")] == [
        (i, len(first)) for i in range(len(first))
    ]
    for name, weight in first.items():
        assert torch.equal(weight.data, wanted[name].data), name

    packed_names.clear()
    assert_same(first, read_weights(FolderSource(float_folder), scheme))
    assert packed_names == []  # it was mapped
    assert len(files_in(cache)) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_answers_the_same_with_and_without_the_cache(float_folder, cache, monkeypatch, scheme):
    through = iolite.load(float_folder, quantize=scheme)
    mapped = iolite.load(float_folder, quantize=scheme)
    monkeypatch.setattr(packing, "SMALL", 1 << 40)
    memory = iolite.load(float_folder, quantize=scheme)
    wanted = memory.logits("what number")
    assert torch.equal(through.logits("what number"), wanted)
    assert torch.equal(mapped.logits("what number"), wanted)
    assert not torch.equal(iolite.load(float_folder).logits("what number"), wanted)


def test_schemes_and_models_have_files_of_their_own(float_folder, cache, packed_names, tmp_path):
    other = shutil.copytree(float_folder, tmp_path / "other")
    change_tensors(other, lambda tensors: [t.neg_() for t in tensors.values()])
    wanted = {}
    for folder in (float_folder, other):
        for scheme in SCHEMES:
            wanted[folder, scheme] = read_weights(FolderSource(folder), scheme)
    assert len(files_in(cache)) == 4
    packed_names.clear()
    for (folder, scheme), weights in wanted.items():
        assert_same(weights, read_weights(FolderSource(folder), scheme))
    assert packed_names == []


def test_compressed_tensors_go_through_the_cache_too(float_folder, cache, tmp_path, monkeypatch):
    folder = shutil.copytree(float_folder, tmp_path / "compressed")
    weights = compress_folder(folder)
    first = read_weights(FolderSource(folder), None)
    assert len(files_in(cache)) == 1
    monkeypatch.setattr(FolderSource, "weight", None)  # no longer read
    second = read_weights(FolderSource(folder), None)
    assert_same(first, second)
    for name, weight in weights.items():
        assert torch.equal(second[name.removeprefix("model.")].to_float(), weight)


def test_float_weights_and_small_models_leave_no_files(float_folder, cache, monkeypatch):
    source = FolderSource(float_folder)
    floats = read_weights(source, None)
    assert all(torch.equal(floats[name], source.weight(name)) for name in source.names())
    monkeypatch.undo()
    monkeypatch.setenv("IOLITE_CACHE", str(cache))
    read_weights(source, "int4")  # 17 MB of source files: packed in memory
    assert not cache.exists()


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    for name in ("IOLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert packing.cache_folder() == Path("/home/me/.cache/iolite")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert packing.cache_folder() == Path("/x/iolite")
    monkeypatch.setenv("IOLITE_CACHE", "/y")
    assert packing.cache_folder() == Path("/y")


# What was kept is no longer good


def test_a_source_that_changed_is_packed_again(float_folder, cache, packed_names, tmp_path):
    folder = shutil.copytree(float_folder, tmp_path / "model")
    first = read_weights(FolderSource(folder), "int4")
    change_tensors(folder, lambda tensors: [t.mul_(2) for t in tensors.values()])
    packed_names.clear()
    second = read_weights(FolderSource(folder), "int4")
    assert packed_names != []
    name = "language_model.norm.weight"
    assert torch.equal(second[name], 2 * first[name])


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def damage_header(path):
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff")


def lose_a_tensor(path):
    change_tensors(path.parent, lambda tensors: tensors.pop("model.language_model.norm.weight"))


def exchange_shapes(path):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    change_tensors(path.parent, lambda t: t.update({name: t[name].transpose(0, 1).contiguous()}))


@pytest.mark.parametrize("damage", [cut_short, empty, damage_header, lose_a_tensor, exchange_shapes])
def test_a_kept_file_that_was_damaged_is_packed_again_and_replaced(float_folder, cache, packed_names, damage):
    source = FolderSource(float_folder)
    first = read_weights(source, "int4")
    wanted = {name: (w.data if isinstance(w, PackedMatrix) else w).clone() for name, w in first.items()}
    del first
    (path,) = files_in(cache)
    damage(path)
    packed_names.clear()
    again = read_weights(source, "int4")
    assert packed_names != []
    assert all(torch.equal(again[name].data, weight) for name, weight in wanted.items())
    assert files_in(cache) == [path]
    packed_names.clear()
    read_weights(source, "int4")
    assert packed_names == []


# What cannot be kept


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_packing_leaves_nothing_half(float_folder, cache, packed_names, monkeypatch, stop):
    source, write, written = FolderSource(float_folder), StreamWriter.write, []

    def interrupted(self, name, tensor):
        written.append(name)
        if len(written) == 10:
            raise stop
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(StreamWriter, "write", interrupted)
        with pytest.raises(stop):
            read_weights(source, "int4")
    assert files_in(cache) == []
    packed_names.clear()
    read_weights(source, "int4")
    assert packed_names != []
    assert len(files_in(cache)) == 1


def no_room(monkeypatch, cache):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    return r"has 1 MB free and needs \d+ MB"


def not_a_folder(monkeypatch, cache):
    cache.write_text("a file")
    return "cannot be made"


def disk_fills_up(monkeypatch, cache):
    write = StreamWriter.append
    count = iter(range(10**6))

    def append(self, raw):
        if next(count) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, raw)

    monkeypatch.setattr(StreamWriter, "append", append)
    return "No space left on device"


def no_permission(monkeypatch, cache):
    """Root may write everywhere, so the refusal is made here."""
    import builtins

    true = builtins.open

    def refusing(file, mode="r", *args, **kwargs):
        if "w" in mode and str(file).startswith(str(cache)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return true(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)
    return "cannot be written .*Permission denied"


@pytest.mark.parametrize("hinder", [no_room, not_a_folder, disk_fills_up, no_permission])
def test_where_it_cannot_be_kept_it_is_packed_in_memory_with_a_note(
    float_folder, cache, monkeypatch, capsys, tmp_path, hinder
):
    source = FolderSource(float_folder)
    with monkeypatch.context() as patch:
        message = hinder(patch, cache)
        found = read_weights(source, "int4")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("note: the packed weights are not kept: ")
    assert re.search(message, err)
    assert [path for path in files_in(tmp_path) if path != cache] == []
    monkeypatch.setenv("IOLITE_CACHE", str(tmp_path / "another"))
    assert_same(found, read_weights(source, "int4"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cannot_be_packed_are_named_and_nothing_is_kept(float_folder, cache, tmp_path, value):
    folder = shutil.copytree(float_folder, tmp_path / "model")
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.raises(CheckpointError, match=r"cannot quantise language_model\.layers\.1\.self_attn\.q_proj"):
        read_weights(FolderSource(folder), "int4")
    assert files_in(cache) == []


# Memory

_PEAK = """
import os, sys, torch
def peak(): return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmHWM"))
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.source import FolderSource
from iolite.quant import schemes
torch.set_num_threads(1)
# What a first packing takes for itself: code that is loaded, buffers that are kept.
schemes.quantise_named("warm", torch.randn(4096, 1024).bfloat16(), schemes.INT4)
source = FolderSource(__import__("pathlib").Path(sys.argv[1]))
before = peak()
weights = read_weights(source, "int4")
packed = sum(w.data.nbytes for w in weights.values())
print(before, peak(), packed, len(os.listdir(os.environ["IOLITE_CACHE"] + "/packed")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_holds_one_tensor_at_a_time(tmp_path):
    folder, largest, total = big_folder(tmp_path / "big")
    environment = os.environ | {"IOLITE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PEAK, str(folder)]
    for _ in range(2):  # packed, then mapped
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=True)
        before, after, packed, kept = map(int, done.stdout.split())
        assert kept == 1
        # While it packs: the largest tensor in bfloat16 and packed, 1.3 of it; floats are made in pieces of 1 MB, some
        # at a time. After that the packed file, mapped. 32 MB for the pieces and what the allocator keeps of them.
        limit = max(packed, 1.3 * largest) + (32 << 20)
        assert after - before < limit
        assert limit < total / 2  # the limit means something


def big_folder(folder):
    """A model of 300 MB in bfloat16, most of it in wide layers; -> (folder, bytes of its largest tensor, of all)."""
    config = FolderSource(random_folder(folder)).config
    layers = 4
    text = replace(
        config.text,
        hidden_size=1024,
        intermediate_size=11_264,
        num_hidden_layers=layers,
        layer_types=config.text.layer_types[-layers:],
    )
    config = replace(config, text=text, vision=None, audio=None)
    with torch.device("meta"):
        network = Unified(config)
    rng = torch.Generator().manual_seed(0)
    shapes = expected_shapes(config)
    state = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}
    network.load_state_dict(state, assign=True)
    save_folder(folder, network, config)
    sizes = [tensor.nbytes for tensor in state.values()]
    return folder, max(sizes), sum(sizes)


def test_the_kept_file_is_a_safetensors_file_with_its_scheme(float_folder, cache):
    read_weights(FolderSource(float_folder), "int8")
    (path,) = files_in(cache)
    assert SafetensorsFile(path).metadata == {"format": "pt", "iolite": "int8 1"}
