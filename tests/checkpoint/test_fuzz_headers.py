"""Damaged and hostile model files: whatever the headers say, a file is loaded or refused with an IoliteError.

Two kinds of files: valid ones with bytes, lengths and counts changed, cut, moved and repeated, and files put together
from fields that are each plausible, extreme or wrong. For every one of them the parsers may raise nothing but
IoliteError, whose message the commands can show, and may not allocate for what the file only claims to hold:
Python's and NumPy's memory is traced and compared with the file's size, and the process may not map more than
256 MB beyond what it had, far less than the sizes that the files claim. A loop over a claimed count would run into
pytest's time limit.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_bytes import Gguf, array, key, tensor, text, u32, u64

import iolite
from iolite.checkpoint import gguf_blocks, gguf_metadata, gguf_names, gguf_source
from iolite.checkpoint.folder import INDEX, WEIGHTS, check_weights, load_folder, open_weights, read_config, save_folder
from iolite.checkpoint.gguf import TYPES, GgufFile, create_gguf, tensor_bytes
from iolite.checkpoint.gguf_source import GgufSource
from iolite.checkpoint.names import expected_shapes
from iolite.checkpoint.safetensors import DTYPES, SafetensorsFile, save_safetensors
from iolite.cli.terminal import harmless
from iolite.config import GenerationConfig, ModelConfig, ProcessorConfig
from iolite.errors import IoliteError
from iolite.model.unified import Unified
from iolite.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ROOM = 256 << 20  # bytes of address space beyond what the tests began with


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    """An allocation of a size that only a file claims fails at once, with MemoryError or RuntimeError."""
    if sys.platform != "linux":
        yield
        return
    import resource

    torch.ones(300, 300).mm(torch.ones(300, 300))  # threads and their stacks are there before the limit is
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def survives(parse: Callable[[], None], size: int, constant: int) -> bool:
    """Whether the files, `size` bytes in all, were accepted; fails when they are refused in another way than due."""
    tracemalloc.start()
    try:
        parse()
        accepted = True
    except IoliteError as error:
        shown = harmless(f"{error}{error.hint or ''}")
        assert "\x1b" not in shown, shown
        assert shown.encode()
        accepted = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # What is parsed takes more than its bytes: a list of empty strings or lists up to eight times as much.
    assert peak <= constant + 30 * size, f"{peak} bytes of memory for a file of {size}"
    return accepted


# Damage to bytes

LENGTHS = (0, 1, 2, 3, 31, 32, 33, 255, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1)
LENGTHS += (2**63, 2**64 - 32, 2**64 - 1)
places = st.integers(0, 1 << 20)
edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("long"), places, st.sampled_from(LENGTHS)),
    st.tuples(st.just("word"), places, st.sampled_from(LENGTHS)),
    st.tuples(st.just("cut"), places, st.just(0)),
    st.tuples(st.just("drop"), places, st.integers(1, 64)),
    st.tuples(st.just("again"), places, st.integers(1, 64)),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=16)),
)


def damaged(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """The changes one after the other, their places taken modulo the length."""
    for kind, place, value in changes:
        at = place % (len(data) + 1)
        before, behind = data[:at], data[at:]
        match kind:
            case "flip":
                data = before + bytes(b ^ value for b in behind[:1]) + behind[1:]
            case "long":
                data = before + u64(value) + behind[8:]
            case "word":
                data = before + u32(value & 0xFFFFFFFF) + behind[4:]
            case "cut":
                data = before
            case "drop":
                data = before + behind[value:]
            case "again":
                data = before + behind[:value] + behind
            case "insert":
                data = before + value + behind
    return data


damage = st.lists(edits, min_size=1, max_size=5)


def fuzz(cases: int) -> Callable[[Any], Any]:
    # The folder of a test is shared by its cases: each writes the same file anew.
    shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=cases, suppress_health_check=shared)


# GGUF


def whole_gguf() -> Gguf:
    """A valid file with every kind of value and several types of tensors."""
    numbers = [
        key(f"n{kind}", kind, bytes([1] + [0] * (size - 1))) for kind, size in enumerate((1, 1, 2, 2, 4, 4, 4, 1))
    ]
    keys = (
        *numbers,
        *(key(f"n{kind}", kind, bytes(8)) for kind in (10, 11, 12)),
        key("general.architecture", 8, text("gemma4")),
        key("general.alignment", 4, u32(32)),
        key("split.count", 2, b"\x01\x00"),
        key("flags", 9, array(7, 2, b"\x00\x01")),
        key("tokens", 9, array(8, 3, text("a") + text("▁b") + text(""))),
        key("nested", 9, array(9, 2, array(4, 1, u32(5)) + array(8, 1, text("x")))),
    )
    shapes = {"scalar": ((), "F32"), "norm": ((5,), "F32"), "half": ((3, 2), "BF16")}
    shapes |= {kind: ((2, TYPES[kind].values), kind) for kind in gguf_blocks.PACKED}
    descriptions, data = [], b""
    for name, (shape, kind) in shapes.items():
        descriptions.append(tensor(name, shape[::-1], TYPES[kind].code, len(data)))
        size = tensor_bytes(shape, kind)
        data += bytes(size + -size % 32)
    return Gguf(keys, tuple(descriptions), data)


def read_gguf(path: Path) -> None:
    file = GgufFile(path)
    for name, t in file.tensors.items():
        raw = file.raw(name)
        assert raw.numel() == t.nbytes
        raw.sum()  # every byte is there
        if t.type in gguf_blocks.DECODED:
            gguf_blocks.dequantize(raw, t.type, t.shape)
    for name, t in file.tensors.items():
        if t.type in gguf_blocks.PACKED and len(t.shape) == 2:
            gguf_blocks.repack(file.raw(name), t.type, *t.shape)


def check_gguf(folder: Path, data: bytes) -> bool:
    path = folder / "a.gguf"
    path.write_bytes(data)
    return survives(partial(read_gguf, path), len(data), 200_000)


@fuzz(2000)
@given(changes=damage)
def test_damaged_gguf(tmp_path, changes):
    check_gguf(tmp_path, damaged(whole_gguf().encode(), changes))


def test_the_undamaged_gguf_is_accepted(tmp_path):
    assert check_gguf(tmp_path, whole_gguf().encode())


numbers = st.one_of(st.integers(0, 5), st.integers(0, 600), st.sampled_from(LENGTHS))
words = numbers.map(lambda n: n & 0xFFFFFFFF)
kinds = st.one_of(st.integers(0, 13), words)
texts = st.builds(text, st.one_of(st.text(max_size=8), st.binary(max_size=8)), st.none() | numbers)
arrays = st.recursive(
    st.builds(array, kinds, numbers, st.binary(max_size=40)) | st.builds(array, st.just(8), numbers, texts),
    lambda inner: st.builds(array, st.just(9), numbers, st.lists(inner, max_size=3).map(b"".join)),
    max_leaves=4,
)
key_names = st.sampled_from(["a", "b", "", "general.alignment", "split.count", "split.no", "split.tensors.count"])
keys = st.one_of(
    st.builds(key, key_names, kinds, st.one_of(st.binary(max_size=24), words.map(u32), texts, arrays)),
    st.builds(key, key_names, st.just(4), words.map(u32)),
    st.builds(key, key_names, st.just(9), arrays),
)
codes = st.one_of(st.sampled_from([block.code for block in TYPES.values()]), words)
dimensions = st.lists(st.one_of(st.sampled_from([1, 32, 256]), numbers), max_size=5).map(tuple)
offsets = st.one_of(st.integers(0, 8).map(lambda n: n * 32), numbers)
tensor_names = st.sampled_from([*"tuvwxyz", *"abcde", "", "x" * 65])
plausible = st.tuples(st.sampled_from([32, 256]), st.integers(1, 3))
descriptions = st.one_of(
    st.builds(tensor, tensor_names, dimensions, codes, offsets),
    st.builds(
        tensor, tensor_names, plausible, st.sampled_from([0, 2, 8, 30]), st.integers(0, 60).map(lambda n: n * 32)
    ),
)
counts = st.sampled_from((None,) * 150 + LENGTHS)
ggufs = st.builds(
    Gguf,
    keys=st.lists(keys, max_size=3).map(tuple),
    tensors=st.lists(descriptions, max_size=4).map(tuple),
    data=st.sampled_from([0, 1, 32, 64, 300, 5000, 10_000]).map(bytes),
    version=st.sampled_from([3] * 20 + [2] * 5 + [0, 1, 4, 0x03000000]),
    num_tensors=counts,
    num_keys=counts,
    alignment=st.sampled_from([1, 32, 32, 64]),
)


@fuzz(1500)
@given(file=ggufs)
def test_invented_gguf(tmp_path, file):
    check_gguf(tmp_path, file.encode())


@fuzz(500)
@given(
    tensors=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=6), room=st.integers(0, 24)
)
def test_places_of_tensors(tmp_path, tensors, room):
    """Tensors of 1 to 4 times 32 bytes at any places: accepted when they share none and all are in the file."""
    described = tuple(tensor(str(i), (8 * size,), 0, 32 * place) for i, (place, size) in enumerate(tensors))
    taken = [place + i for place, size in tensors for i in range(size)]
    fine = len(set(taken)) == len(taken) and max(taken) < room
    assert check_gguf(tmp_path, Gguf(tensors=described, data=bytes(32 * room)).encode()) is fine


# Safetensors


def read_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.keys():  # noqa: SIM118 (not a dict)
        found = file.tensor(name)
        assert tuple(found.shape) == file.shape(name)
        found.view(-1).view(torch.uint8).sum()


def check_safetensors(folder: Path, data: bytes) -> bool:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    return survives(partial(read_safetensors, path), len(data), 200_000)


@pytest.fixture(scope="module")
def whole_safetensors(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("safetensors")
    tensors = {
        "a": torch.ones(3, 2),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(0),
        "d": torch.ones(()),
    }
    save_safetensors(folder / "whole", tensors | {"e": torch.ones(3, dtype=torch.uint8)}, {"format": "pt"})
    return (folder / "whole").read_bytes()


@fuzz(1000)
@given(changes=damage)
def test_damaged_safetensors(tmp_path, whole_safetensors, changes):
    check_safetensors(tmp_path, damaged(whole_safetensors, changes))


def test_the_undamaged_safetensors_are_accepted(tmp_path, whole_safetensors):
    assert check_safetensors(tmp_path, whole_safetensors)


# JSON: any value in any place, and texts that json.dumps does not write

strange = st.one_of(
    st.none() | st.booleans() | st.integers(-2, 70),
    st.sampled_from([2**31, 2**32, 2**48, 2**53, 2**63, 2**64, 10**400, -(10**400), -1]),
    st.sampled_from([0.5, -0.5, 1.5, 1e300, 1e-300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "x", "bfloat16", "full_attention", "../a", "/etc/passwd", "\x1b[31m", "\ud800", "é" * 40]),
    st.sampled_from([[], {}, [[]], [{}], [1, "a"], {"": None}, [10**400], ["x" * 300]]),
    st.sampled_from(["DEEP 50", "DEEP 900", "DEEP 5000", "DIGITS"]),
)
EXTREME = {'"DIGITS"': "9" * 5000} | {f'"DEEP {n}"': "[" * n + "]" * n for n in (50, 900, 5000)}


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, the outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for k, inner in items for pair in ((value, k), *places_of(inner))]


def changed_json(value: Any, changes: list[tuple[int, str, Any]]) -> bytes:
    """The changed value as text; (place, what to do, the new value)."""
    value = json.loads(json.dumps(value))
    for place, what, new in changes:
        found = places_of(value)
        if not found:
            break
        container, k = found[place % len(found)]
        new = copy.deepcopy(new)  # later changes reach into it
        if what == "drop":
            del container[k]
        elif what == "rename" and isinstance(container, dict):
            container[str(new)] = container.pop(k)
        else:
            container[k] = new
    written = json.dumps(value)
    for mark, extreme in EXTREME.items():
        written = written.replace(mark, extreme)
    return written.encode()


json_changes = st.lists(
    st.tuples(st.integers(0, 1000), st.sampled_from(["set", "set", "set", "drop", "rename"]), strange),
    min_size=1,
    max_size=3,
)
some_damage = st.one_of(st.just([]), st.just([]), damage)

NAMES = st.sampled_from(["a", "b", "__metadata__", "\x1b[31m", "é"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(sorted(DTYPES)), strange),
        "shape": st.one_of(st.lists(numbers, max_size=4), st.lists(strange, max_size=3), strange),
        "data_offsets": st.one_of(st.tuples(numbers, numbers).map(list), st.lists(strange, max_size=3), strange),
    },
    optional={"more": strange},
)


@fuzz(1000)
@given(
    header=st.dictionaries(NAMES, st.one_of(entries, entries, strange), max_size=4),
    room=st.integers(0, 40),
    length=counts,
)
def test_invented_safetensors(tmp_path, header, room, length):
    encoded = changed_json(header, [])
    length = len(encoded) if length is None else length
    check_safetensors(tmp_path, struct.pack("<Q", length) + encoded + bytes(room))


# A model's folder: config.json in both spellings, plain and quantised; settings; the index of the shards


@pytest.fixture(scope="module")
def model_folder(tiny_folder, tmp_path_factory) -> Path:
    """A small model in three shards."""
    folder = tmp_path_factory.mktemp("fuzzed")
    config, model = load_folder(tiny_folder("own-values"))
    save_folder(
        folder,
        model,
        config,
        generation=GenerationConfig(),
        processor=ProcessorConfig(
            patch_size=config.vision.patch_size,
            pooling_kernel_size=config.vision.pooling_kernel_size,
            audio_samples_per_token=config.audio.audio_samples_per_token,
        ),
        max_shard_bytes=sum(t.nbytes for t in model.state_dict().values()) // 2,
    )
    assert not (folder / WEIGHTS).exists()
    return folder


def read_folder(folder: Path) -> None:
    config = read_config(folder)
    GenerationConfig.from_folder(folder, config)
    ProcessorConfig.from_folder(folder, config)
    check_weights(config, open_weights(folder))
    with torch.device("meta"):
        Unified(config)


def check_folder(folder: Path, name: str, data: bytes) -> bool:
    """Puts `data` in the place of one file, and then the old file back."""
    path = folder / name
    kept = path.read_bytes()
    size = len(data) + sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".json")
    size += sum(struct.unpack("<Q", p.read_bytes()[:8])[0] for p in folder.glob("*.safetensors"))
    path.write_bytes(data)
    try:
        return survives(partial(read_folder, folder), size, 8_000_000)  # tables for up to a thousand layers
    finally:
        path.write_bytes(kept)


QUANTISED = (
    {"quant_method": "iolite", "scheme": "int4", "version": 1},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
)


def configs(folder: Path, tiny_folder: Any) -> list[Any]:
    ours = json.loads((folder / "config.json").read_text())
    theirs = json.loads((tiny_folder("own-values") / "config.json").read_text())
    return [ours, theirs, *(ours | {"quantization_config": quantised} for quantised in QUANTISED)]


@fuzz(1200)
@given(which=st.integers(0, 3), changes=json_changes, more=some_damage)
def test_changed_config(model_folder, tiny_folder, which, changes, more):
    config = configs(model_folder, tiny_folder)[which]
    check_folder(model_folder, "config.json", damaged(changed_json(config, changes), more))


@fuzz(600)
@given(
    name=st.sampled_from(["generation_config.json", "processor_config.json", INDEX]),
    changes=json_changes,
    more=some_damage,
)
def test_changed_settings_and_index(model_folder, name, changes, more):
    value = json.loads((model_folder / name).read_text())
    check_folder(model_folder, name, damaged(changed_json(value, changes), more))


def test_the_unchanged_folder_is_accepted(model_folder, tiny_folder):
    for config in configs(model_folder, tiny_folder)[:2]:
        assert check_folder(model_folder, "config.json", json.dumps(config).encode())


# A GGUF model: metadata of other kinds and values than it needs, tensors of other shapes and types


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory) -> Path:
    """The embedded model's decoder with weights of zeros."""
    nano = Path(iolite.__file__).parent / "nano"
    config, tokenizer = ModelConfig.from_folder(nano), Tokenizer.from_folder(nano)
    metadata = {"general.architecture": "gemma4", **gguf_metadata.text_metadata(config.text, "gemma4")}
    metadata |= gguf_metadata.tokenizer_metadata(tokenizer, config.text, (), "{{ messages }}")
    shapes = {name: shape for name, shape in expected_shapes(config).items() if name.startswith("language_model.")}
    angles = torch.from_numpy(gguf_metadata.rope_freqs(config.text))
    tensors = [(gguf_names.to_gguf(name), shape, "F32") for name, shape in shapes.items()]
    path = tmp_path_factory.mktemp("model") / "a.gguf"
    with create_gguf(path, metadata, [(gguf_names.ROPE, tuple(angles.shape), "F32"), *tensors]) as writer:
        writer.write(gguf_names.ROPE, angles.view(torch.uint8))
        for name, shape, kind in tensors:
            writer.write(name, torch.zeros(tensor_bytes(shape, kind), dtype=torch.uint8))
    return path


