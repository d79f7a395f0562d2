"""Which words of a prompt are files to send along."""

from __future__ import annotations

import pytest

from iolite.cli.attachments import attach, kind_of, pick_paths, user_message
from iolite.errors import MediaError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with media, as the working directory; empty files do, since nothing opens them."""
    for name in ("a.png", "b.JPG", "talk.wav", "clip.mp4", "two words.png", "it's.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.webp").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("What is this? a.png", "What is this?", ["a.png"]),
        ("a.png What is this?", "What is this?", ["a.png"]),
        ("a.png", "", ["a.png"]),
        ("'two words.png'", "", ["two words.png"]),
        ('Read "two words.png"', "Read", ["two words.png"]),
        (r"Read two\ words.png now", "Read two words.png now", ["two words.png"]),
        ("Read it's.png now", "Read it's.png now", ["it's.png"]),
        ("Compare a.png and b.JPG.", "Compare a.png and b.JPG.", ["a.png", "b.JPG"]),
        ("Is sub/c.webp, like a.png?", "Is c.webp, like a.png?", ["c.webp", "a.png"]),
        ("./talk.wav\nWrite it down", "Write it down", ["talk.wav"]),
        ("(see a.png)", "(see a.png)", ["a.png"]),
        ("What does other.png mean?", "What does other.png mean?", []),
        ("Look at https://example.org/a.png", "Look at https://example.org/a.png", []),
        ("notes.txt", "notes.txt", []),
        ("a.pngx and xa.png", "a.pngx and xa.png", []),
        ("", "", []),
    ],
)
def test_paths_in_a_prompt(here, text, left, names):
    rest, found = pick_paths(text)
    assert rest == left
    assert [attachment.name for attachment in found] == names


def test_absolute_home_and_file_paths(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    for spelling in (f"{here}/a.png", "~/a.png", f"file://{here}/a.png"):
        assert pick_paths(f"What? {spelling}") == ("What?", [attach("image", str(here / "a.png"))])
    assert pick_paths(f"file://{here}/two%20words.png")[1][0].name == "two words.png"


def test_kinds_come_from_endings(here):
    assert [a.kind for a in pick_paths("a.png talk.wav clip.mp4 b.JPG")[1]] == ["image", "audio", "video", "image"]
    assert kind_of("x.FLAC") == "audio" and kind_of("a.PDF") == "document"
    assert kind_of("README") is None


@pytest.mark.parametrize("text", ["What is /nowhere/a.png", "sub/x.png", "~/zz.wav ?", "'./two  words.png'"])
def test_a_path_that_is_not_there_is_an_error_not_a_word(here, text):
    with pytest.raises(MediaError, match="there is no"):
        pick_paths(text)


def test_a_named_file_must_be_there(here):
    with pytest.raises(MediaError, match=r"no audio file 'gone.wav'"):
        attach("audio", "gone.wav")
    assert attach("image", "data:image/png;base64,AAAA").source == "data:image/png;base64,AAAA"


def test_pictures_stand_before_the_text_and_sound_after_it(here):
    media = [attach("audio", "talk.wav"), attach("image", "a.png"), attach("video", "clip.mp4")]
    content = user_message("Hi", media)["content"]
    assert [part["type"] for part in content] == ["image", "video", "text", "audio"]
    assert [part["type"] for part in user_message("", media)["content"]] == ["image", "video", "audio"]
    assert user_message("Hi", []) == {"role": "user", "content": "Hi"}
