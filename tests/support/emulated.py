"""The functions of `iolite.kernels.cpu` as another processor computes them: a process of its own under an emulator."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iolite.kernels.contracts import Matrix
from iolite.kernels.cpu.attention import KINDS
from iolite.kernels.cpu.build import FOLDER, build, compiler
from support.programs import need_program

_TARGET = "aarch64-linux-gnu"


class Emulated:
    """A process with the library in it. Arguments are as those of the functions of the same name."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def use(self, isa: str, threads: int) -> None:
        status = self._call("use", isa.encode(), threads)
        assert status == bytes(8), f"{isa} does not run under the emulator"

    def close(self) -> None:
        self._process.communicate()

    def linear(self, x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
        n = x.numel() // x.shape[-1]
        told = [part for m in matrices for part in _matrix(m)]
        rows = [m.rows for m in matrices]
        out = self._floats(torch.Size((n * sum(rows),)), "linear", x, n, len(matrices), *told)
        parts = out.split([n * r for r in rows])
        return [part.view(*x.shape[:-1], r) for part, r in zip(parts, rows, strict=True)]

    def gated(self, x: Tensor, gate: Matrix, up: Matrix) -> Tensor:
        n = x.numel() // x.shape[-1]
        shape = torch.Size((*x.shape[:-1], gate.rows))
        return self._floats(shape, "gated", x, n, *_matrix(gate), *_matrix(up))

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return self._floats(x.shape, "rms_norm", x, weight, eps, x.numel() // x.shape[-1], x.shape[-1])

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        return self._floats(x.shape, "add_rms_norm", residual, x, weight, eps, scale, rows, size)

    def norm_rope(self, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        wide = torch.nn.functional.pad(x.flatten(1), (0, 3), value=torch.nan)  # tokens some way apart
        return self._floats(x.shape, "norm_rope", wide, weight, cos, sin, eps, wide.shape[1], *x.shape)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._floats(gate.shape, "geglu", gate, up)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return self._floats(x.shape, "softcap", x, cap)

    def embed(self, matrix: Matrix, ids: Tensor, scale: float = 1.0) -> Tensor:
        shape = torch.Size((*ids.shape, matrix.cols))
        code = matrix.format.code
        return self._floats(shape, "embed", matrix.data, ids, matrix.rows, matrix.cols, code, float(scale))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        first: int = 0,
        room: int | None = None,
        keys: int,
        past: int,
        window: int = 0,
        blocks: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        scale_strides = (0, 0) if k_scale is None else k_scale.contiguous().stride()
        numbers = (
            KINDS[k.dtype], *k.stride()[:2], *v.stride()[:2], *scale_strides, q.shape[0], q.shape[1], *k.shape[1:],
            keys, first, k.shape[0] if room is None else room, past, window,
        )  # fmt: skip
        return self._floats(q.shape, "attention", q, k, v, blocks, k_scale, v_scale, *numbers)

    def _floats(self, shape: torch.Size, name: str, *arguments: Tensor | int | float | None) -> Tensor:
        data = self._call(name, *arguments)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape) if data else torch.empty(shape)

    def _call(self, name: str, *arguments: Tensor | bytes | int | float | None) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(b"".join(map(_message, (name.encode(), *arguments))))
        stdin.flush()
        head = stdout.read(8)
        assert len(head) == 8, f"the emulated {name} ended with status {self._process.wait()}"
        return stdout.read(struct.unpack("<q", head)[0])


def _matrix(matrix: Matrix) -> tuple[Tensor, int, int, int]:
    return matrix.data, matrix.rows, matrix.cols, matrix.format.code


def _message(argument: Tensor | bytes | int | float | None) -> bytes:
    match argument:
        case None:
            return struct.pack("<q", -1)
        case int():
            return struct.pack("<q", argument)
        case float():
            return struct.pack("<d", argument)
        case Tensor():
            argument = argument.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(argument)) + argument


@contextlib.contextmanager
def aarch64() -> Iterator[Emulated]:
    """The kernels for 64-bit ARM; skips the test where the compiler or the emulator is missing."""
    need_program(f"{_TARGET}-g++", f"g++-{_TARGET}")
    need_program("qemu-aarch64", "qemu-user")
    with tempfile.TemporaryDirectory() as folder:
        server = f"{folder}/server"
        build(_TARGET, Path(folder, "libiolite.so"))
        source = Path(__file__).with_name("kernel_server.cpp")
        link = [f"-I{FOLDER}", f"-L{folder}", "-liolite", f"-Wl,-rpath,{folder}", "-o", server]
        subprocess.run([*compiler(_TARGET), "-std=c++17", "-O1", str(source), *link], check=True)
        emulated = Emulated(["qemu-aarch64", "-cpu", "max", "-L", f"/usr/{_TARGET}", server])
        try:
            yield emulated
        finally:
            emulated.close()
