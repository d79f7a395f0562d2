"""What a constraint costs: seconds for a vocabulary, for a grammar, and for every token that is drawn.

    python bench/grammar.py                 # the embedded model's vocabulary, and one of 262,144 made-up tokens

Answers are written by random scores, likely to end what they begin. A token's cost is that of `Constraint.mask` and
`Constraint.saw` (which is llguidance), and that of ruling the rest out of the scores and taking the largest.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

import tokenizers
import torch

import iolite
from iolite.generate.grammar import constrain
from iolite.generate.matcher import Grammars
from iolite.generate.sampling import keep_allowed
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer

SIZE = 262_144
STRING = {"type": "string", "maxLength": 200}
PERSON = {
    "type": "object",
    "properties": {
        "name": STRING,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "home": {
            "type": "object",
            "properties": {"street": STRING, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
        },
    },
    "required": ["name", "age", "tags", "home"],
}
TOOL = {"name": "find", "parameters": PERSON}
ASKED = {
    "a schema": {"schema": PERSON},
    "any JSON object": {"schema": {"type": "object"}},
    "a call": {"tools": [TOOL], "tool_choice": "required"},
    "a regular expression": {"grammar": {"regex": "[a-z]{3,20}(, [a-z]{3,20}){20,}"}},
}
SCRIPTS = (("a", "z"), ("a", "z"), ("A", "Z"), ("!", "@"), ("Ѐ", "ӿ"), ("一", "鿿"), ("가", "힣"), ("ऀ", "ॿ"))
LIKELY = ('"', "}", "]", '<|"|>', "<tool_call|>", "<turn|>")


def made_up() -> Tokenizer:
    """A vocabulary of the 12B's size: the special tokens, all bytes, and words of several scripts."""
    dice, words = random.Random(0), dict.fromkeys([*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))])
    words |= dict.fromkeys([*map(chr, range(33, 127)), "▁", "\n"])
    while len(words) < SIZE:
        first, last = dice.choice(SCRIPTS)
        word = "".join(chr(dice.randint(ord(first), ord(last))) for _ in range(dice.randint(1, 7)))
        words["▁" * dice.randint(0, 1) + word] = None
    model = tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(backend)


def measure(grammars: Grammars, asked: dict) -> dict[str, float]:
    """Seconds to make the constraint, and microseconds a token."""
    begin = time.perf_counter()
    tokenizer = grammars.tokenizer
    ends = {tokenizer.token_id("<turn|>")}
    constrain(grammars, [], ends, **asked)
    found, masks, allows = {"first": time.perf_counter() - begin}, [], []
    for seed in range(3):
        begin = time.perf_counter()
        constraint = constrain(grammars, [], ends, **asked)
        assert constraint is not None
        found["again"] = time.perf_counter() - begin
        for mask, allow in _written(constraint, tokenizer, grammars.vocab_size, seed, ends):
            masks.append(mask)
            allows.append(allow)
    ordered = sorted(masks)
    found |= {
        "tokens": len(masks),
        "mask": mean(masks),
        "median": median(masks),
        "p99": ordered[len(masks) * 99 // 100],
    }
    return found | {"worst": ordered[-1], "scores": mean(allows)}


def _written(constraint, tokenizer, size, seed, ends) -> Iterator[tuple[float, float]]:
    """Seconds of each token: in the constraint, and in the scores."""
    generator, boost = torch.Generator().manual_seed(seed), torch.zeros(size)
    boost[[tokenizer.token_id(token) for token in LIKELY]] = 9.0
    for _ in range(300):
        scores = torch.randn(size, generator=generator) + boost
        begin = time.perf_counter()
        mask = constraint.mask()
        middle = time.perf_counter()
        token = int(keep_allowed(scores, mask).argmax())
        after = time.perf_counter()
        constraint.saw(token)
        yield middle - begin + time.perf_counter() - after, after - middle
        if token in ends:
            return


def main() -> None:
    nano = Tokenizer.from_folder(Path(iolite.__file__).parent / "nano")
    for name, tokenizer in (("nano", nano), ("made up", made_up())):
        grammars = Grammars(tokenizer, tokenizer.vocab_size)
        begin = time.perf_counter()
        grammars.regex("a")
        took = {"vocabulary": name, "tokens": tokenizer.vocab_size, "seconds": round(time.perf_counter() - begin, 3)}
        print(json.dumps(took))
        for what, asked in ASKED.items():
            found = measure(grammars, asked)
            rounded = {key: value if key == "tokens" else round(value * 1e6, 1) for key, value in found.items()}
            print(json.dumps({"vocabulary": name, "microseconds of": what} | rounded))


if __name__ == "__main__":
    main()
