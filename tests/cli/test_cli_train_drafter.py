"""`iolite train drafter`: from a file of dialogues to a drafter that its model takes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iolite.checkpoint.drafter import find_drafter
from iolite.cli import run_command

TALK = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello."}],
    [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "i am iolite-nano."}],
    [{"role": "user", "content": "what can you do?"}],
    [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "red square"},
    ],
]
SMALL = ["--layers", "2", "--hidden", "16", "--intermediate", "32", "--rows", "2", "--held-out", "1", "-t", "1"]


@pytest.fixture
def data(here: Path) -> Path:
    """Four dialogues; `here` has the picture."""
    (here / "sub").mkdir()
    (here / "a.png").rename(here / "sub" / "a.png")
    path = here / "sub" / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in TALK))
    return path


def train(data: Path | str, *more: str, out: str = "run") -> int:
    return run_command(["train", "drafter", "--target", "nano", "--data", str(data), "--out", out, *more])


def test_a_run_and_how_it_goes_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, *SMALL, "--max-steps", "3", "--max-tokens", "12") == 0
    out, err = capsys.readouterr()
    assert out == str(Path("run") / "drafter") + "\n"
    assert "3 answers to learn from, 1 to measure with, of 4 dialogues" in err
    assert "mean accepted length" in err
    source = find_drafter(Path("run/drafter"))
    assert (source.text.hidden_size, source.text.num_hidden_layers) == (16, 2)
    report = json.loads(Path("run/evaluation.json").read_text())
    assert (report["target"], report["drafts"], report["steps"]) == ("nano", 4, 3)
    assert report["sets"]["held out"]["answers"] == 1

    assert train(data, *SMALL, "--max-steps", "5") == 2
    assert "--resume" in capsys.readouterr().err
    assert train(data, *SMALL, "--max-steps", "5", "--max-tokens", "12", "--resume") == 0
    capsys.readouterr()
    steps = [json.loads(line)["step"] for line in Path("run/log.jsonl").read_text().splitlines()]
    assert steps == [3, 3, 5, 5]

    more = ["--rows", "2", "--held-out", "1", "--answers", "target", "--max-tokens", "5", "--labels", "hard"]
    assert train(data, *more, "--from", "run/drafter", "--max-steps", "1", "-k", "2", out="other") == 0
    assert json.loads(Path("other/evaluation.json").read_text())["drafts"] == 2
    assert len(Path("other/answers.jsonl").read_text().splitlines()) == 4

    assert train(data, "--held-out", "1", "--from", "run/drafter", "--max-steps", "0", out="measured") == 0
    assert not Path("measured/state.safetensors").exists()
    with_own = Path("run/drafter/model.safetensors").read_bytes()
    assert Path("measured/drafter/model.safetensors").read_bytes() == with_own


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--from", "none"], "there is no drafter 'none'"),
        (["--from", ".", "--hidden", "16"], "--hidden is for a new drafter"),
        (["--store", "s"], "--store is for the recipe"),
        (["--max-steps", "0"], "measures a drafter, and there is none"),
        (["--held-out", "4"], "4 of 4 dialogues are to be kept"),
        (["--minutes", "nan"], "not a finite number"),
    ],
)
def test_what_does_not_go_together(data: Path, more: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, *more) == 2
    assert fault in capsys.readouterr().err
    assert not Path("run/drafter").exists()


def test_data_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("none.jsonl") == 2
    assert "there is no file 'none.jsonl'" in capsys.readouterr().err
    assert train("nano", "--answers", "target") == 2
    assert "the recipe brings its own answers" in capsys.readouterr().err


def test_a_bad_line_stops_it_before_it_begins(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(data.read_text() + "\n" + json.dumps({"messages": [{"role": "user", "content": 3}]}))
    assert train(data) == 2
    err = capsys.readouterr().err
    assert f"{data}, line 5: message 0: content must be a string" in err
    assert "hint: " in err
    assert not Path("run/answers.jsonl").exists()


def test_a_drafter_of_another_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["init", "tiny", "--shape", "tiny", "--drafter"]) == 0
    capsys.readouterr()
    assert train(data, "--from", "tiny/drafter") == 2
    assert "the drafter is for hidden states of 128, but the model has 192" in capsys.readouterr().err
