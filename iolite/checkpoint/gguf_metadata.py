"""Settings, tokenizer and template out of a GGUF file's metadata, and into it, in llama.cpp's keys.

Read is what llama.cpp's converter writes for this family (conversion/gemma.py there) and what its loader understands
(src/models/gemma4.cpp). A key of the architecture that is not known here, or a value that would change the mathematics
in a way that iolite does not implement, is a ConfigError.

What GGUF has no key for: the tokens that stand for media (found by their text), whether the full layers' values are
their keys (they then have no attn_v), the share of a full head that is rotated (counted in `rope_freqs`), greedy
decoding (written as temperature 0), and the picture budgets: those of the published models are taken, unless the file
has iolite's own key PROCESSOR, which is written for models with other ones and which llama.cpp does not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from iolite.config import FULL, SLIDING, GenerationConfig, ModelConfig, ProcessorConfig, TextConfig, VisionConfig
from iolite.errors import CheckpointError, ConfigError
from iolite.text.tokenizer import SPECIAL_TOKENS, Tokenizer

MODEL, EMBEDDERS, DRAFTER = "gemma4", "clip", "gemma4-assistant"  # general.architecture
PROCESSOR = "iolite.processor_config"

# general.file_type by the type of most matrices.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}

# Kinds of tokens (enum llama_token_type in llama.cpp's include/llama.h).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED)
# Special tokens that llama.cpp's converter marks as text, so that its parser of tool calls sees them.
_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
# Tokens that end an answer of a model that chats; llama.cpp knows them by their text, too.
_ENDS = ("<eos>", "<turn|>", "<|tool_response>")

_NO_TURN = 1e30  # what `rope_freqs` divides the frequency of an angle by that does not turn

# Keys of the architecture that must be absent or have one of these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "embedding_length_per_layer_input": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
}
_IGNORED = frozenset(("vocab_size", "expert_feed_forward_length", "rope.scaling.finetuned"))


@dataclass
class Keys:
    """The keys of one architecture, each of the expected kind; remembers which were asked for."""

    metadata: Mapping[str, Any]
    prefix: str
    file: str
    used: set[str] = field(default_factory=set)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `prefix.key`; ConfigError when it is of another kind, or absent and there is no default."""
        self.used.add(key)
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise ConfigError(f"{self.file}: the key {self.prefix}.{key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.file}: {self.prefix}.{key} is {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float stored in 32 bits as the decimal number that it was written for: 1e-06, not 9.999999974752427e-07."""
        value = self.get(key, (int, float), default)
        with np.errstate(over="ignore"):  # infinity, which no setting may be
            return float(str(np.float32(value))) if math.isfinite(value) else value

    def each(self, key: str, count: int, default: Any = None) -> list[int]:
        """One whole number for each layer: an array, or a number that holds for all."""
        value = self.get(key, (int, np.ndarray), default)
        if isinstance(value, int):
            return [value] * count
        if len(value) != count or value.dtype.kind not in "iu":
            raise ConfigError(f"{self.file}: {self.prefix}.{key} must have {count} whole numbers")
        return [int(n) for n in value]

    def same(self, key: str, count: int, default: Any = None) -> int:
        """A number that must be the same for every layer."""
        return self.one_of(key, self.each(key, count, default))

    def one_of(self, key: str, values: list[int]) -> int:
        if len(set(values)) != 1:
            raise ConfigError(f"{self.file}: {self.prefix}.{key} differs between layers of one kind ({set(values)})")
        return values[0]

    def unknown(self) -> Iterator[str]:
        """Keys with the prefix that nothing has asked for."""
        start = self.prefix + "."
        yield from (key for key in self.metadata if key.startswith(start) and key.removeprefix(start) not in self.used)


# The decoder's settings


def read_text_config(
    metadata: Mapping[str, Any],
    file: str,
    *,
    prefix: str,
    shares_kv: bool,
    angles: int,
    vocab_size: int,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """`text_config` as in config.json. angles: how many of a full head's angle pairs turn. more: keys that this
    architecture has and a model's has not, or with another value than 0."""
    keys = Keys(metadata, prefix, file)
    layers = keys.get("block_count", int)
    pattern = keys.get("attention.sliding_window_pattern", np.ndarray)
    if len(pattern) != layers or pattern.dtype != bool:
        raise ConfigError(f"{file}: {prefix}.attention.sliding_window_pattern must say yes or no {layers} times")
    heads = keys.same("attention.head_count", layers)
    full_dim, dim = _head_sizes(keys)
    kv_heads = list(zip(pattern, keys.each("attention.head_count_kv", layers, heads), strict=True))
    full_kv = [count for sliding, count in kv_heads if not sliding]
    sliding_kv = [count for sliding, count in kv_heads if sliding] or full_kv
    cap = keys.number("final_logit_softcapping", 0.0)
    text = {
        "vocab_size": vocab_size,
        "hidden_size": keys.get("embedding_length", int),
        "intermediate_size": keys.same("feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.one_of("attention.head_count_kv", sliding_kv),
        "num_global_key_value_heads": keys.one_of("attention.head_count_kv", full_kv or sliding_kv),
        "head_dim": dim,
        "global_head_dim": full_dim,
        "attention_k_eq_v": shares_kv,
        "sliding_window": keys.get("attention.sliding_window", int),
        "layer_types": [SLIDING if sliding else FULL for sliding in pattern],
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base"),
                "partial_rotary_factor": _rotary_factor(angles, full_dim),
            },
        },
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": cap or None,
        "max_position_embeddings": keys.get("context_length", int),
    }
    _refuse_others(keys, more)
    return text


def _head_sizes(keys: Keys) -> tuple[int, int]:
    """(full, sliding): keys and values are of one size, and rotation reaches over all of it."""
    sizes: list[int] = []
    for suffix in ("", "_swa"):
        size = keys.get(f"attention.key_length{suffix}", int, sizes[0] if sizes else None)
        for name in (f"attention.value_length{suffix}", f"rope.dimension_count{suffix}"):
            if keys.get(name, int, size) != size:
                raise ConfigError(f"{keys.file}: {keys.prefix}.{name} is not the length of a key, {size}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _rotary_factor(angles: int, head_dim: int) -> float:
    """The share of a head's dimensions that is rotated, such that `RopeConfig.num_angles` gives `angles` again."""
    factor = 2 * angles / head_dim
    return factor if int(factor * head_dim // 2) == angles else math.nextafter(factor, 2.0)


def _refuse_others(keys: Keys, more: Mapping[str, Any]) -> None:
    fixed = _FIXED | {key: (value,) for key, value in more.items()}
    for key, allowed in fixed.items():
        value = keys.metadata.get(f"{keys.prefix}.{key}", allowed[0])
        values = value.tolist() if isinstance(value, np.ndarray) else [value]
        if any(v not in allowed for v in values):
            raise ConfigError(f"{keys.file}: {keys.prefix}.{key} = {value!r} is not supported (needs {allowed[0]!r})")
    keys.used |= fixed.keys() | _IGNORED
    for key in keys.unknown():
        raise ConfigError(
            f"{keys.file}: the key {key} is not known", "this version of iolite might compute something else"
        )


def rope_angles(freqs: np.ndarray, file: str) -> int:
    """How many angles turn, from the values of `rope_freqs`: ones, then numbers so large that nothing turns."""
    turning = int((freqs == 1).sum())
    if not (freqs[:turning] == 1).all() or not (freqs[turning:] >= _NO_TURN / 2).all():
        raise ConfigError(f"{file}: rope_freqs must be ones and then {_NO_TURN:g}: other frequencies are not supported")
    return turning


def rope_freqs(text: TextConfig) -> np.ndarray:
    """The values of `rope_freqs`, float32 [global_head_dim / 2]."""
    turning = text.rope_full.num_angles(text.global_head_dim)
    return np.asarray([1.0] * turning + [_NO_TURN] * (text.global_head_dim // 2 - turning), np.float32)


def text_metadata(text: TextConfig, prefix: str) -> dict[str, Any]:
    """The architecture's keys."""
    sliding = [not text.is_full(layer) for layer in range(text.num_hidden_layers)]
    values: dict[str, Any] = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": [text.layer_kv_heads(layer) for layer in range(text.num_hidden_layers)],
        "rope.freq_base": text.rope_full.theta,
        "rope.freq_base_swa": text.rope_sliding.theta,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "attention.key_length": text.global_head_dim,
        "attention.value_length": text.global_head_dim,
    }
    values |= {
        # llama.cpp's converter leaves the key out where there is no cap, and its loader then takes 30.
        "final_logit_softcapping": text.final_logit_softcapping or 0.0,
        "attention.sliding_window": text.sliding_window,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "attention.sliding_window_pattern": sliding,
        "attention.key_length_swa": text.head_dim,
        "attention.value_length_swa": text.head_dim,
        "rope.dimension_count": text.global_head_dim,
        "rope.dimension_count_swa": text.head_dim,
    }
    return {f"{prefix}.{key}": value for key, value in values.items()}


# The embedders' settings


def read_vision_config(metadata: Mapping[str, Any], file: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`vision_config` as in config.json; shapes: of the tensors as they lie in the file, by our names."""
    keys = Keys(metadata, "clip.vision", file)
    patch, positions = keys.get("patch_size", int), shapes.get("vision_embedder.pos_embedding", ())
    values = shapes.get("vision_embedder.patch_dense.weight", (0,))[-1]
    if len(positions) != 3:
        raise ConfigError(f"{file}: v.position_embd.weight is missing, or has {len(positions)} dimensions")
    side = math.isqrt(values // 3)
    if patch < 1 or side % patch or 3 * side * side != values:
        raise ConfigError(f"{file}: a patch of {values} values is not made of RGB squares of {patch} pixels")
    pooling = keys.get("projector.scale_factor", int, 3)
    if pooling * patch != side:
        raise ConfigError(f"{file}: {pooling} x {patch} pixels do not make a patch {side} pixels wide")
    for key, value in (("image_mean", 0), ("image_std", 1)):
        if any(v != value for v in keys.get(key, np.ndarray)):
            raise ConfigError(f"{file}: clip.vision.{key} must be {value}: other pixels are not supported")
    width = keys.get("embedding_length", int)
    return {
        "patch_size": patch,
        "pooling_kernel_size": pooling,
        "mm_embed_dim": width,
        "mm_posemb_size": positions[1],
        "rms_norm_eps": keys.number("attention.layer_norm_epsilon"),
    }


def read_audio_config(metadata: Mapping[str, Any], file: str) -> dict[str, Any]:
    """`audio_config` as in config.json. `num_mel_bins` is not read: converters write 640 there, or 128."""
    keys = Keys(metadata, "clip.audio", file)
    return {
        "audio_embed_dim": keys.get("embedding_length", int),
        "rms_norm_eps": keys.number("attention.layer_norm_epsilon"),
    }


def embedder_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys of a mmproj file. llama.cpp takes the layers' sizes of a tower; there is none, so they are 0.

    Raises CheckpointError for embedders that llama.cpp cannot run: for sound it has fixed numbers.
    """
    hidden, values = config.text.hidden_size, {"clip.has_vision_encoder": True} if config.vision else {}
    tower = {"feed_forward_length": 0, "block_count": 0, "attention.head_count": 0}
    if vision := config.vision:
        own: dict[str, Any] = {
            "projection_dim": hidden,
            "image_size": 224,  # asked for and not used
            "patch_size": vision.patch_size,
            "embedding_length": vision.mm_embed_dim,
            **tower,
            "image_mean": [0.0] * 3,
            "image_std": [1.0] * 3,
            "projector_type": "gemma4uv",
            "attention.layer_norm_epsilon": vision.rms_norm_eps,
        }
        if vision.pooling_kernel_size != 3:
            own["projector.scale_factor"] = vision.pooling_kernel_size
        values |= {f"clip.vision.{key}": value for key, value in own.items()}
    if audio := config.audio:
        if (audio.audio_embed_dim, audio.rms_norm_eps) != (640, 1e-6):
            raise CheckpointError(
                f"frames of {audio.audio_embed_dim} samples, normalised with {audio.rms_norm_eps:g}, cannot be written",
                "in GGUF files these are always 640 and 1e-06",
            )
        values["clip.has_audio_encoder"] = True
        own = {
            "projection_dim": hidden,
            "embedding_length": audio.audio_embed_dim,
            **tower,
            "projector_type": "gemma4ua",
            "num_mel_bins": audio.audio_samples_per_token,
            "attention.layer_norm_epsilon": audio.rms_norm_eps,
        }
        values |= {f"clip.audio.{key}": value for key, value in own.items()}
    return values


# The tokenizer


def read_tokenizer(metadata: Mapping[str, Any], file: str) -> Tokenizer:
    """The tokenizer in `tokenizer.ggml.*`: the same pieces, merges and special tokens as in the tokenizer.json that
    it was made from. Raises CheckpointError for another kind of tokenizer, or for one that contradicts itself."""
    keys = Keys(metadata, "tokenizer.ggml", file)
    kind = keys.get("model", str)
    if kind != "gemma4":
        raise CheckpointError(f"{file}: the tokenizer is of the kind {kind!r}, not 'gemma4'")
    tokens, merges = keys.get("tokens", list), keys.get("merges", (list, np.ndarray))
    types = keys.get("token_type", np.ndarray)
    if len(types) != len(tokens):
        raise CheckpointError(f"{file}: {len(tokens)} tokens, but the types of {len(types)}")
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if len(vocab) != int((types != _UNUSED).sum()):
        raise CheckpointError(f"{file}: two tokens have the same text")
    try:
        return Tokenizer(_backend(vocab, [_pair(merge) for merge in merges], _added(tokens, types)))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: the tokenizer cannot be used ({str(error)[:200]})") from None


def _pair(merge: str) -> tuple[str, str]:
    """Two pieces with a space between, which no piece holds but as ▁."""
    first, _, second = merge.partition(" ")
    return first, second


def _added(tokens: list[str], types: np.ndarray) -> list[AddedToken]:
    """Tokens that are cut out of a text before anything else, in the order of their ids."""
    found = (int(i) for i in np.isin(types, _ADDED).nonzero()[0])
    return [
        AddedToken(tokens[i], normalized=False, special=types[i] != _USER_DEFINED or tokens[i] in SPECIAL_TOKENS)
        for i in found
    ]


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token="<unk>" if "<unk>" in vocab else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(added)
    return backend


def tokenizer_metadata(
    tokenizer: Tokenizer, text: TextConfig, suppress_tokens: Sequence[int] | None, template: str | None
) -> dict[str, Any]:
    """The keys of the tokenizer, its template and the tokens that are never drawn (None: left open).

    Ids up to the config's vocabulary that no token has become unused ones: llama.cpp wants as many tokens as the
    table has rows.
    """
    state = json.loads(tokenizer.to_json())
    _check_tokenizer(state)
    tokens = [tokenizer.id_to_token(i) for i in range(text.vocab_size)]
    special = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    values: dict[str, Any] = {
        "model": "gemma4",
        "tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "scores": np.full(len(tokens), -1000, np.float32),
        "token_type": np.asarray([_type(i, token, special) for i, token in enumerate(tokens)], np.int32),
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]],
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "padding_token_id": text.pad_token_id,
    }
    if suppress_tokens is not None:
        values["suppress_tokens"] = np.asarray(suppress_tokens, np.int32)
    for key, token in (("unknown", "<unk>"), ("mask", "<mask>")):
        found = tokenizer.token_id(token)
        if found is not None:
            values[f"{key}_token_id"] = found
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if template:
        keys["tokenizer.chat_template"] = template
    return keys | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": True}


def _type(i: int, token: str | None, special: Mapping[int, bool]) -> int:
    if token is None:
        return _UNUSED
    if token in _VISIBLE:
        return _USER_DEFINED
    if i in special:
        return _CONTROL if special[i] else _USER_DEFINED
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return _BYTE
    return _NORMAL


def _check_tokenizer(state: Mapping[str, Any]) -> None:
    """CheckpointError unless a GGUF file can hold the tokenizer: of the family's kind, no spaces in its pieces."""
    model, normalizer = state["model"], state.get("normalizer") or {}
    of_family = model.get("type") == "BPE" and model.get("byte_fallback") and not model.get("ignore_merges")
    if not of_family or (normalizer.get("type"), normalizer.get("content")) != ("Replace", "▁"):
        raise CheckpointError("the tokenizer is not of the family's kind (BPE with byte fallback, ▁ for a space)")
    if any(" " in piece for pair in model["merges"] if isinstance(pair, list) for piece in pair):
        raise CheckpointError("the tokenizer has pieces with spaces, which a GGUF file cannot hold")


# Generation and pictures


def read_generation(metadata: Mapping[str, Any], file: str, model: ModelConfig) -> GenerationConfig:
    """Sampling as `general.sampling.*` says, the card's where it says nothing; temperature 0 is greedy decoding."""
    keys = Keys(metadata, "general.sampling", file)
    temperature = keys.number("temp", 1.0)
    suppressed = metadata.get("tokenizer.ggml.suppress_tokens")
    if suppressed is None:
        suppressed = np.asarray([model.eoi_token_id, model.eoa_token_id])
    if not isinstance(suppressed, np.ndarray) or suppressed.dtype.kind not in "iu":
        raise ConfigError(f"{file}: tokenizer.ggml.suppress_tokens must be whole numbers")
    return GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=keys.number("top_p", 0.95),
        top_k=keys.get("top_k", int, 64),
        min_p=keys.number("min_p", 0.0),
        repetition_penalty=keys.number("penalty_repeat", 1.0),
        eos_token_ids=model.eos_token_ids,
        suppress_tokens=tuple(int(i) for i in suppressed if 0 <= i < model.text.vocab_size),
    )


def sampling_metadata(generation: GenerationConfig) -> dict[str, Any]:
    """`general.sampling.*`."""
    return {
        "general.sampling.top_k": generation.top_k,
        "general.sampling.top_p": generation.top_p,
        "general.sampling.min_p": generation.min_p,
        "general.sampling.temp": generation.temperature if generation.do_sample else 0.0,
        "general.sampling.penalty_repeat": generation.repetition_penalty,
    }


def end_tokens(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[int]:
    """The ids that end an answer: the family's three for a model that chats, and those that the keys name."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    chat = [vocab.get(token) for token in _ENDS] if "tokenizer.chat_template" in metadata else []
    return list(dict.fromkeys(i for i in (*chat, *named) if isinstance(i, int)))


def token_ids(vocab: Mapping[str, int]) -> dict[str, int]:
    """The ids in config.json of the tokens for media, by their text; those that the vocabulary lacks are left out."""
    named = {name: vocab.get(token) for token, name in SPECIAL_TOKENS.items()}
    keys = {f"{kind}_token_id": named[f"{kind}_token"] for kind in ("image", "audio", "video", "boi", "eoi", "boa")}
    keys["eoa_token_index"] = named["eoa_token"]
    return {key: i for key, i in keys.items() if i is not None}


def processor_json(processor: ProcessorConfig, config: ModelConfig) -> str | None:
    """The value of PROCESSOR, or None where a file does without: the published models' settings."""
    vision = config.vision and dataclasses.replace(config.vision, num_soft_tokens=VisionConfig.num_soft_tokens)
    default = ProcessorConfig.from_hf({}, dataclasses.replace(config, vision=vision))
    return None if processor == default else json.dumps(processor.to_hf(), ensure_ascii=False)
