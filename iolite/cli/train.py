"""`iolite train`: make the embedded model, from nothing, on this machine, or a drafter for any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from iolite.cli.options import Number


@click.group(no_args_is_help=False)
def command() -> None:
    """Train the embedded model from nothing, or a drafter for any model."""


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


@command.command(context_settings={"show_default": True})
@click.option("--target", required=True, metavar="MODEL", help="Model to draft for: a name, folder, id or .gguf file.")
@click.option(
    "--data", required=True, metavar="FILE|nano", help="A .jsonl file of dialogues, or the embedded model's recipe."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the run.")
@click.option("--minutes", type=Number(min=0, min_open=True), help="Time to train for; 25 if neither is given.")
@click.option("--max-steps", type=click.IntRange(min=0), help="Stop after so many steps; 0: only measure.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--from", "start", metavar="DRAFTER", help="Train this one on: a folder or .gguf file.")
@click.option("--layers", type=click.IntRange(1, 64), help="Of a new drafter; 4 if not given, the last one full.")
@click.option("--hidden", type=click.IntRange(8, 1 << 16), help="Its width; about a quarter of the target's.")
@click.option("--intermediate", type=click.IntRange(8, 1 << 18), help="Its feed-forward width; 8 times --hidden.")
@click.option("-k", "--drafts", type=click.IntRange(1, 8), default=4, help="Steps of a chain.")
@click.option("--rows", type=click.IntRange(min=1), help="Dialogues of a step; 48 of the recipe's, 8 of a file's.")
@click.option("--chains", type=click.IntRange(min=1), default=256, help="Most chains of a step; memory grows with it.")
@click.option(
    "--labels",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    help="Learn the target's distribution, or its likeliest token.",
)
@click.option(
    "--answers",
    type=click.Choice(["data", "target"]),
    default="data",
    help="Learn a file's answers, or what the target says instead.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, help="Of an answer that the target gives.")
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    help="Dialogues to measure with: 256 of each task, or a tenth of a file, 64 at most.",
)
@click.option(
    "--store", type=click.Path(path_type=Path, file_okay=False), help="Of the recipe; by default OUT/store, and made."
)
@click.option("--learning-rate", type=Number(min=0, min_open=True), help="At its peak; by default for the width.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of weights, dialogues and chains.")
@click.option("--evaluate-every", type=Number(min=0), default=180.0, help="Seconds between evaluations.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="CPU threads to compute with.")
@click.option("--device", metavar="TEXT", help="cpu, cuda, cuda:N or mps; by default the fastest there is.")
@click.option("--dtype", help="Of the target: float32, bfloat16 or float16; by default what suits it.")
@click.option("--quantize", type=click.Choice(["int4", "int8"]), help="Pack the target's float weights.")
def drafter(**settings: Any) -> None:
    """Train a drafter for TARGET, which stays as it is, and write it to OUT/drafter.

    Every line of FILE is {"messages": [...]}, in the shapes that `iolite.load(…).chat` takes; paths of pictures and
    sound begin at the file's folder. The assistant's turns are what is learnt; where the last turn is the user's, the
    target answers. OUT/log.jsonl shows how it goes, OUT/evaluation.json how many tokens a pass of the target brings.
    """
    from iolite.cli.options import load_model
    from iolite.train.drafter.run import Plan, run

    plan = Plan(**{name: settings.pop(name) for name in Plan.__dataclass_fields__})
    plan.check()
    model = load_model(settings.pop("target"), drafter="none", **settings)
    run(plan, model, lambda line: click.echo(line, err=True))
    click.echo(str(plan.out / "drafter"))
