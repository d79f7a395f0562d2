"""What is said of the machine, and the rates it is measured to have."""

from __future__ import annotations

import mmap
import re

import pytest
import torch

from iolite.evals import machine


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(machine, "_POOL_BYTES", 1 << 20)


def test_cores():
    hardware = machine.hardware()
    assert 1 <= hardware["cores"] <= hardware["logical_cores"]
    assert hardware["memory_bytes"] > 1 << 28
    assert hardware["processor"]


def test_memory_grows_with_what_is_held():
    size, private = 32 << 20, getattr(mmap, "MAP_PRIVATE", 2)
    before = machine.memory()
    held = mmap.mmap(-1, size, flags=private)  # pages of its own: an allocator hands out what it kept from before
    held.write(b"1" * size)
    after = machine.memory()
    held.close()
    assert after["peak"] >= max(before["peak"], size)
    if after["anonymous"] is not None:
        assert after["anonymous"] > before["anonymous"] + size // 2


def test_numbers_of_a_status_file(tmp_path):
    (tmp_path / "status").write_text("Name:\tiolite\nVmHWM:\t      12 kB\nThreads:\t3\nread_bytes: 4096\n")
    assert machine._status(str(tmp_path / "status")) == {"VmHWM": 12 * 1024, "Threads": 3, "read_bytes": 4096}
    assert machine._status(str(tmp_path / "none")) == {}


def test_disk_bytes_only_grow():
    before, after = machine.disk_bytes(), machine.disk_bytes()
    assert (before is None) == (after is None)
    if before is not None:
        assert after >= before


def test_the_commit_is_one_or_none():
    found = machine.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{12,}\+?", found)


def test_no_commit_outside_of_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(machine.iolite, "__file__", str(tmp_path / "__init__.py"))
    assert machine.commit() is None


def test_bandwidth_by_torch_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv("IOLITE_KERNELS", "reference")
    probe = machine.Probe(seconds=0.001)
    assert probe.how == "torch"
    assert 0.001 < probe.bandwidth() < 100_000
    assert probe.int8() is None
    assert "IOLITE_KERNELS" in probe.reason


def test_rates_by_our_kernels():
    if machine.kernels()["isa"] is None:
        pytest.skip(f"no C++ kernels: {machine.kernels()['reason']}")
    probe = machine.Probe(seconds=0.001)
    assert (probe.how, probe.reason) == ("iolite", None)
    assert 0.001 < probe.bandwidth() < 100_000
    assert 0.001 < probe.int8() < 1_000_000


def test_a_probe_of_another_device_knows_nothing_of_8_bit():
    probe = machine.Probe(torch.device("meta"))
    assert probe.int8() is None
    assert probe.reason == "not measured on meta"
