"""GGUF files put together field by field, so that a test can put any field wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def array(kind: int, count: int, elements: bytes) -> bytes:
    """The value of a key of kind 9."""
    return u32(kind) + u64(count) + elements


def tensor(name: str, dimensions: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    """One description; the dimensions in the file's order, the fastest first."""
    return text(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(code) + u64(offset)


@dataclass
class Gguf:
    """The fields of a file; `None` for a count means: as many as there are."""

    keys: tuple[bytes, ...] = ()
    tensors: tuple[bytes, ...] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    alignment: int = 32

    def encode(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        header = self.magic + u32(self.version) + u64(num_tensors) + u64(num_keys)
        header += b"".join(self.keys) + b"".join(self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path
