"""`iolite bench`: every figure is there, for people and for programs; bad input ends before anything is measured."""

from __future__ import annotations

import json

import pytest
import torch

from iolite.cli import run_command
from iolite.evals import machine
from iolite.kernels import cpu

SMALL = ("--repeat", "1", "--depth", "0,30", "--passes", "1,2,4", "--prefill", "8,20")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short probes of little memory, samples of one step."""
    from iolite.evals import speed

    monkeypatch.setattr(machine, "_POOL_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "_LEAST_SECONDS", 0.001)


def report(capsys, *arguments):
    assert run_command(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_object_with_all_figures(random_model, capsys):
    found = report(capsys, str(random_model), *SMALL)
    assert found["load_s"] > 0
    assert found["peak_rss_bytes"] > 50_000_000
    assert found["bandwidth_gb_s"] > 0
    assert (found["int8_gmac_s"] is None) == (found["isa"] is None)
    assert found["decode_tok_s"] == found["decode_by_depth"]["0"]["tok_s"]["median"] > 0
    assert found["decode_fraction_of_bandwidth"] > 0
    assert set(found["decode_by_depth"]) == {"0", "30"}
    assert found["decode_by_depth"]["30"]["bytes_per_token"] > found["bytes_per_token"]
    assert set(found["pass_ratio"]) == {"1", "2", "4"}
    assert found["pass_ratio"]["1"] == 1
    assert set(found["prefill_tok_s"]) == {"8", "20"}
    assert found["threads"] >= 1
    assert found["versions"]["iolite"]
    assert "commit" in found
    assert found["machine"]["processor"]
    assert found["load"]["again"]["seconds"] > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(random_model, capsys, threads):
    """As the pool has them whose kernels are in use, or torch."""
    before = machine.kernels()
    try:
        found = report(capsys, str(random_model), *SMALL, "--only", "passes", "-t", str(threads))
        assert found["threads"] == threads
    finally:
        torch.set_num_threads(before["threads"])
        if before["isa"]:
            cpu.set_threads(before["threads"])


def test_one_part(random_model, capsys):
    found = report(capsys, str(random_model), *SMALL, "--only", "passes")
    assert "pass_ratio" in found
    assert not {"decode_tok_s", "prefill_tok_s", "peak_rss_bytes", "bandwidth_gb_s"} & set(found)


def test_tables_for_people_and_talk_on_stderr(random_model, capsys):
    assert run_command(["bench", str(random_model), *SMALL]) == 0
    out, err = capsys.readouterr()
    for word in ("load again", "peak memory", "bandwidth", "8-bit rate", "cached tokens", "times one token"):
        assert word in out
    assert "decode at 30:" in err
    assert "decode at" not in out
    assert str(random_model) in out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "1,x"], "'1,x' is not a list of whole numbers"),
        (["--depth", "-1"], "-1 is smaller than 0"),
        (["--passes", "0,1"], "0 is smaller than 1"),
        (["--prefill", ""], "'' is not a list of whole numbers"),
        (["--repeat", "0"], "--repeat"),
        (["--only", "decode,sleep"], "there is no part 'sleep'"),
        (["--quantize", "int3"], "int3"),
        (["--kv", "int3"], "int3"),
        (["--depth", "100000000"], "decode would need 100000001 tokens"),
        (["--passes", "1,100000000"], "passes would need 100000000 tokens"),
        (["--prefill", "100000000"], "prefill would need 100000000 tokens"),
    ],
)
def test_wrong_input(random_model, capsys, arguments, message):
    assert run_command(["bench", str(random_model), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert message in err


def test_a_model_that_is_not_there(capsys):
    assert run_command(["bench", "./nowhere"]) == 2
    assert "error: there is no model './nowhere'" in capsys.readouterr().err


def test_defaults_too_large_for_a_small_model_are_left_out(random_model, capsys):
    arguments = ("--ctx-size", "2000", "--repeat", "1", "--only", "decode", "--json")
    assert run_command(["bench", str(random_model), *arguments]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)["decode_by_depth"]) == {"0", "1024"}
    assert "note: decode at 4,096 is left out: this model takes 2,000 tokens" in err
