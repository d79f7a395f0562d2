"""`iolite quantize`, and `--quantize` of the commands that load a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.compressed import change_config, change_tensors, compress_folder

import iolite
from iolite.checkpoint.packing import read_weights
from iolite.checkpoint.source import open_source
from iolite.cli import options, run_command
from iolite.cli import quantize as quantize_module
from iolite.cli.terminal import loading

DEMO = Path(__file__).parents[2] / "docs" / "demo"


def quantize(*arguments):
    return run_command(["quantize", *map(str, arguments)])


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_folder_answers_as_the_model_packed_in_memory(random_model, tmp_path, capsys, scheme):
    folder = tmp_path / "packed"
    assert quantize(random_model, folder, "--to", scheme) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert " became " in err
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "iolite", "scheme": scheme, "version": 1}
    written, memory = iolite.load(folder), iolite.load(random_model, quantize=scheme)
    assert written.scheme == scheme
    prompt = written.prompt("what number")
    assert prompt.ids == memory.prompt("what number").ids
    assert (written.defaults, written.processor) == (memory.defaults, memory.processor)
    assert written.render("a") == memory.render("a")
    assert torch.equal(written.logits(prompt), memory.logits(prompt))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_embedded_model_sees_as_before(tmp_path, capsys, piped):
    folder = tmp_path / "nano"
    assert quantize("nano", folder) == 0
    capsys.readouterr()
    question = ["What number is this?", "--image", str(DEMO / "number.png"), "--temp", "0"]
    assert run_command(["run", str(folder), *question]) == 0
    assert capsys.readouterr().out == "47\n"
    # Its embedders, which stay bfloat16, are a third of it.
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.6 * (Path(iolite.__file__).parent / "nano" / "model.safetensors").stat().st_size


def test_gguf_and_compressed_tensors_become_packed_folders(random_model, tmp_path):
    gguf, compressed = tmp_path / "model.gguf", shutil.copytree(random_model, tmp_path / "compressed")
    assert run_command(["convert", str(random_model), str(gguf), "--to", "q4_0"]) == 0
    compress_folder(compressed)
    for source in (gguf, compressed):
        folder = tmp_path / f"{source.stem} packed"
        assert quantize(source, folder) == 0
        assert (folder / "tokenizer.json").is_file()
        found, wanted = (read_weights(open_source(str(path)), None) for path in (folder, source))
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            # Packed ones bit for bit; floats become those of config.json, and GGUF keeps norms in float32.
            assert torch.equal(found[name].data, weight.data.to(found[name].data.dtype))
        assert iolite.load(folder).prompt("what").ids == iolite.load(source).prompt("what").ids


def test_force_replaces_what_is_there(random_model, tmp_path, capsys):
    folder = tmp_path / "packed"
    assert quantize(random_model, folder) == 0
    (folder / "README.md").write_text("mine")
    assert quantize(random_model, folder, "--to", "int8") == 2
    assert "is not empty" in capsys.readouterr().err
    assert iolite.load(folder).scheme == "int4"
    assert quantize(random_model, folder, "--to", "int8", "--force") == 0
    assert iolite.load(folder).scheme == "int8"
    assert (folder / "README.md").read_text() == "mine"


def test_an_interrupted_writing_is_not_taken_for_a_model(random_model, tmp_path, monkeypatch):
    from iolite.checkpoint import packing

    def weight(self, name):
        raise KeyboardInterrupt

    folder = tmp_path / "packed"
    monkeypatch.setattr(packing.PackingSource, "weight", weight)
    assert quantize(random_model, folder) == 130
    assert not (folder / "config.json").exists()
    assert not list(folder.glob("*.safetensors*"))


def refused(capsys, message, *arguments):
    assert quantize(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "\nhint: " in err


def test_places_that_are_refused(random_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    refused(capsys, "is a file", random_model, tmp_path / "file", "--force")
    refused(capsys, "is not empty", random_model, tmp_path)
    refused(capsys, "is where the model is read from", random_model, random_model, "--force")
    refused(capsys, "another command", random_model, tmp_path / "a.gguf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: usage)
    refused(capsys, "has 1.0 kB", random_model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_sources_that_are_refused(random_model, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert quantize(random_model, packed) == 0
    capsys.readouterr()
    refused(capsys, "is packed as int4 already", packed, tmp_path / "again")
    refused(capsys, "is packed as int4 already", packed, tmp_path / "again", "--to", "int8")
    refused(capsys, "there is no model", "./gone", tmp_path / "again")
    refused(capsys, "'int3' is not one of", random_model, tmp_path / "again", "--to", "int3")
    compressed = shutil.copytree(random_model, tmp_path / "compressed")
    compress_folder(compressed)
    refused(capsys, "is packed as int4 already", compressed, tmp_path / "again", "--to", "int8")
    change_config(compressed, lambda config: config["quantization_config"].update(quant_method="awq"))
    refused(capsys, "quantised by 'awq'", compressed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_that_are_no_numbers_are_named(random_model, tmp_path, capsys):
    broken = shutil.copytree(random_model, tmp_path / "broken")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    change_tensors(broken, lambda tensors: tensors[name].fill_(float("nan")))
    assert quantize(broken, tmp_path / "packed") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot quantise language_model.layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "packed" / "config.json").exists()


# --quantize and --kv of the commands that load a model


@pytest.fixture
def loads(random_model, monkeypatch):
    """The settings that models are loaded with; the model is another, at once."""
    from iolite.generate import model

    found, ready = [], iolite.load(random_model)

    def load(name, progress, **settings):
        progress(1, 4, "packing a tensor")
        found.append(settings)
        return ready

    monkeypatch.setattr(model, "load", load)
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["run", "nano", "what", "-n", "1"],
        ["chat", "nano"],
        ["transcribe", str(DEMO / "digits.wav"), "-n", "1"],
        ["bench", "nano", "--only", "load"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_loads_a_model_takes_quantize_and_kv(loads, piped, capsys, command):
    assert run_command([*command, "--quantize", "int4", "--kv", "float32", "--ctx-size", "64"]) == 0
    wanted = {"quantize": "int4", "kv": "float32", "context": 64, "device": None, "dtype": None}
    wanted["drafter"] = None if command[0] == "bench" else "auto"  # which loads one only to time it
    assert loads and all(found == wanted for found in loads)
    loads.clear()
    assert run_command(command) == 0
    assert all((found["quantize"], found["kv"]) == (None, "auto") for found in loads)
    for wrong in (["--quantize", "int3"], ["--kv", "int2"]):
        assert run_command([*command, *wrong]) == 2
        assert wrong[1] in capsys.readouterr().err


def test_the_settings_of_loading_are_those_of_the_flags():
    names = {name for option in options.LOADING for name in _parameter(option)}
    settings = dict.fromkeys(names, 1) | {"seed": 2}
    assert options.take_loading(settings) == dict.fromkeys(names, 1)
    assert settings == {"seed": 2}


def _parameter(option):
    import click

    return [p.name for p in click.command()(option(lambda: None)).params]


def test_run_with_packed_weights(capsys, piped):
    question = ["What colour is the shape?", "--image", str(DEMO / "shape.png"), "--temp", "0", "--verbose"]
    assert run_command(["run", "nano", *question, "--quantize", "int8"]) == 0
    out, err = capsys.readouterr()
    assert out == "blue\n"
    assert "int8 weights" in err


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    with loading("nano") as progress:
        progress(1, 4, "packing a tensor")
    assert capsys.readouterr() == ("", "")
    import rich.console

    shown = []

    class Status:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, text):
            shown.append(text)

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(rich.console.Console, "status", lambda self, text: shown.append(text) or Status())
    with loading("nano") as progress:
        progress(1, 4, "packing a\x1btensor")
    assert shown == ["Loading nano …", "Loading nano: 25 %, packing a\N{REPLACEMENT CHARACTER}tensor"]
