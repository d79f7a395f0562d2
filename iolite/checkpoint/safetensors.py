"""Reading and writing safetensors files: the header is checked against the file before a byte of it is used.

Layout (https://github.com/huggingface/safetensors): 8 bytes, the header's length N, little endian; N bytes of JSON,
`{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}`, offsets
counted from the end of the header; then the tensors, end to end, with nothing between, before or behind them.

Tensors are views of the mapped file: no copy, no pickle, and pages that are not read cost no memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iolite.checkpoint.files import map_file, populate, release, replacing
from iolite.errors import CheckpointError

if TYPE_CHECKING:  # torch is imported by the functions that need it: headers are read without it
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIMENSIONS = 16
MAX_SIZE = 1 << 48  # of one dimension: 281 T, beyond any file, and products of sixteen stay exact in Python

# Format's name -> (torch's name, bytes for one value).
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_FORMAT_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor's place: bytes begin..end of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One file, its header read and checked; tensors are mapped when asked for.

    Raises CheckpointError for anything that is not exactly the format: a truncated file, a header longer than the
    file, a tensor whose offsets, shape and format disagree, tensors that overlap, and bytes that belong to none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                header = _read_header(file.read(8), file, self._size, self.path.name)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror})") from None
        self._data_start, parsed = header
        metadata = parsed.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{self.path.name}: __metadata__ must map text to text")
        self.metadata: dict[str, str] = metadata
        self._entries = {name: _entry(self.path.name, name, value) for name, value in parsed.items()}
        _check_cover(self.path.name, self._entries, self._size - self._data_start)
        self._map: mmap.mmap | None = None

    def keys(self) -> list[str]:
        """Names of the tensors, in the header's order."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """The format's own name: BF16, F32, …"""
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        entry = self._entries[name]
        return entry.end - entry.begin

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it lies in the file. Writing to it changes memory only (the mapping is copy on write)."""
        import torch

        entry = self._entries[name]
        dtype = getattr(torch, DTYPES[entry.dtype][0])
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        if self._map is None:
            self._map = map_file(self.path, self._size)
        start = self._data_start + entry.begin
        count = math.prod(entry.shape)
        # The tensor keeps the mapping alive, so neither it nor the file needs closing.
        if start % dtype.itemsize:  # legal in the format, but not for arithmetic on every machine
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.begin, offset=start)
            return raw.clone().view(dtype).reshape(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(entry.shape)

    def release(self) -> None:
        """Lets go of the pages that were read so far: they count as memory in use until then."""
        if self._map is not None:
            release(self._map)

    def populate(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Brings the whole file into memory, so that the first use does not wait for the disk page by page.

        progress(bytes done, bytes in all).
        """
        if self._map is None:
            self._map = map_file(self.path, self._size)
        populate(self._map, progress)


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the file beside `path`, to the disk, and only then gives it its name: there is never half a file."""
    # Wide formats first, as the format's own writer does, so that every tensor is aligned to its values.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        dtype = _FORMAT_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(Path(path)) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            if tensors[name].numel():
                file.write(_raw_bytes(tensors[name]))


class StreamWriter:
    """Tensors written to a safetensors file one by one, so that no two need to be in memory. Made by `streaming`.

    The header comes first in the file and is written last, into room that was left for it; readers skip the blanks
    behind it. Tensors whose sizes are multiples of 64 come first, so that they begin at multiples of 64 in the file.
    """

    def __init__(self, file: Any, metadata: Mapping[str, str], room: int) -> None:
        self._file, self._end = file, 0
        self._room = -(-(8 + room) // 64) * 64 - 8
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        file.seek(8 + self._room)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """One more tensor, whole."""
        self.begin(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if tensor.numel():
            self.append(_raw_bytes(tensor))

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Announces a tensor whose bytes come by `append`. dtype is torch's name. Raises ValueError when the one before
        has fewer or more bytes than it was to have, or a name comes twice."""
        self._check_end()
        if name in self._header:
            raise ValueError(f"{name} is written twice")
        begin, size = self._end, math.prod(shape) * DTYPES[_FORMAT_NAMES[dtype]][1]
        self._end += size
        self._header[name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, self._end],
        }

    def append(self, raw: memoryview) -> None:
        self._file.write(raw)

    def finish(self) -> None:
        encoded = json.dumps(self._header, separators=(",", ":")).encode()
        if len(encoded) > self._room:
            raise ValueError(f"a header of {len(encoded)} bytes in room for {self._room}")
        self._check_end()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + encoded.ljust(self._room))

    def _check_end(self) -> None:
        written = self._file.tell() - 8 - self._room
        if written != self._end:
            raise ValueError(f"{written} bytes were written where {self._end} were announced")


@contextmanager
def streaming(path: Path, metadata: Mapping[str, str], names: Sequence[str]) -> Iterator[StreamWriter]:
    """A writer for tensors of these names; the file takes its name when the block ends without an exception."""
    room = 4096 + len(json.dumps(dict(metadata))) + sum(len(json.dumps(name)) + 160 for name in names)
    with replacing(path) as file:
        writer = StreamWriter(file, metadata, room)
        yield writer
        writer.finish()


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_header(prefix: bytes, file: Any, size: int, name: str) -> tuple[int, dict[str, Any]]:
    """(where the data section begins, the parsed header)."""
    if len(prefix) < 8:
        raise CheckpointError(f"{name} is {size} bytes long, too short for a safetensors file", AGAIN)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{name} claims a header of {length} bytes: not a safetensors file")
    if length > size - 8:
        raise CheckpointError(f"{name} claims a header of {length} bytes but is {size} bytes long", AGAIN)
    raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(f"{name} ended while its header was read", AGAIN)
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):  # bad UTF-8, bad JSON, repeated keys, numbers of thousands of digits
        raise CheckpointError(f"{name}: the header is not valid JSON, or repeats a name", AGAIN) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name}: the header is no JSON object")
    return 8 + length, parsed


AGAIN = "the file may be damaged or half downloaded; fetch it again"


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _entry(file: str, name: str, value: Any) -> Entry:
    """One header entry, checked in itself: known format, whole numbers, and as many bytes as its shape needs."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has the unknown format {dtype!r}")
    if not _whole_numbers(shape, MAX_SIZE) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{file}: tensor {name!r} has the impossible shape {shape!r}")
    if not _whole_numbers(offsets, 1 << 63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: tensor {name!r} has the impossible offsets {offsets!r}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][1]
    if end - begin != needed:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {shape} in {dtype} needs {needed} bytes, "
            f"but its offsets give it {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any, limit: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= limit for n in value)


def _check_cover(file: str, entries: Mapping[str, Entry], size: int) -> None:
    """The tensors must fill the `size` bytes of the data section exactly, once."""
    for name, entry in entries.items():
        if entry.end > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} ends at byte {entry.end}, but the file holds {size} bytes of data", AGAIN
            )
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps another" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {name!r} {fault}")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes at the end belong to no tensor", AGAIN)
