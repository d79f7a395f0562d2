"""The drafter that belongs to a model: found, held against it, and loaded.

"auto" looks where people and programs put drafters, in this order:

    MODEL/drafter/, MODEL/assistant/    folders in the model's own
    MODEL/*.gguf, MODEL/MTP/*.gguf      GGUF files whose architecture is gemma4-assistant, whatever they are called
    MODEL-assistant/                    the folder beside it
    OWNER/NAME-assistant                in the Hugging Face cache, and then the drafters of the family that NAME says

MODEL is the model's folder, of a GGUF file the one that it lies in. What is there and does not fit is passed over, and
the note says why. Nothing is downloaded and no weight is read; without a drafter to open, torch is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iolite.checkpoint import hub
from iolite.checkpoint.folder import WEIGHTS
from iolite.checkpoint.gguf import GgufFile, architecture
from iolite.checkpoint.gguf_metadata import DRAFTER, FILE_TYPES, MODEL
from iolite.checkpoint.gguf_source import is_gguf, is_named_drafter, model_files
from iolite.checkpoint.source import Progress, Source
from iolite.config import DRAFTER_TYPE, MODEL_TYPE, read_json
from iolite.errors import CheckpointError, DownloadError, IoliteError, UsageError

if TYPE_CHECKING:
    import torch

    from iolite.checkpoint.gguf_drafter import DrafterSource
    from iolite.model.drafter import Drafter

AUTO = "auto"
_FOLDERS = ("drafter", "assistant")
_EXAMPLE = "google/gemma-4-12B-it-assistant"
_NAMES = f"use auto, a folder, a .gguf file, or an id such as {_EXAMPLE}"
# A published model's name, and what others add to it when they change the format and nothing else.
_FORMAT = (
    r"qat|gguf|unquantized|ct|w\d+a\d+|int[48]|[2-8]-?bit|bnb|mlx|ud|b?f(?:16|32)|fp(?:8|16|32)"
    r"|i?q\d(?:_(?:[01km]|x*[ls]|nl))*|\d{5}-of-\d{5}"
)
_FAMILY = re.compile(rf"gemma-4-(\d+)b-it((?:[-_.](?:{_FORMAT}))*)", re.IGNORECASE | re.ASCII)
_PUBLISHED = re.compile(r"google/gemma-4-\d+b-it(-qat-q4_0-unquantized)?-assistant", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Pair:
    """A drafter that fits its model, where it was found, and what was passed over on the way, each with its reason."""

    source: DrafterSource
    where: str
    passed: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """All that in a sentence."""
        return f"the drafter is {self.where}{_spoken(self.passed)}"


@dataclass(frozen=True)
class Unpaired:
    """No drafter that fits: where it was looked for, and what was passed over, each with its reason."""

    looked: str
    passed: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """All that in a sentence."""
        return f"no drafter was found {self.looked}{_spoken(self.passed)}"


def _spoken(passed: Sequence[str]) -> str:
    return f"; passed over {'; '.join(passed)}" if passed else ""


def find_pair(model: Source, name: str, asked: str | os.PathLike[str]) -> Pair | Unpaired:
    """The drafter for a model that was opened by `name`.

    asked: "auto", or just one drafter: a folder, a .gguf file, a Hugging Face id in the cache, a folder or an id with
    `:QUANT`. Only "auto" may find none. Raises UsageError for a drafter that does not fit (with both sizes) and for a
    model in its place, DownloadError for what is not here, CheckpointError for files that are wrong.
    """
    if asked != AUTO:
        path, where = _asked_for(os.fspath(asked), model)
        return Pair(_fitting(path, model), where)
    passed: list[str] = []
    for path, where in _candidates(model, name):
        try:
            source = _fitting(path, model)
        except IoliteError as error:
            passed.append(f"{where}: {error}")
        else:
            return Pair(source, where, tuple(passed))
    return Unpaired(_looked_for(model, name), tuple(passed))


def load_pair(
    pair: Pair,
    scheme: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Drafter:
    """The network of a pair's drafter: floats in dtype, matrices packed where they are so or by the scheme.

    What was packed is kept in the cache folder of packed models, and mapped the next time. progress(done, in all, what)
    is called while it is packed. Raises CheckpointError for weights that cannot be packed.
    """
    from iolite.checkpoint.drafter import assemble_drafter
    from iolite.checkpoint.drafter_packing import kept

    source = kept(pair.source, scheme, progress)
    source.populate()
    report = progress if source is pair.source else None  # what was kept is there at once
    return assemble_drafter(source, scheme, dtype=dtype, device=device, progress=report)


def named_drafter(name: str) -> Path | None:
    """Where the drafter lies that `name` means, as commands take it for a model; None for a model and for what is not
    here. Raises ConfigError for a config.json that cannot be read."""
    place, quant = _place(name)
    if place is None or (os.path.isfile(place) and not is_gguf(place)):
        return None
    if not _is_folder(place) and any(_kind(path) != DRAFTER_TYPE for path in model_files(place)):
        return None
    return next((path for path in _drafters_at(place, quant) if _kind(path) == DRAFTER_TYPE), None)


def drafter_ids(name: str) -> list[str]:
    """Ids that a model's drafter may have on the Hub, the likeliest first: that of its own id, and those of the family
    when its name is a published one with another format, as unsloth/gemma-4-12b-it-GGUF or gemma-4-12b-it-Q4_0.gguf."""
    repository = _repository(name)
    owner, _, last = repository.rpartition("/")
    found = [f"{repository}-assistant"] if repository else []
    stem = last or re.sub(r"\.gguf$", "", os.path.basename(os.path.abspath(os.path.expanduser(name))), flags=re.I)
    if family := _FAMILY.fullmatch(stem):
        base = f"gemma-4-{family[1]}B-it"
        found += [f"google/{base}-qat-q4_0-unquantized-assistant"] if "qat" in family[2].lower() else []
        found += [f"{owner}/{base}-assistant"] if owner else []
        found.append(f"google/{base}-assistant")
    return [item for i, item in enumerate(found) if item.lower() not in [other.lower() for other in found[:i]]]


def published_drafter(name: str) -> str | None:
    """The id of the drafter that was published for a model of this name; None for a name that is not the family's."""
    return next((item for item in drafter_ids(name) if _PUBLISHED.fullmatch(item)), None)


