"""`iolite quantize`: a model with packed weights, in a folder to keep."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from iolite.cli.list import human_bytes
from iolite.cli.terminal import put, say, working
from iolite.errors import UsageError


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--to", "scheme", type=click.Choice(["int4", "int8"]), default="int4", show_default=True, help="Bits of a weight."
)
@click.option("--force", is_flag=True, help="Write into DST though there is something in it.")
def command(source: str, target: Path, scheme: str, force: bool) -> None:
    """Pack the weights of SRC into 4 or 8 bits and write the model into the folder DST.

    SRC is a folder, a Hugging Face id that was pulled, or a .gguf file, of a model or of a drafter. DST loads at once,
    on this machine and on others. It is not needed for running: `--quantize int4` of the other commands packs while it
    reads and keeps the result in the cache.

    \b
    iolite quantize google/gemma-4-12B-it ./gemma-int4
    iolite run ./gemma-int4 "What is 17 times 23?"
    """
    from iolite.checkpoint.pairing import named_drafter

    if target.suffix.lower() == ".gguf":
        raise UsageError("GGUF files are written by another command", f"iolite convert {source} {target} --to q4_0")
    drafter = named_drafter(source)
    files = _pack(source, target, scheme, force) if drafter is None else _pack_drafter(drafter, target, scheme, force)
    size = (target / "model.safetensors").stat().st_size
    say(f"{human_bytes(sum(path.stat().st_size for path in files))} became {human_bytes(size)}")
    put(f"{target}\n")


def _pack(source: str, target: Path, scheme: str, force: bool) -> Sequence[Path]:
    """Packs a model; -> the files that it was read from."""
    from iolite.checkpoint.convert import to_folder
    from iolite.checkpoint.packing import PackingSource, bytes_needed
    from iolite.checkpoint.source import FolderSource, open_source

    found = open_source(source)
    if isinstance(found, FolderSource) and found.is_packed:
        raise UsageError(f"{source} is packed as {found.scheme} already", "copy the folder")
    packing = PackingSource(found, scheme)
    check_target(target, bytes_needed(found, scheme), force)
    with working("Packing", "tensors") as progress:
        to_folder(packing, target, None, lambda done, count, name: progress(done, count))
    return found.files


def _pack_drafter(path: Path, target: Path, scheme: str, force: bool) -> Sequence[Path]:
    """Packs a drafter; -> the files that it was read from."""
    from iolite.checkpoint.drafter import find_drafter, write_folder
    from iolite.checkpoint.drafter_packing import bytes_needed

    found = find_drafter(path)
    if found.scheme and (path.is_dir() or found.scheme != scheme):
        hint = "copy the folder" if path.is_dir() else f"{scheme} needs a float version of the drafter"
        raise UsageError(f"{path} is packed as {found.scheme} already", hint)
    if target.resolve() == path.resolve():
        raise UsageError(f"{target} is where the drafter is read from", "write into another folder")
    check_target(target, bytes_needed(found, scheme), force)
    spoken = path.is_file() or (path / "tokenizer.json").is_file()
    with working("Packing", "tensors") as progress:
        write_folder(
            target,
            found,
            scheme,
            found.tokenizer if spoken else None,
            lambda done, count, name: progress(done, count),
        )
    return found.files


def check_target(folder: Path, needed: int, force: bool) -> None:
    """Raises UsageError for a place that is taken, and when its disk has less than the `needed` bytes."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "name a new folder")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder, or add --force")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(place).free
    if room < needed:
        raise UsageError(
            f"the model takes {human_bytes(needed)}, and the disk of {place} has {human_bytes(room)}",
            "free some room, or name a folder on another disk",
        )
