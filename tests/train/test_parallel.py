"""Processes that add up: every dtype and size, the same bits in all, and an end to the waiting when one has ended."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iolite.errors import ProcessError
from iolite.train.parallel import SLOT, Group, group_of

LIMIT = 120  # seconds, for what takes one
SUMMED = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int16, torch.complex64]
COPIED = [*SUMMED, torch.bool, torch.uint8, torch.float16]
SHAPES = [(), (1,), (0, 3), (7, 5), (SLOT // 4,), (SLOT // 4 + 1,), (3, SLOT // 8 + 3)]  # less and more than one piece


@contextmanager
def running(size: int, work: Callable[[Group, Path], None], folder: Path) -> Iterator[list[SpawnProcess]]:
    """A group of processes that do some work, of which none is left behind."""
    context, groups = multiprocessing.get_context("spawn"), group_of(size)
    processes = [context.Process(target=work, args=(group, folder)) for group in groups]
    try:
        for process, group in zip(processes, groups, strict=True):
            process.start()
            group.close()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of every size that a rounding would show in, another set for every rank."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (drawn.exp() * 50).to(dtype)


def _add_and_copy(group: Group, folder: Path) -> None:
    torch.set_num_threads(1)
    sums = [group.sum_(values(group.rank, shape, dtype)) for dtype in SUMMED for shape in SHAPES]
    copies = [values(group.rank, shape, dtype) for dtype in COPIED for shape in SHAPES]
    group.copy_from_lead_(copies)
    weight = torch.nn.Parameter(values(group.rank, (3,), torch.float32))
    group.copy_from_lead_([weight])
    torch.save([sums, copies, weight.detach()], folder / f"{group.rank}.pt")


def test_sums_and_copies_are_the_same_in_every_process(tmp_path: Path) -> None:
    with running(3, _add_and_copy, tmp_path) as processes:
        for process in processes:
            process.join(LIMIT)
            assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for at, (dtype, shape) in enumerate((dtype, shape) for dtype in SUMMED for shape in SHAPES):
        first, second, third = (values(rank, shape, dtype) for rank in range(3))
        for sums, _, _ in found:
            assert torch.equal(sums[at], first + second + third), (dtype, shape)
    for at, (dtype, shape) in enumerate((dtype, shape) for dtype in COPIED for shape in SHAPES):
        for _, copies, _ in found:
            assert torch.equal(copies[at], values(0, shape, dtype)), (dtype, shape)
    assert all(torch.equal(weight, values(0, (3,), torch.float32)) for _, _, weight in found)


def _until_somebody_ends(group: Group, folder: Path) -> None:
    torch.set_num_threads(1)
    numbers = torch.zeros(SLOT)
    try:
        for turn in range(1_000_000):
            group.sum_(numbers)
            if turn == 3:
                (folder / f"{group.rank}.busy").touch()
    except ProcessError as error:
        (folder / f"{group.rank}.txt").write_text(f"{error}; {error.hint}")


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + LIMIT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_the_waiting_of_the_others(tmp_path: Path, victim: int) -> None:
    others = {0, 1, 2} - {victim}
    with running(3, _until_somebody_ends, tmp_path) as processes:
        wait_for([tmp_path / f"{rank}.busy" for rank in range(3)])
        processes[victim].kill()
        for rank in others:
            processes[rank].join(LIMIT)
            assert processes[rank].exitcode == 0
            assert "another process of this run has ended; its error" in (tmp_path / f"{rank}.txt").read_text()


def _one_is_long_away(group: Group, folder: Path) -> None:
    """The lead evaluates, say; the last dies while the second waits for both."""
    if group.rank == 2:
        wait_for([folder / "1.waits"])
        os.kill(os.getpid(), signal.SIGKILL)
    if group.rank == 0:
        wait_for([folder / "may go on"])
    (folder / f"{group.rank}.waits").touch()
    with pytest.raises(ProcessError):
        group.sum_(torch.zeros(3))


def test_a_process_that_is_long_away_is_waited_for_and_hears_of_a_death_then(tmp_path: Path) -> None:
    with running(3, _one_is_long_away, tmp_path) as processes:
        processes[2].join(LIMIT)
        assert processes[2].exitcode == -signal.SIGKILL
        assert processes[1].is_alive()
        (tmp_path / "may go on").touch()
        for process in processes[:2]:
            process.join(LIMIT)
            assert process.exitcode == 0


def test_one_that_leaves_is_missed() -> None:
    lead, peer = group_of(2)
    peer.close()
    with pytest.raises(ProcessError, match="has ended"):
        lead.sum_(torch.zeros(3))
    lead.close()


def test_a_group_of_one_does_nothing() -> None:
    (alone,) = group_of(1)
    numbers = torch.arange(3)
    assert alone.leads
    assert alone.sum_(numbers) is numbers
    alone.copy_from_lead_([numbers])
    assert numbers.tolist() == [0, 1, 2]
    assert pickle.loads(pickle.dumps(alone)).size == 1
    alone.close()
