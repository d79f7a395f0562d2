"""`iolite eval MODEL`: the model's accuracy on the held-out samples of the embedded model's tasks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iolite.cli.options import LOADING, add, load_model
from iolite.errors import UsageError

if TYPE_CHECKING:
    from iolite.evals.task import Score


@click.command()
@click.argument("model", default="nano")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--limit", type=click.IntRange(min=1), default=500, show_default=True, help="Questions of each task.")
@click.option("--tasks", metavar="NAMES", help="Some tasks only, with commas between.")
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of held-out glyphs and speech; by default in the cache. Made when missing, with espeak-ng and fonts.",
)
@click.option("--show-wrong", is_flag=True, help="Print some wrong answers to stderr.")
@add(*LOADING)
def command(
    model: str,
    as_json: bool,
    limit: int,
    tasks: str | None,
    store: Path | None,
    show_wrong: bool,
    **loading: Any,
) -> None:
    """Measure MODEL (by default nano) on the tasks of iolite-nano: fonts, voices and layouts it has not seen.

    An answer counts when it is right as a whole. ci95 is the Wilson interval of the share of right answers.
    """
    from iolite.evals import nano
    from iolite.evals.task import ask

    names = tasks.split(",") if tasks else list(nano.NAMES)
    unknown = [name for name in names if name not in nano.NAMES]
    if unknown:
        raise UsageError(f"there is no task {unknown[0]!r}", f"there are {', '.join(nano.NAMES)}")
    loaded = load_model(model, **loading)
    data = nano.open_store(store or nano.default_store(), _making)
    begin, scores = time.monotonic(), {}
    for name in names:
        progress = _Progress(name, limit)
        scores[name] = ask(loaded, nano.questions(data, name, limit), progress=progress)
        progress.end(scores[name], show_wrong)
    report = {
        "model": model,
        "dtype": loaded.choice.dtype_name,
        "quantize": loaded.scheme,
        "seconds": round(time.monotonic() - begin, 1),
        "tasks": {name: score.to_dict() for name, score in scores.items()},
    }
    click.echo(json.dumps(report, indent=2) if as_json else _table(scores))


def _making(done: int, total: int, _: str) -> None:
    click.echo(f"making the held-out glyphs and clips: {done}/{total}", err=True)


class _Progress:
    """A line on stderr every five seconds."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.said = name, total, time.monotonic()

    def __call__(self, asked: int, right: int) -> None:
        if time.monotonic() - self.said > 5:
            self.said = time.monotonic()
            click.echo(f"{self.name}: {right} right of {asked} (of {self.total})", err=True)

    def end(self, score: Score, show_wrong: bool) -> None:
        click.echo(f"{self.name}: {score.right} right of {score.n}", err=True)
        for wanted, given in score.wrong if show_wrong else ():
            click.echo(f"  {wanted!r}: answered {given!r}", err=True)


def _table(scores: dict[str, Score]) -> str:
    from iolite.evals.task import wilson

    lines = [f"{'task':<24} {'right':>6}  {'95 %':<13} {'n':>5}"]
    for name, score in scores.items():
        for label, one in ((name, score), *((f"  {g}", s) for g, s in sorted(score.groups.items()))):
            low, high = wilson(one.right, one.n)
            lines.append(f"{label:<24} {one.accuracy:6.3f}  {low:.3f}–{high:.3f}  {one.n:>5}")
    return "\n".join(lines)
