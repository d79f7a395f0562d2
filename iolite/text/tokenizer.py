"""Strings <-> ids with the checkpoint's own tokenizer.json.

The family splits text by BPE with bytes as the fallback: a character that is no token becomes its UTF-8 bytes, tokens
`<0x00>` to `<0xFF>`; a space is the character ▁ inside tokens. Decoding is therefore: join the bytes of all tokens,
read them as UTF-8. `iolite.text.stream` does the same a token at a time and gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import tokenizers

from iolite.errors import CheckpointError, MessageError

SPECIAL_TOKENS: Final = {  # token -> its name in tokenizer_config.json, in the order of the family's ids
    "<pad>": "pad_token",
    "<eos>": "eos_token",
    "<bos>": "bos_token",
    "<unk>": "unk_token",
    "<mask>": "mask_token",
    "<|tool>": "std_token",
    "<tool|>": "etd_token",
    "<|tool_call>": "stc_token",
    "<tool_call|>": "etc_token",
    "<|tool_response>": "str_token",
    "<tool_response|>": "etr_token",
    '<|"|>': "escape_token",
    "<|think|>": "think_token",
    "<|channel>": "soc_token",
    "<channel|>": "eoc_token",
    "<|turn>": "sot_token",
    "<turn|>": "eot_token",
    "<|image>": "boi_token",
    "<|audio>": "boa_token",
    "<|image|>": "image_token",
    "<|audio|>": "audio_token",
    "<image|>": "eoi_token",
    "<audio|>": "eoa_token",
    "<|video|>": "video_token",
}

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DECODERS = {"Replace", "ByteFallback", "Fuse"}


class Tokenizer:
    """A tokenizer that adds nothing and hides nothing: what is special in the text is special in the ids, and back.

    Safe to use from many threads. Raises CheckpointError for a file that cannot be used.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        unknown = _decoder_types(backend) - _DECODERS
        if unknown:
            raise CheckpointError(
                f"the tokenizer decodes with {', '.join(sorted(unknown))}, which this model family does not use",
                "only tokenizers with byte fallback (▁ for a space, <0x00>…<0xFF> for bytes) can be used",
            )
        backend.no_padding()
        backend.no_truncation()
        # The library would keep ten thousand texts between special tokens, since a space is no border to it here: 4 KB
        # of memory for a question that it hardly ever meets again.
        backend.model._resize_cache(0)
        self._backend = backend

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint's folder."""
        return cls.from_file(Path(path) / "tokenizer.json")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a tokenizer.json."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", "a checkpoint needs its tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer that can be read") from error
        return cls(backend)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """The ids of text. Special tokens written in it become their ids; nothing is added.

        Raises MessageError for half a surrogate pair, which no UTF-8 text holds.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MessageError(f"the text is not valid Unicode at character {error.start}") from None
        # `encode` of one text would hold up all other threads until it is done: for seconds, where it is long.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens spelled out. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text, as UTF-8: possibly a part of a character. Empty for an unused id."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary (`▁the`, `<|turn>`), None when there is none."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None for an unused id."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    @cached_property
    def vocab_size(self) -> int:
        """Ids run from 0 to one less than this."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that are structure, not text."""
        flagged = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        named = (self.token_id(token) for token in SPECIAL_TOKENS)
        return frozenset(flagged | {i for i in named if i is not None})

    @cached_property
    def _bytes(self) -> list[bytes]:
        """token_bytes of every id."""
        table = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            byte = _BYTE.fullmatch(token)
            table[i] = bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return table


def tokenizer_config(tokens: Mapping[str, str]) -> dict[str, object]:
    """The tokenizer_config.json that belongs to a tokenizer.json, with the names that the reference's processor asks
    for. tokens: those of SPECIAL_TOKENS that the vocabulary has."""
    roles = {role: token for token, role in tokens.items()}
    basic = ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token")
    return {
        "tokenizer_class": "GemmaTokenizer",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        **roles,
        "extra_special_tokens": [],
        "model_specific_special_tokens": {role: token for role, token in roles.items() if role not in basic},
    }


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    """The class names in the decoder, those in a sequence one by one."""
    if backend.decoder is None:
        return set()
    # As JSON, since a sequence shows its members nowhere else.
    state = bytes(backend.decoder.__getstate__()).decode()
    return set(re.findall(r'"type":\s*"(\w+)"', state)) - {"Sequence"}
