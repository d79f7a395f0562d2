"""`iolite show` with settings to plan for: what takes how much memory, whether it fits, and what would."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import iolite
from iolite import memory
from iolite.cli import run_command

CONFIG = Path(__file__).parent.parent / "data" / "gemma-4-12B-config.json"
KEYS = {"weights_bytes", "cache_bytes", "cache_bytes_per_token", "total_bytes", "fits", "max_context"}


@pytest.fixture(scope="module")
def folder_12b(tmp_path_factory):
    """The 12B as far as its config.json."""
    folder = tmp_path_factory.mktemp("12b")
    shutil.copyfile(CONFIG, folder / "config.json")
    return str(folder)


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)


def show_json(capsys, *arguments):
    assert run_command(["show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_12b_in_16_gb(folder_12b, capsys):
    settings = ("--context", 262_144, "--parallel", 1, "--memory", "16GB", "--quantize", "int4")
    report = show_json(capsys, folder_12b, *settings)
    assert report.keys() >= KEYS | {"model", "parameters", "text", "media", "weights", "kv_cache", "files"}
    assert (report["fits"], report["max_context"], report["cache_bytes_per_token"]) == (True, 262_144, 10_240)
    assert report["cache_bytes"] == 262_144 * 10_240 + 2048 * 40 * 8192
    assert report["total_bytes"] < 11e9
    assert {key: report["plan"][key] for key in KEYS} == {key: report[key] for key in KEYS}
    assert report["plan"]["memory_bytes"] == 16_000_000_000


def test_without_settings_the_plan_is_of_the_whole_context(folder_12b, capsys, monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "32GB")
    report = show_json(capsys, folder_12b)
    assert report["plan"]["context"] == report["max_context"] == 262_144
    assert report["plan"]["memory_bytes"] == 32_000_000_000
    assert report["cache_bytes_per_token"] == report["kv_cache"]["bytes_per_token"]
    assert report["cache_bytes"] == report["kv_cache"]["bytes_at"]["262144"]


def test_the_cache_in_8_bits(folder_12b, capsys):
    report = show_json(capsys, folder_12b, "--kv", "int8", "--context", 4096)
    assert report["cache_bytes_per_token"] == report["kv_cache"]["bytes_per_token"] == 5152
    assert report["kv_cache"]["dtype"] == "int8"


def test_each_sequence_has_its_own_cache(folder_12b, capsys):
    one, three = (show_json(capsys, folder_12b, "-c", 9000, "--parallel", n) for n in (1, 3))
    assert three["cache_bytes"] == 3 * one["cache_bytes"]
    assert three["weights_bytes"] == one["weights_bytes"]


def test_a_drafter_and_the_format_that_is_computed_in(folder_12b, capsys):
    parts = show_json(capsys, folder_12b, "--drafter", "--dtype", "float32")["plan"]["parts"]
    found = {part["name"]: (part["bytes"], part["dtype"]) for part in parts}
    assert found["drafter"] == (845_713_928, "bfloat16")
    assert found["decoder"] == (4 * (10_900_717_312 + 48), "float32")


def test_a_table_for_people(folder_12b, capsys):
    assert run_command(["show", folder_12b, "--context", "4096", "--memory", "16GB", "--quantize", "int4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, *rows = out.splitlines()
    assert first.split() == [f"{folder_12b},", "4,096", "tokens", "BYTES", "FORMAT"]
    assert rows[1].split() == ["decoder", "6,134,299,840", "6.13", "GB", "int4"]
    assert rows[-1].startswith("fits in 16.00 GB: takes 8.")
    assert "10,240 bytes" in rows[-2]
    assert "parameters" not in out


def test_what_does_not_fit_says_what_does(folder_12b, capsys):
    assert run_command(["show", folder_12b, "--context", "32768", "--parallel", "2", "--memory", "14GB"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit in 14.00 GB: takes 26.")
    assert "what fits: int4 weights (" in last
    report = show_json(capsys, folder_12b, "--context", 32_768, "--parallel", 2, "--memory", "14GB")
    assert report["fits"] is False
    assert [advice["quantize"] for advice in report["plan"]["advice"]] == ["int4"]
    assert report["plan"]["advice"][0]["total_bytes"] <= 14_000_000_000


def test_the_short_section_says_whether_it_fits(folder_12b, capsys, monkeypatch):
    for there, words in (("64GB", "fits in 64.00 GB"), ("16GB", "not in 16.00 GB")):
        monkeypatch.setenv(memory.VARIABLE, there)
        assert run_command(["show", folder_12b]) == 0
        assert words in capsys.readouterr().out.splitlines()[-1]


def test_a_packed_folder_is_planned_as_it_is(random_model, tmp_path, capsys):
    assert run_command(["quantize", str(random_model), str(tmp_path / "packed"), "--to", "int8"]) == 0
    capsys.readouterr()
    report = show_json(capsys, tmp_path / "packed", "--context", 100)
    assert report["plan"]["scheme"] == "int8"
    assert report["weights"]["here"] is True
    network = iolite.load(tmp_path / "packed", device="cpu").network
    assert report["weights_bytes"] == sum(tensor.nbytes for tensor in network.state_dict().values())
    assert run_command(["show", str(tmp_path / "packed"), "--quantize", "int4"]) == 2
    assert "packed as int8 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--context", "0"), "context of 0"),
        (("--context", "262145"), "262145"),
        (("--context", "many"), "many"),
        (("--parallel", "0"), "0 sequences"),
        (("--memory", "banana"), "'banana' is no amount of memory"),
        (("--memory", "0GB"), "0GB"),
        (("--kv", "fp4"), "fp4"),
        (("--quantize", "int3"), "int3"),
        (("--dtype", "int4"), "int4"),
    ],
)
def test_wrong_input(folder_12b, capsys, arguments, named):
    assert run_command(["show", folder_12b, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert named in err
    assert "Traceback" not in err


def test_planning_loads_no_torch(folder_12b):
    code = (
        "import sys; from iolite.cli import run_command\n"
        "assert run_command(['show', sys.argv[1], '--context', '9000', '--memory', '9GB']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, folder_12b], check=True, capture_output=True)
