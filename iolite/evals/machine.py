"""What a measurement was made on: processor, cores, memory, kernels and software, and the rates it can reach.

Two rates bound a language model on a CPU: bytes a second out of memory bound the drawing of single tokens, 8-bit
multiplications a second bound the reading of a prompt. Both change with whoever shares the machine, so they are
measured between the samples that are compared with them, never once beforehand.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import iolite
from iolite.device import physical_memory
from iolite.kernels.cpu import library, probe

# Far beyond any processor's cache, which would give back its part of the buffer in every round.
_POOL_BYTES = 1 << 30


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Cores that this process may run on, those that share their arithmetic counted once; where the system does not
    say which do, the logical ones."""
    if not hasattr(os, "sched_getaffinity"):
        return _mac_number("hw.physicalcpu") or usable_cores()
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return usable_cores()
    return len(cores)


def _mac_number(name: str) -> int:
    """A whole number from sysctlbyname, 0 where there is none."""
    call = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(8)
    if call is None or call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)):
        return 0
    return value.value


def kernels() -> dict[str, Any]:
    """Which code computes on the CPU: `isa` (None: plain torch), `reason` (why it is not C++), `threads`."""
    if os.environ.get("IOLITE_KERNELS") == "reference":
        reason = "IOLITE_KERNELS=reference asks for the reference"
    elif library.load() is not None:
        return {"isa": library.isa(), "reason": None, "threads": library.threads()}
    else:
        reason = library.reason()
    return {"isa": None, "reason": reason, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of iolite, Python, torch and the system."""
    return {
        "iolite": iolite.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def commit() -> str | None:
    """The commit of a git checkout that this package runs from, with "+" when files differ from it; else None."""
    folder = Path(iolite.__file__).parent
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "") if tracked else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def gpu() -> dict[str, Any]:
    """What torch sees of CUDA, and Triton's version (None: not installed)."""
    found = torch.cuda.is_available()
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else []
    built = torch.version.cuda
    why = None if found else "this torch is built without CUDA" if built is None else "no CUDA device is here"
    return {"cuda": built if found else None, "devices": names, "reason": why, "triton": triton}


def hardware() -> dict[str, Any]:
    """The processor's name, its cores and the bytes of memory."""
    return {
        "processor": processor(),
        "cores": physical_cores(),
        "logical_cores": usable_cores(),
        "memory_bytes": physical_memory(),
    }


def _status(path: str) -> Mapping[str, int]:
    """The numbers of one of Linux's `NAME: NUMBER [kB]` files, in bytes; nothing elsewhere."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    found = [re.fullmatch(r"(\w+):\s+(\d+)( kB)?", line) for line in lines]
    return {m[1]: int(m[2]) * (1024 if m[3] else 1) for m in found if m}


def memory() -> dict[str, int | None]:
    """Bytes of memory that this process holds: at its peak so far, and now of mapped files and of its own.

    Pages of a mapped file count as resident and in the peak, though the system can drop them without writing.
    """
    status = _status("/proc/self/status")
    peak = status.get("VmHWM")
    if peak is None:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = used if sys.platform == "darwin" else 1024 * used
    return {"peak": peak, "file": status.get("RssFile"), "anonymous": status.get("RssAnon")}


def disk_bytes() -> tuple[int, int] | None:
    """(read from, written to) storage by this process so far, page faults in mapped files included; None elsewhere
    than on Linux."""
    io = _status("/proc/self/io")
    return (io["read_bytes"], io["write_bytes"]) if io else None


class Probe:
    """The machine's rates at this moment, as often as they are asked for.

    bandwidth() reads a buffer of 1 GiB on all threads: with our C++ kernels, else with torch. int8() multiplies in
    registers, with our kernels only.
    """

    def __init__(self, device: torch.device | None = None, seconds: float = 0.15) -> None:
        """seconds: for how long each call works."""
        self.seconds, self.device = seconds, device or torch.device("cpu")
        self._kernel: ModuleType | None = None
        self.reason: str | None = f"not measured on {self.device.type}"
        if self.device.type == "cpu":
            self._kernel, self.reason = _kernel_probe()

    @property
    def how(self) -> str:
        """Who reads the memory."""
        return "torch" if self._kernel is None else "iolite"

    def bandwidth(self) -> float:
        """GB/s of reading, with all threads."""
        if self._kernel is not None:
            return self._memory.bandwidth(self.seconds)
        pool = self._pool  # made before the clock starts
        rounds, begin = 0, time.perf_counter()
        while (took := time.perf_counter() - begin) < self.seconds:
            pool.sum().item()
            rounds += 1
        return rounds * _POOL_BYTES / took / 1e9

    def int8(self) -> float | None:
        """Billions of 8-bit multiply-adds a second, with all threads; None without our kernels (`reason`)."""
        return None if self._kernel is None else float(self._kernel.int8_rate(self.seconds))

    @cached_property
    def _memory(self) -> probe.Memory:
        return probe.Memory(_POOL_BYTES)

    @cached_property
    def _pool(self) -> torch.Tensor:
        return torch.ones(_POOL_BYTES // 8, dtype=torch.int64, device=self.device)


def _kernel_probe() -> tuple[ModuleType | None, str | None]:
    """(the module that measures with our kernels, None), or (None, why there is none)."""
    reason = kernels()["reason"]
    return (None, reason) if reason else (probe, None)
