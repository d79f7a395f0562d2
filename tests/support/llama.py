"""llama.cpp through the plain functions of llama-cpp-python, and what its arithmetic is expected to round.

llama.cpp multiplies a matrix with activations that it first rounds to a format that goes with the matrix: bf16 or f16
for matrices of these, blocks of 32 (Q8_0) or 256 (K types) in 8 bits for quantised ones. It also looks gelu up in a
table of fp16 numbers. `rounded_logits` computes the same network in float32 with just this rounding put in; how far
it moves the logits is how far llama.cpp's may be from the exact ones. On the models here the two distances (root mean
square over all positions and tokens) agree within a tenth, and a mistake in a tensor or a setting moves logits by their
own size.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import llama_cpp
import numpy as np
import torch
from llama_cpp import mtmd_cpp
from torch import Tensor
from torch.nn import functional as F

from iolite.checkpoint import gguf_names
from iolite.checkpoint.gguf import GgufFile
from iolite.checkpoint.gguf_blocks import dequantize
from iolite.checkpoint.gguf_source import GgufSource
from iolite.generate.loop import prompt_logits
from iolite.kernels import ops, reference
from iolite.model.unified import Unified
from iolite.prompt import Prompt

CONTEXT = 512
SLACK = 1.5  # of the expected distance, for another order of sums

_linear = F.linear


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp's own log would bury pytest's output."""


llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
mtmd_cpp.mtmd_log_set(_quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Llama:
    """A GGUF model in llama.cpp: one thread, float32 keys and values, no flash attention."""

    def __init__(self, path: Path) -> None:
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        llama_cpp.llama_model_free(self.model)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [len(ids), vocabulary]."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self.model, settings)
        assert context
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            assert llama_cpp.llama_decode(context, batch) == 0
            rows = (llama_cpp.llama_get_logits_ith(context, i) for i in range(len(ids)))
            return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.size,)).copy() for row in rows]))
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def encode(self, text: str) -> list[int]:
        """Ids without what llama.cpp puts in front by itself; special tokens are recognised."""
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)
        assert count >= 0
        return list(out[:count])

    def template(self) -> str | None:
        found = llama_cpp.llama_model_chat_template(self.model, None)
        return None if found is None else found.decode()

    def ends(self) -> set[int]:
        """Ids that end an answer."""
        return {i for i in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, i)}

    def soft_tokens(self, mmproj: Path, media: np.ndarray) -> Tensor:
        """What the embedders make of a picture (uint8 [height, width, 3]) or sound (float32 [samples])."""
        with contextlib.ExitStack() as stack:
            settings = mtmd_cpp.mtmd_context_params_default()
            settings.use_gpu, settings.n_threads, settings.warmup, settings.print_timings = False, 1, False, False
            context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.model, settings)
            assert context, f"llama.cpp does not load {mmproj}"
            stack.callback(mtmd_cpp.mtmd_free, context)
            bitmap = _bitmap(media)
            stack.callback(mtmd_cpp.mtmd_bitmap_free, bitmap)
            chunks = mtmd_cpp.mtmd_input_chunks_init()
            stack.callback(mtmd_cpp.mtmd_input_chunks_free, chunks)
            marker = mtmd_cpp.mtmd_default_marker()
            text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
            found = [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]
            (chunk,) = [
                c for c in found if mtmd_cpp.mtmd_input_chunk_get_type(c) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT
            ]
            count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
            width = llama_cpp.llama_model_n_embd(self.model)
            values = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), (count, width))
            return torch.from_numpy(values.copy())


def _bitmap(media: np.ndarray) -> object:
    if media.ndim == 1:
        values = np.ascontiguousarray(media, np.float32)
        return mtmd_cpp.mtmd_bitmap_init_from_audio(len(values), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
    height, width, _ = media.shape
    pixels = np.ascontiguousarray(media, np.uint8)
    return mtmd_cpp.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))


def quantise(source: Path, target: Path, file_type: int, *, pure: bool = False) -> Path:
    """A float GGUF file as llama.cpp's quantiser writes it."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.pure = 1, file_type, pure
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    assert done == 0, f"llama.cpp does not quantise {source} to {file_type}"
    return target


# The same network in float32


def exact_network(path: Path) -> Unified:
    """The network with the numbers that a GGUF file's blocks stand for, in float32; text only."""
    source, file = GgufSource(path), GgufFile(path)
    network = Unified(source.config)
    for name, weight in network.state_dict().items():
        tensor = file.tensors.get(gguf_names.to_gguf(name))
        if tensor is not None:
            weight.copy_(dequantize(file.raw(tensor.name), tensor.type, tensor.shape))
    return network.eval().requires_grad_(False)


def logits_of(network: Unified, ids: Sequence[int]) -> Tensor:
    with ops.only_reference(), torch.inference_mode():
        return prompt_logits(network, Prompt(ids=list(ids), text=""))


def rounded_logits(network: Unified, ids: Sequence[int], kind: str) -> Tensor:
    """The logits with activations rounded as llama.cpp does for matrices of the type `kind`, and gelu in fp16."""
    with _rounding(_ROUND.get(kind, _blocks_of(256 if kind.endswith("K") else 32))):
        return logits_of(network, ids)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square over all positions and tokens."""
    return (a - b).square().mean().sqrt().item()


@contextlib.contextmanager
def _rounding(round_: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _linear(round_(x), weight, bias)

    def geglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate.half().float(), approximate="tanh").half().float() * up

    with mock.patch.object(F, "linear", linear), mock.patch.object(reference, "geglu", geglu):
        yield


def _blocks_of(size: int) -> Callable[[Tensor], Tensor]:
    def round_(x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, size))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(step == 0, 0, 1 / step)
        return ((blocks * inverse).round() * (step.half().float() if size == 32 else step)).flatten(-2)

    return round_


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda x: x,
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
}
