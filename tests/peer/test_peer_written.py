"""llama.cpp runs the GGUF files that iolite writes, and computes what iolite computes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.gguf_model import save_tiny, save_tiny_drafter

from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.gguf_drafter import open_drafter, write_drafter
from iolite.checkpoint.gguf_source import GgufSource
from iolite.checkpoint.hub import nano_folder
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.source import open_source
from iolite.model.unified import Unified

# Text ids of the embedded model's tokenizer, past several windows of 16.
IDS = [2, *range(300, 380)]

TEXTS = (
    "Hello, what number is this?",
    "",
    " ",
    "   three spaces, and ▁ itself",
    "one\ntwo\n\nthree\n\n\n\nfour",
    "\n",
    "\t\r\n tabs",
    "naïve Zürich 東京 — €5, 😀👩‍👩‍👧",
    "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><|image|><|audio|>',
    "<0x41> <unk> <unused1> </s> <|nothing|>",
    "x" * 300,
    "0123456789 3.14 1,000",
)


def model(name: str, tmp_path: Path) -> Path:
    return nano_folder() if name == "nano" else save_tiny(tmp_path / name, name, tied=name != "own-values")


def written(folder: Path, path: Path, to: str) -> Path:
    to_gguf(open_source(str(folder)), path, to, Beside())
    return path


@pytest.mark.parametrize("to", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["published", "own-values", "nano"])
def test_logits(llama: ModuleType, tmp_path: Path, name: str, to: str) -> None:
    """At every position, as far from exact ones as the rounding of activations puts them, and no further."""
    path = written(model(name, tmp_path), tmp_path / "model.gguf", to)
    network = llama.exact_network(path)
    ours = llama.logits_of(network, IDS)
    expected = llama.distance(llama.rounded_logits(network, IDS, to.upper()), ours)
    with llama.Llama(path) as peer:
        theirs = peer.logits(IDS)
    assert llama.distance(theirs, ours) <= llama.SLACK * expected
    assert expected < 0.05 * ours.square().mean().sqrt()  # the bound is tight beside the logits


def test_what_the_kernels_compute(llama: ModuleType, tmp_path: Path) -> None:
    """The packed network with the kernels of this machine, which round activations as llama.cpp does."""
    path = written(nano_folder(), tmp_path / "nano.gguf", "q4_0")
    source = GgufSource(path)
    network = assemble(source.config, read_weights(source, None), dtype=torch.float32).eval()
    exact = llama.exact_network(path)
    truth = llama.logits_of(exact, IDS)
    expected = llama.distance(llama.rounded_logits(exact, IDS, "Q4_0"), truth)
    from iolite.generate.loop import prompt_logits
    from iolite.prompt import Prompt

    with torch.inference_mode():
        ours = prompt_logits(network, Prompt(ids=IDS, text=""))
    with llama.Llama(path) as peer:
        theirs = peer.logits(IDS)
    # Each is off by the rounding; they round the same numbers, so they need not be off in the same direction.
    assert llama.distance(ours, truth) <= llama.SLACK * expected
    assert llama.distance(theirs, ours) <= llama.SLACK * 2**0.5 * expected


def test_a_mistake_would_show(llama: ModuleType, tmp_path: Path) -> None:
    """One norm's weights a hundredth too large is beyond the bound for float files."""
    path = written(nano_folder(), tmp_path / "nano.gguf", "bf16")
    network = llama.exact_network(path)
    expected = llama.distance(llama.rounded_logits(network, IDS, "BF16"), llama.logits_of(network, IDS))
    network.language_model.layers[2].post_attention_layernorm.weight.mul_(1.01)
    with llama.Llama(path) as peer:
        assert llama.distance(peer.logits(IDS), llama.logits_of(network, IDS)) > llama.SLACK * expected


def test_the_tokenizer(llama: ModuleType, tmp_path: Path) -> None:
    path = written(nano_folder(), tmp_path / "nano.gguf", "bf16")
    ours = GgufSource(path).tokenizer()
    with llama.Llama(path) as peer:
        for text in TEXTS:
            assert peer.encode(text) == ours.encode(text), text


def test_the_settings(llama: ModuleType, tmp_path: Path) -> None:
    path = written(nano_folder(), tmp_path / "nano.gguf", "bf16")
    source = GgufSource(path)
    with llama.Llama(path) as peer:
        assert peer.template() == source.template().source
        assert peer.ends() == set(source.generation().eos_token_ids)


# Pictures and sounds


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(nano_folder(), tmp_path_factory.mktemp("nano") / "nano.gguf", "f32")


@pytest.fixture(scope="module")
def network(nano: Path) -> Unified:
    source = GgufSource(nano)
    return assemble(source.config, read_weights(source, None), dtype=torch.float32).eval()


def test_a_picture(llama: ModuleType, nano: Path, network: Unified) -> None:
    """480 x 336 pixels are 70 patches, the fewest that llama.cpp makes, so that it does not resize."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (336, 480, 3)).astype(np.uint8)
    side = 48
    patches = picture.reshape(7, side, 10, side, 3).transpose(0, 2, 1, 3, 4).reshape(70, -1)
    positions = torch.tensor([(x, y) for y in range(7) for x in range(10)])
    with torch.inference_mode():
        pixels = torch.from_numpy(patches).float() / 255
        ours = network.embed_vision(network.vision_embedder(pixels, positions))
    with llama.Llama(nano) as peer:
        theirs = peer.soft_tokens(nano.with_name("mmproj-nano.gguf"), picture)
    assert theirs.shape == ours.shape
    # im2col and the products are in float32 on both sides.
    assert llama.distance(theirs, ours) <= 1e-4 * ours.square().mean().sqrt()


def test_sound(llama: ModuleType, nano: Path, network: Unified) -> None:
    """Frames of 640 samples, the last one filled up with silence."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 640 * 5 + 100).astype(np.float32)
    frames = torch.from_numpy(np.pad(samples, (0, 540)).reshape(6, 640))
    with torch.inference_mode():
        ours = network.embed_audio(frames)
    with llama.Llama(nano) as peer:
        theirs = peer.soft_tokens(nano.with_name("mmproj-nano.gguf"), samples)
    assert theirs.shape == ours.shape
    assert llama.distance(theirs, ours) <= 1e-4 * ours.square().mean().sqrt()


def test_a_drafter_loads(llama: ModuleType, tmp_path: Path) -> None:
    """Keys and tensors are what llama.cpp's loader asks for. What a drafter computes needs its model's cache."""
    drafter = open_drafter(save_tiny_drafter(tmp_path / "drafter"))
    for to in ("bf16", "q8_0", "q4_0"):
        write_drafter(tmp_path / "mtp.gguf", drafter, to)
        with llama.Llama(tmp_path / "mtp.gguf") as peer:
            assert peer.size == drafter.text.vocab_size
            assert peer.encode("Hello") == drafter.tokenizer.encode("Hello")
