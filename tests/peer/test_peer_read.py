"""iolite reads what llama.cpp's own quantiser and converter write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.gguf_model import save_tiny_drafter

from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.folder import open_weights, read_config
from iolite.checkpoint.gguf import GgufFile
from iolite.checkpoint.gguf_drafter import open_drafter, open_gguf_drafter, write_drafter
from iolite.checkpoint.gguf_metadata import read_tokenizer
from iolite.checkpoint.gguf_source import GgufSource
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.source import open_source

IDS = [2, *range(300, 380)]

# name -> (llama.cpp's number for it, whether its weights are quantised anew into 8 bits)
QUANTISED = {
    "F16": (1, False),
    "BF16": (32, False),
    "Q4_0": (2, False),
    "Q4_1": (3, False),
    "Q5_0": (8, False),
    "Q5_1": (9, True),
    "Q8_0": (7, False),
    "Q4_K": (15, False),
    "Q5_K": (17, True),
    "Q6_K": (18, True),
}


@pytest.fixture(scope="module")
def floats(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("floats") / "tiny.gguf"
    to_gguf(open_source(str(tiny)), path, "f32", Beside(embedders=False))
    return path


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised(llama: ModuleType, floats: Path, tmp_path: Path, kind: str, pure: bool) -> None:
    """Not pure, llama.cpp chooses a better type for some matrices (the table is Q6_K in all of these but Q8_0)."""
    number, requantised = QUANTISED[kind]
    path = llama.quantise(floats, tmp_path / f"tiny-{kind}.gguf", number, pure=pure)
    types = {tensor.type for tensor in GgufFile(path).tensors.values() if len(tensor.shape) == 2}
    assert kind in types
    assert not pure or types == {kind}

    exact = llama.exact_network(path)
    truth = llama.logits_of(exact, IDS)
    expected = llama.distance(llama.rounded_logits(exact, IDS, kind), truth)
    source = GgufSource(path)
    ours = llama.logits_of(assemble(source.config, read_weights(source, None), dtype=torch.float32).eval(), IDS)
    with llama.Llama(path) as peer:
        theirs = peer.logits(IDS)
    assert llama.distance(theirs, truth) <= llama.SLACK * expected
    # Weights that are rounded to 8 bits by blocks of 32 move the products as activations do that are: as far once more.
    requantised |= types & {"Q5_1", "Q5_K", "Q6_K"} != set()
    assert llama.distance(ours, truth) <= (llama.SLACK * expected if requantised else 0.2 * expected)


def converted(sources: Path, folder: Path, target: Path, *options: str) -> Path:
    """The folder as llama.cpp's converter writes it."""
    script = str(sources / "convert_hf_to_gguf.py")
    command = [sys.executable, script, str(folder), "--outfile", str(target), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_the_converters_files_are_ours(llama_sources: Path, tiny: Path, tmp_path: Path, kind: str) -> None:
    """Tensor by tensor the same bytes, key by key the same value: but for three that we write with more sense."""
    theirs = GgufFile(converted(llama_sources, tiny, tmp_path / "theirs.gguf", "--outtype", kind))
    to_gguf(open_source(str(tiny)), tmp_path / "ours.gguf", kind, Beside())
    ours = GgufFile(tmp_path / "ours.gguf")
    assert {n: (t.shape, t.type) for n, t in ours.tensors.items()} == {
        n: (t.shape, t.type) for n, t in theirs.tensors.items()
    }
    for name in ours.tensors:
        assert torch.equal(ours.raw(name), theirs.raw(name)), name
    assert differing(ours, theirs) == {"general.name", "general.sampling.temp"}  # greedy decoding is temperature 0


@pytest.mark.slow
def test_the_converters_embedders_are_ours(llama_sources: Path, tiny: Path, tmp_path: Path) -> None:
    theirs = GgufFile(converted(llama_sources, tiny, tmp_path / "theirs.gguf", "--outtype", "bf16", "--mmproj"))
    to_gguf(open_source(str(tiny)), tmp_path / "ours.gguf", "bf16", Beside())
    ours = GgufFile(tmp_path / "mmproj-ours.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert (tensor.shape, tensor.type) == (theirs.tensors[name].shape, theirs.tensors[name].type)
        assert torch.equal(ours.raw(name), theirs.raw(name)), name
    sampling = {key for key in theirs.metadata if key.startswith("general.sampling.")}  # not an embedder's concern
    # The converter writes 128 mel bins for embedders that have none, and llama.cpp reads 640 whatever is there.
    assert differing(ours, theirs) == sampling | {
        "general.name", "clip.audio.num_mel_bins", "iolite.processor_config"
    }  # fmt: skip


@pytest.mark.slow
def test_the_converters_files_are_read(llama_sources: Path, tiny: Path, tmp_path: Path) -> None:
    path = converted(llama_sources, tiny, tmp_path / "tiny.gguf", "--outtype", "bf16")
    converted(llama_sources, tiny, tmp_path / "mmproj-tiny.gguf", "--outtype", "bf16", "--mmproj")
    source, config = GgufSource(path), read_config(tiny)
    assert source.config.text == config.text
    assert source.config.modalities == config.modalities
    stored = open_weights(tiny)
    for name, weight in read_weights(source, None).items():
        assert torch.equal(weight.float(), stored[name].tensor().float()), name


def differing(a: GgufFile, b: GgufFile) -> set[str]:
    def plain(value: object) -> object:
        return value.tolist() if hasattr(value, "tolist") else value

    keys = a.metadata.keys() | b.metadata.keys()
    return {key for key in keys if plain(a.metadata.get(key)) != plain(b.metadata.get(key))}


def test_the_published_vocabulary(llama_sources: Path) -> None:
    """The tokenizer of Gemma 4 out of llama.cpp's test data: 262,144 tokens, and the ids that Hugging Face gives."""
    path = llama_sources / "models" / "ggml-vocab-gemma-4.gguf"
    tokenizer = read_tokenizer(GgufFile(path).metadata, path.name)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = path.with_suffix(".gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) > 40
    for text, ids in zip(texts, wanted, strict=False):
        assert tokenizer.encode(text) == [int(i) for i in ids.split()], text
    assert tokenizer.encode("<bos><|turn>user") == [2, 105, 2364]
    assert tokenizer.vocab_size == 262_144


@pytest.mark.slow
def test_the_converters_drafter_is_ours(llama_sources: Path, tmp_path: Path) -> None:
    folder = save_tiny_drafter(tmp_path / "drafter")
    theirs = GgufFile(converted(llama_sources, folder, tmp_path / "theirs.gguf", "--outtype", "bf16"))
    write_drafter(tmp_path / "ours.gguf", open_drafter(folder), "bf16")
    ours = GgufFile(tmp_path / "ours.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        assert torch.equal(ours.raw(name), theirs.raw(name)), name
    assert differing(ours, theirs) == {"general.name"}
    assert open_gguf_drafter(theirs.path).text == open_drafter(folder).text
