"""`iolite chat` through a pipe, its commands, and what it does with a Ctrl+C."""

from __future__ import annotations

import json

import pytest

from iolite.cli import chat, run_command
from iolite.cli.chat import Chat, is_open, unfence
from iolite.cli.conversation import Conversation


@pytest.fixture
def talk(says, piped, capsys):
    """lines -> (stdout, stderr, prompts) of a chat in which the model says "a red circle" to everything."""

    def use(*lines: str, flags: tuple[str, ...] = ()) -> tuple[str, str, list]:
        prompts = says("a red circle")
        prompts.clear()
        piped("\n".join(lines).encode())
        assert run_command(["chat", *flags]) == 0
        out, err = capsys.readouterr()
        return out, err, prompts

    return use


def test_each_line_is_a_message_and_answers_are_all_of_stdout(talk):
    out, err, prompts = talk("what", "", "and who", flags=("--system", "Be kind.", "--temp", "0"))
    assert out == "a red circle\n" * 2
    assert "4096 tokens of context" in err
    assert prompts[1].text.startswith("<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\nwhat<turn|>\n")
    assert "a red circle<turn|>\n<|turn>user\nand who<turn|>" in prompts[1].text


def test_several_lines_between_triple_quotes_are_one_message(talk):
    out, _, prompts = talk('"""the', 'red circle"""', "/bye", "never")
    assert out == "a red circle\n"
    assert "the\nred circle<turn|>" in prompts[0].text


def test_files_wait_for_the_next_message(talk, here):
    out, err, prompts = talk("/image a.png", "/show", "what", "and now talk.wav", "/clear", "again")
    assert out == "a red circle\n" * 3
    assert "Added image a.png; it goes with your next message" in err
    assert "waiting   image" in err
    assert "Added audio talk.wav" in err
    assert [[span.kind for span in prompt.spans] for prompt in prompts] == [["image"], ["image", "audio"], []]


def test_settings_take_effect_and_wrong_ones_change_nothing(talk):
    lines = ("/set max_tokens 2", "what", "/set temp hot", "/set temperature -1", "/set heat 1", "/set", "/set verbose")
    out, err, _ = talk(*lines, "/set max_tokens", "what", "/show")
    assert out.splitlines()[1] == "a red circle"
    assert len(out.splitlines()[0]) < len("a red circle")
    assert "note: the answer was cut off after 2 tokens" in err
    for message in ("temperature takes a number, not 'hot'", "temperature is -1.0", "no setting 'heat'"):
        assert f"error: {message}" in err or f"error: there is {message}" in err
    assert "tokens/s" in err
    assert "default   temperature = 1.0" in err
    assert "set       max_tokens = 2048" in err


def test_a_chat_is_saved_and_goes_on_after_load(talk, here):
    talk("what a.png", "/set seed 5", "/save chat.json")
    saved = json.loads((here / "chat.json").read_text())
    assert saved["settings"]["seed"] == 5
    assert saved["messages"][0]["content"][0] == {"type": "image", "image": str(here / "a.png")}
    out, err, prompts = talk("/load chat.json", "and now")
    assert out == "a red circle\n"
    assert "Loaded 2 messages" in err
    assert [span.kind for span in prompts[0].spans] == ["image"]
    (here / "a.png").unlink()
    out, err, _ = talk("/load chat.json", "and now", "/clear", "hello")
    assert "a.png is no longer there" in err
    assert out == "a red circle\n"  # after /clear


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/sav x", "there is no command '/sav'"),
        ("/image gone.png", "no image file 'gone.png'"),
        ("/image", "which image?"),
        ("/save", "which file?"),
        ("/load gone.json", "cannot be read"),
        ("/load a.png", "cannot be read"),
        ("/save /nowhere/x.json", "cannot be written"),
        ("/nowhere/a.png what", "no image file '/nowhere/a.png'"),
        ("word " * 5000, "context is 4096"),
    ],
)
def test_a_mistake_is_told_and_the_chat_goes_on(talk, here, line, error):
    out, err, prompts = talk("what", line, "and then")
    assert f"error: {error}" in err or error in err
    assert out == "a red circle\n" * 2
    assert "what<turn|>" in prompts[-1].text and "and then<turn|>" in prompts[-1].text


def test_message_that_begins_with_a_path_is_no_command(talk, here):
    _, err, prompts = talk(f"{here}/a.png what is it")
    assert "Added image a.png" in err
    assert [span.kind for span in prompts[0].spans] == ["image"]


def test_help_names_every_command(talk):
    _, err, _ = talk("/help")
    assert all(name in err for name in chat.COMMANDS)


def test_what_was_not_answered_is_offered_again_and_not_kept(says, random_model):
    import iolite

    says("a red circle")
    session = Chat(iolite.load(random_model), Conversation())
    offers = []

    def read(offered: str) -> str:
        offers.append(offered)
        if len(offers) == 1:
            return "what ./gone.png"
        if len(offers) == 2:
            raise KeyboardInterrupt  # on an empty line: the chat stays
        raise EOFError

    session.run(read)
    assert offers == ["", "what ./gone.png", ""]
    assert session.talk.messages == []


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(says, random_model, capsys, monkeypatch):
    import iolite

    says("a red circle is a blue square")
    model = iolite.load(random_model)
    ids = iter([*model.tokenizer.encode("a red circle")])

    def interrupted(_hidden):
        import torch

        rows = torch.full((1, model.config.text.vocab_size), -30.0)
        try:
            rows[0, next(ids)] = 30.0
        except StopIteration:
            raise KeyboardInterrupt from None
        return rows

    monkeypatch.setattr(model.network, "logits", interrupted)
    session = Chat(model, Conversation())
    session.turn("what")
    out, err = capsys.readouterr()
    assert out.startswith("a red")
    assert "(stopped)" in err
    assert session.talk.messages[1]["content"] == out.strip()
    session.turn("and")  # interrupted before the first token
    assert "(stopped)" in capsys.readouterr().err
    assert session.unsent == "and"
    assert len(session.talk.messages) == 2


@pytest.mark.parametrize(
    ("text", "opened", "plain"),
    [
        ('"""', True, '"""'),
        ('"""a', True, '"""a'),
        ('"""a\nb"""', False, "a\nb"),
        ('""""""', False, ""),
        ("a", False, "a"),
        ('say """x""" now', False, 'say """x""" now'),
    ],
)
def test_triple_quotes(text, opened, plain):
    assert is_open(text) is opened
    assert unfence(text) == plain


def test_history_is_the_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    kept = chat.history()
    kept.store_string("what")
    file = tmp_path / "iolite" / "chat_history"
    assert "what" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert type(chat.history()).__name__ == "InMemoryHistory"
