"""Files of weights as a whole: mapped to be read, and written beside their name until they are complete.

On Linux both go about it so that the kernel keeps a file's contents in large pages, where it can (ext4 since 6.16, xfs
and others since 6.6): a step of a large model reads every weight, and with pages of 4 KiB the two cores measured read a
tenth less a second than with pages of 2 MiB.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iolite.errors import CheckpointError

PIECE = 8 << 20  # what is written at once: the largest unit in which ext4 keeps contents, four large pages

_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it
_POPULATE = 256 << 20


class WriteError(CheckpointError):
    """A file that could not be written: no room, or no permission."""


# Reading


def map_file(path: Path, size: int) -> mmap.mmap:
    """The whole file, readable and privately writable, without reserving memory for writes that will not come."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            raise CheckpointError(f"{path.name} changed while it was being read")
        if sys.platform == "linux":
            # A plain private mapping counts as memory in use, and the kernel refuses one that is larger than the
            # machine's memory. The constant has no name in Python 3.11's mmap module.
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
            flags, protection = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=protection)
            with suppress(OSError):  # a kernel without large pages
                mapped.madvise(mmap.MADV_HUGEPAGE)  # counts for what is still to be read from the disk
            return mapped
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def populate(mapped: mmap.mmap, progress: Callable[[int, int], None] | None = None) -> None:
    """Brings a whole mapped file into memory, so that the first use does not wait for the disk page by page.

    progress(bytes done, bytes in all).
    """
    for start in range(0, len(mapped), _POPULATE):
        size = min(_POPULATE, len(mapped) - start)
        try:
            mapped.madvise(_MADV_POPULATE_READ, start, size)
        except (OSError, ValueError, AttributeError):
            return  # an older kernel or another system: pages come when they are used
        if progress:
            progress(start + size, len(mapped))


def release(mapped: mmap.mmap) -> None:
    """Unmodified pages of a private mapping of a file are dropped from this process; they can be read again."""
    with suppress(OSError, ValueError, AttributeError):  # a hint only, and not known everywhere
        mapped.madvise(mmap.MADV_DONTNEED)


# Writing


class Pieces:
    """A binary file to write, whose bytes go to the system in whole pieces that begin at multiples of their size.

    Contents are kept in units of what was written at once, and a large page holds what belongs to one unit only.
    """

    def __init__(self, file: Any) -> None:
        """file: opened to be written, without a buffer of its own."""
        self._file, self._held, self._at = file, bytearray(), 0  # where the file ends, what is held not counted

    @property
    def name(self) -> Any:
        return self._file.name

    def tell(self) -> int:
        return self._at + len(self._held)

    def write(self, data: Any) -> int:
        """All of data, anything with bytes in one stretch. OSError where they cannot be written."""
        view = memoryview(data).cast("B")
        count = len(view)
        while view:
            room = PIECE - self.tell() % PIECE
            if self._held or len(view) < room:
                size = min(room, len(view))
                self._held += view[:size]
                if size == room:
                    self.flush()
            else:
                size = room + (len(view) - room) // PIECE * PIECE
                self._put(view[:size])
            view = view[size:]
        return count

    def seek(self, position: int) -> None:
        self.flush()
        self._at = self._file.seek(position)

    def flush(self) -> None:
        held, self._held = self._held, bytearray()
        self._put(memoryview(held))

    def _put(self, view: memoryview) -> None:
        while view:
            written = self._file.write(view)
            self._at += written
            view = view[written:]


@contextmanager
def replacing(path: Path) -> Iterator[Pieces]:
    """A binary file to write that takes the name `path` only when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            pieces = Pieces(file)
            yield pieces
            pieces.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # it has its name already, or could not be made
            partial.unlink()
    if os.name == "posix":  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
