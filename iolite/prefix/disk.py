"""Sequences kept in a folder, so that a conversation goes on after a restart without reading it again.

One safetensors file for each sequence: the state of its cache, the digests of its tokens (`chain`), the checkpoints of
its rings, and as the last tensor a digest of everything before it. A file is written beside its place and renamed. It
is used only if all of it is what was written, for the same model in the same formats; what is damaged is removed, and
the prompt is read again. Files hold private conversations: only their owner may read them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.checkpoint.files import replacing
from iolite.checkpoint.safetensors import SafetensorsFile, StreamWriter
from iolite.errors import CheckpointError, UsageError
from iolite.memory import human_bytes
from iolite.prefix.chain import Chain, last_cut
from iolite.prefix.checkpoint import Checkpoint
from iolite.prefix.memory import Kept
from iolite.prompt import Prompt

FORMAT = "iolite-sequence-1"
ENDING = ".safetensors"
_PARTIAL = re.compile(r"\.(.+)\.(\d+)\.partial")  # what `replacing` writes to, with the number of its process
_DIGEST = 32  # bytes
_STARTED = time.time()
_DAY = 86_400  # seconds; nothing takes that long to write


@dataclass(frozen=True)
class _Found:
    """A file that may be used: what its header says, before its content is checked."""

    path: Path
    chain: Chain
    earliest: int
    checkpoints: tuple[tuple[int, int], ...]  # (earliest, length)

    def usable(self, prompt: Prompt, chain: Chain) -> int:
        """As `Kept.usable`, as far as the header tells."""
        length = last_cut(prompt, min(chain.common(self.chain), len(prompt.ids) - 1))
        reached = any(earliest <= length for earliest, _ in self.checkpoints)
        return length if length >= self.earliest or reached else 0


class DiskStore:
    """Sequences of one model in one folder, of a limited size."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, str],
        limit_bytes: int,
        note: Callable[[str], None],
        device: torch.device | str = "cpu",
    ) -> None:
        """identity: all that must be the same for a sequence to be of use: the model, formats. note: is told what was
        refused or not written, and why. device: where caches live. Raises UsageError when the folder cannot be made.
        """
        self.folder, self.limit_bytes, self.note, self.device = Path(folder), limit_bytes, note, device
        self.identity = {"format": FORMAT, **identity}
        self._too_large: set[str] = set()  # of which that was noted
        self._seen: dict[tuple[str, int, int], _Found | None] = {}  # (name, size, time of change) -> what is in it
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True)
            self._clean()
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be used as a folder ({error.strerror})") from None

    def load(
        self, prompt: Prompt, chain: Chain, more_than: int, make: Callable[[], KVCache]
    ) -> tuple[Kept, int] | None:
        """The sequence with most of a prompt that is usable, and how much; None where none has more than that."""
        while True:
            found = [(item.usable(prompt, chain), item.path.name, item) for item in self._files(chain)]
            length, _, best = max(found, key=lambda item: item[:2], default=(0, "", None))
            if best is None or length <= more_than:
                return None
            kept = self._read(best.path, make, chain)
            length = kept.usable(prompt, chain) if kept else 0
            if kept and length > more_than:
                with suppress(OSError):
                    os.utime(best.path)
                return kept, length
            if kept:  # a file whose header says more than its content is no file of ours
                self._refuse(best.path, "its lengths are contradictory")

    def write(self, kept: Kept) -> bool:
        """Writes a sequence in place of what it was before, and removes the files used least recently beyond the
        limit. False, with a note, when it is larger than the limit. Raises CheckpointError when it cannot be written.
        """
        tensors = _tensors(kept)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.limit_bytes:
            if kept.name not in self._too_large:
                limit = human_bytes(self.limit_bytes)
                self.note(f"{human_bytes(size)} of cache are more than the limit of {limit}: not written")
            self._too_large.add(kept.name)
            return False
        path = self.folder / f"{kept.name}{ENDING}"
        metadata = self.identity | {
            "length": str(kept.cache.length),
            "earliest": str(kept.cache.earliest),
            "end": kept.chain.end.hex(),
            "checkpoints": json.dumps([[c.earliest, c.length] for c in kept.checkpoints]),
        }
        with replacing(path) as file:
            os.chmod(file.name, 0o600)
            _write(file, metadata, tensors)
        self._prune(path)
        return True

    def clear(self) -> None:
        """Removes all sequences of all models."""
        for path in self._paths():
            path.unlink(missing_ok=True)

    def num_bytes(self) -> int:
        return sum(size for _, size, _ in self._sizes())

    def _paths(self) -> list[Path]:
        with suppress(OSError):
            return sorted(self.folder.glob(f"[!.]*{ENDING}"))
        return []

    def _sizes(self) -> Iterator[tuple[Path, int, int]]:
        for path in self._paths():
            with suppress(OSError):
                stat = path.stat()
                yield path, stat.st_size, stat.st_mtime_ns

    def _files(self, like: Chain) -> list[_Found]:
        """What is there of this model. Files of others are left alone; those that are none of ours are removed."""
        seen = {}
        for path, size, changed in self._sizes():
            key = (path.name, size, changed)
            seen[key] = self._seen[key] if key in self._seen else self._look(path, like)
        self._seen = seen
        return [found for found in seen.values() if found is not None]

    def _look(self, path: Path, like: Chain) -> _Found | None:
        try:
            file = SafetensorsFile(path)
            told = file.metadata
            if not told.keys() >= self.identity.keys() | {"length", "earliest", "end", "checkpoints"}:
                raise ValueError("it is no sequence of this version")
            if any(told[name] != value for name, value in self.identity.items()):
                self.note(f"{path.name} is of another model, or in another format: not used")
                return None
            chain = like.with_rows(file.tensor("chain").numpy())
            if len(chain) != int(told["length"]) or chain.end.hex() != told["end"]:
                raise ValueError("its tokens are others")
            checkpoints = tuple((int(a), int(b)) for a, b in json.loads(told["checkpoints"]))
            return _Found(path, chain, int(told["earliest"]), checkpoints)
        except (CheckpointError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._refuse(path, str(error))
            return None

    def _read(self, path: Path, make: Callable[[], KVCache], like: Chain) -> Kept | None:
        """A sequence, if every byte of it is what was written."""
        try:
            file = SafetensorsFile(path)
            told, names = file.metadata, file.keys()
            tensors = {name: file.tensor(name) for name in names}
            digest = tensors.pop("digest")
            if _digest(told, tensors) != bytes(digest.tolist()):
                raise ValueError("its content is not what was written")
            if any(told[name] != value for name, value in self.identity.items()):
                raise ValueError("it is of another model")
            kept = Kept(make(), like.with_rows(tensors.pop("chain").numpy()), name=path.stem)
            here = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            _take_up(kept, here, json.loads(told["checkpoints"]))
        except (CheckpointError, ValueError, KeyError, TypeError, IndexError) as error:
            self._refuse(path, str(error))
            return None
        kept.written, kept.written_length = kept.chain.end, len(kept.chain)
        return kept

    def _refuse(self, path: Path, why: str) -> None:
        self.note(f"{path.name} cannot be used ({why.splitlines()[0]}): removed, its prompt is read again")
        with suppress(OSError):
            path.unlink()

    def _prune(self, written: Path) -> None:
        total, files = self.num_bytes(), sorted(self._sizes(), key=lambda item: item[2])
        for path, size, _ in files:
            if total > self.limit_bytes and path != written:
                path.unlink(missing_ok=True)
                total -= size

    def _clean(self) -> None:
        """Removes what processes that are no more have left half written."""
        for path in self.folder.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            if match and match[1].endswith(ENDING) and _is_left(int(match[2]), path.stat().st_mtime):
                path.unlink(missing_ok=True)


def _is_left(process: int, changed: float) -> bool:
    """Whether nobody writes any more what a process with that number changed at that time."""
    if process == os.getpid():
        return changed < _STARTED  # in a container a number soon comes again
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return changed < time.time() - _DAY


def _tensors(kept: Kept) -> dict[str, Tensor]:
    """Everything of a sequence that is kept in a file, by name."""
    tensors = dict(kept.cache.state())
    for number, checkpoint in enumerate(kept.checkpoints):
        tensors |= {f"checkpoint.{number}.{name}": store for name, store in checkpoint.state().items()}
    return {**tensors, "chain": torch.from_numpy(kept.chain.rows().copy())}


@torch.inference_mode()
def _take_up(kept: Kept, tensors: Mapping[str, Tensor], checkpoints: list[list[int]]) -> None:
    """The opposite of `_tensors`. Raises ValueError for what does not fit the cache."""
    own: list[dict[str, Tensor]] = [{} for _ in checkpoints]
    state = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first == "checkpoint":
            number, _, inner = rest.partition(".")
            own[int(number)][inner] = tensor
        else:
            state[name] = tensor
    kept.cache.load_state(state, len(kept.chain))
    for (earliest, length), rows in zip(checkpoints, own, strict=True):
        kept.checkpoints.append(Checkpoint.from_state(rows, length, earliest, kept.cache))


def _write(file: Any, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    room = 4096 + len(json.dumps(dict(metadata))) + sum(len(json.dumps(name)) + 160 for name in tensors)
    writer = StreamWriter(file, metadata, room)
    digest = _begin(metadata)
    for name, tensor in sorted(tensors.items()):
        raw = _bytes(tensor)
        digest.update(_header(name, tensor))
        digest.update(raw)
        writer.begin(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        writer.append(raw)
    writer.write("digest", torch.tensor(list(digest.digest()), dtype=torch.uint8))
    writer.finish()


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Over the metadata and every tensor's name, form and bytes."""
    digest = _begin(metadata)
    for name, tensor in sorted(tensors.items()):
        digest.update(_header(name, tensor))
        digest.update(_bytes(tensor))
    return digest.digest()


def _begin(metadata: Mapping[str, str]) -> Any:
    return blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=_DIGEST)


def _header(name: str, tensor: Tensor) -> bytes:
    return f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
