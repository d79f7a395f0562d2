"""The safetensors reader and writer: the same files as the format's own library, and nothing else accepted."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iolite.checkpoint.safetensors import MAX_HEADER_BYTES, SafetensorsFile, save_safetensors
from iolite.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def some_tensors():
    rng = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": (torch.randn(3, 5 + i, generator=rng) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "one": torch.ones(1)}


def write_raw(path, header, data=b"", length=None):
    """A file from its pieces; a header that is not bytes is written as JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.keys()) == set(tensors)
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        assert file.nbytes(name) == tensor.nbytes
        assert file.tensor(name).dtype == tensor.dtype
        assert torch.equal(file.tensor(name), tensor)


def test_the_library_reads_what_we_write(tmp_path):
    tensors = some_tensors() | {"turned": torch.arange(12.0).reshape(3, 4).T}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_share_one_mapping_and_writing_to_them_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.zeros(1000), "b": torch.ones(1000)})
    before = path.read_bytes()
    file = SafetensorsFile(path)
    a, b = file.tensor("a"), file.tensor("b")
    assert b.data_ptr() - a.data_ptr() == 4000
    a.add_(7)
    assert file.tensor("a")[0] == 7  # the same memory
    assert path.read_bytes() == before
    del file
    assert b.sum() == 1000  # a tensor keeps the mapping alive


def test_values_that_are_not_aligned_to_their_size_are_read(tmp_path):
    data = bytes([5]) + torch.arange(4.0).numpy().tobytes()
    header = {"byte": entry("U8", [1], 0, 1), "odd": entry("F32", [4], 1, 17)}
    file = SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, data))
    assert file.tensor("odd").tolist() == [0, 1, 2, 3]


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.ones(2)})
    with pytest.raises(TypeError):
        save_safetensors(path, {"a": torch.ones(2)}, {"not text": object()})
    meta = torch.ones(2, device="meta")
    with pytest.raises(NotImplementedError):
        save_safetensors(path, {"a": meta})
    assert SafetensorsFile(path).tensor("a").tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


F4 = entry("F32", [1], 0, 4)
BAD_FILES = {
    "empty": (b"", b"", None, "too short"),
    "header longer than the file": ({"a": F4}, b"", 10_000, "claims a header of 10000"),
    "header of 2**63 bytes": ({"a": F4}, b"1234", 1 << 63, "claims a header"),
    "header over the limit": ({"a": F4}, b"1234", MAX_HEADER_BYTES + 1, "not a safetensors file"),
    "not JSON": (b"{'a': 1}", b"", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "nested too deep": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "not valid JSON"),
    "a list": (b"[]", b"", None, "no JSON object"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", None, "repeats a name"),
    "entry is a number": ({"a": 3}, b"", None, "must have dtype"),
    "entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "must have dtype"),
    "entry with a stranger": ({"a": F4 | {"file": "/etc/passwd"}}, b"1234", None, "must have dtype"),
    "unknown format": ({"a": entry("F33", [1], 0, 4)}, b"1234", None, "unknown format 'F33'"),
    "format is a list": ({"a": entry(["F32"], [1], 0, 4)}, b"1234", None, "unknown format"),
    "negative dimension": ({"a": entry("F32", [-1], 0, 4)}, b"1234", None, "impossible shape"),
    "fractional dimension": ({"a": entry("F32", [1.0], 0, 4)}, b"1234", None, "impossible shape"),
    "true as a dimension": ({"a": entry("F32", [True], 0, 4)}, b"1234", None, "impossible shape"),
    "dimension of 2**60": ({"a": entry("F32", [1 << 60], 0, 4)}, b"1234", None, "impossible shape"),
    "a hundred dimensions": ({"a": entry("F32", [1] * 100, 0, 4)}, b"1234", None, "impossible shape"),
    "negative offset": ({"a": entry("F32", [1], -4, 0)}, b"1234", None, "impossible offsets"),
    "offsets turned round": ({"a": entry("F32", [1], 4, 0)}, b"1234", None, "impossible offsets"),
    "three offsets": ({"a": F4 | {"data_offsets": [0, 4, 8]}}, b"1234", None, "impossible offsets"),
    "shape larger than the offsets": ({"a": entry("F32", [2], 0, 4)}, b"1234", None, "needs 8 bytes"),
    "shape smaller than the offsets": ({"a": entry("F32", [1], 0, 8)}, b"12345678", None, "needs 4 bytes"),
    "product of dimensions beyond 64 bits": (
        {"a": entry("F32", [1 << 40, 1 << 40], 0, 4)},
        b"1234",
        None,
        "needs 4835703278458516698824704 bytes",
    ),
    "beyond the end": ({"a": entry("F32", [4], 0, 16)}, b"1234", None, "holds 4 bytes"),
    "overlap": ({"a": F4, "b": entry("F32", [1], 2, 6)}, b"123456", None, "overlaps another"),
    "the same bytes twice": ({"a": F4, "b": F4}, b"1234", None, "overlaps another"),
    "hole": ({"a": F4, "b": entry("F32", [1], 8, 12)}, b"123456789012", None, "leaves a hole"),
    "hole at the start": ({"a": entry("F32", [1], 4, 8)}, b"12345678", None, "leaves a hole"),
    "bytes at the end": ({"a": F4}, b"12345", None, "belong to no tensor"),
    "no tensors, but bytes": ({}, b"1", None, "belong to no tensor"),
    "metadata is a number": ({"__metadata__": 1}, b"", None, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"format": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_broken_file_is_refused(tmp_path, name):
    header, data, length, message = BAD_FILES[name]
    path = tmp_path / "a.safetensors"
    if name == "empty":
        path.write_bytes(b"")
    else:
        write_raw(path, header, data, length)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


def test_every_truncation_is_refused(tmp_path):
    whole = tmp_path / "whole"
    save_safetensors(whole, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    data = whole.read_bytes()
    path = tmp_path / "cut"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_missing_file_and_folder_in_its_place(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            SafetensorsFile(path)


def test_a_file_that_shrinks_after_it_was_opened_is_not_mapped(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.ones(3)})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="changed"):
        file.tensor("a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read_but_never_crash(tmp_path, changes):
    """Whatever is accepted must also be readable to the last byte."""
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.ones(3), "bc": torch.ones(2, 2, dtype=torch.bfloat16)}, {"format": "pt"})
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    assert sum(file.tensor(name).nbytes for name in file.keys()) <= len(data)  # noqa: SIM118
    for name in file.keys():  # noqa: SIM118
        file.tensor(name).clone()
