"""How much memory there is, containers' limits included, and sizes as people write them."""

from __future__ import annotations

import pytest

from iolite import memory
from iolite.errors import UsageError
from iolite.memory import available_memory, human_bytes, parse_bytes, physical_memory, stated_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16GB", 16_000_000_000),
        ("16 GiB", 16 << 30),
        ("12.5gb", 12_500_000_000),
        (" 800m ", 800_000_000),
        ("1.5KiB", 1536),
        ("2T", 2_000_000_000_000),
        ("17B", 17),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["banana", "", " ", "16", "GB", "-1GB", "0GB", "1e9GB", "16 iB", "nanGB", "٣GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="no amount of memory") as error:
        parse_bytes(text)
    assert "16GB" in error.value.hint


@pytest.mark.parametrize(
    ("count", "text"), [(17, "17 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (23_919_460_448, "23.92 GB")]
)
def test_sizes_for_people(count, text):
    assert human_bytes(count) == text


def test_what_the_environment_says(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert stated_memory() is None
    monkeypatch.setenv(memory.VARIABLE, "16GB")
    assert stated_memory() == 16_000_000_000
    monkeypatch.setenv(memory.VARIABLE, "much")
    with pytest.raises(UsageError, match="IOLITE_MEMORY: 'much'"):
        stated_memory()


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 GiB of which 10 are free, without limits; its files can be added to."""
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 << 20}.__getitem__)
    write(tmp_path, {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable:   {10 << 20} kB\n"})
    return tmp_path


def test_a_machine_without_limits(machine):
    assert physical_memory(machine) == 16 * GIB
    assert available_memory(machine) == 10 * GIB


def test_version_2_limits_of_a_group_and_those_around_it(machine):
    stat = "anon 5\ninactive_file 1073741824\nactive_file 1073741824\n"
    write(
        machine,
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            "sys/fs/cgroup/user.slice/job/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/job/memory.current": "1\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{5 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.stat": stat,
        },
    )
    assert physical_memory(machine) == 8 * GIB
    assert available_memory(machine) == 5 * GIB  # of the 5 that are used, the system can take 2 back


def test_a_container_whose_own_path_is_not_to_be_seen(machine):
    write(
        machine,
        {
            "proc/self/cgroup": "0::/../docker/0123\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
        },
    )
    assert physical_memory(machine) == 4 * GIB
    assert available_memory(machine) == 3 * GIB


def test_version_1_limits(machine):
    write(
        machine,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/box\n1:cpu:/other\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",  # none
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "77\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {GIB}\ntotal_active_file {GIB}\n",
            "sys/fs/cgroup/memory/other/memory.limit_in_bytes": "1\n",  # no group of ours
        },
    )
    assert physical_memory(machine) == 2 * GIB
    assert available_memory(machine) == GIB


def test_more_is_used_than_a_limit_allows(machine):
    write(machine, {"sys/fs/cgroup/memory.max": f"{GIB}", "sys/fs/cgroup/memory.current": f"{2 * GIB}"})
    assert available_memory(machine) == 0


def test_a_system_that_does_not_say(tmp_path, machine, monkeypatch):
    assert available_memory(tmp_path / "nowhere") == 16 * GIB
    monkeypatch.delattr(memory.os, "sysconf")
    assert physical_memory(machine) is None
    assert available_memory(tmp_path / "nowhere") is None


def test_this_machine():
    there, free = physical_memory(), available_memory()
    assert there is not None and free is not None
    assert there > 1 << 28
    assert 0 < free <= there