# Looking


def _candidates(model: Source, name: str) -> Iterator[tuple[Path, str]]:
    """Drafters that may be the model's, in the order of the module's description, and what people call them."""
    shown = _repository(name) or str(model.folder)
    for inner in _FOLDERS:
        for path in _ranked(_drafters_at(model.folder / inner), model):
            yield path, f"{path.relative_to(model.folder)}{'/' if path.is_dir() else ''} in {shown}"
    for folder in _folders(model):
        for path in _ranked(_gguf_drafters(folder), model):
            yield path, f"{path.relative_to(folder)} in {_repository(name) or folder}"
    if neighbour := _neighbour(model, name):
        for path in _ranked(_drafters_at(neighbour), model):
            yield path, str(path)
    for repository in drafter_ids(name):
        if snapshot := hub.cached(repository):
            for path in _ranked(_drafters_at(snapshot), model):
                inner = "" if path == snapshot else f"{path.relative_to(snapshot)} in "
                yield path, f"{inner}{hub.repository(snapshot)} in the Hugging Face cache"


def _looked_for(model: Source, name: str) -> str:
    shown = _repository(name) or str(model.folder)
    places = [f"in {shown} ({', '.join(f'{inner}/' for inner in _FOLDERS)}, GGUF files, MTP/)"]
    if neighbour := _neighbour(model, name):
        places.append(f"as {neighbour}")
    if ids := drafter_ids(name):
        places.append(f"as {', '.join(ids)} in the Hugging Face cache")
    fetch = published_drafter(name)
    return " nor ".join(places) + (f" (iolite pull {fetch} fetches one)" if fetch else "")


def _folders(model: Source) -> list[Path]:
    """Where files of a model lie: a model in parts may have a folder to itself, inside that of the others."""
    in_parts = is_gguf(model.files[0]) and len(model.files) > 1 and "-of-" in model.files[0].stem
    return [model.folder, model.folder.parent] if in_parts else [model.folder]


def _neighbour(model: Source, name: str) -> Path | None:
    """The folder beside the model's that is named after it; None for the embedded model and in the cache."""
    folder = Path(os.path.abspath(model.folder))  # "." has no name
    if name == hub.NANO or _repository(name) or not folder.name:
        return None
    return folder.with_name(f"{folder.name}-assistant")


def _drafters_at(place: Path, quant: str | None = None) -> list[Path]:
    """A file itself, a folder with weights itself, or the GGUF drafters in it; with `quant` those with it in their
    names."""
    if not os.path.isdir(place):
        return [place] if os.path.isfile(place) else []
    if quant is None and _is_folder(place):
        return [place]
    files = _gguf_drafters(place)
    if quant is None:
        return files
    return [path for path in files if re.search(rf"(^|[-.]){re.escape(quant)}([-.]|$)", path.stem, re.IGNORECASE)]


def _gguf_drafters(folder: Path) -> list[Path]:
    """GGUF files of drafters in a folder and in its MTP/; one that is damaged counts by its name, to be spoken of."""
    inside = sorted(folder.glob("*"))
    inside += [path for mtp in inside if mtp.name.lower() == "mtp" for path in sorted(mtp.glob("*"))]
    return [path for path in inside if is_gguf(path) and os.path.isfile(path) and _kind(path) == DRAFTER_TYPE]


