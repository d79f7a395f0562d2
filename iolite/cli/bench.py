"""`iolite bench MODEL`: how fast the model is here, beside what this machine can do at best."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from iolite.cli.list import human_bytes
from iolite.cli.options import LOADING, add, load_model
from iolite.cli.terminal import put, say
from iolite.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from iolite.generate.model import Model

PARTS = ("load", "memory", "decode", "passes", "prefill", "drafting")


class Numbers(click.ParamType):
    """Whole numbers with commas between, each in a range; given twice, one counts once."""

    name = "numbers"

    def __init__(self, low: int) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(int(word) for word in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers with commas between", param, ctx)
        if min(found) < self.low:
            self.fail(f"{min(found)} is smaller than {self.low}", param, ctx)
        return found


@click.command()
@click.argument("model", default="nano")
@click.option("--prefill", type=Numbers(1), default="64,280,512", show_default=True, help="Lengths of prompts to read.")
@click.option(
    "--depth", "depths", type=Numbers(0), default="0,1024,4096", show_default=True, help="Cached tokens to draw behind."
)
@click.option(
    "--passes", type=Numbers(1), default="1,2,3,4,6,8", show_default=True, help="Tokens that one pass takes at once."
)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Turns; medians are shown.")
@click.option("--only", metavar="PARTS", help=f"Some parts only, with commas between, of {', '.join(PARTS)}.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@add(*LOADING)
def command(
    model: str,
    quantize: str | None,
    kv: str,
    prefill: tuple[int, ...],
    depths: tuple[int, ...],
    passes: tuple[int, ...],
    repeat: int,
    only: str | None,
    as_json: bool,
    threads: int | None,
    drafter: str,
    **loading: Any,
) -> None:
    """Measure how fast MODEL (by default nano) is: loading, memory, reading prompts, drawing tokens, drafting.

    Drawing is bound by memory bandwidth and reading by 8-bit arithmetic. Both are measured between the samples, each
    sample is compared with what was measured right before and after it, and medians are shown with the whole range.
    Deep caches are filled with random keys and values. A model smaller than the processor's cache can pass the limit.
    """
    from iolite.evals import machine, speed

    parts = _parts(only)
    found: dict[str, Any] = {}

    def load(drafter: str = "none") -> Model:
        return load_model(model, threads, drafter, quantize=quantize, kv=kv, **loading)

    loaded, found["load"] = speed.measure_load(load)
    depths = _fitting(loaded.context, "decode", "depths", depths, 1)
    passes = _fitting(loaded.context, "passes", "passes", passes, depths[0])
    prefill = _fitting(loaded.context, "prefill", "prefill", prefill, 0)
    if "load" in parts:
        say(_load_line(found["load"]))
        del loaded
        gc.collect()
        loaded, found["load"]["again"] = speed.measure_load(load)
        say(f"again: {_load_line(found['load']['again'])}")
    if "memory" in parts:
        found["memory"] = speed.measure_memory(loaded)
        say(f"memory: {human_bytes(found['memory']['peak_rss_bytes'])} at its peak")
    _measure(loaded, found, parts, depths, passes, prefill, repeat)
    if "drafting" in parts and drafter != "none":
        del loaded
        gc.collect()
        loaded = load(drafter)
        found["drafting"] = speed.drafting(loaded)
        say(f"drafting: {loaded.drafting}")
    report = {
        "model": model,
        "quantize": quantize,
        "kv": kv,
        "device": str(loaded.choice.device),
        "dtype": loaded.choice.dtype_name,
        **machine.kernels(),
        **speed.summary(found),
        **found,
        "repeat": repeat,
        "machine": machine.hardware(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    if as_json:
        put(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        _print(report)


def _parts(only: str | None) -> tuple[str, ...]:
    names = tuple(only.split(",")) if only is not None else PARTS
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UsageError(f"there is no part {unknown[0]!r}", f"there are {', '.join(PARTS)}")
    return names


def _fitting(context: int, part: str, name: str, wanted: Sequence[int], more: int) -> tuple[int, ...]:
    """Those of the numbers that leave room for `more` tokens in the context. The defaults may be too large for a small
    model, which is said; a number that was asked for and does not fit is a UsageError."""
    fitting = tuple(n for n in wanted if n + more <= context)
    if fitting != tuple(wanted):
        source = click.get_current_context().get_parameter_source(name)
        too_large = max(wanted) + more
        if source is not click.core.ParameterSource.DEFAULT or not fitting:
            raise UsageError(
                f"{part} would need {too_large} tokens and the context is {context}", "give smaller numbers"
            )
        say(f"note: {part} at {max(wanted):,} is left out: this model takes {context:,} tokens")
    return fitting


def _measure(
    model: Model,
    found: dict[str, Any],
    parts: Sequence[str],
    depths: Sequence[int],
    passes: Sequence[int],
    prefill: Sequence[int],
    repeat: int,
) -> None:
    """The parts that are compared with the machine, into `found`."""
    from iolite.evals.machine import Probe
    from iolite.evals.speed import Spread, Subject, measure_decode, measure_passes, measure_prefill

    probe = Probe(model.choice.device)
    subject = Subject(model, max(depths) if "decode" in parts else depths[0])
    if "decode" in parts:
        found["decode_by_depth"], rates = measure_decode(subject, probe, depths, repeat, say)
        found["bandwidth"] = Spread.of(rates).to_dict() | {"by": probe.how}
        found["bytes_per_token"] = next(iter(found["decode_by_depth"].values()))["bytes_per_token"]
    if "passes" in parts:
        ratios = measure_passes(subject, passes, depths[0], repeat, say)
        found["passes"] = {n: spread.to_dict() for n, spread in ratios.items()}
    if "prefill" in parts:
        found["prefill"], peaks = measure_prefill(subject, probe, prefill, repeat, say)
        found["int8"] = Spread.of(peaks).to_dict() if peaks else {"median": None, "reason": probe.reason}


def _load_line(load: Mapping[str, Any]) -> str:
    line = f"loaded in {load['seconds']:.2f} s, first token after {load['first_token_s']:.2f} s more"
    if load["state"]:
        line += f" ({load['state']}: {human_bytes(load['disk_read_bytes'])} came from the disk)"
    return line


def _print(report: Mapping[str, Any]) -> None:
    """The report as tables for people, on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    code = report["isa"] or f"plain torch ({report['reason']})"
    machine, release = report["machine"], " ".join(filter(None, (report["versions"]["iolite"], report["commit"])))
    console.print(f"{report['model']}: {report['dtype']} on {report['device']}, {report['threads']} threads, {code}")
    console.print(f"{machine['processor']}, {machine['cores']} cores; iolite {release}")
    for table in _tables(report):
        console.print(table)


