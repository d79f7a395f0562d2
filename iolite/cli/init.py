"""`iolite init`: a model with random weights, of the true shape."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from iolite.cli.terminal import put, working
from iolite.errors import UsageError


@click.command()
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--shape", default="12b", show_default=True, help="12b, small, tiny, or a config.json.")
@click.option(
    "--quantize",
    type=click.Choice(["int4", "int8", "none"]),
    default="int4",
    show_default=True,
    help="Format of the matrices; none: bfloat16.",
)
@click.option("--drafter", is_flag=True, help="Write a drafter too, into DST/drafter, or mtp-DST beside a .gguf.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Write over a model that is there.")
def command(target: Path, shape: str, quantize: str, drafter: bool, seed: int, force: bool) -> None:
    """Write a model with random weights into the folder DST, or into DST ending in .gguf.

    It has the size and the speed of a real model of its shape and says nothing: for planning and benchmarks.
    """
    from iolite.checkpoint import synthetic
    from iolite.checkpoint.convert import Beside, to_folder, to_gguf

    scheme = None if quantize == "none" else quantize
    source = synthetic.SyntheticSource(synthetic.config_of(shape), scheme, seed, f"synthetic-{Path(shape).stem}")
    gguf = target.suffix.lower() == ".gguf"
    if target.exists() and not force and (gguf or not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already", "add --force to write over it")
    place, needed = next(path for path in target.absolute().parents if path.exists()), source.num_bytes()
    if shutil.disk_usage(place).free < needed * 1.05:
        raise UsageError(f"{needed / 1e9:.1f} GB do not fit on the disk of {place}")
    with working("Making", "tensors") as progress:

        def report(done: int, count: int, name: str) -> None:
            progress(done, count)

        if gguf:
            place = target.absolute().parent
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".drafter-", dir=place) as folder:
                if drafter:
                    synthetic.write_drafter(Path(folder), source, report)
                written = to_gguf(source, target, None, Beside(drafter=Path(folder) if drafter else None), report)
        else:
            written = to_folder(source, target, None, report)
            synthetic.write_card(target, source, shape)
            if drafter:
                written.append(target / "drafter")
                synthetic.write_drafter(written[-1], source, report)
    put("".join(f"{path}\n" for path in written))
