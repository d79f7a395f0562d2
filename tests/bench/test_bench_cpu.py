"""`bench/cpu.py`: processes that stop while others work, the order of samples, the log and the table made of it."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest

from iolite.errors import IoliteError, UsageError

MACHINE = {"processor": "A Processor", "cores": 2, "memory_bytes": 8 << 30, "day": "2026-01-02"}


def sample(part, engine, run="1", **values):
    return {"run": run, "part": part, "engine": engine, **values}


def started(run="1", command="python bench/cpu.py m"):
    return sample("run", "", run, command=command, **MACHINE)


def cells(table, label):
    """The cells of the row that begins with the label."""
    [row] = [line for line in table.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


class Fake:
    """An engine in this process: notes what it is told, and answers from a table."""

    def __init__(self, name, answers, told):
        self.name, self.answers, self.told = name, answers, told

    def call(self, do, **arguments):
        self.told.append((self.name, do, *arguments.values()))
        return self.answers[do]

    def step(self, depth, tokens=1, times=1):
        return self.call("step", depth=depth, tokens=tokens)

    def prefill(self, length):
        return self.call("prefill", length=length)


@pytest.fixture
def pair():
    told = []
    ours = {"step": 0.25, "prefill": 2.0, "bandwidth": 10.0, "int8": 400.0, "bytes": 2 * 10**9, "macs": 4 * 10**11}
    return Fake("iolite", ours, told), Fake("llama.cpp", {"step": 0.5, "prefill": 4.0}, told), told


@pytest.fixture
def plan(cpu):
    return cpu.Plan([], {}, cpu.PARTS, (0, 9), (1, 2), (100,), 2)


@pytest.fixture
def log(cpu, tmp_path):
    made = cpu.Log(tmp_path / "new" / "log.jsonl", "1")
    made.add("run", "", command="python bench/cpu.py m", **MACHINE)
    return made


def test_engines_draw_in_turns_with_a_probe_between(cpu, plan, pair, log):
    *both, told = pair
    cpu.measure_decode(plan, both, log)
    probe, ours, theirs = ("iolite", "bandwidth"), ("iolite", "step", 9, 1), ("llama.cpp", "step", 9, 1)
    turn = [ours, ours, probe, theirs, theirs, probe]  # the first step after a probe is not counted
    assert told[-13:] == [probe, *turn, *turn]
    table = cpu.table(cpu.read_log(log.path))
    assert cells(table, "drawing behind 9 tokens, tokens/s") == ["4.00", "2.00", "× 2.00"]
    assert table.count("| … of the bandwidth | 80.0 % |") == 2


def test_passes_stand_between_two_of_one_token(cpu, plan, pair, log):
    *both, told = pair
    cpu.measure_passes(plan, both, log)
    turn = [(name, "step", 0, n) for name in ("iolite", "llama.cpp") for n in (1, 1, 2, 1)]
    assert told[-16:] == 2 * turn
    assert cells(cpu.table(cpu.read_log(log.path)), "pass over 2 tokens / over one") == ["1.00", "1.00", ""]


def test_engines_read_in_turns_with_a_probe_between(cpu, plan, pair, log):
    *both, told = pair
    cpu.measure_prefill(plan, both, log)
    probe = ("iolite", "int8")
    turn = [("iolite", "prefill", 100), probe, ("llama.cpp", "prefill", 100), probe]
    assert told[-9:] == [probe, *turn, *turn]
    table = cpu.table(cpu.read_log(log.path))
    assert cells(table, "reading 100 tokens, tokens/s") == ["50.0", "25.0", "× 2.00"]
    assert cells(table, "… of the 8-bit peak") == ["50.0 %", "25.0 %", ""]
    assert "8-bit rate, GMAC/s: 400\n" in table


def test_ratios_are_made_within_a_turn(cpu):
    """The machine is three times as fast in the second turn; the ratio is the same in both."""
    seconds = {("iolite", 0): 0.2, ("llama.cpp", 0): 0.3, ("iolite", 1): 0.6, ("llama.cpp", 1): 0.9}
    records = [
        sample("decode", engine, depth=0, turn=turn, seconds=value, bandwidth=[10, 10])
        for (engine, turn), value in seconds.items()
    ]
    table = cpu.table([started(), *records])
    assert cells(table, "drawing behind 0 tokens, tokens/s")[2] == "× 1.50"
    assert cells(table, "drawing behind 0 tokens, tokens/s")[0] == "3.33 (1.67–5.00)"


def test_a_turn_that_was_cut_short_counts_for_its_own_engine_only(cpu):
    records = [
        sample("prefill", "iolite", length=8, turn=0, seconds=1.0, int8=[None, None], macs=1),
        sample("prefill", "llama.cpp", length=8, turn=0, seconds=2.0, int8=[None, None], macs=1),
        sample("prefill", "iolite", length=8, turn=1, seconds=4.0, int8=[None, None], macs=1),
    ]
    assert cells(cpu.table([started(), *records]), "reading 8 tokens, tokens/s") == [
        "5.00 (2.00–8.00)",
        "4.00",
        "× 2.00",
    ]
    alone = cells(cpu.table([started(), records[2]]), "reading 8 tokens, tokens/s")
    assert alone == ["2.00"]


def test_each_part_is_of_the_last_run_that_measured_it(cpu):
    first = [started("1", "python bench/cpu.py m --first"), sample("memory", "iolite", "1", peak_rss_bytes=5 * 10**9)]
    old = sample("load", "iolite", "1", turn=0, seconds=9.0, first_token_s=1.0, state="cold")
    new = sample("load", "iolite", "2", turn=0, seconds=1.5, first_token_s=0.3, state="warm")
    table = cpu.table([*first, old, started("2", "python bench/cpu.py m --only load"), new])
    assert cells(table, "peak memory") == ["5.00 GB"]
    assert cells(table, "load, first time") == ["1.5 s, warm; first token 0.3 s later"]
    assert "--first\npython bench/cpu.py m --only load\n" in table
    assert "A Processor, 2 cores, 8 GiB; 2026-01-02" in table
    assert "drawing" not in table


def test_a_log_can_be_shown_again(cpu, log, capsys):
    log.add("memory", "iolite", peak_rss_bytes=7 * 10**9)
    capsys.readouterr()
    assert cpu.main(["--report", str(log.path)]) == 0
    assert "| peak memory | 7.00 GB |" in capsys.readouterr().out
    assert cpu.main(["--report", str(log.path) + "x"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["m", "--only", "sleep"], ["m", "--peer", "llama.cpp"], ["m", "--peer-model", "f"], ["m", "--depth", "x"]],
)
def test_wrong_arguments(cpu, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cpu.parse(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_plan_has_room_for_everything(cpu):
    plan = cpu.plan_of(cpu.parse(["m", "--peer", "llama.cpp", "--peer-model", "f", "--depth", "7", "--prefill", "900"]))
    assert plan.engines == [("iolite", "m"), ("llama.cpp", "f")]
    assert (plan.settings["depth"], plan.settings["room"]) == (7, 901)


def test_answers_and_errors_of_an_engine(engines):
    class Engine:
        def double(self, n):
            return 2 * n

        def fail(self):
            raise UsageError("no", "do not")

    requests = io.StringIO('{"do": "double", "n": 21}\n{"do": "fail"}\n')
    answers = io.StringIO()
    engines.serve(Engine(), requests, answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"value": 42},
        {"error": "no", "hint": "do not"},
    ]


def state_of(pid: int) -> str:
    """Linux's letter for what a process is doing."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads what Linux says of a process")
def test_an_engine_is_stopped_while_it_has_nothing_to_do(cpu):
    """A real one, from its start to its end; whatever it was told wrong is said, and it goes on."""
    settings = {"threads": 1, "quantize": None, "kv": None, "depth": 4}
    with cpu.Engine("iolite", "nano", settings) as engine:
        assert engine.call("load")["seconds"] > 0
        assert wait_for(lambda: state_of(engine.process.pid) == "T")
        assert engine.step(4, tokens=2) > 0
        assert engine.prefill(8) > 0
        assert engine.call("macs", length=2) > engine.call("macs", length=1) > 0
        assert engine.call("about")["threads"] == 1
    assert engine.process.returncode is not None


def test_what_an_engine_cannot_do_is_said(cpu):
    settings = {"threads": 1, "depth": 4, "room": 4}
    with cpu.Engine("iolite", "./nowhere", settings) as engine, pytest.raises(IoliteError, match=r"iolite: .*nowhere"):
        engine.call("load")
    with cpu.Engine("llama.cpp", "./nowhere.gguf", settings) as engine:
        with pytest.raises(IoliteError, match="no GGUF file"):
            engine.call("load")
        with pytest.raises(IoliteError, match="ended in the middle of 'load'"):
            engine.call("load")
