"""`iolite pull` against a small hub of our own: what is fetched, how it goes on after a stop, and how it fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.gguf_model import save_tiny_drafter
from support.hub_server import COMMIT, Hub, serve

from iolite.checkpoint.download import wanted
from iolite.checkpoint.drafter import find_drafter
from iolite.errors import CheckpointError

NAME = "Tiny/Gem"
WEIGHTS = "model.safetensors"
REPOSITORY = Path("hub/models--Tiny--Gem")
SNAPSHOT = REPOSITORY / "snapshots" / COMMIT


@pytest.fixture
def hub(tiny_folder):
    folder = tiny_folder("published")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {
        "README.md": b"# Gem\n",
        "chat_template.jinja": b"{{ bos_token }}",
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"\x80" * 30_000,
        "modeling_gem.py": b"import os",
        "onnx/model.onnx": b"o",
        "original/config.json": b"{}",
    }
    with serve(Hub(NAME, files)) as server:
        yield server


@pytest.fixture
def pull(hub, tmp_path):
    """Runs `iolite pull` in a process of its own, since the library reads its environment when it is imported.

    The library writes what it receives in pieces of 10 MB; with pieces of 4 kB small files can be interrupted too.
    """
    code = (
        "import sys; from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 4096; "
        "from iolite.cli import main; main(sys.argv[1:])"
    )

    def start(*arguments, stderr=subprocess.PIPE, **variables):
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        command = [sys.executable, "-c", code, "pull", *arguments]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=_heed_interrupts
        )

    return start


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what it runs in the background deaf to SIGINT


def finish(process):
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err
    return process.returncode, out, err


def fails(process):
    """(error line, hint line) of a pull that must fail with exit code 2."""
    code, out, err = finish(process)
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert len(lines) == 2, err
    return lines


def test_what_iolite_uses_and_nothing_else_is_fetched(hub, pull, tmp_path, tiny_folder):
    code, out, err = finish(pull("tiny/GEM"))
    assert code == 0, err
    folder = tmp_path / SNAPSHOT
    assert out == f"{folder}\n"
    used = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == used
    for name in used:
        assert (folder / name).read_bytes() == hub.files[name]
        assert (folder / name).resolve().name == hub.etag(name)  # the layout that other programs share
    assert (tmp_path / REPOSITORY / "refs" / "main").read_text() == COMMIT
    assert not list((tmp_path / REPOSITORY / "blobs").glob("*.*"))
    assert "Tiny/Gem: 6 files" in err

    hub.requests.clear()
    code, _, err = finish(pull(NAME))
    assert code == 0
    assert "0.00 GB to fetch" in err
    assert hub.downloads(WEIGHTS) == hub.downloads("tokenizer.json") == []


def test_an_interrupted_download_goes_on_where_it_stopped(hub, pull, tmp_path):
    hub.stall_after = 100_000
    first = pull(NAME)
    assert hub.stalled.wait(200)
    partial = tmp_path / REPOSITORY / "blobs" / f"{hub.etag(WEIGHTS)}.incomplete"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    code, out, err = finish(first)
    assert (code, out) == (130, "")
    assert "the same command goes on from here" in err
    kept = partial.stat().st_size
    assert 0 < kept <= 100_000

    hub.requests.clear()
    code, _, err = finish(pull(NAME))
    assert code == 0, err
    assert hub.downloads(WEIGHTS) == [f"bytes={kept}-"]
    assert (tmp_path / SNAPSHOT / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert not partial.exists()


def test_a_connection_that_breaks_is_taken_up_again(hub, pull, tmp_path):
    hub.cut_after = 50_000
    code, _, err = finish(pull(NAME))
    assert code == 0, err
    assert len(hub.downloads(WEIGHTS)) == 2
    assert hub.downloads(WEIGHTS)[1].startswith("bytes=")
    assert (tmp_path / SNAPSHOT / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_content_that_does_not_match_its_checksum_is_thrown_away(hub, pull, tmp_path):
    hub.claimed_hashes[WEIGHTS] = "f" * 64
    error, hint = fails(pull(NAME))
    assert "arrived damaged" in error
    assert "pull again" in hint
    assert not list((tmp_path / REPOSITORY / "blobs").glob("f*"))


def test_check_finds_and_fetches_damaged_files(hub, pull, tmp_path):
    assert finish(pull(NAME))[0] == 0
    for name in (WEIGHTS, "tokenizer.json"):
        blob = (tmp_path / SNAPSHOT / name).resolve()
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
    hub.requests.clear()
    code, _, err = finish(pull("--check", NAME))
    assert code == 0, err
    assert "damaged, fetched again: model.safetensors" in err
    assert "damaged, fetched again: tokenizer.json" in err
    assert hub.downloads("config.json") == []
    for name in (WEIGHTS, "tokenizer.json"):
        assert (tmp_path / SNAPSHOT / name).read_bytes() == hub.files[name]


def test_progress_is_shown_on_a_terminal(hub, pull):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = pull(NAME, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux ends a terminal
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    process.communicate(timeout=240)
    assert process.returncode == 0
    assert b"model.safetensors:   0%|" in shown
    assert b"model.safetensors: 100%|" in shown
    assert b"config.json" not in shown


def test_the_token_is_sent(hub, pull):
    assert finish(pull(NAME, HF_TOKEN="hf_secret"))[0] == 0
    about_the_model = [headers for _, path, headers in hub.requests if "Tiny/Gem" in path]
    assert {headers.get("authorization") for headers in about_the_model} == {"Bearer hf_secret"}


def test_offline_uses_what_is_here_and_asks_nobody(hub, pull, tmp_path):
    error, _ = fails(pull(NAME, HF_HUB_OFFLINE="1"))
    assert "not on this machine, and HF_HUB_OFFLINE forbids the network" in error
    assert hub.requests == []
    assert finish(pull(NAME))[0] == 0
    hub.requests.clear()
    code, out, _ = finish(pull(NAME.lower(), HF_HUB_OFFLINE="1"))
    assert (code, out) == (0, f"{tmp_path / SNAPSHOT}\n")
    assert hub.requests == []


def test_missing_or_private(hub, pull):
    hub.hide = True
    error, hint = fails(pull(NAME))
    assert "there is no model Tiny/Gem" in error
    assert "HF_TOKEN" in hint


def test_gated(hub, pull):
    hub.gated = True
    error, hint = fails(pull(NAME))
    assert "accept its terms" in error
    assert f"{hub.url}/Tiny/Gem" in hint
    assert "HF_TOKEN" in hint


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refused the access"), (403, "refused the access"), (418, "answered 418")]
)
def test_other_answers(hub, pull, status, message):
    hub.status = status
    assert message in fails(pull(NAME))[0]


def test_no_network(pull):
    error, hint = fails(pull(NAME, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached" in error
    assert "proxy" in hint


def test_no_space(hub, pull):
    hub.claimed_sizes[WEIGHTS] = 1 << 60
    error, hint = fails(pull(NAME))
    assert "needs 1152921504.6 GB" in error
    assert "HF_HOME" in hint
    assert hub.downloads(WEIGHTS) == []


def test_another_architecture_is_refused_before_its_weights_are_fetched(hub, pull):
    hub.files["config.json"] = b'{"model_type": "llama"}'
    assert "model_type is 'llama'" in fails(pull(NAME))[0]
    assert hub.downloads(WEIGHTS) == []


def test_a_drafter_is_fetched_like_a_model(hub, pull, tmp_path):
    folder = save_tiny_drafter(tmp_path / "drafter")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = finish(pull(NAME))
    assert code == 0, err
    assert out == f"{tmp_path / SNAPSHOT}\n"
    assert find_drafter(tmp_path / SNAPSHOT).shapes == find_drafter(folder).shapes


def test_a_drafter_of_another_kind_is_refused_before_its_weights_are_fetched(hub, pull, tmp_path):
    folder = save_tiny_drafter(tmp_path / "drafter")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(hub.files["config.json"]) | {"use_ordered_embeddings": True}
    hub.files["config.json"] = json.dumps(config).encode()
    assert "only drafters whose layers all read" in fails(pull(NAME))[0]
    assert hub.downloads(WEIGHTS) == []


def test_no_config(hub, pull):
    del hub.files["config.json"]
    assert "lacks a file that it needs" in fails(pull(NAME))[0]


def test_pickled_weights_are_refused(hub, pull):
    del hub.files[WEIGHTS]
    assert "has pickled weights" in fails(pull(NAME))[0]
    assert hub.downloads("pytorch_model.bin") == []


@pytest.mark.parametrize("name", ["gemma", "a/b/c", "https://huggingface.co/a/b"])
def test_not_an_id(pull, name):
    assert "is not a Hugging Face id" in fails(pull(name))[0]


def test_nano_needs_no_download(hub, pull):
    code, out, _ = finish(pull("nano"))
    assert code == 0
    assert out.rstrip().endswith("iolite/nano")
    assert hub.requests == []


def test_wanted():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert wanted(["config.json", index, *shards]) == ["config.json", index, *shards]
    assert wanted(["config.json", index, *shards, WEIGHTS]) == ["config.json", WEIGHTS]
    assert wanted([WEIGHTS, "consolidated.safetensors", "a.py", "LICENSE"]) == ["LICENSE", WEIGHTS]
    for names, kind in ((["config.json"], "no"), (shards, "no"), (["a-Q4.gguf"], "GGUF"), (["a.bin"], "pickled")):
        with pytest.raises(CheckpointError, match=f"has {kind} weights"):
            wanted(names)
