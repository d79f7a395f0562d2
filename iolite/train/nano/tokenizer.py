"""Trains the embedded model's own tokenizer, of the family's kind, on the texts of its recipe.

BPE over words that end in their space (▁), bytes as the fallback, digits one by one. Ids: the family's special tokens
first (0 to 23, in the order of `SPECIAL_TOKENS`), then the 256 bytes, the words of the template and printable ASCII,
then what training finds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from iolite.errors import UsageError
from iolite.text.tokenizer import SPECIAL_TOKENS, tokenizer_config

# What the chat template writes around every message; each is one token, however rare in the texts.
TEMPLATE_WORDS = ("\n", "thought", "user", "model", "system")

Merge = tuple[str, str]

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CHARACTERS = ("▁", *(chr(code) for code in range(0x21, 0x7F)))  # printable ASCII
_FIXED = tuple(dict.fromkeys((*SPECIAL_TOKENS, *_BYTES, *TEMPLATE_WORDS, *_CHARACTERS)))
MIN_VOCAB_SIZE = len(_FIXED) + 32  # room for the steps from letters to the words of the template


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> tokenizers.Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json into the folder path, and returns the tokenizer.

    vocab_size counts everything; texts with little variety give fewer. The same texts give the same file.
    Raises UsageError when vocab_size leaves no room.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(f"a vocabulary of {vocab_size} is too small", f"the least is {MIN_VOCAB_SIZE}")
    found = _learn(texts, vocab_size - len(_FIXED))
    tokenizer = _assemble(*found, vocab_size)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(SPECIAL_TOKENS), indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return tokenizer


def _learn(texts: Iterable[str], room: int) -> tuple[list[str], list[Merge]]:
    """(tokens, merges): at most room tokens beside the fixed ones, in the order in which they were found."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # The family splits nothing when it encodes, so what must not merge is kept apart here: no merge goes over the
    # beginning of a word, and none has a digit, a line break or a punctuation mark in it.
    apart = Regex(r"[^\w▁]|[0-9]")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(apart, "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=room + len(_CHARACTERS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(_CHARACTERS),
        limit_alphabet=len(_CHARACTERS) + room // 4,  # rarer characters are written in bytes
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [(left, right) for left, right in model["merges"]]


def _assemble(found: list[str], merges: list[Merge], vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of the fixed and the found tokens, with merges added that make each template word one token."""
    tokens = list(dict.fromkeys((*_FIXED, *found)))[:vocab_size]
    for word in TEMPLATE_WORDS:
        # At the end, where they change nothing that training found: they join what is left of the word.
        pieces = _build(tokens, merges).encode(word).tokens
        while len(pieces) > 1:
            joined = pieces[0] + pieces[1]
            if joined not in tokens:  # a step on the way takes the place of the last, rarest token
                tokens.insert(len(_FIXED), joined)
                dropped = set(tokens[vocab_size:])
                tokens = tokens[:vocab_size]
                merges = [m for m in merges if not dropped & {*m, m[0] + m[1]}]
            merges.append((pieces[0], pieces[1]))
            pieces = _build(tokens, merges).encode(word).tokens
    return _build(tokens, merges)


def _build(tokens: list[str], merges: list[Merge]) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # the family's; finds no space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