# What `GgufFile.metadata` may hold.
scalars = st.one_of(
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([*LENGTHS, -(2**63), 0.5, -1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "a", "gemma4", "clip", "[" * 3000, "{{", "{}", "{% for %}", "\x1b[31m"]),
)
number_arrays = st.builds(
    lambda values, dtype: np.asarray(values).astype(dtype),
    st.lists(st.integers(0, 100), max_size=8),
    st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8"]),
)
found_values = st.one_of(
    scalars,
    number_arrays,
    st.lists(st.sampled_from(["", "a", "a b", "a b c", "<bos>", "▁"]), max_size=4),
    st.lists(number_arrays, max_size=2),
)
key_changes = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from("sssda"), found_values), max_size=3)
small_shapes = st.lists(st.sampled_from([1, 2, 32, 256]), max_size=3).map(tuple)
tensor_changes = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(["d", *TYPES]), small_shapes), max_size=2)


def read_gguf_model(path: Path) -> None:
    source = GgufSource(path)
    source.tokenizer()
    source.template()
    source.processor()
    source.generation()
    assert source.scheme in (None, "int4", "int8")


@fuzz(300)
@given(keys=key_changes, tensors=tensor_changes)
def test_changed_gguf_model(gguf_model, keys, tensors):
    class Changed(GgufFile):
        """What the reader would give for a file that is well formed and says something else."""

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            names = list(self.metadata)
            for place, what, value in keys:
                name = names[place % len(names)]
                if what == "d":
                    self.metadata.pop(name, None)
                else:
                    self.metadata[f"{name}.more" if what == "a" else name] = value
            described = list(self.tensors.values())
            for place, kind, shape in tensors:
                changed = described[place % len(described)]
                if kind == "d":
                    self.tensors.pop(changed.name, None)
                elif TYPES[kind].values == 1 or (shape and shape[-1] % TYPES[kind].values == 0):
                    nbytes = min(tensor_bytes(shape, kind), changed.nbytes)
                    self.tensors[changed.name] = replace(changed, shape=shape, type=kind, nbytes=nbytes)

    with mock.patch.object(gguf_source, "GgufFile", Changed):
        survives(partial(read_gguf_model, gguf_model), 200_000, 8_000_000)


def test_the_unchanged_gguf_model_is_accepted(gguf_model):
    assert survives(partial(read_gguf_model, gguf_model), 200_000, 8_000_000)


def test_the_guards_notice_what_they_are_for():
    with pytest.raises(AssertionError, match="bytes of memory"):
        survives(lambda: bytearray(1_000_000) and None, 100, 200_000)
    if sys.platform == "linux":
        with pytest.raises(RuntimeError, match="alloc"):
            torch.empty(4 * ROOM, dtype=torch.uint8)
