"""One engine in a process of its own, which does what it is told line by line: the working side of `cpu.py`.

    python bench/engines.py iolite|llama.cpp MODEL SETTINGS

SETTINGS is a JSON object. Every line of stdin is a JSON object, {"do": NAME, …arguments}; every line of stdout answers
one, {"value": …} or {"error": …, "hint": …}. Both engines know load, prefill, step, memory and about; iolite also
bytes, macs, bandwidth and int8. A step begins in the same place each time: what it adds to the cache is taken back.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from iolite.errors import IoliteError, UsageError


class Iolite:
    """Ours. settings: threads, quantize, kv, depth (the longest cache that will be asked for)."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = model, settings

    def load(self) -> dict[str, Any]:
        from iolite.cli.options import load_model
        from iolite.evals.machine import Probe
        from iolite.evals.speed import Subject, measure_load

        options = {name: self.settings[name] for name in ("quantize", "kv") if self.settings.get(name)}
        model, found = measure_load(lambda: load_model(self.name, self.settings["threads"], **options))
        self.subject = Subject(model, self.settings["depth"])
        self.probe = Probe()
        return found

    def prefill(self, length: int) -> float:
        return self.subject.prefill(length)

    def step(self, depth: int, tokens: int, times: int) -> float:
        return self.subject.step(depth, tokens, times)

    def memory(self) -> dict[str, Any]:
        from iolite.evals.speed import measure_memory

        return measure_memory(self.subject.model)

    def about(self) -> dict[str, Any]:
        from iolite.evals import machine

        kernels, versions = machine.kernels(), machine.versions()
        code = kernels["isa"] or f"plain torch ({kernels['reason']})"
        return {
            "version": f"{versions['iolite']}, commit {machine.commit()}",
            "threads": kernels["threads"],
            "code": code,
            "probe": self.probe.how,
        }

    def bytes(self, depth: int) -> int:
        return self.subject.bytes_per_token(depth)

    def macs(self, length: int) -> int:
        return self.subject.macs(length)

    def bandwidth(self) -> float:
        return self.probe.bandwidth()

    def int8(self) -> float | None:
        return self.probe.int8()


