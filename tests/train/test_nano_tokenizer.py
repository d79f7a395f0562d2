"""The embedded model's tokenizer: the family's form, its fixed tokens, and what training must and must not merge."""

import json
import random

import pytest

from iolite.errors import UsageError
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from iolite.train.nano.tokenizer import MIN_VOCAB_SIZE, TEMPLATE_WORDS, train_tokenizer

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star", "usage", "thoughtful")


def texts():
    rng = random.Random(0)
    for i in range(3000):
        yield f"What shape is the {rng.choice(COLOURS)} one?\nIt is a {rng.choice(SHAPES)}, number {i * 37}."
        yield f"<|turn>user\nNaïve — {rng.choice(SHAPES)} because {rng.choice(COLOURS)}<turn|>"


@pytest.fixture(scope="module", params=[MIN_VOCAB_SIZE, 600])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(), request.param, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


def test_fixed_tokens(tokenizer):
    assert [tokenizer.token_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert [tokenizer.token_id(t) for t in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert tokenizer.special_ids == frozenset(range(len(SPECIAL_TOKENS)))
    assert [tokenizer.token_id(f"<0x{b:02X}>") for b in range(256)] == list(range(24, 280))
    assert tokenizer.vocab_size <= 600


def test_template_costs_few_tokens(tokenizer):
    text = "<bos><|turn>system\n<|think|>\n<turn|>\n"
    text += "<|turn>user\n<|image|><turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]
    assert len(tokens) == 21
    assert set(tokens) - set(SPECIAL_TOKENS) == set(TEMPLATE_WORDS)


def test_digits_and_marks_stand_alone(tokenizer):
    for text in ("0123456789", "3,14", "a1b22", '{"k":[1,2]}', "\n\n\n"):
        tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]
        assert all(len(t) == 1 for t in tokens if not t.isalpha()), tokens
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("a 42")] == ["a", "▁", "4", "2"]


def test_frequent_words_are_single_tokens(tmp_path):
    train_tokenizer(texts(), 600, tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for word in (*COLOURS, *SHAPES, "shape", "because"):
        assert len(tokenizer.encode(f" {word}")) == 1, word


@pytest.mark.parametrize(
    "text", ["What shape is it?", "Zürich 東京 🙂\t\r\n", "  two  spaces ", "user", "superuser\x00", ""]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_id("<unk>") not in tokenizer.encode(text)


def test_file_has_the_family_form(folder):
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert found["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert found["pre_tokenizer"]["behavior"] == "MergedWithPrevious"
    assert [d["type"] for d in found["decoder"]["decoders"]] == ["Replace", "ByteFallback", "Fuse"]
    assert found["model"]["byte_fallback"] and found["model"]["fuse_unk"]


def test_loads_in_the_reference(folder, tokenizer):
    import transformers

    text = "<bos><|turn>user\nWhat shape is the 🙂 12?<turn|>\n"
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(str(folder))
    for other in (plain, auto):
        ids = other.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text)
        assert other.decode(ids) == tokenizer.decode(ids) == text
    assert (auto.image_token, auto.boi_token, auto.eoa_token) == ("<|image|>", "<|image>", "<audio|>")
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (2, 1, 0)


def test_training_is_reproducible(folder, tokenizer, tmp_path):
    train_tokenizer(texts(), max(tokenizer.vocab_size, MIN_VOCAB_SIZE), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(UsageError, match="too small"):
        train_tokenizer([], MIN_VOCAB_SIZE - 1, tmp_path)
    assert not list(tmp_path.iterdir())
