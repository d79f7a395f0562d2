"""Files of weights are written in whole pieces, byte for byte what was given, whatever it came in."""

from __future__ import annotations

import io
import mmap
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iolite.checkpoint import files
from iolite.checkpoint.files import Pieces, WriteError, map_file, populate, replacing


class Recorded(io.BytesIO):
    """A file that notes where and how much is written to it, and takes at most `most` bytes at a time."""

    def __init__(self, most: int = sys.maxsize) -> None:
        super().__init__()
        self.most, self.writes = most, list[tuple[int, int]]()

    def write(self, data: object) -> int:
        at = self.tell()
        count = super().write(bytes(data)[: self.most])  # type: ignore[call-overload]
        self.writes.append((at, count))
        return count


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 16)


@given(parts=st.lists(st.binary(max_size=70), max_size=12), room=st.integers(0, 40), most=st.integers(1, 100))
def test_what_is_written_is_what_was_given(parts: list[bytes], room: int, most: int) -> None:
    file = Recorded(most)
    pieces = Pieces(file)
    pieces.seek(room)
    for part in parts:
        before = pieces.tell()
        assert pieces.write(memoryview(part)) == len(part)
        assert pieces.tell() == before + len(part)
    pieces.flush()
    assert file.getvalue()[room:] == b"".join(parts)


@given(st.lists(st.binary(min_size=1, max_size=70), min_size=1, max_size=12))
def test_every_write_begins_at_a_piece_and_all_but_the_last_end_at_one(parts: list[bytes]) -> None:
    file = Recorded()
    pieces = Pieces(file)
    for part in parts:
        pieces.write(part)
    pieces.flush()
    assert all(at % 16 == 0 and count % 16 == 0 for at, count in file.writes[:-1])
    assert file.writes[-1][0] % 16 == 0


def test_a_header_is_written_last_into_room_that_was_left() -> None:
    file = Recorded()
    pieces = Pieces(file)
    pieces.seek(5)
    pieces.write(b"weights" * 10)
    pieces.seek(0)
    pieces.write(b"head!")
    pieces.flush()
    assert file.getvalue() == b"head!" + b"weights" * 10
    assert pieces.tell() == 5


def test_a_file_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def run_out_of_space() -> None:
        with replacing(path) as file:
            file.write(bytes(40))
            raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="No space left"):
        run_out_of_space()
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    assert path.read_bytes() == b"old"


def test_a_mapped_file_is_the_file(tmp_path: Path) -> None:
    path, content = tmp_path / "weights", bytes(range(256)) * 64
    with replacing(path) as file:
        file.write(content)
    mapped = map_file(path, len(content))
    done: list[tuple[int, int]] = []
    populate(mapped, lambda *counts: done.append(counts))
    assert mapped[:] == content
    assert done in ([], [(len(content), len(content))])  # nothing where the system cannot
    mapped[:4] = b"mine"
    files.release(mapped)
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages to ask for")
def test_a_kernel_without_large_pages_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"content")
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    assert map_file(path, 7)[:] == b"content"
