"""Strings <-> ids: special tokens, bytes, and files that are no tokenizer of the family."""

import ctypes
import gc
import threading
import time

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from iolite.errors import CheckpointError, MessageError
from iolite.text.tokenizer import Tokenizer
from iolite.train.nano.tokenizer import train_tokenizer

# No limits of time: the machine that runs the tests may be busy.
RANDOM = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Which shape is it? It is a red circle."] * 20, 500, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


def test_special_tokens_are_neither_added_nor_hidden(tokenizer):
    ids = tokenizer.encode("<bos><|turn>user")
    assert ids[:2] == [tokenizer.token_id("<bos>"), tokenizer.token_id("<|turn>")]
    assert tokenizer.decode(ids) == "<bos><|turn>user"
    assert tokenizer.encode("") == []


@RANDOM
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decodes_as_the_library_does(folder, tokenizer):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [*range(tokenizer.vocab_size)]
    broken = [i for i in ids if not tokenizer.token_bytes(i).isascii()]  # of bytes alone, which are no UTF-8
    whole = [i for i in ids if i not in set(broken)]
    assert tokenizer.decode(whole) == library.decode(whole, skip_special_tokens=False)


def test_bytes_that_are_no_text(tokenizer):
    ids = [tokenizer.token_id(t) for t in ("<0xC3>", "<|turn>", "<0xE2>", "<0x82>", "a", "<0xC3>", "<0xA9>")]
    assert tokenizer.decode(ids) == "\ufffd<|turn>\ufffda\u00e9"


def test_unknown_ids_and_tokens(tokenizer):
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.decode([tokenizer.vocab_size + 5, -1]) == ""


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(MessageError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    other = tokenizers.Tokenizer(models.BPE())
    other.decoder = decoders.ByteLevel()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="ByteLevel"):
        Tokenizer.from_folder(tmp_path)


def test_a_long_text_does_not_hold_up_other_threads(tokenizer):
    ticks, over = [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(time.sleep(0.001))

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = len(ticks)
        tokenizer.encode("Which shape is it? " * 50_000)
        during = len(ticks) - before
    finally:
        over.set()
        thread.join()
    assert during > 3


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def test_texts_that_were_read_are_not_remembered(tokenizer):
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("only the GNU C library from 2.33 on says how much memory is in use")
    mallinfo.restype = _Mallinfo

    def read(texts: range) -> int:
        for number in texts:
            tokenizer.encode(f"what is {number}? " + "please tell " * 10)
        gc.collect()
        return int(mallinfo().uordblks)

    before = read(range(500))
    # The library's own cache would take 2 KB and more for each.
    assert read(range(500, 2500)) - before < 2000 * 200
