"""`iolite convert`: a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

import click

from iolite.cli.terminal import put, working


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_0"]),
    help="Format of the weights; by default that of SRC.",
)
@click.option("--mmproj/--no-mmproj", default=True, help="Write the embedders beside a GGUF model (default: yes).")
@click.option(
    "--drafter",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a drafter to write beside a GGUF model.",
)
def command(source: str, target: Path, to: str | None, mmproj: bool, drafter: Path | None) -> None:
    """Write the model SRC in another format and print the files.

    SRC is a folder, a .gguf file, a Hugging Face id that was pulled, with GGUF files also ID:QUANT; or the folder of a
    drafter. DST ends in .gguf for a file that llama.cpp runs, with mmproj-DST beside it for pictures and sounds (and
    mtp-DST with --drafter); anything else is a folder to be written with safetensors.
    """
    from iolite.checkpoint.convert import Beside, drafter_to_gguf, to_folder, to_gguf
    from iolite.checkpoint.folder import is_drafter
    from iolite.checkpoint.source import open_source

    with working("Converting", "tensors") as progress:

        def report(done: int, count: int, name: str) -> None:
            progress(done, count)

        if target.suffix.lower() != ".gguf":
            written = to_folder(open_source(source), target, to, report)
        elif is_drafter(Path(source)):
            written = drafter_to_gguf(Path(source), target, to, report)
        else:
            written = to_gguf(open_source(source), target, to, Beside(mmproj, drafter), report)
    put("".join(f"{path}\n" for path in written))
