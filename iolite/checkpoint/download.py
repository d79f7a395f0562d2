"""Fetching a model from the Hub into the Hugging Face cache, so that an interrupted download is continued.

`huggingface_hub` does the asking (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies) and lays out the cache. Large files
are the exception: since version 2 it throws a partial file away when it stops, so they are fetched here, appended to
`blobs/SHA.incomplete` across as many attempts as it takes, and take their name once their SHA-256 is right.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iolite.checkpoint import hub
from iolite.checkpoint.folder import INDEX, WEIGHTS, check_weights, is_drafter, open_weights, read_config
from iolite.errors import CheckpointError, DownloadError

_SETTINGS = (".json", ".jinja")
_PAPERS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_SPARE_BYTES = 200_000_000  # left free on the disk: other programs live there too


@dataclass(frozen=True)
class Remote:
    """One file of the repository, to be stored as blobs/`etag`."""

    name: str
    size: int
    etag: str  # SHA-256 of the content for large files, git's SHA-1 for the others
    large: bool


def pull(name: str, *, check: bool = False, report: Callable[[str], None] = lambda line: None) -> Path:
    """Downloads what iolite needs of a model, or what is missing of it, and returns its folder.

    check reads every file that is already here and fetches damaged ones again. `report` gets lines for people; bars
    go to stderr when that is a terminal. Raises DownloadError (no such model, no access, no network, no space) and,
    before anything large is fetched, CheckpointError for a model that iolite cannot run.
    """
    if name == hub.NANO or os.path.isdir(os.path.expanduser(name)):
        return hub.resolve(name)
    if not hub.is_id(name):
        raise DownloadError(f"{name[:200]!r} is not a Hugging Face id", "an id looks like google/gemma-4-12B-it")
    if check and (here := hub.cached(name)) is not None:
        for path in damaged(here):
            report(f"damaged, fetched again: {path.name}")
            _remove(path)
    if _offline():
        return _pull_offline(name, report)
    name, commit, files = _ask(name)
    _fetch_config(name, commit)
    repository = hub.cache_folder() / f"models--{name.replace('/', '--')}"
    blobs = repository / "blobs"
    missing = [file for file in files if not (blobs / file.etag).exists()]
    _check_space(blobs, missing)
    total = sum(file.size for file in files)
    left = sum(file.size - _partial_size(blobs, file) for file in missing)
    report(f"{name}: {len(files)} files, {total / 1e9:.2f} GB, {left / 1e9:.2f} GB to fetch")
    for file in missing:
        if file.large:
            _fetch_large(name, commit, file, blobs, report)
    folder = _link(name, files)
    for file in files:
        if (folder / file.name).stat().st_size != file.size:
            raise DownloadError(f"{file.name} has not the size that the Hub says", "pull again with --check")
    _check_whole(folder)
    return folder


def damaged(folder: Path) -> Iterator[Path]:
    """The files of a snapshot whose content is not what their blob's name, a checksum, says. Reads all of them."""
    for path in sorted(folder.iterdir()):
        blob = path.resolve()
        algorithm = {64: "sha256", 40: "sha1"}.get(len(blob.name))
        if not blob.is_file() or algorithm is None or blob.parent.name != "blobs":
            continue
        # git's name for a file is the SHA-1 of a header and the content; large files are named by the content alone.
        start = b"" if algorithm == "sha256" else b"blob %d\0" % blob.stat().st_size
        if _digest(blob, algorithm, start) != blob.name:
            yield path


def wanted(names: Sequence[str]) -> list[str]:
    """Which files of a repository iolite uses: settings, template, tokenizer, weights, and the papers to them.

    Raises CheckpointError when there are no safetensors weights among them.
    """
    top = [name for name in names if "/" not in name]
    if WEIGHTS in top:  # beside it, shards would be a second copy
        weights = [WEIGHTS]
    else:
        weights = [name for name in top if name.startswith("model-") and name.endswith(".safetensors")]
    if not weights or (weights != [WEIGHTS] and INDEX not in top):
        kinds = {"GGUF": ".gguf", "pickled": ".bin"}
        found = next((kind for kind, end in kinds.items() if any(n.endswith(end) for n in names)), "no")
        raise CheckpointError(
            f"this repository has {found} weights", "iolite reads models with a model.safetensors or its shards"
        )
    settings = [n for n in top if n.endswith(_SETTINGS) and not (n == INDEX and weights == [WEIGHTS])]
    return [*settings, *(name for name in top if name in _PAPERS), *weights]


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _pull_offline(name: str, report: Callable[[str], None]) -> Path:
    here = hub.cached(name)
    if here is None or not hub.is_complete(here):
        what = "is not on this machine" if here is None else "is only partly on this machine"
        raise DownloadError(f"{name} {what}, and HF_HUB_OFFLINE forbids the network", "unset HF_HUB_OFFLINE")
    report("HF_HUB_OFFLINE is set: not asked whether there is a newer version")
    return here


