"""Reading and writing GGUF files: everything the header says is checked against the file before it is used.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all of it little endian: the four letters GGUF, the
version (u32), the number of tensors and of keys (u64 each); the keys, each a string, the kind of its value (u32) and
the value; for every tensor its name, the number of its dimensions (u32), the dimensions (u64 each, the fastest first),
its type (u32) and its offset (u64); then, at the next multiple of `general.alignment`, the tensors. A string is its
length (u64) and so many bytes of UTF-8; an array is the kind of its elements (u32), their number (u64), and they.

Counts and lengths are compared with the bytes that are left before anything is read or allocated for them, sizes are
computed in integers that do not overflow, and no tensor reaches over the file's end or into another. Tensors are views
of the mapped file: no copy, and pages that are not read cost no memory.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from iolite.checkpoint.files import map_file, release, replacing
from iolite.checkpoint.safetensors import AGAIN
from iolite.errors import CheckpointError

if TYPE_CHECKING:  # torch is imported by the functions that need it: headers are read without it
    import torch

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # where the file does not say
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 64  # of a tensor
MAX_KEY_BYTES = 65_535
MAX_TEXT_BYTES = 1 << 26  # of one piece of text
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_ELEMENTS = 1 << 23  # strings and inner arrays of one file: each costs some 60 bytes however short it is
MAX_NESTING = 4
MAX_PARTS = 1000


class BlockType(NamedTuple):
    """How a tensor's values are stored: `values` of them, one behind the other in a row, in `nbytes` bytes."""

    code: int
    values: int
    nbytes: int


TYPES = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q8_1": BlockType(9, 32, 36),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "Q8_K": BlockType(15, 256, 292),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ1_S": BlockType(19, 256, 50),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ4_XS": BlockType(23, 256, 136),
    "I8": BlockType(24, 1, 1),
    "I16": BlockType(25, 1, 2),
    "I32": BlockType(26, 1, 4),
    "I64": BlockType(27, 1, 8),
    "F64": BlockType(28, 1, 8),
    "IQ1_M": BlockType(29, 256, 56),
    "BF16": BlockType(30, 1, 2),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "MXFP4": BlockType(39, 32, 17),
}
_NAMES = {block.code: name for name, block in TYPES.items()}

# Kinds of metadata values.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {code: np.dtype(text) for code, text in _NUMBERS.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_U32, _U64, _COUNTS = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<QQ")
_START = 4 + _U32.size + _COUNTS.size
_LEAST_KEY = 8 + 1 + 4 + 1  # bytes of the shortest key and value
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8  # bytes of the shortest description of a tensor


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place: `nbytes` bytes from byte `offset` of the file `part` (0 unless the model is in parts).

    The shape is in PyTorch's order: the last dimension's values lie next to each other.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    part: int = 0


class GgufFile:
    """One GGUF file, or all parts of one from its first: header read and checked, tensors mapped.

    `metadata`: numbers, booleans and text as Python values, arrays of numbers as NumPy arrays, arrays of text (or of
    arrays) as lists. `tensors`: by name, in the file's order.

    Raises CheckpointError for a file that is not exactly the format, and for versions other than 2 and 3.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._maps = [_open(self.path)]
        self.metadata, self.tensors = _read_header(self._maps[0], self.path.name, 0)
        count = self.metadata.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= MAX_PARTS:
            raise CheckpointError(f"{self.path.name}: split.count must be a number up to {MAX_PARTS}")
        if count > 1:
            self._read_parts(count)

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes, uint8 [nbytes], as they lie in the file. Writing to them changes memory only."""
        import torch

        tensor = self.tensors[name]
        # The tensor keeps the mapping alive, so neither it nor the file needs closing.
        return torch.frombuffer(self._maps[tensor.part], dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)

    def release(self) -> None:
        """Lets go of the pages that were read so far: they count as memory in use until then."""
        for mapped in self._maps:
            release(mapped)

    def _read_parts(self, count: int) -> None:
        """Adds the tensors of the parts 2 to `count`; the first one's metadata is the model's."""
        first = part_name(self.path.name, 1, count)
        if not _is(self.metadata, "split.no", 0) or self.path.name != first:
            named = f"the first is {first}" if first else "their names must end in -00001-of-00002.gguf and so on"
            raise CheckpointError(f"{self.path.name} is a later one of {count} parts, or was renamed", named)
        for number in range(2, count + 1):
            path = self.path.with_name(part_name(first, number, count))
            self._maps.append(_open(path))
            metadata, tensors = _read_header(self._maps[-1], path.name, number - 1)
            if not _is(metadata, "split.count", count) or not _is(metadata, "split.no", number - 1):
                raise CheckpointError(f"{path.name} is not part {number} of {count} of this model")
            both = self.tensors.keys() & tensors.keys()
            if both:
                raise CheckpointError(f"{path.name}: tensor {min(both)!r} stands in an earlier part too")
            self.tensors.update(tensors)
        if "split.tensors.count" in self.metadata and not _is(self.metadata, "split.tensors.count", len(self.tensors)):
            total = self.metadata["split.tensors.count"]
            raise CheckpointError(f"{self.path.name}: the parts hold {len(self.tensors)} tensors, not {total}")