def _tables(report: Mapping[str, Any]) -> list[Table]:
    made = [_table("", ("", "", ""), _general_rows(report))]
    rows: list[tuple[str, ...]]
    if "decode_by_depth" in report:
        rows = [
            (f"{int(depth):,}", _shown(r["tok_s"]), _shown(r["gb_s"]), _percent(r["fraction_of_bandwidth"]))
            for depth, r in report["decode_by_depth"].items()
        ]
        made.append(_table("drawing", ("cached tokens", "tokens/s", "GB/s", "of bandwidth"), rows))
    if "passes" in report:
        rows = [(n, _shown(spread)) for n, spread in report["passes"].items()]
        made.append(_table("one pass", ("tokens", "times one token"), rows))
    if "prefill" in report:
        rows = [
            (f"{int(n):,}", _shown(r["tok_s"]), _percent(r["fraction_of_int8"])) for n, r in report["prefill"].items()
        ]
        made.append(_table("reading", ("tokens", "tokens/s", "of 8-bit peak"), rows))
    if gains := report.get("drafting", {}).get("gain_by_acceptance"):
        rows = [(f"{100 * float(a):.0f} %", str(g["drafts"]), f"{g['times_plain']:.2f}") for a, g in gains.items()]
        made.append(_table("drafting", ("accepted", "best drafts a pass", "times plain"), rows))
    return made


def _general_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    load = report["load"]
    rows: list[tuple[str, ...]] = [("load", f"{load['seconds']:.2f} s", load["state"] or "")]
    if "again" in load:
        rows.append(("load again", f"{load['again']['seconds']:.2f} s", load["again"]["state"] or ""))
    if "memory" in report:
        file = report["memory"]["file_bytes"]
        share = "" if file is None else f"{human_bytes(file)} of it now mapped files"
        rows.append(("peak memory", human_bytes(report["memory"]["peak_rss_bytes"]), share))
    if "bandwidth" in report:
        b = report["bandwidth"]
        rows.append(("bandwidth", f"{b['median']:.1f} GB/s", f"{b['low']:.1f}–{b['high']:.1f}, read by {b['by']}"))
    if "int8" in report:
        i = report["int8"]
        known = i["median"] is not None
        rate, note = (f"{i['median']:.0f} GMAC/s", f"{i['low']:.0f}–{i['high']:.0f}") if known else ("?", i["reason"])
        rows.append(("8-bit rate", rate, note))
    if drafting := report.get("drafting"):
        step = drafting["draft_s"]
        if step:
            rows.append(("a draft", f"{1e3 * step:.2f} ms", f"{step / drafting['pass_s'][0]:.3f} of a pass"))
    return rows


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and title else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _shown(spread: Mapping[str, Any]) -> str:
    from iolite.evals.speed import Spread

    return str(Spread(**spread))


def _percent(spread: Mapping[str, Any] | None) -> str:
    from iolite.evals.speed import Spread

    return f"{Spread(**spread).times(100)} %" if spread else "?"
