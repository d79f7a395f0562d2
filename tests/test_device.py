"""Device and dtype are chosen once, for a reason that can be printed."""

from __future__ import annotations

import pytest
import torch

from iolite import device as devices
from iolite.device import choose
from iolite.errors import UsageError


def test_what_is_asked_for_wins():
    choice = choose("cpu", "bf16")
    assert (choice.device.type, choice.dtype, choice.dtype_name) == ("cpu", torch.bfloat16, "bfloat16")
    assert "as asked" in choice.reason


def test_a_small_model_is_float32_on_a_cpu():
    choice = choose("cpu", None, "bfloat16", parameters=4_000_000)
    assert choice.dtype == torch.float32
    assert choice.reason == "float32 on the CPU: a small model"


@pytest.mark.parametrize(
    ("fast", "memory", "dtype"), [(True, 1 << 40, "bf16"), (False, 1 << 40, "fp32"), (False, 1 << 35, "bf16")]
)
def test_a_large_model_is_bfloat16_where_that_is_fast_or_all_that_fits(monkeypatch, fast, memory, dtype):
    monkeypatch.setattr(devices, "_cpu_has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(devices, "physical_memory", lambda: memory)
    assert choose("cpu", None, "bfloat16", 12_000_000_000).dtype == devices.DTYPES[dtype]


def test_a_float32_checkpoint_stays_so():
    assert choose("cpu", None, "float32", 12_000_000_000).dtype == torch.float32


@pytest.mark.parametrize("name", ["gpu", "cpu:3", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=name):
        choose(name)


@pytest.mark.parametrize("name", ["int4", "float64", torch.int8])
def test_a_format_we_do_not_compute_in_is_refused(name):
    with pytest.raises(UsageError, match="compute in"):
        choose("cpu", name)


def test_memory_of_this_machine_is_known():
    assert (devices.physical_memory() or 0) > 1 << 28