def architecture(path: Path) -> str:
    """What a file's `general.architecture` says, "" where it says nothing. It is the first key of most files, and no
    more is read than up to it. Raises CheckpointError for what is no GGUF file, and for one damaged before the key."""
    data = _open(path)
    cursor = _Cursor(data, len(data), path.name)
    _check_version(cursor)
    _, num_keys = cursor.take(_COUNTS)
    for _ in range(min(num_keys, MAX_KEYS)):
        key = cursor.string("a key", MAX_KEY_BYTES)
        value = cursor.value(key)
        if key == "general.architecture":
            return value if isinstance(value, str) else ""
    return ""


def _is(metadata: Mapping[str, Any], key: str, number: int) -> bool:
    """Whether the value is this number; it may be anything else too, and arrays do not compare like numbers."""
    return type(metadata.get(key)) is int and metadata[key] == number


def part_name(name: str, number: int, count: int) -> str:
    """Name of part `number` (from 1) of `count`, from the name of any of them; "" if that is no part's name."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", name, re.DOTALL)
    if not match or int(match[2]) != count:
        return ""
    return f"{match[1]}-{number:05d}-of-{count:05d}.gguf"


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor of this shape (PyTorch's order) and type; its rows must be whole blocks (else ValueError)."""
    block = TYPES[kind]
    if block.values > 1 and (not shape or shape[-1] % block.values):
        raise ValueError(f"rows of {kind} come in blocks of {block.values} values")
    return math.prod(shape) // block.values * block.nbytes


# Reading


def _open(path: Path) -> mmap.mmap:
    try:
        size = path.stat().st_size
        if size < _START:
            raise CheckpointError(f"{path.name} is {size} bytes long, too short for a GGUF file", AGAIN)
        return map_file(path, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def _read_header(data: mmap.mmap, file: str, part: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata and the tensors of one file."""
    cursor = _Cursor(data, len(data), file)
    _check_version(cursor)
    num_tensors, num_keys = cursor.take(_COUNTS)
    if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
        raise CheckpointError(f"{file} claims {num_keys} keys and {num_tensors} tensors: more than any model has")
    if num_keys * _LEAST_KEY + num_tensors * _LEAST_TENSOR > cursor.left:
        raise CheckpointError(
            f"{file} claims {num_keys} keys and {num_tensors} tensors but is {len(data)} bytes long", AGAIN
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a key", MAX_KEY_BYTES)
        if not key or key in metadata:
            raise CheckpointError(f"{file}: the key {key!r} " + ("stands there twice" if key else "has no letters"))
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{file}: general.alignment must be a power of two from 8 to {MAX_ALIGNMENT}")
    found: dict[str, GgufTensor] = {}
    for _ in range(num_tensors):
        tensor = _tensor(cursor, part)
        if tensor.name in found:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} stands there twice")
        found[tensor.name] = tensor
    return metadata, _placed(found, file, cursor.at + -cursor.at % alignment, len(data), alignment)


def _check_version(cursor: _Cursor) -> None:
    if cursor.data[:4] != MAGIC:
        raise CheckpointError(f"{cursor.file} is no GGUF file (it begins with {cursor.data[:4]!r})")
    cursor.at = 4
    (version,) = cursor.take(_U32)
    if not version & 0xFFFF and version:
        raise CheckpointError(f"{cursor.file} is a GGUF file in big-endian order, which is not supported")
    if version not in (2, VERSION):
        raise CheckpointError(f"{cursor.file} is of GGUF version {version}; versions 2 and 3 are supported")


def _tensor(cursor: _Cursor, part: int) -> GgufTensor:
    """The next tensor, checked in itself; its offset still counts from where the data begins."""
    name = cursor.string("a tensor's name", MAX_NAME_BYTES)
    what = f"{cursor.file}: tensor {name!r}"
    (dimensions,) = cursor.take(_U32)
    if not name:
        raise CheckpointError(f"{cursor.file}: a tensor has no name")
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(f"{what} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(cursor.take(_U64)[0] for _ in range(dimensions))[::-1]
    (code,) = cursor.take(_U32)
    (offset,) = cursor.take(_U64)
    if code not in _NAMES:
        raise CheckpointError(f"{what} has the unknown type {code}")
    if 0 in shape:
        raise CheckpointError(f"{what} has the impossible shape {list(shape)}")
    try:
        nbytes = tensor_bytes(shape, _NAMES[code])
    except ValueError as error:
        raise CheckpointError(f"{what} has the impossible shape {list(shape)}: {error}") from None
    return GgufTensor(name, shape, _NAMES[code], offset, nbytes, part)


def _placed(
    tensors: Mapping[str, GgufTensor], file: str, start: int, size: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors with offsets from the file's beginning, every one inside the file and none inside another.

    Unlike llama.cpp's reader this one takes them in any order and with room between them: that does no harm.
    """
    for name, tensor in tensors.items():
        if tensor.offset % alignment:
            raise CheckpointError(f"{file}: tensor {name!r} begins at {tensor.offset}, no multiple of {alignment}")
        if start + tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} of shape {list(tensor.shape)} in {tensor.type} ends at byte "
                f"{start + tensor.offset + tensor.nbytes}, but the file is {size} bytes long",
                AGAIN,
            )
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} overlaps another")
        end = tensor.offset + tensor.nbytes
    return {
        name: GgufTensor(t.name, t.shape, t.type, start + t.offset, t.nbytes, t.part) for name, t in tensors.items()
    }


