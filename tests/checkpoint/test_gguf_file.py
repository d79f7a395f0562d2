"""The GGUF reader and writer: exactly the format, every field checked against the file."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from support.gguf_bytes import Gguf, array, key, tensor, text, u32, u64

from iolite.checkpoint import gguf
from iolite.checkpoint.gguf import GgufFile, create_gguf, part_name, tensor_bytes
from iolite.errors import CheckpointError

F32 = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
ONE = Gguf(keys=(key("a", 4, u32(7)),), tensors=(tensor("t", (3, 2)),), data=F32)


def read(tmp_path, file):
    return GgufFile(file.write(tmp_path / "a.gguf"))


@pytest.mark.parametrize("version", [2, 3])
def test_reads_a_file_written_by_hand(tmp_path, version):
    file = read(tmp_path, Gguf(ONE.keys, ONE.tensors, ONE.data, version=version))
    assert file.metadata == {"a": 7}
    assert list(file.tensors) == ["t"]
    t = file.tensors["t"]
    assert (t.shape, t.type, t.nbytes) == ((2, 3), "F32", 24)
    assert file.path.read_bytes()[t.offset :] == F32
    assert file.raw("t").view(torch.float32).tolist() == [1, 2, 3, 4, 5, 6]


VALUES = {
    "u8": (0, b"\xff", 255),
    "i8": (1, b"\xff", -1),
    "u16": (2, b"\x01\x02", 513),
    "i16": (3, b"\xff\xff", -1),
    "u32": (4, u32(4_000_000_000), 4_000_000_000),
    "i32": (5, struct.pack("<i", -5), -5),
    "f32": (6, struct.pack("<f", 0.5), 0.5),
    "true": (7, b"\x01", True),
    "false": (7, b"\x00", False),
    "text": (8, text("grün"), "grün"),
    "no text": (8, text(""), ""),
    "u64": (10, u64(1 << 63), 1 << 63),
    "i64": (11, struct.pack("<q", -(1 << 40)), -(1 << 40)),
    "f64": (12, struct.pack("<d", 1e-300), 1e-300),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_kind(tmp_path, name):
    kind, raw, expected = VALUES[name]
    value = read(tmp_path, Gguf(keys=(key("v", kind, raw),))).metadata["v"]
    assert value == expected
    assert type(value) is type(expected)


def test_arrays(tmp_path):
    inner = array(4, 2, u32(1) + u32(2)), array(4, 0, b"")
    keys = (
        key("numbers", 9, array(5, 2, struct.pack("<2i", -1, 9))),
        key("flags", 9, array(7, 3, b"\x01\x00\x01")),
        key("words", 9, array(8, 3, text("a") + text("") + text("▁b"))),
        key("nested", 9, array(9, 2, b"".join(inner))),
        key("behind", 8, text("them")),
    )
    found = read(tmp_path, Gguf(keys=keys)).metadata
    assert found["numbers"].dtype == np.int32
    assert found["numbers"].tolist() == [-1, 9]
    assert found["flags"].tolist() == [True, False, True]
    assert found["words"] == ["a", "", "▁b"]
    assert [part.tolist() for part in found["nested"]] == [[1, 2], []]
    assert found["behind"] == "them"


def test_tensors_are_aligned_as_the_file_says_and_share_one_mapping(tmp_path):
    tensors = (tensor("b", (2,), offset=64), tensor("a", (1,), offset=0), tensor("scalar", (), offset=128))
    data = F32[:4] + bytes(60) + F32[:8] + bytes(56) + F32[8:12]
    file = read(tmp_path, Gguf((key("general.alignment", 4, u32(64)),), tensors, data, alignment=64))
    assert list(file.tensors) == ["b", "a", "scalar"]
    assert all(t.offset % 64 == 0 for t in file.tensors.values())
    a, b = file.raw("a").view(torch.float32), file.raw("b").view(torch.float32)
    assert (a.tolist(), b.tolist()) == ([1], [1, 2])
    assert file.raw("scalar").view(torch.float32).reshape(file.tensors["scalar"].shape) == 3
    assert b.data_ptr() - a.data_ptr() == 64
    before = file.path.read_bytes()
    a.add_(5)
    assert file.path.read_bytes() == before
    del file
    assert b.sum() == 3  # a tensor keeps the mapping alive


def test_types_agree_with_their_blocks():
    assert tensor_bytes((2, 256), "Q4_K") == 2 * 144
    assert tensor_bytes((3, 4, 32), "Q8_0") == 12 * 34
    assert tensor_bytes((), "F32") == 4
    with pytest.raises(ValueError, match="blocks of 32"):
        tensor_bytes((32, 16), "Q4_0")


def changed(**fields):
    values = {name: getattr(ONE, name) for name in ONE.__dataclass_fields__} | fields
    return Gguf(**values)


def one_key(*fields, **more):
    return Gguf(keys=(key(*fields),), **more)


def one_tensor(*fields, data=F32):
    return Gguf(tensors=(tensor(*fields),), data=data)


BAD = {
    "magic": (changed(magic=b"GGML"), "no GGUF file"),
    "big-endian": (changed(version=0x03000000), "big-endian"),
    "version 1": (changed(version=1), "version 1"),
    "version 4": (changed(version=4), "version 4"),
    "version 0": (changed(version=0), "version 0"),
    "2**63 tensors": (changed(num_tensors=1 << 63), "more than any model has"),
    "2**63 keys": (changed(num_keys=1 << 63), "more than any model has"),
    "more keys than bytes": (changed(num_keys=5000), "claims 5000 keys"),
    "more tensors than bytes": (changed(num_tensors=5000), "claims 1 keys and 5000 tensors"),
    "one key too many": (changed(num_keys=2), r"a tensor.s name of \d+ bytes; 64 are allowed"),
    "key twice": (Gguf(keys=(key("a", 0, b"1"), key("a", 0, b"1"))), "'a' stands there twice"),
    "empty key": (one_key("", 0, b"1"), "has no letters"),
    "key of 2**63 bytes": (Gguf(keys=(text(b"abcdefgh", 1 << 63),)), "a key of 9223372036854775808 bytes"),
    "key beyond the end": (Gguf(keys=(text(b"abcdefgh", 60_000),)), "ends within a key"),
    "key not UTF-8": (one_key(b"\xff", 0, b"1"), "a key is not UTF-8"),
    "kind 13": (one_key("a", 13, b"12345678"), "unknown kind 13"),
    "kind 2**32 - 1": (one_key("a", 0xFFFFFFFF, b"12345678"), "unknown kind"),
    "value beyond the end": (one_key("abc", 10, b"123", alignment=1), "ends within the value of 'abc'"),
    "text beyond the end": (one_key("a", 8, text(b"x", 50)), "ends within"),
    "text of 2**40 bytes": (one_key("a", 8, text(b"x", 1 << 40)), "allowed"),
    "text not UTF-8": (one_key("a", 8, text(b"\xc3")), "'a' is not UTF-8"),
    "a surrogate": (one_key("a", 8, text(b"\xed\xa0\x80")), "'a' is not UTF-8"),
    "boolean 2": (one_key("a", 7, b"\x02"), "neither true nor false"),
    "boolean 2 in an array": (one_key("a", 9, array(7, 2, b"\x01\x02")), "neither true nor false"),
    "array of 2**62 numbers": (one_key("a", 9, array(10, 1 << 62, b"")), "ends within"),
    "array of 2**61 texts": (one_key("a", 9, array(8, 1 << 61, b"")), "ends within"),
    "array of 2**61 arrays": (one_key("a", 9, array(9, 1 << 61, b"")), "ends within"),
    "array of unknown kind": (one_key("a", 9, array(14, 0, b"")), "unknown kind 14"),
    "token beyond the end": (one_key("a", 9, array(8, 2, text("x") + text("y", 900) + bytes(40))), "ends within"),
    "second token's length cut": (one_key("a", 9, array(8, 2, text("x") * 2)[:-5], alignment=1), "ends within"),
    "token of 2**64 - 1 bytes": (one_key("a", 9, array(8, 1, text("x", (1 << 64) - 1))), "ends within"),
    "token not UTF-8": (one_key("a", 9, array(8, 2, text("x") + text(b"\xff"))), "not UTF-8"),
    "arrays five deep": (one_key("a", 9, array(9, 1, array(9, 1, array(9, 1, array(9, 1, bytes(40)))))), "too deep"),
    "alignment 0": (one_key("general.alignment", 4, u32(0)), "alignment must be"),
    "alignment 24": (one_key("general.alignment", 4, u32(24)), "alignment must be"),
    "alignment 4": (one_key("general.alignment", 4, u32(4)), "alignment must be"),
    "alignment 2**31": (one_key("general.alignment", 4, u32(1 << 31)), "alignment must be"),
    "alignment as text": (one_key("general.alignment", 8, text("32")), "alignment must be"),
    "alignment true": (one_key("general.alignment", 7, b"\x01"), "alignment must be"),
    "tensor twice": (Gguf(tensors=(tensor("t", (1,)), tensor("t", (1,), 0, 32)), data=bytes(64)), "'t' stands there"),
    "tensor without a name": (one_tensor("", (1,)), "no name"),
    "tensor with a long name": (one_tensor("t" * 65, (1,)), "a tensor's name of 65 bytes"),
    "five dimensions": (one_tensor("t", (1, 1, 1, 1, 1)), "5 dimensions"),
    "2**32 - 1 dimensions": (Gguf(tensors=(text("t") + u32(0xFFFFFFFF) + bytes(40),)), "4294967295 dimensions"),
    "dimension 0": (one_tensor("t", (3, 0)), "impossible shape"),
    "dimension 2**64 - 1": (one_tensor("t", ((1 << 64) - 1,)), "but the file is"),
    "product beyond 64 bits": (one_tensor("t", (1 << 32, 1 << 32)), "but the file is"),
    "product that wraps to 4 bytes": (one_tensor("t", (1 << 62, 4, 1, 1)), "but the file is"),
    "row of half a block": (one_tensor("t", (16, 2), 2), "blocks of 32"),
    "row of one value and a bit": (one_tensor("t", (), 12), "blocks of 256"),
    "type 4, which was removed": (one_tensor("t", (32,), 4), "unknown type 4"),
    "type 2**32 - 1": (one_tensor("t", (32,), 0xFFFFFFFF), "unknown type"),
    "one byte short": (one_tensor("t", (3, 2), data=F32[:-1]), "but the file is"),
    "offset beyond the end": (one_tensor("t", (1,), 0, 1 << 40), "but the file is"),
    "offset 2**64 - 32": (one_tensor("t", (1,), 0, (1 << 64) - 32), "but the file is"),
    "offset not aligned": (one_tensor("t", (1,), 0, 4), "no multiple of 32"),
    "the same place": (Gguf(tensors=(tensor("t", (1,)), tensor("u", (1,))), data=bytes(64)), "overlaps"),
    "one inside another": (Gguf(tensors=(tensor("t", (30,)), tensor("u", (1,), 0, 64)), data=bytes(120)), "overlaps"),
    "split in a number of bad kind": (one_key("split.count", 8, text("2")), "split.count must be"),
    "in 65535 parts": (one_key("split.count", 2, b"\xff\xff"), "split.count must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    file, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, file)
    assert "a.gguf" in str(caught.value)


def test_every_truncation_is_noticed(tmp_path):
    whole = changed(keys=(*ONE.keys, key("words", 9, array(8, 2, text("ab") + text("c"))))).encode()
    path = tmp_path / "a.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"too short|ends within|claims|but the file is"):
            GgufFile(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.gguf is missing"):
        GgufFile(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"cannot be read|too short"):
        GgufFile(tmp_path)


def test_a_limit_on_pieces_of_text(tmp_path, monkeypatch):
    file = one_key("a", 9, array(9, 2, array(8, 2, text("x") * 2) * 2))
    monkeypatch.setattr(gguf, "MAX_ELEMENTS", 6)  # two arrays of two
    assert read(tmp_path, file).metadata["a"] == [["x", "x"]] * 2
    monkeypatch.setattr(gguf, "MAX_ELEMENTS", 5)
    with pytest.raises(CheckpointError, match="more than 5 pieces"):
        read(tmp_path, file)


# Several parts


def write_parts(tmp_path, *, count=3, numbers=(0, 1, 2), names=("a", "b", "c"), total=3):
    """The parts of a model with one tensor each; the first one's path."""
    for place, (number, name) in enumerate(zip(numbers, names, strict=True)):
        keys = [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", count))]
        keys += [key("split.tensors.count", 5, u32(total)), key("place", 4, u32(place))]
        file = Gguf(tuple(keys), (tensor(name, (1,)),), struct.pack("<f", place))
        file.write(tmp_path / f"m-{place + 1:05d}-of-{count:05d}.gguf")
    return tmp_path / f"m-00001-of-{count:05d}.gguf"


def test_parts_are_read_as_one(tmp_path):
    file = GgufFile(write_parts(tmp_path))
    assert file.metadata["place"] == 0
    assert {name: file.raw(name).view(torch.float32).item() for name in file.tensors} == {"a": 0, "b": 1, "c": 2}


def test_parts_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match="later one of 3 parts") as caught:
        GgufFile(write_parts(tmp_path).with_name("m-00002-of-00003.gguf"))
    assert caught.value.hint == "the first is m-00001-of-00003.gguf"
    renamed = write_parts(tmp_path).rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="was renamed"):
        GgufFile(renamed)
    with pytest.raises(CheckpointError, match="'a' stands in an earlier part"):
        GgufFile(write_parts(tmp_path, names=("a", "b", "a")))
    with pytest.raises(CheckpointError, match="is not part 3 of 3"):
        GgufFile(write_parts(tmp_path, numbers=(0, 1, 1)))
    with pytest.raises(CheckpointError, match="hold 3 tensors, not 4"):
        GgufFile(write_parts(tmp_path, total=4))
    first = write_parts(tmp_path)
    arrays = key("split.count", 2, b"\x03\x00"), key("split.no", 9, array(4, 2, bytes(8)))
    with pytest.raises(CheckpointError, match="later one of 3 parts"):
        GgufFile(Gguf(arrays).write(tmp_path / "o-00001-of-00003.gguf"))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf is missing"):
        GgufFile(first)


