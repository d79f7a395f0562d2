"""`iolite list` and `iolite show`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from iolite.checkpoint.folder import WEIGHTS
from iolite.cli import run_command

CONFIG_12B = {
    "model_type": "gemma4_unified",
    "dtype": "bfloat16",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "vocab_size": 262144,
        "final_logit_softcapping": 30.0,
    },
    "vision_config": {},
    "audio_config": {},
}


@pytest.fixture
def folder_12b(tmp_path):
    """The 12B as far as its config.json."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_12B))
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("models--a--whole", "models--b--half"):
        shutil.copytree(tiny_folder("published"), tmp_path / name / "snapshots" / "c0ffee")
    (tmp_path / "models--b--half" / "snapshots" / "c0ffee" / WEIGHTS).unlink()
    return tmp_path


def show_json(capsys, *arguments):
    assert run_command(["show", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list(cache, capsys):
    assert run_command(["list"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["MODEL", "SIZE", "FORMAT", "MODIFIED"]
    rows = {row.split()[0]: row for row in rows}
    assert "float32" in rows["a/whole"]
    assert "incomplete" not in rows["a/whole"]
    assert "incomplete: iolite pull b/half" in rows["b/half"]


def test_list_json(cache, capsys):
    assert run_command(["ls", "--json"]) == 0
    models = {m["id"]: m for m in json.loads(capsys.readouterr().out)["models"]}
    whole = models["a/whole"]
    assert whole["complete"] is True
    assert models["b/half"]["complete"] is False
    assert whole["dtype"] == "float32"
    assert whole["modalities"] == ["text", "image", "video", "audio"]
    assert whole["bytes"] > 100_000
    assert whole["modified"][:2] == "20"


def test_show_the_12b_from_its_config_alone(folder_12b, capsys):
    report = show_json(capsys, str(folder_12b))
    assert report["parameters"] == {
        "total": 11_959_730_176,
        "embedding": 1_006_632_960,
        "decoder": 10_900_717_312,
        "vision": 49_922_304,
        "audio": 2_457_600,
    }
    assert report["modalities"] == ["text", "image", "video", "audio"]
    assert report["context"] == 262_144
    assert (report["text"]["sliding_layers"], report["text"]["full_layers"]) == (40, 8)
    assert report["media"]["image"] == {"patch": 48, "tokens": 280, "budgets": [70, 140, 280, 560, 1120]}
    assert report["media"]["audio"]["seconds_at_once"] == 30
    assert report["weights"] == {"here": False, "dtype": "bfloat16", "bytes": 2 * 11_959_730_224}
    cache = report["kv_cache"]
    assert cache["bytes_per_token"] == 10 * 1024
    assert cache["sliding_bytes"] == 40 * 8 * 1024 * 2048
    gigabytes = {int(n): round(size / 1e9, 2) for n, size in cache["bytes_at"].items()}
    assert gigabytes == {8192: 0.75, 32768: 1.01, 131072: 2.01, 262144: 3.36}
    assert report["files"] == {"config.json": (folder_12b / "config.json").stat().st_size}


def test_show_for_people(folder_12b, capsys):
    assert run_command(["show", str(folder_12b)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "parameters    11,959,730,176: embedding" in out
    assert "weights       23.92 GB in bfloat16, not here" in out
    assert "10,240 bytes a token + 671.1 MB" in out
    assert "\nmemory        28." in out
    assert " GB with 262,144 tokens, weights in bfloat16, cache in bfloat16: " in out


def test_show_with_weights(tiny_folder, capsys):
    folder = tiny_folder("no-vision")
    report = show_json(capsys, str(folder))
    assert report["weights"]["here"] is True
    assert report["weights"]["dtype"] == "F32"
    assert report["weights"]["bytes"] == 4 * (report["parameters"]["total"] + report["text"]["layers"])
    assert report["parameters"]["head"] == report["parameters"]["embedding"]  # untied
    assert report["modalities"] == ["text", "audio"]
    assert "image" not in report["media"]
    assert report["files"][WEIGHTS] == (folder / WEIGHTS).stat().st_size


def test_show_text_only(tiny_folder, capsys):
    report = show_json(capsys, str(tiny_folder("text-only")))
    assert report["modalities"] == ["text"]
    assert report["media"] == {}
    assert run_command(["show", str(tiny_folder("text-only"))]) == 0
    assert "pictures" not in capsys.readouterr().out


def test_show_refuses_broken_weights(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("published"), folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert run_command(["show", str(folder)]) == 2
    assert "error: model.safetensors" in capsys.readouterr().err


def test_show_the_machine(folder_12b, capsys):
    machine = show_json(capsys, "--system")
    assert list(machine) == ["system"]
    assert machine["system"]["cores"] >= machine["system"]["usable_cores"] >= 1
    assert machine["system"]["device"] in machine["system"]["reason"].lower() or machine["system"]["device"] != "cpu"
    both = show_json(capsys, str(folder_12b), "--system")
    assert both["system"]["dtype"] in ("bfloat16", "float32")
    assert both["parameters"]["total"] == 11_959_730_176
    assert run_command(["show", "--system"]) == 0
    assert "computes in" in capsys.readouterr().out


def test_show_imports_no_torch(folder_12b):
    code = (
        "import sys; from iolite.cli import run_command; assert run_command(['show', sys.argv[1]]) == 0; "
        "assert run_command(['list']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, folder_12b], check=True, capture_output=True)


def test_an_id_of_which_only_the_config_is_here(cache, capsys):
    report = show_json(capsys, "b/half", "--context", "100")
    assert report["weights"]["here"] is False
    assert report["plan"]["context"] == 100


def test_an_id_that_is_not_here(cache, capsys):
    assert run_command(["show", "google/gemma-4-12B-it"]) == 2
    assert "hint: fetch it: iolite pull google/gemma-4-12B-it" in capsys.readouterr().err