def _ranked(files: Sequence[Path], model: Source) -> list[Path]:
    """First a drafter's file that is named after the model's, then those in its format, then Q8_0, then others."""
    if len(files) < 2:
        return list(files)
    own = model.files[0]
    wanted = _file_type(own) if is_gguf(own) else None

    def rank(path: Path) -> tuple[bool, bool, bool]:
        found = _file_type(path)
        named = path.stem.lower() == f"mtp-{own.stem}".lower()
        return not named, found is None or found != wanted, found != FILE_TYPES["Q8_0"]

    return sorted(files, key=rank)


def _file_type(path: Path) -> int | None:
    """`general.file_type` of a GGUF file: the format of most of its matrices."""
    try:
        found = GgufFile(path).metadata.get("general.file_type")
    except CheckpointError:
        return None
    return found if type(found) is int else None


def _kind(path: Path) -> str:
    """The model_type of a folder, and for a GGUF file that which its architecture stands for; "" for others."""
    if os.path.isdir(path):
        config = path / "config.json"
        return str(read_json(config).get("model_type")) if os.path.isfile(config) else ""
    try:
        found = architecture(path)
    except CheckpointError:
        return DRAFTER_TYPE if is_named_drafter(path) else ""
    return {DRAFTER: DRAFTER_TYPE, MODEL: MODEL_TYPE}.get(found, "")


def _is_folder(path: Path) -> bool:
    """Whether a folder holds weights in the Hugging Face layout, or was meant to."""
    return any(os.path.exists(path / name) for name in ("config.json", WEIGHTS))


def _fitting(path: Path, model: Source) -> DrafterSource:
    """The drafter, opened and held against its model."""
    if path.is_dir() and not hub.is_complete(path):
        raise CheckpointError(f"only a part of {path.name} is there", "fetch or write it again")
    from iolite.checkpoint.drafter import check_pair, find_drafter

    source = find_drafter(path)
    check_pair(model.config.text, source.text, source.backbone_hidden_size)
    return source


# Being told


def _asked_for(asked: str, model: Source) -> tuple[Path, str]:
    """The one drafter that was asked for, and what to call it."""
    place, quant = _place(asked)
    if place is None:
        raise _not_here(asked)
    if os.path.isfile(place) and not is_gguf(place):
        raise CheckpointError(f"{asked} is a file", "give the folder of a drafter, or its .gguf")
    found = _ranked(_drafters_at(place, quant), model)
    models = [path for path in found or model_files(place) if _kind(path) == MODEL_TYPE]
    if models:
        raise UsageError(
            f"{asked} is a model, not a drafter",
            f"a drafter is a small network beside it, often called …-assistant or mtp-…: {_NAMES}",
        )
    if not found:
        which = f" {quant}" if quant else ""
        raise CheckpointError(f"{asked} holds no drafter{which}", _NAMES)
    repository = _repository(asked)
    if repository and found[0].is_dir() and not hub.is_complete(found[0]):
        raise DownloadError(f"{asked} is only partly on this machine", f"continue the download: iolite pull {asked}")
    return found[0], asked if found[0] == place else f"{found[0].name} in {asked}"


def _not_here(asked: str) -> DownloadError:
    start, colon, quant = asked.rpartition(":")
    if hub.is_id(asked):
        return DownloadError(f"{asked} is not on this machine", f"fetch it: iolite pull {asked}")
    if colon and quant and hub.is_id(start):
        fetch = f'hf download {start} --include "mtp*{quant}*" "MTP/*{quant}*" "*assistant*{quant}*"'
        return DownloadError(f"{asked} is not on this machine", f"fetch it: {fetch}")
    return DownloadError(f"there is no drafter {asked[:200]!r}", _NAMES)


def _place(name: str) -> tuple[Path | None, str | None]:
    """(the folder or file that a name means, None when it is not here; what follows a colon)."""
    if name == hub.NANO:
        return hub.nano_folder(), None
    path = os.path.expanduser(name)  # unlike the methods of Path, those of os.path never raise here
    if os.path.exists(path):
        return Path(path), None
    start, colon, quant = path.rpartition(":")
    if colon and quant and os.path.isdir(start):
        return Path(start), quant
    if repository := _repository(name):
        return hub.cached(repository), None if repository == name else quant
    return None, None


def _repository(name: str) -> str:
    """The Hugging Face id in a model's or a drafter's name; "" for the embedded model, files and folders."""
    start, _, quant = name.rpartition(":")
    here = os.path.exists(os.path.expanduser(name)) or os.path.isdir(os.path.expanduser(start))
    if name == hub.NANO or here:
        return ""
    return next((found for found in (name, start if quant else "") if found and hub.is_id(found)), "")
