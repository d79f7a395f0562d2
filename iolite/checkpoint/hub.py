"""From the name of a model to its files on this machine: the embedded model, a folder, or the Hugging Face cache.

Nothing here uses the network; `iolite.checkpoint.download` fills the cache. Layout of the cache, shared with every
other program that uses it (`HF_HOME`, `HF_HUB_CACHE`):

    models--google--gemma-4-12B-it/
        blobs/SHA                    the files themselves, named after their content
        refs/main                    the commit that "main" was when it was last asked for
        snapshots/COMMIT/config.json a link into blobs

A folder, or an id's snapshot, may hold GGUF files instead; a colon and the ending of a file's name say which is meant:
unsloth/gemma-4-12b-it-GGUF:Q4_0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import iolite
from iolite.checkpoint.folder import INDEX, WEIGHTS, read_config, weight_files
from iolite.checkpoint.gguf_source import choose_file, is_gguf, model_files
from iolite.config import ModelConfig
from iolite.errors import CheckpointError, DownloadError, IoliteError

NANO = "nano"
_EXAMPLE = "google/gemma-4-12B-it"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Found:
    """A model on this machine that iolite can run."""

    name: str
    folder: Path
    config: ModelConfig
    size: int  # bytes of its files
    modified: float  # seconds since 1970
    complete: bool  # False: a download that was interrupted


def resolve(name: str) -> Path:
    """Where a model is: its folder, or its GGUF file.

    name: "nano" (the one inside the package), a folder, a .gguf file, or a Hugging Face id in the cache, in any letter
    case; a folder or an id with GGUF files may be followed by a colon and the ending of one of them. Raises
    DownloadError, with the command that fetches it, for an id that is not in the cache or only in part, and
    CheckpointError for a file that is no model and for a choice that is not clear.
    """
    if name == NANO:
        return nano_folder()
    path = os.path.expanduser(name)  # unlike the methods of Path, those of os.path never raise here
    if os.path.isdir(path):
        return _in_folder(Path(path), None, name)
    if os.path.isfile(path):
        if is_gguf(Path(path)):
            return Path(path)
        raise CheckpointError(f"{name} is a file", "give the folder that holds config.json and the weights, or a .gguf")
    start, colon, quant = path.rpartition(":")
    if colon and quant and os.path.isdir(start):
        return _in_folder(Path(start), quant, start)
    repository = start if colon and quant and is_id(start) else name
    if not is_id(repository):
        raise DownloadError(f"there is no model {name[:200]!r}", f"use nano, a folder, or an id such as {_EXAMPLE}")
    snapshot = cached(repository)
    if snapshot is None:
        fetch = f"iolite pull {name}"
        if repository != name:
            fetch = f'hf download {repository} --include "*{quant}*.gguf" --include "mmproj*"'
        raise DownloadError(f"{name} is not on this machine", f"fetch it: {fetch}")
    if repository != name or _has_only_gguf(snapshot):
        return _in_folder(snapshot, quant if repository != name else None, repository)
    if not is_complete(snapshot):
        raise DownloadError(f"{name} is only partly on this machine", f"continue the download: iolite pull {name}")
    return snapshot


def _in_folder(folder: Path, quant: str | None, name: str) -> Path:
    """The folder itself, or the GGUF file in it that is meant: named by `quant`, or the only one."""
    return choose_file(folder, quant, name) if quant or _has_only_gguf(folder) else folder


def _has_only_gguf(folder: Path) -> bool:
    """Whether a folder's model is in GGUF files: there are some, and no safetensors."""
    plain = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return not plain and bool(model_files(folder))


def nano_folder() -> Path:
    """The folder of the embedded model."""
    return Path(iolite.__file__).parent / "nano"


def is_id(name: str) -> bool:
    """Whether the name has the form of a Hugging Face id: owner/model."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def cached(name: str) -> Path | None:
    """The newest snapshot of an id in the cache, complete or not; None when there is none."""
    same = [(repo, folder) for repo, folder in _repositories() if repo.lower() == name.lower()]
    # Two spellings may both be there; the one that was typed goes first, then one that is whole.
    same.sort(key=lambda item: item[0] != name)
    snapshots = [found for _, folder in same if (found := _snapshot(folder)) is not None]
    return next(filter(is_complete, snapshots), snapshots[0] if snapshots else None)


def repository(snapshot: Path) -> str:
    """The id that a snapshot in the cache is of, as the cache spells it."""
    return snapshot.parent.parent.name.partition("--")[2].replace("--", "/", 1)


def is_complete(folder: Path) -> bool:
    """Whether config.json and every file that the weights need are there."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except IoliteError:
        return False


def list_models() -> list[Found]:
    """The models here that iolite can run: the embedded one, then those of the cache by name."""
    folders = [(NANO, nano_folder())]
    for repo, folder in sorted(_repositories()):
        snapshot = _snapshot(folder)
        if snapshot is not None:
            folders.append((repo, snapshot))
    found = []
    for name, folder in folders:
        try:
            config = read_config(folder)
        except IoliteError:
            continue  # another architecture, or a data set's leftovers: no concern of this list
        stats = [path.stat() for path in folder.iterdir() if path.is_file()]
        size, modified = sum(s.st_size for s in stats), max(s.st_mtime for s in stats)
        found.append(Found(name, folder, config, size, modified, is_complete(folder)))
    return found


def cache_folder() -> Path:
    """Where Hugging Face's programs keep models: HF_HUB_CACHE, or hub/ in HF_HOME, or in ~/.cache/huggingface."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _repositories() -> Iterator[tuple[str, Path]]:
    """(id, folder) of every model in the cache."""
    root = cache_folder()
    if not root.is_dir():
        return
    for folder in root.iterdir():
        kind, _, name = folder.name.partition("--")
        if kind == "models" and name and folder.is_dir():
            yield name.replace("--", "/", 1), folder


def _snapshot(repository: Path) -> Path | None:
    """The snapshot that "main" points to, or else the newest one."""
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = ""
    if re.fullmatch(r"[0-9a-f]{4,64}", commit) and (repository / "snapshots" / commit).is_dir():
        return repository / "snapshots" / commit
    snapshots = [path for path in (repository / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
