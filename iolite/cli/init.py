"""`iolite init`: a model with random weights, of the true shape."""

from __future__ import annotations

import shutil
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
@click.option("--drafter", is_flag=True, help="Write a drafter too, into DST/drafter (or mtp-DST for GGUF).")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Write over a model that is there.")
def command(target: Path, shape: str, quantize: str, drafter: bool, seed: int, force: bool) -> None:
    """Write a model with random weights into the folder DST, or into DST ending in .gguf.

    It has the size and the speed of a real model of its shape and says nothing: for planning and benchmarks.
    """
    from iolite.checkpoint import names, synthetic
    from iolite.checkpoint.convert import Beside, to_folder, to_gguf
    from iolite.quant.formats import packed_bytes

    scheme = None if quantize == "none" else quantize
    source = synthetic.SyntheticSource(synthetic.config_of(shape), scheme, seed, f"synthetic-{Path(shape).stem}")
    gguf = target.suffix.lower() == ".gguf"
    if target.exists() and not force and (gguf or not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already", "add --force to write over it")
    formats, needed = source.packed_formats(), 0
    for name, shape_of in names.expected_shapes(source.config).items():
        count = 1
        for size in shape_of:
            count *= size
        needed += packed_bytes(shape_of[0], shape_of[1], formats[name]) if name in formats else 2 * count
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    if shutil.disk_usage(place).free < needed * 1.05:
        raise UsageError(f"{needed / 1e9:.1f} GB do not fit on the disk of {place}")
    with working("Making", "tensors") as progress:

        def report(done: int, count: int, name: str) -> None:
            progress(done, count)

        if gguf:
            target.parent.mkdir(parents=True, exist_ok=True)
            written = to_gguf(source, target, None, Beside(embedders=True), report)
        else:
            written = to_folder(source, target, None, report)
            synthetic.write_card(target, source, shape)
        if drafter:
            written.append(target.with_name(f"drafter-{target.stem}") if gguf else target / "drafter")
            synthetic.write_drafter(written[-1], source, report)
    put("".join(f"{path}\n" for path in written))
