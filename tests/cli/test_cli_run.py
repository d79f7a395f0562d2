"""`iolite run` and `iolite transcribe`, over a model with random weights that says what it is told to."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
from support.pdf import a_pdf

from iolite.cli import run_command
from iolite.cli.run import split_words
from iolite.errors import UsageError


def test_the_answer_is_all_of_stdout(says, capsys):
    says("a red circle")
    assert run_command(["run", "nano", "what"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("a red circle\n", "")


def test_thoughts_and_speed_go_to_stderr(says, capsys):
    says("<|channel>thought\nred\n<channel|>a circle")
    assert run_command(["run", "what", "--thinking", "--verbose", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "a circle\n"
    assert err.startswith("red\n")
    for line in ("load:", "prompt:", "first token:", "answer:", "tokens/s", "float32 on the CPU"):
        assert line in err


def test_files_of_flags_and_of_the_prompt_are_sent(says, here, capsys):
    prompts = says("yes")
    assert run_command(["run", "what? a.png", "--audio", "talk.wav", "--system", "Be kind."]) == 0
    assert capsys.readouterr().err == "Added image a.png\n"
    assert [span.kind for span in prompts[0].spans] == ["image", "audio"]
    assert "Be kind." in prompts[0].text
    assert prompts[0].text.index("<|image|>") < prompts[0].text.index("what?") < prompts[0].text.index("<|audio|>")


def test_pdfs_and_texts_are_read(says, here, capsys):
    (here / "report.pdf").write_bytes(a_pdf("first words"))
    (here / "notes").write_text("some notes")
    prompts = says("yes")
    assert run_command(["run", "what? report.pdf", "--file", "notes"]) == 0
    assert capsys.readouterr().err == "Added document report.pdf\n"
    read = "[notes]\nsome notes\n[end of notes]\n\n[report.pdf]\n[page 1]\nfirst words\n[end of report.pdf]\n\nwhat?"
    assert read in prompts[0].text and not prompts[0].spans
    assert run_command(["run", "what? report.pdf", "--pages", "pictures"]) == 0
    assert [span.kind for span in prompts[1].spans] == ["image"]
    assert run_command(["run", "what?", "--file", "notes", "--pages", "pictures"]) == 2
    assert "is a text, which has no pages" in capsys.readouterr().err


def test_stdin_is_the_prompt_a_part_of_it_or_a_file(says, piped, here):
    prompts = says("yes")
    piped(b"the blue square\n")
    assert run_command(["run", "-m", "nano"]) == 0
    assert "the blue square<turn|>" in prompts[-1].text
    piped("Grüße".encode())
    assert run_command(["run", "what"]) == 0
    assert "what\n\nGrüße<turn|>" in prompts[-1].text
    piped((here / "a.png").read_bytes())
    assert run_command(["run", "what", "--image", "-"]) == 0
    assert [span.kind for span in prompts[-1].spans] == ["image"]


def test_json_is_one_object(says, capsys):
    says("a red circle")
    assert run_command(["run", "what", "--json", "--seed", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["finish_reason"]) == ("a red circle", "stop")
    assert found["timings"]["time_to_first_token"] > 0


def test_an_answer_cut_off_or_empty_is_noted(says, capsys):
    says("a red circle")
    assert run_command(["run", "what", "-n", "1"]) == 0
    assert "note: the answer was cut off after 1 tokens" in capsys.readouterr().err
    says("")
    assert run_command(["run", "what"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "note: the model ended its turn without an answer" in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "error"),
    [
        ([], b"", "there is no prompt"),
        (["nano"], b"", "there is no prompt"),
        (["what? /nowhere/x.png"], b"", "no image file"),
        (["what", "--image", "gone.png"], b"", "no image file 'gone.png'"),
        (["what", "--image", "-", "--audio", "-"], b"", "stdin is named twice"),
        (["what"], b"\xff\xfe", "not UTF-8"),
        (["what", "--temp", "-1"], b"", "temperature is -1"),
        (["what", "-n", "0"], b"", "max_tokens is 0"),
        (["word " * 5000], b"", "tokens and the context is 4096"),
        (["what", "--image", "talk.wav"], b"", "talk.wav"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(says, here, piped, capsys, arguments, stdin, error):
    says("yes")
    piped(stdin)
    assert run_command(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-2 if "hint:" in err else -1].startswith("error: ")
    assert error in err


def test_a_schema_and_a_grammar_from_files_and_from_the_command_line(says, here, capsys):
    says("I will not")
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}
    (here / "schema.json").write_text(json.dumps(schema))
    (here / "answer.lark").write_text('start: "yes" | "no"')
    for given in ("schema.json", json.dumps(schema)):
        assert run_command(["run", "what", "--schema", given]) == 0
        assert json.loads(capsys.readouterr().out) in ([None], [None, None])
    assert run_command(["run", "what", "--grammar", "answer.lark", "--thinking", "--thinking-budget", "0"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--schema", "nowhere.json"], "No such file"),
        (["--schema", "{no"], "not JSON"),
        (["--schema", "talk.wav"], "not UTF-8"),
        (["--schema", "list.json"], "no JSON object"),
        (["--schema", '{"type": "thing"}'], "thing"),
        (["--grammar", "nowhere.lark"], "No such file"),
        (["--grammar", "list.json"], "grammar cannot be used"),
        (["--thinking-budget", "-1"], "thinking_budget"),
    ],
)
def test_a_schema_that_is_none_is_one_line_and_exit_2(says, here, capsys, arguments, error):
    says("yes")
    (here / "list.json").write_text("[1]")
    assert run_command(["run", "what", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and error in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "model", "prompt", "wanted"),
    [
        (["what is it"], None, None, ("nano", "what is it")),
        (["nano", "what"], None, None, ("nano", "what")),
        (["nano"], None, None, ("nano", "")),
        (["google/gemma-4-12B-it"], None, None, ("google/gemma-4-12B-it", "")),
        (["google/gemma-4-12B-it", "what", "is", "it"], None, None, ("google/gemma-4-12B-it", "what is it")),
        (["pics/a.png"], None, None, ("nano", "pics/a.png")),
        (["what", "is"], "nano", None, ("nano", "what is")),
        (["nano"], None, "what", ("nano", "what")),
        ([], "x/y", "what", ("x/y", "what")),
        ([], None, None, ("nano", "")),
    ],
)
def test_which_argument_is_the_model(words, model, prompt, wanted):
    assert split_words(words, model, prompt) == wanted


@pytest.mark.parametrize(("words", "model", "prompt"), [(["a"], "m", "p"), (["a", "b"], None, "p")])
def test_arguments_with_no_place_are_refused(words, model, prompt):
    with pytest.raises(UsageError):
        split_words(words, model, prompt)


def test_transcribe_one_file_several_and_json(says, here, capsys):
    prompts = says("two three")
    assert run_command(["transcribe", "talk.wav"]) == 0
    assert capsys.readouterr().out == "two three\n"
    assert "Transcribe the speech.<|audio|>" in prompts[-1].text
    assert run_command(["transcribe", "talk.wav", "talk.wav"]) == 0
    assert capsys.readouterr().out == "talk.wav: two three\ntalk.wav: two three\n"
    assert run_command(["transcribe", "talk.wav", "--json", "--language", "German"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["file"], found["text"], found["seconds"]) == ("talk.wav", "two three", 1.2)
    assert found["segments"] == [{"start": 0.0, "end": 1.2, "text": "two three", "notice": None}]
    assert "--language German changes nothing" in err


def test_a_long_recording_is_heard_in_pieces(says, here, capsys):
    prompts = says("one")
    with wave.open("long.wav", "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 2 * 40_000).astype("<i2").tobytes())
    assert run_command(["transcribe", "long.wav", "--json"]) == 0  # 5 s, and this model hears 2 s at once
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == " ".join(["one"] * len(prompts))
    assert 3 <= len(prompts) <= 5
    assert found["segments"][-1]["end"] == pytest.approx(5.0, abs=0.01)
    assert all(span.length <= 50 for prompt in prompts for span in prompt.spans)


def test_transcribe_refuses_what_is_not_there_before_it_loads(capsys):
    assert run_command(["transcribe", "gone.wav"]) == 2
    assert "no audio file 'gone.wav'" in capsys.readouterr().err