class _Cursor:
    """Reads a header from its beginning to its end, and never beyond the file's."""

    def __init__(self, data: mmap.mmap, size: int, file: str) -> None:
        self.data, self.size, self.file = data, size, file
        self.at = 0
        self._elements = 0  # strings and inner arrays so far

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        self._need(form.size, "the header")
        values = form.unpack_from(self.data, self.at)
        self.at += form.size
        return values

    def string(self, what: str, limit: int) -> str:
        (length,) = self.take(_U64)
        if length > limit:
            raise CheckpointError(f"{self.file}: {what} of {length} bytes; {limit} are allowed")
        self._need(length, what)
        text = self._decode(self.data[self.at : self.at + length], what)
        self.at += length
        return text

    def value(self, key: str) -> Any:
        (kind,) = self.take(_U32)
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self.string(what, MAX_TEXT_BYTES)
        if kind == _ARRAY:
            return self._array(what, 1)
        if kind not in _DTYPES:
            raise CheckpointError(f"{self.file}: {what} is of the unknown kind {kind}")
        return self._numbers(kind, 1, what).item()

    def _array(self, what: str, depth: int) -> Any:
        """NumPy array of numbers, or a list of strings or of arrays."""
        (kind,) = self.take(_U32)
        (count,) = self.take(_U64)
        if kind in _DTYPES:
            return self._numbers(kind, count, what)
        if kind not in (_STRING, _ARRAY) or depth == MAX_NESTING:
            raise CheckpointError(f"{self.file}: {what} holds arrays too deep, or the unknown kind {kind}")
        self._need(count * (8 if kind == _STRING else 12), what)
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise CheckpointError(f"{self.file}: more than {MAX_ELEMENTS} pieces of text in the metadata")
        if kind == _STRING:
            return self._strings(count, what)
        return [self._array(what, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = _DTYPES[kind]
        self._need(count * dtype.itemsize, what)
        raw = np.frombuffer(self.data, np.uint8, count * dtype.itemsize, self.at).copy()
        if kind == _BOOL and (raw > 1).any():
            raise CheckpointError(f"{self.file}: {what} is neither true nor false")
        self.at += raw.nbytes
        return raw.view(dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has 262,144 and as many merges again: this loop is most of the time that a header takes."""
        data, at, size, length_at = self.data, self.at, self.size, _U64.unpack_from
        found: list[bytes] = []
        add: Callable[[bytes], None] = found.append
        for _ in range(count):
            if at + 8 > size:
                break
            begin = at + 8
            at = begin + length_at(data, at)[0]
            if at > size:
                break
            add(data[begin:at])
        if len(found) < count:
            self._need(size, what)  # more than is left
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError:
            raise self._not_text(what) from None

    def _decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._not_text(what) from None

    def _not_text(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {what} is not UTF-8")

    def _need(self, nbytes: int, what: str) -> None:
        if nbytes > self.left:
            raise CheckpointError(f"{self.file} ends within {what}", AGAIN)


# Writing


class GgufWriter:
    """What `create_gguf` yields: takes the tensors' bytes in the order in which they were announced."""

    def __init__(self, file: Any, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]]):
        self._file = file
        self._sizes = [(name, tensor_bytes(shape, kind)) for name, shape, kind in tensors]
        self._next = 0  # which of them is being written
        self._written = 0  # bytes of it
        header = _encode_header(metadata, tensors, [size for _, size in self._sizes])
        file.write(header + bytes(-len(header) % ALIGNMENT))

    def write(self, name: str, data: torch.Tensor) -> None:
        """A tensor's bytes (uint8 of any shape), whole or in pieces that follow each other."""
        expected, size = self._sizes[self._next]
        raw = data.detach().cpu().contiguous().reshape(-1).numpy().data
        if name != expected or raw.format != "B" or self._written + raw.nbytes > size:
            raise ValueError(f"{raw.nbytes} bytes of {name}, but {size - self._written} of {expected} come next")
        self._file.write(raw)
        self._written += raw.nbytes
        if self._written == size:
            self._file.write(bytes(-size % ALIGNMENT))
            self._next, self._written = self._next + 1, 0

    def check_complete(self) -> None:
        if self._next < len(self._sizes):
            raise ValueError(f"{self._sizes[self._next][0]} and what follows it was not written")


@contextmanager
def create_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
) -> Iterator[GgufWriter]:
    """Writes a GGUF file tensor by tensor, beside `path`; it takes the name when it is complete and on the disk.

    metadata: bool, str, float (stored in 32 bits), int (in 32 bits without sign, or 64, or 32 with sign if negative),
    NumPy scalars and arrays in their own formats, lists of str, bool, float (32 bits) or int (32 bits with sign), as
    llama.cpp expects them. tensors: (name, shape in PyTorch's order, type), in the order in which they will be written.
    """
    with replacing(Path(path)) as file:
        writer = GgufWriter(file, metadata, tensors)
        yield writer
        writer.check_complete()


