"""llama.cpp drafts with the GGUF drafters that iolite writes, and its drafts are iolite's.

The steps are those of llama.cpp's own `draft-mtp`: a second context reads the first one's keys and values, and every
step of a chain stands at one position. What hands hidden states over is in its C++ interface; `_nextn` finds that by
the names that compilers on Linux and macOS give it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.gguf_model import save_tiny_drafter
from torch import Tensor

from iolite.cache import KVCache
from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.drafter import load_drafter
from iolite.checkpoint.source import open_source
from iolite.kernels import ops
from iolite.model.drafter import CachedView
from iolite.model.prefill import prefill
from iolite.prompt import Prompt

IDS = [2, *range(300, 380)]  # text ids of the embedded model's tokenizer, past several windows of 16
NEWEST = 333
DEEPEST = 6


def _nextn(name: str, result: Any, *arguments: Any) -> Any:
    """llama_{name} of llama.cpp's C++ interface, whose first argument is a context."""
    import llama_cpp

    plain, letters = f"llama_{name}", {ctypes.c_bool: "b", ctypes.c_int32: "i"}
    mangled = f"_Z{len(plain)}{plain}P13llama_context{''.join(letters[kind] for kind in arguments)}"
    function = llama_cpp.llama_cpp._lib[mangled]
    function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
    return function


@contextmanager
def context(model: Any, other: Any = None) -> Iterator[Any]:
    """A context of one thread, float32 keys and values; `other`: the one whose keys and values it reads."""
    import llama_cpp

    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 128
    settings.n_threads = settings.n_threads_batch = 1
    settings.swa_full = False
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if other:
        settings.ctx_type, settings.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, other
    found = llama_cpp.llama_init_from_model(model, settings)
    assert found, "llama.cpp makes no context"
    set_embeddings = _nextn("set_embeddings_nextn", None, ctypes.c_bool, ctypes.c_bool)
    set_embeddings(found, True, other is not None)
    yield found
    llama_cpp.llama_free(found)


class Peer:
    """A model and its drafter in llama.cpp."""

    def __init__(self, model: Any, drafter: Any) -> None:
        self.model, self.drafter = model, drafter
        self._row = _nextn("get_embeddings_nextn_ith", ctypes.POINTER(ctypes.c_float), ctypes.c_int32)

    def chain(self, ids: Sequence[int], count: int = DEEPEST) -> Tensor:
        """[count, vocabulary]: a greedy chain's scores behind ids and NEWEST."""
        import llama_cpp

        width, size = llama_cpp.llama_model_n_embd(self.model.model), self.model.size
        with ExitStack() as stack:
            target = stack.enter_context(context(self.model.model))
            draft = stack.enter_context(context(self.drafter.model, target))
            for i, read in enumerate(ids):
                self._pass(target, read, i, None)
            hidden = np.ctypeslib.as_array(self._row(target, 0), (width,)).copy()
            token, found = NEWEST, []
            for _ in range(count):
                self._pass(draft, token, len(ids), hidden)
                scores = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(draft, 0), (size,)).copy()
                hidden = np.ctypeslib.as_array(self._row(draft, 0), (width,)).copy()
                found.append(torch.from_numpy(scores))
                token = int(scores.argmax())
        return torch.stack(found)

    def _pass(self, where: Any, token: int, position: int, hidden: np.ndarray | None) -> None:
        """One token, with the hidden state that it was drawn from for a drafter."""
        import llama_cpp

        batch = llama_cpp.llama_batch_ext_init(where)
        index = llama_cpp.llama_batch_ext_add_token(batch, 0, token)
        assert index == 0
        assert llama_cpp.llama_batch_ext_set_pos(batch, index, ctypes.byref(llama_cpp.llama_pos(position)))
        assert llama_cpp.llama_batch_ext_set_output_logits(batch, index, True)
        if hidden is not None:
            state = llama_cpp.llama_embd(hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 1, len(hidden))
            assert llama_cpp.llama_batch_ext_set_embd_token(batch, index, state)
        assert llama_cpp.llama_process(where, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
        llama_cpp.llama_batch_ext_free(batch)


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The kind of the weights -> (model, drafter)."""
    folder = tmp_path_factory.mktemp("mtp")
    drafter, source = save_tiny_drafter(folder / "drafter"), open_source(str(tiny))
    beside = Beside(embedders=False, drafter=drafter)
    made = {kind: to_gguf(source, folder / f"{kind}.gguf", kind, beside) for kind in ("f32", "q4_0")}
    return {kind: (paths[0], paths[-1]) for kind, paths in made.items()}


@contextmanager
def peer(llama: ModuleType, model: Path, drafter: Path) -> Iterator[Peer]:
    with llama.Llama(model) as target, llama.Llama(drafter) as draft:
        yield Peer(target, draft)


@torch.inference_mode()
def our_chain(
    llama: ModuleType, files: tuple[Path, Path], ids: Sequence[int], count: int = DEEPEST, wrong: int = 0
) -> Tensor:
    """The same with the numbers in the files and float32 between them; wrong: positions further than is right."""
    model, drafter = files
    network, draft = llama.exact_network(model), load_drafter(drafter, dtype=torch.float32)
    cache, token, found = KVCache(network.config.text), torch.tensor([NEWEST]), []
    with ops.only_reference():
        hidden = torch.cat(list(prefill(network, Prompt(ids=list(ids), text=""), cache)))[-1:]
        view = CachedView(network, [cache])
        view.positions += wrong
        for _ in range(count):
            scores, hidden = draft(network.language_model.embed(token), hidden, view)
            token = scores.argmax(-1)
            found.append(scores[0])
    return torch.stack(found)


# gelu out of llama.cpp's table of fp16 numbers moves these scores by 3e-4 of their size.
BOUND = 1e-3


@pytest.mark.parametrize("length", [10, 15, 16, 17, 81])
def test_drafts(llama: ModuleType, files: dict[str, tuple[Path, Path]], length: int) -> None:
    """Six steps deep, behind less than a window, just a window, and more."""
    ours = our_chain(llama, files["f32"], IDS[:length])
    with peer(llama, *files["f32"]) as theirs:
        scores = theirs.chain(IDS[:length])
    assert torch.equal(scores.argmax(-1), ours.argmax(-1))
    for step in range(DEEPEST):
        assert llama.distance(scores[step], ours[step]) <= BOUND * ours[step].square().mean().sqrt(), step


def test_a_mistake_would_show(llama: ModuleType, files: dict[str, tuple[Path, Path]]) -> None:
    """One position further is far beyond the bound."""
    ours = our_chain(llama, files["f32"], IDS, count=1, wrong=1)
    with peer(llama, *files["f32"]) as theirs:
        assert llama.distance(theirs.chain(IDS, count=1), ours) > 10 * BOUND * ours.square().mean().sqrt()


def test_packed_weights(llama: ModuleType, files: dict[str, tuple[Path, Path]]) -> None:
    """llama.cpp rounds activations to 8 bits for them, in the model and in the drafter."""
    ours = our_chain(llama, files["q4_0"], IDS, count=1)
    with peer(llama, *files["q4_0"]) as theirs:
        scores = theirs.chain(IDS, count=1)
    assert int(scores.argmax()) == int(ours.argmax())
    assert llama.distance(scores, ours) <= 0.03 * ours.square().mean().sqrt()
