"""`iolite train nano`: make the embedded model, from nothing, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from iolite.cli.options import Number


@click.group(no_args_is_help=False)
def command() -> None:
    """Train the embedded model from nothing, on data that the recipe makes itself."""


@command.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the run.")
@click.option(
    "--minutes",
    type=Number(min=0, min_open=True),
    default=110.0,
    show_default=True,
    help="Time to train for; the learning rate comes down to its end.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of glyphs and speech; by default OUT/store.",
)
@click.option("--device", metavar="TEXT", help="cpu, cuda, cuda:N or mps; by default the fastest there is.")
@click.option(
    "--processes", type=click.IntRange(1, 64), help="Each on one thread; 2 if not given, and only 1 on a GPU."
)
@click.option("--rows", type=click.IntRange(min=1), default=48, show_default=True, help="Samples of a step.")
@click.option(
    "--fresh", type=Number(0, 1), default=1.0, show_default=True, help="Share of new samples; others are seen again."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the weights and samples.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="torch.compile the layers (needs a C++ compiler)."
)
@click.option(
    "--evaluate-every", type=Number(min=0), default=180.0, show_default=True, help="Seconds between evaluations."
)
@click.option("--ahead", type=click.IntRange(min=0), default=6, help="Batches made ahead in other processes; 0: none.")
@click.option("--held-out", type=click.IntRange(min=1), default=256, help="Samples of each task at an evaluation.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many steps.")
def nano(
    out: Path,
    minutes: float,
    resume: bool,
    store: Path | None,
    device: str | None,
    processes: int | None,
    rows: int,
    fresh: float,
    seed: int,
    compiled: bool,
    evaluate_every: float,
    ahead: int,
    held_out: int,
    max_steps: int | None,
) -> None:
    """Train iolite-nano and write it to OUT/model.

    OUT/log.jsonl and OUT/curves.png show how it goes. OUT/mixture.json, if there, re-weights the tasks while it runs.
    """
    from iolite.device import choose
    from iolite.errors import UsageError
    from iolite.train.nano.recipe import Run, export, train
    from iolite.train.trainer import Settings

    where = choose(device, "float32").device
    processes = processes or (2 if where.type == "cpu" else 1)
    if processes > 1 and where.type != "cpu":
        raise UsageError(f"{processes} processes cannot share {where}", "leave --processes out, or train on the CPU")
    settings = Settings(minutes=minutes, compile=compiled, evaluate_every=evaluate_every, max_steps=max_steps)
    folder = store or out / "store"
    run = Run(out, folder, settings, rows, processes, resume, seed, fresh, ahead, held_out, str(where))
    train(run, lambda line: click.echo(line, err=True))
    export(out, out / "model")
    click.echo(str(out / "model"))


@command.command("export")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--weights", type=click.Choice(["best", "last", "averaged"]), default="best", show_default=True)
def write_checkpoint(run: Path, out: Path, weights: str) -> None:
    """Write the present state of the iolite-nano RUN, finished or not, as a model folder OUT.

    Weights are the last, or their average over the last minutes; "best" is what the run's last evaluation says.
    """
    from iolite.train.nano.recipe import export

    averaged = export(run, out, None if weights == "best" else weights == "averaged")
    click.echo(f"wrote the {'averaged' if averaged else 'last'} weights", err=True)
    click.echo(str(out))
