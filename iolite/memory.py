"""How much memory there is, and sizes as people write them. No torch: commands ask before they load anything.

A container has its own limit (cgroup, version 1 or 2), often far below the machine's. IOLITE_MEMORY=16GB in the
environment stands for both what the machine has and what is free of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from iolite.errors import UsageError

VARIABLE = "IOLITE_MEMORY"
SMALL_PARAMETERS = 200_000_000  # float32 weights of under 0.8 GB: nothing is gained by halving them
# Of Python with torch 2.13.0 for CPUs on Linux: resident after `import iolite.generate.model` and the first calls.
RUNTIME = 250_000_000

_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_NO_LIMIT = 1 << 60  # version 1 says "none" by a number of about 2^63

# (where a version mounts its groups, the limit, what is used, the lines of memory.stat that the system can take back)
_VERSIONS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of "16GB", "12.5 gb", "16 GiB" or "800M": powers of 1000, with an i powers of 1024.

    Raises UsageError for anything else, a number without a unit included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or text.strip()[-1].isdigit() or (match[3] and not match[2]):
        raise UsageError(f"{text[:100]!r} is no amount of memory", "write it as 16GB, 12.5GB or 16GiB")
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])
    if count < 1:
        raise UsageError(f"{text[:100]!r} is no amount of memory", "it must be more than nothing, as in 16GB")
    return count


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000 as the Hub and disks count: "23.92 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def stated_memory() -> int | None:
    """What IOLITE_MEMORY says, None where it is not set. Raises UsageError for what is no size."""
    text = os.environ.get(VARIABLE)
    try:
        return parse_bytes(text) if text else None
    except UsageError as error:
        raise UsageError(f"{VARIABLE}: {error}", error.hint) from None


def physical_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory in this machine, or fewer where a container has a limit; None where the system does not say."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min([machine, *(limit for limit, _ in _limits(root))])


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a program can still take without swapping, file caches that the system would give up included.

    Where the system does not say (it does on Linux), all that the machine has.
    """
    free = _numbers(root / "proc/meminfo").get("MemAvailable")
    if free is None:
        return physical_memory(root)
    return max(0, min([free * 1024, *(limit - used for limit, used in _limits(root))]))


def resident_memory() -> int:
    """Bytes that this process has taken for itself already, mapped files left out; 0 where the system does not say."""
    return _numbers(Path("/proc/self/status")).get("RssAnon", 0) * 1024


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes used that cannot be taken back) of this process's control groups and of those around them."""
    for group in _groups(root):
        for mount, limit_name, used_name, reclaimable in _VERSIONS:
            folder = root / mount / group
            limit, used = (_number(folder / name) for name in (limit_name, used_name))
            if limit is not None and limit < _NO_LIMIT:
                stat = _numbers(folder / "memory.stat")
                yield limit, max(0, (used or 0) - sum(stat.get(name, 0) for name in reclaimable))


def _groups(root: Path) -> set[str]:
    """Paths below the mount: of this process's groups and of all that they lie in. Inside a container a path may not
    be there; then its parents, at least the mount itself, are what counts."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {""}
    groups = {""}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or "memory" in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            groups |= {"/".join(parts[:n]) for n in range(len(parts) + 1)}
    return groups


def _number(path: Path) -> int | None:
    """The number in a file, None where there is no file or it holds no number ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file of `NAME NUMBER` or `NAME: NUMBER kB` lines; nothing where there is no file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(number) for name, number in re.findall(r"^(\w+):?[ \t]+(\d+)", text, re.MULTILINE)}