class LlamaCpp:
    """llama.cpp by the C interface of llama-cpp-python, set up as its own llama-bench does: flash attention as it
    chooses, keys and values in fp16, sliding layers with a cache of their window, 512 tokens at once.

    settings: threads, depth, room (tokens that fit behind it). A deep cache has to be read in from random tokens, which
    takes minutes; it is kept in a file below the folder for temporary files and taken from there the next time.
    """

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        if not os.path.isfile(model):
            raise UsageError(f"there is no GGUF file {model!r}", "name one with --peer-model")
        try:
            import llama_cpp
        except ImportError:
            raise UsageError(
                "llama-cpp-python is not installed", "pip install llama-cpp-python, which builds for ten minutes"
            ) from None
        self.path, self.settings, self.lib = model, settings, llama_cpp
        self.depth: int | None = None  # tokens that the cache holds now
        self._rng = np.random.default_rng(0)
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # C keeps no reference to it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))

    def load(self) -> dict[str, Any]:
        lib, begin = self.lib, time.perf_counter()
        lib.llama_backend_init()
        model = lib.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(self.path.encode(), model)
        if not self.model:
            raise UsageError(f"llama.cpp cannot load {self.path!r}", "see whether its llama-cli can")
        context = lib.llama_context_default_params()
        context.n_ctx = self.settings["depth"] + self.settings["room"]
        context.n_threads = context.n_threads_batch = self.settings["threads"]
        context.swa_full = False
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise UsageError("llama.cpp cannot make a context", "give smaller numbers to --depth or --prefill")
        self.cache = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(max(512, self.settings["room"]), 0, 1)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "first_token_s": self.step(0, 1, 1), "state": None}

    def prefill(self, length: int) -> float:
        self._clear()
        begin = time.perf_counter()
        self._decode(0, length, every=False)
        took = time.perf_counter() - begin
        self._clear()
        return took

    def step(self, depth: int, tokens: int, times: int) -> float:
        self._go_to(depth)
        took = 0.0
        for _ in range(times):
            begin = time.perf_counter()
            self._decode(depth, tokens, every=True)
            took += time.perf_counter() - begin
            if not self.lib.llama_memory_seq_rm(self.cache, 0, depth, -1):
                raise UsageError("llama.cpp cannot take tokens back out of this model's cache")
        return took / times

    def memory(self) -> dict[str, Any]:
        from iolite.evals.machine import memory

        loaded = memory()
        self.prefill(280)
        self.step(0, 1, 64)
        after = memory()
        return {
            "peak_rss_bytes": after["peak"],
            "loaded_peak_bytes": loaded["peak"],
            "file_bytes": after["file"],
            "anonymous_bytes": after["anonymous"],
            "prompt_tokens": 280,
            "drawn_tokens": 64,
            "picture": False,
        }

    def about(self) -> dict[str, Any]:
        system = self.lib.llama_print_system_info().decode()
        return {
            "version": f"llama-cpp-python {self.lib.__version__}",
            "threads": self.lib.llama_n_threads(self.context),
            "system": system.strip(),
        }

    def _decode(self, start: int, count: int, every: bool) -> list[int]:
        """Random tokens at positions start…, and the likeliest token after every one of them or after the last."""
        batch = self.batch
        ids = self._rng.integers(3, self.vocabulary, count)
        chosen: list[int] = []
        for first in range(0, count, 512):
            part = ids[first : first + 512]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = int(token), start + first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or first + i == count - 1
            if self.lib.llama_decode(self.context, batch):
                raise UsageError("llama.cpp failed in llama_decode", "the context may be too short")
            wanted = [i for i in range(len(part)) if batch.logits[i]]
            chosen += [self._likeliest(i) for i in wanted]
        return chosen

    def _likeliest(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)  # waits for the computation
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.cache, True)
        self.depth = 0

    def _go_to(self, depth: int) -> None:
        """Makes the cache hold depth tokens: from a file, or by reading random ones."""
        if depth == self.depth:
            return
        self._clear()
        if depth:
            file = self._state_file(depth)
            if not (file.exists() and self._restore(file, depth)):
                self._clear()
                for start in range(0, depth, 512):
                    self._decode(start, min(512, depth - start), every=False)
                self._save(file, depth)
        if depth and self.lib.llama_memory_seq_pos_max(self.cache, 0) != depth - 1:
            raise UsageError("llama.cpp's cache is not where it should be", "remove the files of earlier states")
        self.depth = depth

    def _state_file(self, depth: int) -> Path:
        stat = os.stat(self.path)
        context = self.settings["depth"] + self.settings["room"]
        key = f"{os.path.realpath(self.path)} {stat.st_size} {stat.st_mtime_ns} {self.lib.__version__} {context}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / "iolite-bench" / f"llama-{digest}-{depth}.state"

    def _save(self, file: Path, depth: int) -> None:
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        tokens = (self.lib.llama_token * depth)()
        written = self.lib.llama_state_seq_save_file(self.context, str(partial).encode(), 0, tokens, depth)
        if written:
            partial.replace(file)
        else:  # no room for it: the next run reads the tokens again
            partial.unlink(missing_ok=True)

    def _restore(self, file: Path, depth: int) -> bool:
        tokens, count = (self.lib.llama_token * depth)(), ctypes.c_size_t(0)
        read = self.lib.llama_state_seq_load_file(
            self.context, str(file).encode(), 0, tokens, depth, ctypes.byref(count)
        )
        return bool(read) and count.value == depth


ENGINES = {"iolite": Iolite, "llama.cpp": LlamaCpp}


def serve(engine: Iolite | LlamaCpp, requests: TextIO, answers: TextIO) -> None:
    """Obeys until the requests end."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"value": getattr(engine, request.pop("do"))(**request)}
        except IoliteError as error:
            answer = {"error": str(error), "hint": error.hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_the_parent() -> None:
    """A stopped process whose parent is gone would hold its memory for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    _end_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    try:
        engine = ENGINES[arguments.engine](arguments.model, arguments.settings)
    except IoliteError as error:
        answers.write(json.dumps({"error": str(error), "hint": error.hint}) + "\n")
        return
    serve(engine, sys.stdin, answers)


if __name__ == "__main__":
    main()
