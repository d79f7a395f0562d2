"""iolite beside llama.cpp on the CPU, in turns, with the same model shape: what RESULTS.md is made with.

    python bench/cpu.py MODEL [--quantize int4] [--peer llama.cpp --peer-model FILE.gguf] [--only decode] [--log FILE]

Each engine is a process of its own (`engines.py`); whichever is not at work is stopped, so that it takes no time from
the other. Every sample is printed and appended to the log as it comes, and the table is made from the log: a run that
was cut short loses nothing, parts can be measured one by one, and `--report LOG` prints the table again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iolite.errors import IoliteError, UsageError
from iolite.evals.machine import hardware, physical_cores
from iolite.evals.speed import Spread, repetitions, share_of, steady_step

PARTS = ("load", "memory", "decode", "passes", "prefill")
Record = dict[str, Any]


class Engine:
    """One engine's process. Stopped but while it answers; ended on leaving the `with` block."""

    def __init__(self, name: str, model: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        script = Path(__file__).with_name("engines.py")
        command = [sys.executable, str(script), name, model, json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it reaches a stopped process too
        self.process.communicate()

    def call(self, do: str, **arguments: Any) -> Any:
        """What the process answers; IoliteError when that is an error, or nothing."""
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; it may have said why
        line = process.stdout.readline()
        if not line:
            raise IoliteError(f"{self.name} ended in the middle of {do!r} (exit code {process.wait()})")
        process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise IoliteError(f"{self.name}: {answer['error']}", answer["hint"])
        return answer["value"]

    def prefill(self, length: int) -> float:
        return float(self.call("prefill", length=length))

    def step(self, depth: int, tokens: int = 1, times: int = 1) -> float:
        return float(self.call("step", depth=depth, tokens=tokens, times=times))


@dataclass(frozen=True)
class Plan:
    """What is measured, of which engines."""

    engines: Sequence[tuple[str, str]]  # (name, model)
    settings: Mapping[str, Any]
    parts: Sequence[str]
    depths: Sequence[int]
    passes: Sequence[int]
    lengths: Sequence[int]
    repeat: int

    def start(self, name: str, model: str) -> Engine:
        return Engine(name, model, self.settings)


class Log:
    """Samples, printed as they come and appended to a file, one JSON object a line."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, engine: str, **sample: Any) -> None:
        record = {"run": self.run, "part": part, "engine": engine, **sample}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = ", ".join(f"{key} {_short(value)}" for key, value in sample.items())
        print(f"{part}, {engine}: {shown}", file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- measuring ---


def measure(plan: Plan, log: Log) -> None:
    """All parts of the plan, into the log."""
    if "load" in plan.parts:
        measure_load(plan, log)
    if "memory" in plan.parts:
        measure_memory(plan, log)
    if not {"decode", "passes", "prefill"} & set(plan.parts):
        return
    with ExitStack() as stack:
        engines = [stack.enter_context(plan.start(name, model)) for name, model in plan.engines]
        for engine in engines:
            engine.call("load")
            log.add("about", engine.name, **engine.call("about"))
        if "decode" in plan.parts:
            measure_decode(plan, engines, log)
        if "passes" in plan.parts:
            measure_passes(plan, engines, log)
        if "prefill" in plan.parts:
            measure_prefill(plan, engines, log)


def measure_load(plan: Plan, log: Log) -> None:
    """Twice in turns, each in a fresh process: the first load may come from the disk, the second does not."""
    for turn in range(2):
        for name, model in plan.engines:
            with plan.start(name, model) as engine:
                log.add("load", name, turn=turn, **engine.call("load"))


def measure_memory(plan: Plan, log: Log) -> None:
    """Each in a fresh process that has done nothing else."""
    for name, model in plan.engines:
        with plan.start(name, model) as engine:
            engine.call("load")
            log.add("memory", name, **engine.call("memory"))


def measure_decode(plan: Plan, engines: Sequence[Engine], log: Log) -> None:
    """Turns of the engines at each depth, a probe of the bandwidth before and after every sample."""
    ours = engines[0]
    sizes = {depth: ours.call("bytes", depth=depth) for depth in plan.depths}
    for depth in plan.depths:
        times = [repetitions(engine, depth) for engine in engines]
        # Depth by depth, since going to another one costs an engine more than a sample does.
        around = [ours.call("bandwidth")]
        for turn in range(plan.repeat):
            for engine, count in zip(engines, times, strict=True):
                seconds = steady_step(engine, depth, count)
                around = [around[-1], ours.call("bandwidth")]
                sample: Record = {"depth": depth, "turn": turn, "seconds": seconds, "bandwidth": around}
                if engine is ours:
                    sample["bytes"] = sizes[depth]
                log.add("decode", engine.name, **sample)


def measure_passes(plan: Plan, engines: Sequence[Engine], log: Log) -> None:
    """A pass over n tokens between two over one, by each engine in turn."""
    depth = plan.depths[0]
    sizes = [n for n in plan.passes if n > 1]
    times = {(e.name, n): repetitions(e, depth, n) for e in engines for n in (1, *sizes)}
    for turn in range(plan.repeat):
        for n in sizes:
            for engine in engines:
                engine.step(depth)  # the first one after the other engine's is slow
                before, several, after = (engine.step(depth, m, times[engine.name, m]) for m in (1, n, 1))
                log.add("passes", engine.name, tokens=n, turn=turn, seconds=several, one=[before, after])


def measure_prefill(plan: Plan, engines: Sequence[Engine], log: Log) -> None:
    """Turns of the engines at each length, a probe of the 8-bit rate before and after every sample."""
    ours = engines[0]
    macs = {length: ours.call("macs", length=length) for length in plan.lengths}
    for engine in engines:
        engine.prefill(min(plan.lengths))  # the first one makes buffers
    around = [ours.call("int8")]
    for turn in range(plan.repeat):
        for length in plan.lengths:
            for engine in engines:
                seconds = engine.prefill(length)
                around = [around[-1], ours.call("int8")]
                log.add(
                    "prefill", engine.name, length=length, turn=turn, seconds=seconds, int8=around, macs=macs[length]
                )


# --- the table ---


def latest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Of each part the samples of the last run that measured it."""
    found: dict[str, list[Record]] = {}
    for record in records:
        part = found.setdefault(record["part"], [])
        if part and part[-1]["run"] != record["run"]:
            part.clear()
        part.append(record)
    return found


def rows(parts: Mapping[str, Sequence[Record]]) -> list[tuple[str, Mapping[str, str], str]]:
    """(what, engine -> its figure, iolite's figure over the other's) of everything that was measured."""
    made = []
    for turn, name in ((0, "load, first time"), (1, "load, second time")):
        records = [r for r in parts.get("load", ()) if r["turn"] == turn]
        made.append((name, {r["engine"]: _load(r) for r in records}, ""))
    made.append(("peak memory", {r["engine"]: _memory(r) for r in parts.get("memory", ())}, ""))
    for depth in _values(parts.get("decode", ()), "depth"):
        records = [r for r in parts["decode"] if r["depth"] == depth]
        speeds = _by_turn(records, lambda r: 1 / r["seconds"])
        made.append((f"drawing behind {depth:,} tokens, tokens/s", _spreads(speeds), _ratio(speeds)))
        shares = _by_turn([r for r in records if "bytes" in r], _bandwidth_share)
        made.append(("… of the bandwidth", _spreads(shares, 100, " %"), ""))
    for n in _values(parts.get("passes", ()), "tokens"):
        records = [r for r in parts["passes"] if r["tokens"] == n]
        ratios = _by_turn(records, lambda r: share_of(r["seconds"], r["one"]))
        made.append((f"pass over {n} tokens / over one", _spreads(ratios), ""))
    for length in _values(parts.get("prefill", ()), "length"):
        records = [r for r in parts["prefill"] if r["length"] == length]
        speeds = _by_turn(records, lambda r: r["length"] / r["seconds"])
        made.append((f"reading {length:,} tokens, tokens/s", _spreads(speeds), _ratio(speeds)))
        shares = _by_turn([r for r in records if None not in r["int8"]], _int8_share)
        made.append(("… of the 8-bit peak", _spreads(shares, 100, " %"), ""))
    return [(what, figures, ratio) for what, figures, ratio in made if figures]


def _load(record: Record) -> str:
    state = f", {record['state']}" if record.get("state") else ""
    return f"{record['seconds']:.1f} s{state}; first token {record['first_token_s']:.1f} s later"


def _memory(record: Record) -> str:
    return f"{record['peak_rss_bytes'] / 1e9:.2f} GB"


def _bandwidth_share(record: Record) -> float:
    return share_of(record["bytes"] / record["seconds"] / 1e9, record["bandwidth"])


def _int8_share(record: Record) -> float:
    return share_of(record["macs"] / record["seconds"] / 1e9, record["int8"])


def _values(records: Sequence[Record], key: str) -> list[int]:
    return sorted({r[key] for r in records})


def _by_turn(records: Iterable[Record], value: Any) -> dict[str, dict[int, float]]:
    """engine -> turn -> value."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        found.setdefault(record["engine"], {})[record["turn"]] = value(record)
    return found


def _spreads(values: Mapping[str, Mapping[int, float]], scale: float = 1, unit: str = "") -> dict[str, str]:
    return {name: str(Spread.of(scale * v for v in turns.values())) + unit for name, turns in values.items()}


def _ratio(values: Mapping[str, Mapping[int, float]]) -> str:
    """Of the samples of the same turn, which were made seconds apart."""
    if len(values) != 2:
        return ""
    (_, ours), (_, theirs) = sorted(values.items(), key=lambda item: item[0] != "iolite")
    both = ours.keys() & theirs.keys()
    return f"× {Spread.of(ours[turn] / theirs[turn] for turn in both)}" if both else ""


def table(records: Sequence[Record]) -> str:
    """Markdown ready for RESULTS.md."""
    parts = latest(records)
    machine = parts["run"][-1]
    about = {r["engine"]: r for r in parts.get("about", ())}
    names = sorted({r["engine"] for part, all_ in parts.items() if part != "run" for r in all_}, key="iolite".__ne__)
    size = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"{machine['processor']}, {size}; {machine['day']}",
        *(f"{name}: {_engine(about[name])}" for name in names if name in about),
        *_limits(parts),
    ]
    text = [f"- {line}" for line in lines] + ["", "```", *(r["command"] for r in _commands(parts, records)), "```", ""]
    head = ["", *names, *(["iolite / llama.cpp"] if len(names) == 2 else [])]
    text += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for what, figures, ratio in rows(parts):
        cells = [what, *(figures.get(name, "") for name in names), *([ratio] if len(names) == 2 else [])]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _engine(about: Record) -> str:
    code = f", {about['code']}" if about.get("code") else ""
    return f"{about['version']}; {about['threads']} threads{code}"


def _limits(parts: Mapping[str, Sequence[Record]]) -> list[str]:
    """The machine's own rates in these runs."""
    bandwidth = [rate for r in parts.get("decode", ()) for rate in r["bandwidth"]]
    int8 = [rate for r in parts.get("prefill", ()) for rate in r["int8"] if rate is not None]
    lines = [f"memory bandwidth, GB/s: {Spread.of(bandwidth)}"] if bandwidth else []
    return lines + ([f"8-bit rate, GMAC/s: {Spread.of(int8)}"] if int8 else [])


def _commands(parts: Mapping[str, Sequence[Record]], records: Sequence[Record]) -> list[Record]:
    """The commands that measured what is in the table, each once."""
    used = {r["run"] for part, all_ in parts.items() if part != "run" for r in all_}
    runs = {r["command"]: r for r in records if r["part"] == "run" and r["run"] in used}
    return list(runs.values())


# --- the command ---


def numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(word) for word in text.split(",")))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as for iolite run: nano, a folder, a GGUF file, an id")
    parser.add_argument("--quantize", help="int4 or int8")
    parser.add_argument("--kv", help="what iolite keeps keys and values in")
    parser.add_argument("--peer", choices=["llama.cpp"], help="measure this engine too, in turns")
    parser.add_argument("--peer-model", help="the GGUF file that it runs")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of both; default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between; default: %(default)s")
    parser.add_argument("--depth", type=numbers, default="0,1024,4096", help="default: %(default)s")
    parser.add_argument("--passes", type=numbers, default="2,3,4,6,8", help="default: %(default)s")
    parser.add_argument("--prefill", type=numbers, default="64,280,512", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=7, help="turns; default: %(default)s")
    parser.add_argument("--log", type=Path, default=Path("runs/bench-cpu.jsonl"), help="default: %(default)s")
    parser.add_argument("--report", type=Path, metavar="LOG", help="measure nothing, print the table of a log")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.only.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if options.report is None and options.model is None:
        parser.error("which MODEL?")
    if (options.peer is None) != (options.peer_model is None):
        parser.error("--peer and --peer-model go together")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    engines = [("iolite", options.model)] + ([(options.peer, options.peer_model)] if options.peer else [])
    settings = {
        "threads": options.threads,
        "quantize": options.quantize,
        "kv": options.kv,
        "depth": max(options.depth),
        "room": max(*options.passes, *options.prefill, 280) + 1,
    }
    parts = options.only.split(",")
    return Plan(engines, settings, parts, options.depth, options.passes, options.prefill, options.repeat)


def read_log(path: Path) -> list[Record]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    path = options.report or options.log
    try:
        if options.report is None:
            log = Log(path, f"{time.time():.0f}-{os.getpid()}")
            words = ["python", "bench/cpu.py", *(sys.argv[1:] if arguments is None else arguments)]
            log.add("run", "", command=shlex.join(words), day=time.strftime("%Y-%m-%d"), **hardware())
            measure(plan_of(options), log)
        print(table(read_log(path)), end="")
    except IoliteError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {path}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
