"""Broken checkpoints, one per line of the table: each gets its own clear error, exit code 2 and no traceback."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys

import pytest
import safetensors.torch
import torch

from iolite.checkpoint.folder import INDEX, WEIGHTS, load_folder, save_folder
from iolite.cli import run_command
from iolite.errors import CheckpointError

EMBED = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"


def in_config(**changes):
    """Sets keys of config.json; text__x means text_config.x. None removes the key."""

    def breaks(folder):
        path = folder / "config.json"
        data = json.loads(path.read_text())
        for key, value in changes.items():
            place, _, name = key.rpartition("__")
            target = data[f"{place}_config"] if place else data
            if value is None:
                del target[name]
            else:
                target[name] = value
        path.write_text(json.dumps(data))

    return breaks


def in_tensors(change):
    """Changes the dictionary of tensors and writes them again."""

    def breaks(folder):
        tensors = {k: v.clone() for k, v in safetensors.torch.load_file(folder / WEIGHTS).items()}
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)

    return breaks


def in_header(change):
    """Changes the parsed safetensors header; the data after it stay as they are."""

    def breaks(folder):
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return breaks


def in_index(change):
    """Saves the checkpoint as shards and changes the index."""

    def breaks(folder):
        config, model = load_folder(folder)
        save_folder(folder, model, config, max_shard_bytes=60_000)
        index = json.loads((folder / INDEX).read_text())
        change(index, folder)
        (folder / INDEX).write_text(json.dumps(index))

    return breaks


def text_file(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name):
    return lambda folder: (folder / name).unlink()


def only(name):
    """The weights replaced by a file of another kind."""

    def breaks(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"\x80\x04")

    return breaks


def cut(keep):
    def breaks(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])

    return breaks


def add_bytes(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"1234")


def set_length(length):
    def breaks(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])

    return breaks


def shift(name, begin, end):
    def change(header):
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return in_header(change)


def point_elsewhere(target):
    def change(index, folder):
        if target.endswith(".safetensors") and "/" in target:
            shutil.copyfile(folder / index["weight_map"][NORM], folder.parent / "x.safetensors")
        index["weight_map"][NORM] = target

    return in_index(change)


def delete_shard(index, folder):
    (folder / index["weight_map"][NORM]).unlink()


def as_fp8(tensors):
    tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)


def both_spellings(tensors):
    tensors["model.embed_vision.patch_ln1.bias"] = tensors["model.vision_embedder.patch_ln1.bias"].clone()


FULL = "full_attention"
# what is broken: (how, a piece of the message)
TABLE = {
    "config: missing": (without("config.json"), "config.json is missing"),
    "config: empty": (text_file("config.json", ""), "cannot be read as JSON"),
    "config: not JSON": (text_file("config.json", "{'model_type': 1}"), "cannot be read as JSON"),
    "config: not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "cannot be read as JSON"),
    "config: a list": (text_file("config.json", "[]"), "holds no JSON object"),
    "config: a key twice": (text_file("config.json", '{"model_type": "a", "model_type": "b"}'), "stands twice"),
    "config: nested too deep": (text_file("config.json", "[" * 99_999), "cannot be read as JSON"),
    "config: another architecture": (in_config(model_type="llama"), "model_type is 'llama'"),
    "config: no architecture": (in_config(model_type=None), "model_type is None"),
    "config: no text_config": (in_config(text_config=None), "text_config is missing"),
    "config: text_config is text": (in_config(text_config="big"), "text_config is missing"),
    "config: quantised": (in_config(quantization_config={"quant_method": "fp8"}), "quantised weights"),
    "mathematics: activation": (in_config(text__hidden_activation="silu"), "hidden_activation"),
    "mathematics: mixture of experts": (in_config(text__enable_moe_block=True), "enable_moe_block"),
    "mathematics: per-layer input": (in_config(text__hidden_size_per_layer_input=256), "hidden_size_per_layer_input"),
    "mathematics: all two-way": (in_config(text__use_bidirectional_attention="all"), "use_bidirectional_attention"),
    "mathematics: attention bias": (in_config(text__attention_bias=True), "attention_bias"),
    "mathematics: shared layers": (in_config(text__num_kv_shared_layers=2), "num_kv_shared_layers"),
    "mathematics: wide MLP": (in_config(text__use_double_wide_mlp=True), "use_double_wide_mlp"),
    "mathematics: yarn": (
        in_config(text__rope_parameters={FULL: {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0}}),
        "rope_type 'yarn'",
    ),
    "mathematics: a third kind of layer": (in_config(text__layer_types=["chunked_attention"] * 12), "layer_types"),
    "number: vocabulary of 2**40": (in_config(text__vocab_size=1 << 40), "vocab_size"),
    "number: negative width": (in_config(text__hidden_size=-64), "hidden_size"),
    "number: no layers": (in_config(text__num_hidden_layers=0), "num_hidden_layers"),
    "number: half a head": (in_config(text__num_attention_heads=2.5), "num_attention_heads"),
    "number: width as text": (in_config(text__hidden_size="64"), "hidden_size"),
    "number: heads that cannot be shared": (in_config(text__num_key_value_heads=3), "cannot share"),
    "number: odd head": (in_config(text__head_dim=15), "even"),
    "number: infinite epsilon": (in_config(text__rms_norm_eps=float("inf")), "rms_norm_eps"),
    "number: wider than the weights": (in_config(text__intermediate_size=137), "has the shape"),
    "weights: missing": (without(WEIGHTS), "holds no weights"),
    "weights: empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "too short"),
    "weights: a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "cannot be read"),
    "weights: pickled": (only("pytorch_model.bin"), "as pickle"),
    "weights: GGUF": (only("model-Q4_0.gguf"), "GGUF"),
    "weights: another file renamed": (text_file(WEIGHTS, "<!DOCTYPE html><html>"), "not a safetensors file"),
    "weights: cut in the data": (cut(0.9), "holds"),
    "weights: cut in the header": (cut(0.01), "claims a header"),
    "weights: header longer than the file": (set_length(90_000_000), "claims a header"),
    "weights: header of 2**64 bytes": (set_length((1 << 64) - 1), "claims a header"),
    "weights: header of no bytes": (set_length(0), "not valid JSON"),
    "weights: negative offset": (shift(EMBED, -(1 << 40), 0), "impossible offsets"),
    "weights: offsets beyond the file": (shift(EMBED, 1 << 40, 1 << 40), "holds"),
    "weights: overlap": (shift(EMBED, -4, -4), "overlaps|impossible offsets"),
    "weights: hole": (add_bytes, "belong to no tensor"),
    "weights: no such format": (in_header(lambda h: h[NORM].update(dtype="FLOAT")), "unknown format 'FLOAT'"),
    "weights: 8-bit float": (in_tensors(as_fp8), "F8_E4M3 are not supported"),
    "tensors: shape against its bytes": (in_header(lambda h: h[NORM].update(shape=[65])), "needs 260 bytes"),
    "tensors: wrong shape": (in_tensors(lambda t: t.update({NORM: torch.ones(8, 8)})), r"has the shape \[8, 8\]"),
    "tensors: one missing": (in_tensors(lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "tensors: all missing": (in_tensors(lambda t: t.clear()), "tensors .* are missing"),
    "tensors: one too many": (in_tensors(lambda t: t.update({"model.mtp.weight": torch.ones(2)})), "not a part"),
    "tensors: a stranger without a prefix": (in_tensors(lambda t: t.update(step=torch.ones(2))), "tensor step is"),
    "tensors: the head of a tied model, misshapen": (
        in_tensors(lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})),
        "lm_head.weight has the shape",
    ),
    "tensors: in both spellings": (in_tensors(both_spellings), "there twice"),
    "index: a shard missing": (in_index(delete_shard), "weight files are missing"),
    "index: no weight_map": (in_index(lambda i, _: i.pop("weight_map")), "no weight_map"),
    "index: weight_map is a list": (in_index(lambda i, _: i.update(weight_map=["a"])), "no weight_map"),
    "index: out of the folder": (point_elsewhere("../x.safetensors"), "names the file"),
    "index: an absolute path": (point_elsewhere("/etc/x.safetensors"), "names the file"),
    "index: Windows path": (point_elsewhere("..\\x.safetensors"), "names the file"),
    "index: a number for a file": (in_index(lambda i, _: i["weight_map"].update({NORM: 3})), "names the file 3"),
    "index: a pickled shard": (point_elsewhere("pytorch_model-00001-of-00002.bin"), "names the file"),
    "index: the wrong shard": (
        in_index(lambda i, _: i["weight_map"].update({NORM: i["weight_map"][EMBED]})),
        "but it does not",
    ),
    "index: a tensor not listed": (in_index(lambda i, _: i["weight_map"].pop(NORM)), "does not say"),
}


@pytest.mark.parametrize("name", TABLE)
def test_broken_checkpoint(tiny_folder, tmp_path, monkeypatch, capsys, name):
    breaks, message = TABLE[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("published"), folder)
    breaks(folder)
    with pytest.raises(CheckpointError, match=message):
        load_folder(folder)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    capsys.readouterr()
    assert run_command(["run", "--model", str(folder), "hello"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert len(lines) == 1 or lines[1].startswith("hint: ")


def test_the_same_folder_unbroken_loads(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("published"), folder)
    load_folder(folder)


def test_a_link_to_the_weights_is_followed(tiny_folder, tmp_path):
    """The Hugging Face cache consists of links."""
    for path in tiny_folder("published").iterdir():
        (tmp_path / path.name).symlink_to(path)
    load_folder(tmp_path)
