"""The C++ library: its pool of threads, the choice of a code path, and what is said where there is no library."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpu_kernels import ISAS, code_path
from torch import Tensor

import iolite
from iolite.errors import UsageError
from iolite.kernels import cpu
from iolite.kernels.cpu import build, library, probe
from iolite.quant.formats import FORMATS, INT4, PackedMatrix, quantise

ROOT = Path(iolite.__file__).parents[1]


def _no_compiler() -> str:
    """Why C++ cannot be compiled here, or nothing."""
    try:
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(_no_compiler()), reason=_no_compiler())


@pytest.fixture(name="best", autouse=True)
def _best(request: pytest.FixtureRequest) -> Any:
    with code_path(ISAS[-1] if cpu.load() is None else cpu.isa(), cpu.threads() if cpu.load() else 1):
        yield


def example(n: int = 5) -> tuple[Tensor, list[PackedMatrix]]:
    g = torch.Generator().manual_seed(7)
    matrices = [quantise(torch.randn(700, 300, generator=g), f) for f in FORMATS.values()]
    return torch.randn(n, 300, generator=g), matrices


@pytest.mark.parametrize("n", [1, 5, 60])
def test_the_number_of_threads_changes_no_bit(n: int) -> None:
    x, matrices = example(n)
    results = []
    for count in (1, 2, 3, 8):
        cpu.set_threads(count)
        assert cpu.threads() == count
        results.append([*cpu.linear(x, matrices), cpu.gated(x, *matrices[:2])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads_wait_for_each_other() -> None:
    cpu.set_threads(3)
    x, matrices = example()
    expected = cpu.linear(x, matrices)
    wrong = []

    def work() -> None:
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(cpu.linear(x, matrices), expected, strict=True)):
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_many_short_calls_with_more_threads_than_cores() -> None:
    """Workers that come late to a job must not touch the next one."""
    cpu.set_threads(6)
    x, matrices = example(1)
    expected = cpu.linear(x, matrices)
    for _ in range(500):
        assert all(torch.equal(a, b) for a, b in zip(cpu.linear(x, matrices), expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    code = (
        "import os, torch\nfrom iolite.kernels import cpu\nfrom iolite.quant.formats import INT4, quantise\n"
        "cpu.set_threads(3)\nm, x = quantise(torch.randn(700, 300), INT4), torch.randn(9, 300)\n"
        "before = cpu.linear(x, [m])[0]\nchild = os.fork()\nsame = torch.equal(cpu.linear(x, [m])[0], before)\n"
        "if child == 0:\n    os._exit(0 if same and cpu.threads() == 3 else 1)\n"
        "assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores are allowed")
def test_a_pool_has_no_more_threads_than_this_process_may_use_cores() -> None:
    cpu.set_threads(0)
    assert 1 <= cpu.threads() <= len(os.sched_getaffinity(0))
    code = "from iolite.kernels import cpu; import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    done = subprocess.run([sys.executable, "-c", code + "print(cpu.threads())"], capture_output=True, timeout=60)
    assert done.stdout == b"1\n"


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(UsageError, match="-1 threads"):
        cpu.set_threads(-1)


def in_a_process_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from iolite.errors import IoliteError\nfrom iolite.kernels import cpu\n"
        "try:\n    cpu.load()\n    print(cpu.isa())\nexcept IoliteError as e:\n    print('error:', e, e.hint)"
    )
    environment = {**os.environ, "IOLITE_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_an_environment_variable_chooses_the_code_path() -> None:
    assert in_a_process_with("portable").stdout == "portable\n"


def test_an_unknown_code_path_is_an_error() -> None:
    said = in_a_process_with("avx9").stdout
    assert said.startswith("error: IOLITE_ISA=avx9 is no code path") and "portable" in said


def test_a_code_path_that_the_processor_lacks_is_an_error() -> None:
    class Lacking:
        def isas(self) -> bytes:
            return b"-avx512 avx2 portable "

        def use_isa(self, name: bytes) -> int:
            return 2

    with pytest.raises(UsageError, match="does not run IOLITE_ISA=avx512") as raised:
        library._choose(Lacking(), "avx512")  # type: ignore[arg-type]
    assert raised.value.hint == "it runs: avx2, portable"


def test_a_library_that_is_missing_broken_or_old_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "libiolite.so")
    assert library._open()[1].startswith("libiolite.so was not built")
    (tmp_path / "libiolite.so").write_bytes(b"not a library")
    assert "cannot be loaded" in library._open()[1]
    monkeypatch.undo()
    monkeypatch.setattr(library, "abi_digest", lambda: "0" * 16)
    assert library._open()[0] is None
    assert "built from other sources" in library._open()[1]


@needs_compiler
def test_structures_have_the_size_that_c_gives_them(tmp_path: Path) -> None:
    source = tmp_path / "sizes.cpp"
    numbers = "sizeof(iol_matrix), sizeof(iol_attention_args), offsetof(iol_attention_args, out)"
    numbers += ", sizeof(iol_block), offsetof(iol_block, projections), offsetof(iol_block, eps)"
    includes = '#include "iolite.h"\n#include <cstddef>\n#include <cstdio>\n'
    source.write_text(f'{includes}int main() {{ std::printf("%zu %zu %zu %zu %zu %zu", {numbers}); }}')
    program = tmp_path / "sizes"
    subprocess.run([*build.compiler(), f"-I{build.FOLDER}", str(source), "-o", str(program)], check=True)
    sizes = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    args, block = library.AttentionArgs, library.BlockArg
    assert [int(s) for s in sizes] == [
        ctypes.sizeof(library.MatrixArg), ctypes.sizeof(args), args.out.offset,
        ctypes.sizeof(block), block.projections.offset, block.eps.offset,
    ]  # fmt: skip


def test_without_a_compiler_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.compiler()
    with pytest.raises(build.BuildError, match="for riscv64-linux-gnu"):
        build.compiler("riscv64-linux-gnu")


def test_a_compiler_that_fails_leaves_the_library_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    output = tmp_path / "libiolite.so"
    output.write_bytes(b"the old one")
    with pytest.raises(build.BuildError, match="failed"):
        build.build(output=output)
    assert output.read_bytes() == b"the old one"


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="iolite is not installed from its sources")
def test_installing_without_a_compiler_goes_on_and_says_what_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the C++ kernels were not built" in done.stderr and "many times slower" in done.stderr


def test_tensors_that_do_not_fit_are_refused() -> None:
    x, (matrix, *_) = example()
    for bad in (x.double(), x[:, :299]):
        with pytest.raises(ValueError, match="not float32 with 300 columns"):
            cpu.linear(bad, [matrix])
    with pytest.raises(ValueError, match="of 300 and of 64 columns"):
        cpu.linear(x, [matrix, quantise(torch.ones(16, 64), INT4)])
    with pytest.raises(ValueError, match="one stretch of uint8"):
        cpu.linear(x, [PackedMatrix(matrix.data[::2], 352, 300)])
    with pytest.raises(ValueError, match="for 800 rows"):
        cpu.linear(x, [PackedMatrix(matrix.data, 800, 300)])
    with pytest.raises(ValueError, match="a gate of 700 rows"):
        cpu.gated(x, matrix, quantise(torch.ones(16, 300), INT4))


def test_no_tokens_and_any_leading_shape() -> None:
    x, matrices = example(6)
    assert [out.shape for out in cpu.linear(x[:0], matrices)] == [(0, 700)] * 3
    assert cpu.gated(x[:0], *matrices[:2]).shape == (0, 700)
    flat, shaped = cpu.linear(x, matrices), cpu.linear(x.view(2, 3, 300), matrices)
    assert all(torch.equal(a.view(2, 3, 700), b) for a, b in zip(flat, shaped, strict=True))
    assert cpu.linear(x[0], matrices)[0].shape == (700,)
    turned = x.t().contiguous().t()  # columns of a token lie apart
    assert all(torch.equal(a, b) for a, b in zip(flat, cpu.linear(turned, matrices), strict=True))


# Two tasks that each wait for the other one to begin: a job that a thread misses never ends.
MEETINGS = """
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include "pool.h"

