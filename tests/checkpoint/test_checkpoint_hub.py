"""Names of models: the embedded one, folders, and ids in the Hugging Face cache, in any letter case."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from iolite.checkpoint import hub
from iolite.checkpoint.folder import INDEX, WEIGHTS
from iolite.errors import CheckpointError, DownloadError

COMMIT, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def put_in(cache, tiny_folder):
    """Puts a tiny model under an id and a commit."""

    def put(name, commit=COMMIT, main=True, **content):
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        shutil.copytree(tiny_folder("published"), snapshot)
        if main:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)
        return snapshot

    return put


def test_nano_and_folders(cache, tmp_path, monkeypatch):
    assert hub.resolve("nano") == hub.nano_folder()
    assert hub.nano_folder().parts[-2:] == ("iolite", "nano")
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/hub") == cache
    for name in ("a.gguf", "b.bin"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert hub.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(str(tmp_path / "b.bin"))


@pytest.mark.parametrize("name", ["", "nothing", "a/b/c", "../x", "./x/y", "a//b", "/no/such", "owner/na--me", "a/.."])
def test_names_that_are_nothing(cache, name):
    with pytest.raises(DownloadError, match="there is no model"):
        hub.resolve(name)


def test_an_id_that_is_not_here_says_how_to_fetch_it(cache):
    with pytest.raises(DownloadError, match="not on this machine") as caught:
        hub.resolve("google/gemma-4-12B-it")
    assert caught.value.hint == "fetch it: iolite pull google/gemma-4-12B-it"


def test_an_id_in_any_letter_case(put_in):
    snapshot = put_in("Google/Gemma-4-12B-it")
    for name in ("Google/Gemma-4-12B-it", "google/gemma-4-12b-it", "GOOGLE/GEMMA-4-12B-IT"):
        assert hub.resolve(name) == snapshot


def test_the_spelling_that_was_typed_goes_first(put_in):
    lower, upper = put_in("a/b"), put_in("A/B")
    assert hub.resolve("a/b") == lower
    assert hub.resolve("A/B") == upper


def test_main_decides_among_snapshots_and_else_the_newest(put_in, cache):
    old, new = put_in("a/b", OLD, main=True), put_in("a/b", COMMIT, main=False)
    assert hub.resolve("a/b") == old
    (cache / "models--a--b" / "refs" / "main").unlink()
    os.utime(old, (1, 1))
    assert hub.resolve("a/b") == new
    (cache / "models--a--b" / "refs" / "main").write_text("../../../../etc")
    assert hub.resolve("a/b") == new


@pytest.mark.parametrize("lost", ["config.json", WEIGHTS])
def test_half_a_download_is_not_used(put_in, lost):
    snapshot = put_in("a/b")
    (snapshot / lost).unlink()
    with pytest.raises(DownloadError, match="only partly") as caught:
        hub.resolve("a/b")
    assert caught.value.hint == "continue the download: iolite pull a/b"
    (snapshot / lost).symlink_to("nowhere")  # what a removed blob leaves
    assert not hub.is_complete(snapshot)


def test_list(put_in, cache):
    put_in("b/whole")
    half = put_in("a/half")
    (half / WEIGHTS).unlink()
    other = put_in("c/other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    packed = put_in("d/packed")
    (packed / "config.json").write_text(
        (packed / "config.json").read_text().replace("{", '{"quantization_config": {"bits": 4},', 1)
    )
    (cache / "models--e--empty").mkdir()
    (cache / "datasets--f--data").mkdir()
    (cache / "version.txt").write_text("1")
    found = {m.name: m for m in hub.list_models() if m.name != "nano"}
    assert list(found) == ["a/half", "b/whole"]
    assert found["b/whole"].complete
    assert not found["a/half"].complete
    assert found["b/whole"].size == sum(p.stat().st_size for p in found["b/whole"].folder.iterdir())
    assert found["b/whole"].config.dtype == "float32"


def test_an_index_whose_shards_are_all_there_is_complete(put_in):
    snapshot = put_in("a/b")
    (snapshot / WEIGHTS).rename(snapshot / "model-00001-of-00001.safetensors")
    assert not hub.is_complete(snapshot)
    (snapshot / INDEX).write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert hub.is_complete(snapshot)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HOME": "/x"}, "/x/hub"),
        ({"HF_HUB_CACHE": "/y"}, "/y"),
        ({"HF_HOME": "/x", "HF_HUB_CACHE": "/y"}, "/y"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(variables, expected):
    code = "from iolite.checkpoint.hub import cache_folder; print(cache_folder())"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
