"""Drafters on the command line: `show`, `quantize` and `pull` know them, and `--drafter` names one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from support.gguf_model import save_tiny, save_tiny_drafter

import iolite
from iolite.checkpoint import download
from iolite.checkpoint.drafter import find_drafter, load_drafter
from iolite.cli import options, run_command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with its drafter in drafter/, and the drafter as mtp.gguf beside it."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "model", "published")
    save_tiny_drafter(folder / "drafter")
    assert run_command(["convert", str(folder / "drafter"), str(folder.parent / "mtp.gguf"), "--to", "q4_0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def show_json(capsys, *arguments):
    assert run_command(["show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, message, hint, *arguments):
    capsys.readouterr()
    assert run_command([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[0]
    assert hint in err.splitlines()[1]


# show


def test_show_a_drafter(model, capsys):
    source = find_drafter(model / "drafter")
    report = show_json(capsys, model / "drafter")
    assert report["architecture"] == "gemma4_unified_assistant"
    assert report["drafts_for"] == {
        "hidden_size": 256,
        "vocabulary": source.text.vocab_size,
        "sliding_window": 16,
        "keys": {
            "sliding_attention": {"kv_heads": source.text.num_key_value_heads, "head_dim": 32},
            "full_attention": {"kv_heads": source.text.num_global_key_value_heads, "head_dim": 64},
        },
    }
    assert {key: report["text"][key] for key in ("layers", "sliding_layers", "full_layers", "hidden_size")} == {
        "layers": 4,
        "sliding_layers": 3,
        "full_layers": 1,
        "hidden_size": 128,
    }
    weights = report["weights"]
    assert (weights["dtype"], weights["scheme"], weights["tensors"]) == ("BF16", None, 48)
    assert weights["bytes"] == 2 * (report["parameters"]["total"] + 4)  # four scalars are stored and not trained
    assert report["files"]["model.safetensors"] == (model / "drafter" / "model.safetensors").stat().st_size
    assert report["path"] == str(model / "drafter")


def test_show_a_drafter_for_people(model, capsys):
    assert run_command(["show", str(model.parent / "mtp.gguf")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "drafts for    models of width 256 with a vocabulary of " in out
    assert "of 32 on sliding layers" in out and "a window of 16" in out
    assert "in F32+Q4_0, 48 tensors" in out
    assert show_json(capsys, model.parent / "mtp.gguf")["weights"]["scheme"] == "int4"


def test_show_refuses_damaged_drafters_and_plans_of_drafters(model, tmp_path, capsys):
    folder = shutil.copytree(model / "drafter", tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    refused(capsys, "model.safetensors", "damaged or half downloaded", "show", folder)
    refused(capsys, "is a drafter", "iolite show MODEL --drafter", "show", model / "drafter", "--context", 100)


def test_show_a_model_names_its_drafter(model, tmp_path, capsys):
    report = show_json(capsys, model)
    assert report["drafter"] == {
        "path": str(model / "drafter" / "model.safetensors"),
        "where": f"drafter/ in {model}",
        "passed_over": [],
    }
    assert run_command(["show", str(model)]) == 0
    assert f"\ndrafter       drafter/ in {model}\n" in capsys.readouterr().out
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("drafter"))
    assert show_json(capsys, bare)["drafter"] is None
    assert run_command(["show", str(bare)]) == 0
    assert "\ndrafter " not in capsys.readouterr().out


def test_show_a_model_says_which_drafter_does_not_fit(model, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "drafter" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["sliding_window"] = 99
    (other / "drafter" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = show_json(capsys, other)["drafter"]
    assert found["where"] is None
    assert "in a window of 99, but the model has 16" in found["passed_over"][0]
    assert run_command(["show", str(other)]) == 0
    assert "none that fits; passed over drafter/ in " in capsys.readouterr().out


def test_a_plan_with_the_drafter(model, capsys):
    parts = show_json(capsys, model, "--context", 100, "--drafter")["plan"]["parts"]
    assert [part["kind"] for part in parts].count("drafter") == 1


# quantize


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_quantize_a_drafter(model, tmp_path, capsys, scheme):
    assert run_command(["quantize", str(model / "drafter"), str(tmp_path / "d"), "--to", scheme]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'd'}\n"
    assert " became " in err
    packed, wanted = find_drafter(tmp_path / "d"), load_drafter(model / "drafter", scheme, dtype=torch.float32)
    assert packed.scheme == scheme
    assert packed.tokenizer.to_json() == find_drafter(model / "drafter").tokenizer.to_json()
    for name, tensor in load_drafter(tmp_path / "d", dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
    assert show_json(capsys, tmp_path / "d")["weights"]["dtype"] == f"BF16+{scheme}"


def test_quantize_a_drafter_out_of_gguf(model, tmp_path, capsys):
    assert run_command(["quantize", str(model.parent / "mtp.gguf"), str(tmp_path / "d")]) == 0
    wanted = load_drafter(model.parent / "mtp.gguf", dtype=torch.float32).state_dict()
    for name, tensor in load_drafter(tmp_path / "d", dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_drafters_that_are_not_packed(model, tmp_path, capsys):
    assert run_command(["quantize", str(model / "drafter"), str(tmp_path / "d")]) == 0
    refused(capsys, "is packed as int4 already", "copy the folder", "quantize", tmp_path / "d", tmp_path / "e")
    gguf = model.parent / "mtp.gguf"
    refused(capsys, "is packed as int4 already", "float version", "quantize", gguf, tmp_path / "e", "--to", "int8")
    refused(capsys, "is not empty", "--force", "quantize", model / "drafter", tmp_path / "d")
    own = model / "drafter"
    refused(capsys, "is where the drafter is read from", "another folder", "quantize", own, own, "--force")
    assert not (tmp_path / "e").exists()


# pull


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("google/gemma-4-12B-it", "google/gemma-4-12B-it-assistant"),
        ("google/gemma-4-12B-it-qat-w4a16-ct", "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"),
        ("google/gemma-4-12B-it-assistant", None),
        ("me/mine", None),
    ],
)
def test_pull_names_the_drafter(name, drafter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "pull", lambda *args, **kwargs: tmp_path)
    assert run_command(["pull", name]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}\n"
    assert ("iolite pull" in err) == (drafter is not None)
    if drafter:
        assert err.endswith(f"iolite pull {drafter}\n")
        (tmp_path / "hub" / f"models--{drafter.replace('/', '--')}" / "snapshots" / "c0ffee").mkdir(parents=True)
        assert run_command(["pull", name]) == 0
        assert "iolite pull" not in capsys.readouterr().err


# --drafter of the commands that load a model


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], None if options.DRAFTER == "none" else options.DRAFTER),
        (["--drafter", "none"], None),
        (["--drafter", "auto"], "auto"),
        (["--drafter", "some/folder"], "some/folder"),
    ],
)
def test_what_is_asked_for(model, flags, wanted, monkeypatch, piped, capsys):
    from iolite.generate import model as module

    found, ready = [], iolite.load(model)

    def load(name, progress, drafter, **settings):
        found.append(drafter)
        return ready

    monkeypatch.setattr(module, "load", load)
    assert run_command(["run", str(model), "what", "-n", "1", *flags]) == 0
    assert found == [wanted]


@pytest.mark.parametrize("command", ["run", "show", "quantize", "bench"])
def test_a_drafter_in_a_models_place(model, command, tmp_path, piped, capsys):
    """Commands that take models only say what to do with it; the others know it."""
    arguments = {"run": ["hello"], "quantize": [tmp_path / "d"]}.get(command, [])
    code = run_command([command, str(model / "drafter"), *map(str, arguments)])
    if command in ("show", "quantize"):
        assert code == 0
    else:
        assert code == 2
        assert "hint: that is a drafter: name the model that it drafts for" in capsys.readouterr().err