def _encode_header(
    metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]], sizes: Sequence[int]
) -> bytes:
    if len({name for name, _, _ in tensors}) < len(tensors) or "general.alignment" in metadata:
        raise ValueError("a tensor's name stands there twice, or an alignment is asked for")
    parts = [MAGIC, _U32.pack(VERSION), _COUNTS.pack(len(tensors), len(metadata))]
    parts += [_encode_string(key) + _encode_value(key, value) for key, value in metadata.items()]
    offset = 0
    for (name, shape, kind), size in zip(tensors, sizes, strict=True):
        if not 0 < len(name.encode()) < MAX_NAME_BYTES or len(shape) > MAX_DIMENSIONS or 0 in shape:
            raise ValueError(f"{name!r} {shape} cannot be stored")
        parts += [_encode_string(name), _U32.pack(len(shape)), *(_U64.pack(size) for size in reversed(shape))]
        parts += [_U32.pack(TYPES[kind].code), _U64.pack(offset)]
        offset += size + -size % ALIGNMENT
    return b"".join(parts)


def _encode_string(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _encode_value(key: str, value: Any) -> bytes:
    """The kind and the value."""
    if isinstance(value, str):
        return _U32.pack(_STRING) + _encode_string(value)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        head = _U32.pack(_ARRAY) + _U32.pack(_STRING) + _U64.pack(len(value))
        return head + b"".join(map(_encode_string, value))
    array = _as_array(key, value)
    if array.ndim == 0:
        return _U32.pack(_CODES[array.dtype]) + array.tobytes()
    return _U32.pack(_ARRAY) + _U32.pack(_CODES[array.dtype]) + _U64.pack(len(array)) + array.tobytes()


def _as_array(key: str, value: Any) -> np.ndarray:
    """Numbers in the format in which they are stored: no dimension for one, one for several."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
    elif isinstance(value, bool | float):
        array = np.asarray(value, bool if isinstance(value, bool) else "<f4")
    elif isinstance(value, int):
        array = np.asarray(value, "<i4" if value < 0 else "<u4" if value < 1 << 32 else "<u8")
    else:
        array = _list_as_array(value)
    if array.dtype not in _CODES or array.ndim > 1:
        raise ValueError(f"{key}: {value!r} cannot be stored")
    return array


def _list_as_array(value: Any) -> np.ndarray:
    kinds = {type(element) for element in value} if isinstance(value, list) else set()
    formats = {bool: "?", int: "<i4", float: "<f4"}
    return np.asarray(value, formats[kinds.pop()] if len(kinds) == 1 and kinds <= formats.keys() else object)