int main() {
    iol_pool* pool = iol_pool_create(2);
    for (int job = 0; job < 20000; job++) {
        std::atomic<int> here{0};
        iol_parallel(pool, 2, [](void* context, int64_t, int) {
            std::atomic<int>& here = *(std::atomic<int>*)context;
            here++;
            const auto begin = std::chrono::steady_clock::now();
            while (here.load() < 2) {
                std::this_thread::yield();
                if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(10)) std::_Exit(1);
            }
        }, &here);
    }
    iol_pool_destroy(pool);
    std::puts("all met");
}
"""


@needs_compiler
def test_every_thread_takes_part_in_every_job(tmp_path: Path) -> None:
    (tmp_path / "meetings.cpp").write_text(MEETINGS)
    sources = [str(tmp_path / "meetings.cpp"), str(build.FOLDER / "pool.cpp")]
    program = str(tmp_path / "meetings")
    command = [*build.compiler(), "-std=c++17", "-O2", "-pthread", f"-I{build.FOLDER}", *sources, "-o", program]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("all met\n", 0)


@pytest.mark.parametrize("isa", ISAS)
def test_the_machines_rates(isa: str) -> None:
    """Between what no computer falls short of and what none has."""
    with code_path(isa):
        assert 0.05 < probe.Memory(8 << 20).bandwidth(0.01) < 1e5
        assert 0.05 < probe.int8_rate(0.01) < 1e6
