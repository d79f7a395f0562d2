"""Which device and which number format to compute in, chosen once, with the reason to print.

cuda   bfloat16
mps    bfloat16 where the system has it (macOS 14 on), float16 before
cpu    bfloat16 only where the CPU multiplies it in hardware, float32 otherwise and for every small model: there
       float32 is as fast, and its logits are the reference's
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iolite.errors import UsageError
from iolite.memory import (
    RUNTIME,
    SMALL_PARAMETERS,
    available_memory,
    physical_memory,
    resident_memory,
    stated_memory,
)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Choice:
    """Where and in what format a model is computed."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # for people: "float32 on the CPU: a small model"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def choose(
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    checkpoint_dtype: str = "bfloat16",
    parameters: int | None = None,
    packed: str | None = None,
) -> Choice:
    """Settles device and dtype; what the caller named wins, the rest is decided here.

    `parameters` is the size of the model, where known: it decides what counts as small and whether float32 fits.
    `packed` is the scheme of packed weights; on a CPU these compute in float32, whose sums their kernels make.
    Raises UsageError for a device that is not there or a format we do not compute in.
    """
    where = _device(device)
    if packed and where.type == "cpu":
        if dtype is not None and _dtype(dtype) is not torch.float32:
            raise UsageError(f"{packed} weights compute in float32 on a CPU, not in {dtype}", "leave the dtype out")
        return Choice(where, torch.float32, f"{packed} weights on the CPU, computing in float32")
    if dtype is not None:
        chosen = _dtype(dtype)
        return Choice(where, chosen, f"{_name(chosen)} on {_where(where)}: as asked")
    if where.type == "cuda":
        return Choice(where, torch.bfloat16, f"bfloat16 on {_where(where)}")
    if where.type == "mps":
        chosen = torch.bfloat16 if _mps_has_bfloat16() else torch.float16
        return Choice(where, chosen, f"{_name(chosen)} on {_where(where)}")
    chosen, why = _cpu_dtype(checkpoint_dtype, parameters)
    return Choice(where, chosen, f"{_name(chosen)} on {_where(where)}: {why}")


def _device(name: str | None) -> torch.device:
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except (RuntimeError, UnicodeEncodeError):
        raise UsageError(f"there is no device {name!r}", "use cpu, cuda, cuda:N or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise UsageError(f"the device {name!r} is not available here", "leave --device out to use what is")
    return device


def _dtype(name: str | torch.dtype) -> torch.dtype:
    chosen = DTYPES.get(name) if isinstance(name, str) else name
    if chosen is None or chosen not in DTYPES.values():
        raise UsageError(f"cannot compute in {name!r}", "use float32, bfloat16 or float16")
    return chosen


def _cpu_dtype(checkpoint_dtype: str, parameters: int | None) -> tuple[torch.dtype, str]:
    if checkpoint_dtype == "float32":
        return torch.float32, "the checkpoint's own"
    if parameters is not None and parameters <= SMALL_PARAMETERS:
        return torch.float32, "a small model"
    if _cpu_has_fast_bfloat16():
        return torch.bfloat16, "this CPU multiplies bfloat16 in hardware"
    memory = physical_memory()
    if parameters is not None and memory is not None and 4 * parameters > 0.8 * memory:
        return torch.bfloat16, "float32 would be faster on this CPU but does not fit in its memory"
    return torch.float32, "this CPU has no bfloat16 arithmetic"


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or what IOLITE_MEMORY says; None where the system does not say.

    What this process holds already counts as free as far as a process without a model would hold it too.
    """
    if (stated := stated_memory()) is not None:
        return stated
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return None if free is None else free + min(resident_memory(), RUNTIME)


def _cpu_has_fast_bfloat16() -> bool:
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _mps_has_bfloat16() -> bool:
    return torch.backends.mps.is_macos_or_newer(14, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return {"cpu": "the CPU", "mps": "the Apple GPU"}[device.type]
