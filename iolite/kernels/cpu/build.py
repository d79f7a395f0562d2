"""Compiles the C++ kernels into one shared library beside this file.

    python -m iolite.kernels.cpu.build [--target aarch64-linux-gnu] [--output FILE] [--strict]

The compiler is $CXX, or the first of c++, g++ and clang++ that is there; with --target, TARGET-g++ or clang++ --target.
Every file named isa_*.cpp is compiled once for each instruction set of the processor family, with that set's flags and
-DIOL_ISA=its name; the other .cpp files once. Object files are kept in `build/`, named by a digest of all that went
into them, so that only what changed is compiled again.

setup.py loads this file alone, by its path, before anything is installed: it imports the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
OBJECTS = FOLDER / "build"

# Instruction sets by processor family, best first. The baseline flags of a family compile everything else.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512": (*_AVX2, *_AVX512), "avx2": _AVX2, "portable": ()},
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod+fp16",), "portable": ()},
    "other": {"portable": ()},
}
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi",  # vectors are passed between functions of one file only
)  # fmt: skip
# GCC 12 takes its own headers' undefined vectors for mistakes, and warns of attributes that templates do not need.
STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-ignored-attributes")


class BuildError(Exception):
    """Why there is no library: no compiler, or what it said."""


def library_path() -> Path:
    return FOLDER / ("libiolite.dylib" if sys.platform == "darwin" else "libiolite.so")


def abi_digest() -> str:
    """Of the header that Python's declarations follow. A library built from another one is not called."""
    return hashlib.sha256((FOLDER / "iolite.h").read_bytes()).hexdigest()[:16]


def family(machine: str) -> str:
    """The key of SETS for a machine's name, such as platform.machine() gives it."""
    names = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
    return names.get(machine.lower(), "other")


def compiler(target: str | None = None) -> list[str]:
    """The command that compiles C++ for this machine or a target like "aarch64-linux-gnu".

    Raises BuildError when there is none.
    """
    if target is not None:
        if found := shutil.which(f"{target}-g++"):
            return [found]
        if found := shutil.which("clang++"):
            return [found, f"--target={target}"]
        raise BuildError(f"no C++ compiler for {target}: looked for {target}-g++ and clang++")
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler: looked for $CXX, c++, g++ and clang++")


def jobs(machine: str) -> Iterator[tuple[Path, str, tuple[str, ...]]]:
    """(source, name of its object, flags) of everything to compile for a family."""
    sets = SETS[machine]
    has = tuple(f"-DIOL_HAS_{name}" for name in sets)
    for source in sorted(FOLDER.glob("*.cpp")):
        if source.name.startswith("isa_"):
            for name, flags in sets.items():
                yield source, f"{source.stem}-{name}", (*flags, f"-DIOL_ISA={name}")
        else:
            yield source, source.stem, (*has, f'-DIOL_ABI="{abi_digest()}"')


def build(target: str | None = None, output: Path | None = None, extra: Sequence[str] = ()) -> Path:
    """Compiles and links; `extra` flags go to both. Returns the library's path. Raises BuildError."""
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    command = [*compiler(target), *FLAGS, *extra]
    machine = family(target.split("-")[0] if target else platform.machine())
    output = output or library_path()
    try:
        OBJECTS.mkdir(exist_ok=True)
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(lambda job: _compile(command, *job), jobs(machine)))
        _link(command, objects, output)
    except OSError as error:
        raise BuildError(f"{error}") from error
    _forget_old(objects)
    return output


def _compile(command: list[str], source: Path, name: str, flags: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(repr((command, flags)).encode())
    for file in (source, *sorted(FOLDER.glob("*.h"))):
        digest.update(file.read_bytes())
    made = OBJECTS / f"{name}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        _run([*command, *flags, "-c", str(source)], made)
    made.touch()
    return made


def _link(command: list[str], objects: list[Path], output: Path) -> None:
    _run([*command, "-shared", *map(str, objects)], output)


def _run(command: list[str], output: Path) -> None:
    """Runs a compiler that writes `output`, which is replaced as a whole: a library in use stays what it was."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = "\n".join(done.stderr.strip().splitlines()[:20])
            raise BuildError(f"{shlex.join(command)} failed:\n{lines}")
        if done.stderr:
            print(done.stderr.strip(), file=sys.stderr)
        os.replace(made, output)


def _forget_old(used: list[Path], keep: int = 200) -> None:
    """Leaves the objects just used and the newest others."""
    others = sorted(set(OBJECTS.glob("*.o")) - set(used), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in others[keep:]:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles iolite's C++ kernels.")
    parser.add_argument("--target", help="compile for another machine, e.g. aarch64-linux-gnu")
    parser.add_argument("--output", type=Path, help="the library to write (default: beside the sources)")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    arguments = parser.parse_args()
    try:
        print(build(arguments.target, arguments.output, STRICT if arguments.strict else ()))
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
