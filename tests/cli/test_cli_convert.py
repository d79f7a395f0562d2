"""`iolite convert`: the same model in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.gguf_model import save_tiny, save_tiny_drafter

import iolite
from iolite.checkpoint.folder import open_weights, read_config
from iolite.checkpoint.hub import nano_folder
from iolite.cli import run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "published")


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """Runs the command and returns the names of the files that it printed."""
    assert run_command(["convert", *map(str, arguments)]) == 0
    return [Path(line).name for line in capsys.readouterr().out.splitlines()]


def test_a_file_with_its_embedders(folder, tmp_path, capsys):
    assert convert(capsys, folder, tmp_path / "a.gguf") == ["a.gguf", "mmproj-a.gguf"]
    assert convert(capsys, folder, tmp_path / "b.GGUF", "--to", "q4_0", "--no-mmproj") == ["b.GGUF"]
    assert (tmp_path / "b.GGUF").stat().st_size < 0.4 * (tmp_path / "a.gguf").stat().st_size


def test_a_drafter(tmp_path, folder, capsys):
    drafter = save_tiny_drafter(tmp_path / "drafter")
    assert convert(capsys, drafter, tmp_path / "d.gguf") == ["d.gguf"]
    assert convert(capsys, folder, tmp_path / "a.gguf", "--drafter", drafter)[-1] == "mtp-a.gguf"
    assert (tmp_path / "mtp-a.gguf").stat().st_size == pytest.approx((tmp_path / "d.gguf").stat().st_size, abs=64)


def test_there_and_back(folder, tmp_path, capsys):
    """Through a GGUF file into a folder again: the same weights, settings and tokenizer."""
    convert(capsys, folder, tmp_path / "a.gguf")
    assert convert(capsys, tmp_path / "a.gguf", tmp_path / "back") == ["back"]
    back = tmp_path / "back"
    assert read_config(back) == read_config(folder)
    ours, theirs = open_weights(back), open_weights(folder)
    assert ours.keys() == theirs.keys()
    for name, stored in ours.items():
        assert torch.equal(stored.tensor(), theirs[name].tensor()), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        first, second = (json.loads((where / name).read_text(encoding="utf-8")) for where in (back, folder))
        assert first == second, name
    assert (back / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()


def test_packed_weights_stay_packed(tmp_path, capsys):
    """The embedded model at 4 bits, as a GGUF file and as a folder made of it, says the same."""
    convert(capsys, "nano", tmp_path / "a.gguf", "--to", "q4_0")
    convert(capsys, tmp_path / "a.gguf", tmp_path / "packed")
    convert(capsys, tmp_path / "packed", tmp_path / "again.gguf")
    convert(capsys, tmp_path / "a.gguf", tmp_path / "floats", "--to", "f32")
    models = [iolite.load(tmp_path / name) for name in ("a.gguf", "packed", "again.gguf")]
    prompt = models[0].prompt("What number is this?")
    scores = [model.logits(prompt) for model in models]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert [model.scheme for model in models] == ["int4"] * 3
    floats = iolite.load(tmp_path / "floats", dtype="float32").logits(prompt)
    assert (floats - scores[0]).square().mean() < 0.01 * floats.square().mean()  # 8-bit activations


def test_the_folder_of_another_model_is_replaced(folder, tmp_path, capsys):
    convert(capsys, "nano", tmp_path / "out")
    convert(capsys, folder, tmp_path / "out", "--to", "f32")
    assert read_config(tmp_path / "out").text == read_config(folder).text
    assert {stored.dtype for stored in open_weights(tmp_path / "out").values()} == {"F32"}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("nano", "{out}", "--to", "q4_0"), "a folder cannot hold q4_0"),
        (("{tiny}", "{tiny}"), "is where the model is read from"),
        (("no/such-model", "{out}/a.gguf"), "is not on this machine"),
        (("nano", "{out}/missing/a.gguf"), "cannot be written"),
    ],
)
def test_what_cannot_be_done(folder, tmp_path, capsys, arguments, fault):
    filled = [argument.format(out=tmp_path / "out", tiny=folder) for argument in arguments]
    assert run_command(["convert", *filled]) == 2
    assert fault in capsys.readouterr().err
    assert read_config(folder) and read_config(nano_folder())  # nothing was lost
