"""Safetensors files written tensor by tensor: alignment, room for the header, and mistakes of the writer found."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch

from iolite.checkpoint.files import WriteError
from iolite.checkpoint.safetensors import SafetensorsFile, StreamWriter, streaming

TENSORS = {
    "packed": torch.arange(3 * 576, dtype=torch.uint8).reshape(3, 1, 576),
    "norm": torch.linspace(-1, 1, 7),
    "scale": torch.tensor([2.5], dtype=torch.bfloat16),
    "scalar": torch.tensor(4.0),
    "empty": torch.zeros(0, 5, dtype=torch.float16),
    "part of another": torch.arange(12.0).reshape(3, 4)[:, 1:3],
}


def write(path, tensors=TENSORS):
    with streaming(path, {"format": "pt", "é": "ü"}, list(tensors)) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)
    return path


@pytest.mark.parametrize("read", ["ours", "theirs"])
def test_what_is_streamed_is_read_back(tmp_path, read):
    path = write(tmp_path / "a.safetensors")
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "é": "ü"}
    assert file.keys() == list(TENSORS)
    found = {n: file.tensor(n) for n in TENSORS} if read == "ours" else safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_data_and_whole_tiles_begin_at_multiples_of_64(tmp_path):
    sizes = (576, 640, 1088, 576 * 16)
    path = write(tmp_path / "a.safetensors", {f"t{n}": torch.full((n,), 7, dtype=torch.uint8) for n in sizes})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert (8 + length) % 64 == 0
    assert raw[8 : 8 + length].rstrip()[-1:] == b"}"  # behind the JSON there are only blanks
    begins = [e["data_offsets"][0] for e in json.loads(raw[8 : 8 + length]).values() if "dtype" in e]
    assert [begin % 64 for begin in begins] == [0] * len(sizes)
    assert len(raw) == 8 + length + sum(sizes)


def test_the_header_of_long_names_and_shapes_has_room(tmp_path):
    tensors = {f"{'Ω' * 90}.{i}": torch.zeros((1,) * 16, dtype=torch.bfloat16) for i in range(200)}
    assert SafetensorsFile(write(tmp_path / "a.safetensors", tensors)).keys() == list(tensors)


def test_a_tensor_in_pieces(tmp_path):
    values = torch.arange(10, dtype=torch.int32)
    with streaming(tmp_path / "a.safetensors", {}, ["a", "b"]) as out:
        out.begin("a", "int32", (2, 5))
        out.append(values[:3].numpy().data.cast("B"))
        out.append(values[3:].numpy().data.cast("B"))
        out.write("b", values)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert torch.equal(file.tensor("a"), values.reshape(2, 5))
    assert torch.equal(file.tensor("b"), values)


@pytest.mark.parametrize("size", [7, 9])
@pytest.mark.parametrize("another", [False, True], ids=["last", "not last"])
def test_too_few_or_too_many_bytes_are_found_and_no_file_is_left(tmp_path, size, another):
    with (  # noqa: PT012 (which of the calls raises is what the two cases differ in)
        pytest.raises(ValueError, match=f"{size} bytes were written where 8 were announced"),
        streaming(tmp_path / "a.safetensors", {}, ["a", "b"]) as out,
    ):
        out.begin("a", "uint8", (8,))
        out.append(memoryview(bytes(size)))
        if another:
            out.begin("b", "uint8", (16 - size,))  # would make up for it
            out.append(memoryview(bytes(16 - size)))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_comes_twice_and_a_header_without_room_are_mistakes(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        out = StreamWriter(file, {}, room=64)
        out.write("a", torch.zeros(1))
        with pytest.raises(ValueError, match="a is written twice"):
            out.write("a", torch.zeros(1))
        out.write("b", torch.zeros(1))
        with pytest.raises(ValueError, match=r"a header of \d+ bytes in room for 120"):
            out.finish()


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = write(tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), streaming(path, {}, ["a"]) as out:  # noqa: PT012 (the block is what is interrupted)
        out.write("a", torch.zeros(100))
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        write(tmp_path / "file" / "a.safetensors")


def test_reading_into_memory_and_letting_go_change_nothing(tmp_path):
    file = SafetensorsFile(write(tmp_path / "a.safetensors"))
    file.release()  # nothing is mapped yet
    seen = []
    file.populate(lambda done, size: seen.append((done, size)))
    size = file.path.stat().st_size
    assert seen in ([], [(size, size)])  # [] where the system cannot do it
    first = file.tensor("packed")
    file.release()
    assert torch.equal(first, TENSORS["packed"])
