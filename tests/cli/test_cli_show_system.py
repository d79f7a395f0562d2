"""`iolite show --system`: the machine, its kernels and caches."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import constants

from iolite.cli import run_command
from iolite.evals import machine


def system(capsys):
    assert run_command(["show", "--system", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["system"]


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Two cache folders with 70 and 8 bytes in them, one behind a link that must not be counted twice."""
    hub, own = tmp_path / "hub", tmp_path / "own"
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / "a").write_bytes(bytes(70))
    (own / "packed").mkdir(parents=True)
    (own / "packed" / "b").write_bytes(bytes(8))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("IOLITE_CACHE", str(own))
    return hub, own


def test_what_is_said_of_the_machine(caches, capsys):
    found = system(capsys)
    assert found["processor"]
    assert 1 <= found["physical_cores"] <= found["usable_cores"] <= found["cores"]
    assert found["threads"] >= 1
    assert found["torch"] == torch.__version__
    assert [(c["path"], c["bytes"]) for c in found["caches"]] == [(str(caches[0]), 70), (str(caches[1]), 8)]


def test_a_cache_that_is_not_there_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IOLITE_CACHE", str(tmp_path / "none"))
    assert system(capsys)["caches"][1] == {
        "holds": "packed weights", "path": str(tmp_path / "none"), "bytes": 0
    }  # fmt: skip


def test_the_code_path_is_named(caches, monkeypatch, capsys):
    monkeypatch.setattr(machine, "kernels", lambda: {"isa": "avx2", "reason": None, "threads": 3})
    assert system(capsys)["kernels"] == {"isa": "avx2", "reason": None, "lost": None}
    assert run_command(["show", "--system"]) == 0
    out = capsys.readouterr().out
    assert "C++ for avx2" in out
    assert "threads       3\n" in out


def test_missing_kernels_are_said_with_what_is_lost(caches, monkeypatch, capsys):
    monkeypatch.setattr(machine, "kernels", lambda: {"isa": None, "reason": "no compiler was found", "threads": 2})
    kernels = system(capsys)["kernels"]
    assert kernels["reason"] == "no compiler was found"
    assert "slower" in kernels["lost"]
    assert run_command(["show", "--system"]) == 0
    assert "plain torch: no compiler was found. Packed weights" in capsys.readouterr().out


def test_the_reference_can_be_asked_for(caches, monkeypatch, capsys):
    monkeypatch.setenv("IOLITE_KERNELS", "reference")
    assert system(capsys)["kernels"]["isa"] is None


def test_devices_and_triton(caches, capsys):
    gpu = system(capsys)["gpu"]
    assert bool(gpu["cuda"]) == torch.cuda.is_available() == (gpu["reason"] is None)
    assert run_command(["show", "--system"]) == 0
    out = capsys.readouterr().out
    assert "Triton" in out
    assert out.count("\ncache  ") == 2
