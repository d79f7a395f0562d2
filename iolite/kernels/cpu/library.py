"""The shared library of C++ kernels: found, checked, and called through ctypes with one pool of threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, cast

from iolite.errors import UsageError
from iolite.kernels.cpu.build import abi_digest, library_path

Function = Callable[..., Any]


class MatrixArg(ctypes.Structure):
    """`iol_matrix` of iolite.h."""

    _fields_ = (("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("format", c_int32))


class AttentionArgs(ctypes.Structure):
    """`iol_attention_args` of iolite.h."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("kv_type", c_int32),
        ("k_row", c_int64),
        ("k_head", c_int64),
        ("v_row", c_int64),
        ("v_head", c_int64),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("scale_row", c_int64),
        ("scale_head", c_int64),
        ("N", c_int64),
        ("H", c_int64),
        ("K", c_int64),
        ("D", c_int64),
        ("keys", c_int64),
        ("first", c_int64),
        ("room", c_int64),
        ("past", c_int64),
        ("window", c_int64),
        ("blocks", c_void_p),
        ("out", c_void_p),
    )


class BlockArg(ctypes.Structure):
    """`iol_block` of iolite.h."""

    _fields_ = (
        ("qkv", MatrixArg * 3),
        *((name, MatrixArg) for name in ("o", "gate", "up", "down")),
        *((name, c_int64) for name in ("projections", "size", "head_dim")),
        *((name, c_void_p) for name in ("input_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("post_attention_norm", "pre_feedforward_norm", "post_feedforward_norm")),
        ("scalar", c_void_p),
        ("eps", c_float),
    )


class CacheArg(ctypes.Structure):
    """`iol_cache` of iolite.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("k", "v", "k_scale", "v_scale")),
        ("kv_type", c_int32),
        *((name, c_int64) for name in ("k_row", "k_head", "v_row", "v_head", "scale_row", "scale_head")),
        *((name, c_int64) for name in ("room", "window", "turned")),
        ("factor", c_void_p),
        ("unit", c_float),
    )


class SegmentArg(ctypes.Structure):
    """`iol_segment` of iolite.h."""

    _fields_ = (("caches", POINTER(CacheArg)), ("n", c_int64), ("start", c_int64))


class Library:
    """The loaded library. Its kernels are attributes, taken without the prefix: `library.rms_norm(library.pool, ...)`.

    Pointers are passed as integers (`tensor.data_ptr()`), 0 for null.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError when the file cannot be loaded, AttributeError when it is not a library of ours."""
        self._c = ctypes.CDLL(path)
        self._pools: dict[int, int] = {}
        self._lock = threading.Lock()
        self._threads = 0  # one for each physical core
        self._pool: int | None = None
        p, f, i = c_void_p, c_float, c_int64
        self.abi = self._function("abi", c_char_p)
        self.isa = self._function("isa", c_char_p)
        self.isas = self._function("isas", c_char_p)
        self.use_isa = self._function("use_isa", c_int, c_char_p)
        self._pool_create = self._function("pool_create", p, c_int)
        self._pool_threads = self._function("pool_threads", c_int, p)
        self.linear = self._function("linear", None, p, p, i, i, i, POINTER(MatrixArg), POINTER(p), POINTER(i))
        self.gated = self._function("gated", None, p, p, i, i, POINTER(MatrixArg), POINTER(MatrixArg), p, i)
        self.embed = self._function("embed", None, p, POINTER(MatrixArg), p, i, f, p)
        self.rms_norm = self._function("rms_norm", None, p, p, p, f, i, i, p)
        self.add_rms_norm = self._function("add_rms_norm", None, p, p, p, p, f, f, i, i, p)
        self.norm_rope = self._function("norm_rope", None, p, p, i, p, f, p, p, i, i, i, p)
        self.geglu = self._function("geglu", None, p, p, p, i, p)
        self.softcap = self._function("softcap", None, p, p, f, i, p)
        self.attention = self._function("attention", None, p, POINTER(AttentionArgs))
        self.block_begin = self._function("block_begin", None, p, POINTER(BlockArg), p, i, p, p, p, p, p)
        self.block_end = self._function("block_end", None, p, POINTER(BlockArg), p, p, i, p)
        self.stack = self._function(
            "stack", None, p, POINTER(BlockArg), i, POINTER(SegmentArg), i, p, *[POINTER(p)] * 2
        )
        self.probe_bandwidth = self._function("probe_bandwidth", c_double, p, p, i, c_double)
        self.probe_int8 = self._function("probe_int8", c_double, p, c_double)

    def _function(self, name: str, result: Any, *arguments: Any) -> Function:
        function = getattr(self._c, f"iol_{name}")
        function.restype, function.argtypes = result, arguments
        return cast(Function, function)

    @property
    def pool(self) -> int:
        """The pool that kernels run on, made when it is first asked for."""
        if self._pool is None:
            with self._lock:
                if self._threads not in self._pools:
                    self._pools[self._threads] = self._pool_create(self._threads)
                self._pool = self._pools[self._threads]
        return self._pool

    @property
    def threads(self) -> int:
        return int(self._pool_threads(self.pool))

    def set_threads(self, count: int) -> None:
        """Later calls run on a pool of `count` threads. The one before keeps its threads, asleep, for calls under way
        and for the day that its count is asked for again."""
        with self._lock:
            self._threads, self._pool = count, None

    def forget_pools(self) -> None:
        """In a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._pools, self._pool = {}, None


_lock = threading.Lock()
_tried = False
_library: Library | None = None
_reason = ""


def load() -> Library | None:
    """The library, or None when there is none that can be used here (`reason()`).

    Raises UsageError when IOLITE_ISA names a code path that is not to be had.
    """
    if not _tried:
        with _lock:
            if not _tried:
                _load()
    return _library


def reason() -> str:
    """Why load() gives None; empty when it does not."""
    load()
    return _reason


def isa() -> str:
    """The code path in use: "avx512", "avx2", "neon" or "portable"."""
    return str(loaded().isa().decode())


def isas() -> list[str]:
    """The code paths that this processor runs, best first."""
    return [name for name in loaded().isas().decode().split() if not name.startswith("-")]


def threads() -> int:
    """How many threads share the work."""
    return loaded().threads


def set_threads(count: int) -> None:
    """From now on `count` threads share the work; 0 for one on each physical core that this process may use.

    Raises UsageError for negative counts.
    """
    if count < 0:
        raise UsageError(f"{count} threads are not possible", "give a positive number, or 0 for one on each core")
    loaded().set_threads(count)


def loaded() -> Library:
    """The library. Raises UsageError where there is none."""
    library = load()
    if library is None:
        raise UsageError(f"the C++ kernels are not in use: {_reason}")
    return library


def _load() -> None:
    global _tried, _library, _reason
    library, reason = _open()
    if library is not None and (name := os.environ.get("IOLITE_ISA")):
        _choose(library, name)
    _library, _reason, _tried = library, reason, True


def _open() -> tuple[Library | None, str]:
    """(the library, ""), or (None, why not)."""
    rebuild = "`python -m iolite.kernels.cpu.build` builds it"
    if sys.platform == "win32":
        return None, "the C++ kernels are not built on Windows; in WSL they are"
    path = library_path()
    if not path.exists():
        return None, f"{path.name} was not built when iolite was installed; {rebuild}"
    try:
        library = Library(str(path))
        built_from = library.abi().decode()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}); {rebuild} anew"
    if built_from != abi_digest():
        return None, f"{path.name} was built from other sources; {rebuild} anew"
    return library, ""


def _choose(library: Library, name: str) -> None:
    names: Sequence[str] = library.isas().decode().split()
    usable = ", ".join(n for n in names if not n.startswith("-"))
    match library.use_isa(name.encode()):
        case 1:
            known = ", ".join(n.removeprefix("-") for n in names)
            raise UsageError(f"IOLITE_ISA={name} is no code path of these kernels ({known})", f"here: {usable}")
        case 2:
            raise UsageError(f"this processor does not run IOLITE_ISA={name}", f"it runs: {usable}")


def _forget_pools() -> None:
    if _library is not None:
        _library.forget_pools()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