def _ask(name: str) -> tuple[str, str, list[Remote]]:
    """(the id as the Hub spells it, the commit of main, the files to have)."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _explained(name):
        api = HfApi()
        info = api.model_info(name)
        tree = [f for f in api.list_repo_tree(info.id, revision=info.sha) if isinstance(f, RepoFile)]
    assert info.sha is not None
    chosen = set(wanted([file.path for file in tree]))
    files = [
        Remote(f.path, f.lfs.size, f.lfs.sha256, True) if f.lfs else Remote(f.path, f.size, f.blob_id, False)
        for f in tree
        if f.path in chosen
    ]
    return info.id, info.sha, files


def _fetch_config(name: str, commit: str) -> None:
    """config.json first: a model that iolite cannot run is refused for the price of a few kilobytes."""
    from huggingface_hub import hf_hub_download

    with _explained(name):
        path = hf_hub_download(name, "config.json", revision=commit, tqdm_class=_no_bar())
    _check_config(Path(path).parent)


def _check_config(folder: Path) -> None:
    """Raises ConfigError or CheckpointError for a model, or a drafter, that iolite cannot run."""
    if is_drafter(folder):
        from iolite.checkpoint.gguf_drafter import read_drafter_config

        read_drafter_config(folder)
    else:
        read_config(folder)


def _check_whole(folder: Path) -> None:
    """Raises CheckpointError unless the tensors are just those that config.json asks for."""
    if is_drafter(folder):
        from iolite.checkpoint.gguf_drafter import open_drafter

        open_drafter(folder)
    else:
        check_weights(read_config(folder), open_weights(folder))


def _check_space(blobs: Path, missing: Sequence[Remote]) -> None:
    needed = sum(file.size - _partial_size(blobs, file) for file in missing)
    free = shutil.disk_usage(next(path for path in blobs.parents if path.is_dir())).free
    if needed and needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"the download needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk",
            "make room, or set HF_HOME to a folder on another disk",
        )


def _fetch_large(name: str, commit: str, file: Remote, blobs: Path, report: Callable[[str], None]) -> None:
    """One file into its blob, continuing where an earlier attempt stopped; its checksum must be right at the end."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs.mkdir(parents=True, exist_ok=True)
    partial = _partial(blobs, file)
    lock = hub.cache_folder() / ".locks" / blobs.parent.name / f"{file.etag}.lock"  # huggingface_hub's own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _explained(name), WeakFileLock(lock), open(partial, "ab") as target:
        if target.tell() > file.size:
            target.truncate(0)
        if target.tell() < file.size:
            # The Hub's own address, not the signed one behind it, which expires: each retry asks for a new one.
            http_get(
                hf_hub_url(name, file.name, revision=commit),
                target,
                resume_size=target.tell(),
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.name,
            )
    report(f"{file.name}: checking its SHA-256")
    if _digest(partial, "sha256") != file.etag:
        partial.unlink()
        raise DownloadError(f"{file.name} arrived damaged (its checksum is wrong)", "pull again to fetch it anew")
    os.replace(partial, blobs / file.etag)


def _partial(blobs: Path, file: Remote) -> Path:
    return blobs / f"{file.etag}.incomplete"


def _partial_size(blobs: Path, file: Remote) -> int:
    try:
        return min(_partial(blobs, file).stat().st_size, file.size)
    except OSError:
        return 0


def _link(name: str, files: Sequence[Remote]) -> Path:
    """The small files, and the snapshot's links to all of them; the large ones are here already."""
    from huggingface_hub import snapshot_download

    with _explained(name):
        patterns = [glob.escape(file.name) for file in files]
        return Path(snapshot_download(name, allow_patterns=patterns, tqdm_class=_no_bar()))


def _no_bar() -> type[Any]:
    """A progress bar that shows nothing, for small files, whose bars would only come and go."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return NoBar


def _digest(path: Path, algorithm: str, start: bytes = b"") -> str:
    digest = hashlib.new(algorithm, start, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """A file of a snapshot and the blob behind it."""
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into a DownloadError that says what to do.

    Only calls of that library go inside. Its errors come from several families that change with its versions, so
    every exception is taken; the original stays attached.
    """
    try:
        yield
    except Exception as error:
        raise _explain(name, error) from error


def _explain(name: str, error: Exception) -> DownloadError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = constants.ENDPOINT
    again = "pull again: what was fetched is kept, and the download goes on from there"
    token = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{name} is open only to those who accept its terms", f"accept at {where}/{name}, then {token}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DownloadError(
            f"there is no model {name} at {where}, or it is private", f"check the spelling; if private, {token}"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return DownloadError(f"{name} lacks a file that it needs, such as config.json", "is it a model for iolite?")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "nothing"
        if status in (401, 403):
            return DownloadError(f"{where} refused the access to {name} ({status})", f"check your token: {token}")
        return DownloadError(f"{where} answered {status} for {name}", again)
    if isinstance(error, OfflineModeIsEnabled):
        return DownloadError("HF_HUB_OFFLINE forbids the network", "unset HF_HUB_OFFLINE")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError("the disk is full", f"make room or set HF_HOME to another disk, and {again}")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return DownloadError(f"the cache {hub.cache_folder()} cannot be written", "set HF_HOME to a folder of yours")
    if type(error).__name__.startswith(("Connect", "Proxy", "Pool")):
        return DownloadError(f"{where} cannot be reached", "check the network and the proxy settings, and pull again")
    return DownloadError(f"the download of {name} from {where} stopped ({type(error).__name__})", again)