def test_names_of_parts():
    assert part_name("x-1-00002-of-00012.gguf", 11, 12) == "x-1-00011-of-00012.gguf"
    assert part_name("x-00002-of-00012.gguf", 1, 3) == ""
    assert part_name("x.gguf", 1, 3) == ""


# Writing

METADATA = {
    "general.architecture": "gemma4",
    "text": "▁grün",
    "flag": True,
    "small": 7,
    "negative": -7,
    "large": 1 << 40,
    "real": 0.25,
    "half": np.uint16(9),
    "words": ["a", "", "▁b"],
    "flags": [True, False],
    "numbers": [1, -2],
    "reals": [0.5, 2.0],
    "wide": np.arange(3, dtype=np.int64),
    "none": np.zeros(0, np.float32),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.gguf"
    tensors = [("q", (2, 64), "Q4_0"), ("f", (3,), "F32"), ("g", (1, 2, 3, 4), "BF16")]
    raw = {
        name: torch.randint(0, 256, (tensor_bytes(shape, kind),), dtype=torch.uint8) for name, shape, kind in tensors
    }
    with create_gguf(path, METADATA, tensors) as writer:
        writer.write("q", raw["q"][:36].reshape(2, 18))
        writer.write("q", raw["q"][36:])
        writer.write("f", raw["f"])
        writer.write("g", raw["g"])
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    file = GgufFile(path)
    assert list(file.metadata) == list(METADATA)
    for name, value in METADATA.items():
        assert np.array_equal(file.metadata[name], value), name
    assert [(t.name, t.shape, t.type) for t in file.tensors.values()] == tensors
    assert all(torch.equal(file.raw(name), raw[name]) for name in raw)
    assert all(t.offset % 32 == 0 for t in file.tensors.values())
    assert path.stat().st_size % 32 == 0  # llama.cpp wants the last one padded too


def test_the_bytes_of_a_small_file(tmp_path):
    with create_gguf(tmp_path / "a.gguf", {"a": 7}, [("t", (2, 3), "F32")]) as writer:
        writer.write("t", torch.frombuffer(bytearray(F32), dtype=torch.uint8))
    written = (tmp_path / "a.gguf").read_bytes()
    assert written == ONE.encode() + bytes(8)


KINDS = {
    "u32": (5, 4),
    "i32": (-5, 5),
    "f32": (5.0, 6),
    "bool": (True, 7),
    "u64": (1 << 32, 10),
    "u16": (np.uint16(5), 2),
    "f64": (np.float64(5), 12),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_are_written(tmp_path, name):
    value, kind = KINDS[name]
    with create_gguf(tmp_path / "a.gguf", {"k": value}, []):
        pass
    assert (tmp_path / "a.gguf").read_bytes()[24 + 9 : 24 + 13] == u32(kind)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = ONE.write(tmp_path / "a.gguf")
    for value in (None, [], [1, "a"], [1, 2.0], {"a": 1}, np.zeros((2, 2)), b"raw"):
        with pytest.raises(ValueError, match="cannot be stored"), create_gguf(path, {"k": value}, []):
            pass
    one = [("t", (1,), "F32")]
    four = torch.zeros(4, dtype=torch.uint8)
    for name, data in (("u", four), ("t", torch.zeros(1)), ("t", torch.zeros(5, dtype=torch.uint8))):
        with pytest.raises(ValueError, match="come next"), create_gguf(path, {}, one) as writer:
            writer.write(name, data)
    with pytest.raises(ValueError, match="was not written"), create_gguf(path, {}, one) as writer:
        writer.write("t", four[:3])
    with pytest.raises(ValueError, match="twice"), create_gguf(path, {}, one * 2):
        pass
    with pytest.raises(ValueError, match="cannot be stored"), create_gguf(path, {}, [("t" * 64, (1,), "F32")]):
        pass
    assert path.read_bytes() == ONE.encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
