"""`bench/llama_mtp.py`: what it asks of llama.cpp's server and reads out of it, and the server itself where it is."""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from support.gguf_model import save_tiny, save_tiny_drafter

from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.source import open_source
from iolite.errors import UsageError

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "llama_mtp.py"
PROMPT = [2, 717, 345, 521, 333, 402, 399, 611, 340, 500, 712, 298, 415, 533, 641, 377, 480, 512, 600, 345]
TOKENS = 60


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_llama_mtp", SCRIPT)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def test_an_answer(peer: ModuleType) -> None:
    """Nine tokens: one of the prompt's pass, then five passes that accept three drafts among them."""
    timings = {"predicted_n": 9, "predicted_ms": 400.0, "draft_n": 10, "draft_n_accepted": 3}
    answer = peer.read_answer({"tokens": list(range(9)), "timings": timings})
    assert (answer.seconds, answer.drafted, answer.accepted, answer.passes) == (0.4, 10, 3, 5)
    assert (answer.rate, answer.mean_accepted_length, answer.accepted_drafts_a_pass) == (20, 1.6, 0.6)


def test_an_answer_without_drafts(peer: ModuleType) -> None:
    answer = peer.read_answer({"tokens": [5, 6, 7], "timings": {"predicted_n": 3, "predicted_ms": 100.0}})
    assert (answer.drafted, answer.accepted, answer.passes, answer.mean_accepted_length) == (0, 0, 2, 1)


def test_the_command_line(peer: ModuleType) -> None:
    plain = peer.Settings("m.gguf", "d.gguf", threads=2).arguments()
    assert "m.gguf" in plain and "d.gguf" not in plain
    drafting = peer.Settings("m.gguf", "d.gguf", drafts=3, acceptance=0.7).arguments()
    options = dict(pairwise(drafting))
    assert (options["--spec-draft-model"], options["--spec-draft-n-max"]) == ("d.gguf", "3")
    assert options["--spec-synth-rates"] == "0.7,0.49,0.343"  # of all drafts up to each


def test_without_a_build(peer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    with pytest.raises(UsageError, match="names no build"):
        peer.find_server()
    monkeypatch.setenv(peer.VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match="holds no llama-server"):
        peer.find_server()


# The server itself


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model and its drafter, for a server that is there."""
    if not os.environ.get("IOLITE_LLAMA_BIN"):
        pytest.skip("IOLITE_LLAMA_BIN names no build of llama.cpp")
    folder = tmp_path_factory.mktemp("mtp")
    model, drafter = save_tiny(folder / "model", "published"), save_tiny_drafter(folder / "drafter")
    written = to_gguf(open_source(str(model)), folder / "m.gguf", "f32", Beside(embedders=False, drafter=drafter))
    return str(written[0]), str(written[-1])


def served(peer: ModuleType, *settings: object) -> object:
    with peer.Server(peer.Settings(*settings)) as server:
        return server.answer(PROMPT, TOKENS)


@pytest.mark.peer
@pytest.mark.parametrize("drafts", [1, 4])
def test_drafts_change_nothing(peer: ModuleType, files: tuple[str, str], drafts: int) -> None:
    plain, drafting = served(peer, *files), served(peer, *files, drafts)
    assert drafting.ids == plain.ids
    assert plain.drafted == 0 < drafting.drafted <= drafts * drafting.passes


@pytest.mark.peer
@pytest.mark.parametrize(("acceptance", "passes"), [(0.0, TOKENS - 1), (1.0, 15)])
def test_acceptance_is_set(peer: ModuleType, files: tuple[str, str], acceptance: float, passes: int) -> None:
    """With three drafts of which all are accepted four tokens come of a pass, and three of the last one of these."""
    assert served(peer, *files, 3, acceptance).passes == passes


@pytest.mark.peer
def test_files_that_are_no_pair(peer: ModuleType, files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ended while it loaded"):
        served(peer, files[0], files[0], 2)
    with pytest.raises(UsageError, match="there is no GGUF file"):
        served(peer, files[0], str(tmp_path / "none.gguf"), 2)
