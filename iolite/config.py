"""The settings that travel with a checkpoint, as frozen dataclasses read from its own JSON files.

`ModelConfig` is `config.json`, `GenerationConfig` is `generation_config.json`, `ProcessorConfig` is
`processor_config.json`. Field names are the checkpoint's; derived values are properties. A value that would change
the mathematics in a way this code does not implement is a `ConfigError`, never a silent default.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iolite.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
MODEL_TYPE, DRAFTER_TYPE = "gemma4_unified", "gemma4_unified_assistant"  # model_type of a model and of a drafter
OFFICIAL_IMAGE_BUDGETS = (70, 140, 280, 560, 1120)
DRAFTER_HINT = "that is a drafter: name the model that it drafts for, and give this one as --drafter"

# What Gemma 4 Unified fixes. A checkpoint that says otherwise is another architecture, which we would run wrongly.
_FIXED_TEXT = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "use_bidirectional_attention": ("vision",),
    "use_double_wide_mlp": (False,),
    "enable_moe_block": (False,),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: the base, and the share of the head's dimensions that is rotated."""

    theta: float
    partial_rotary_factor: float = 1.0

    def num_angles(self, head_dim: int) -> int:
        """How many of the head_dim/2 angle pairs turn; the others have frequency zero."""
        return int(self.partial_rotary_factor * head_dim // 2)


@dataclass(frozen=True)
class TextConfig:
    """The decoder (`text_config`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int
    attention_k_eq_v: bool
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_sliding: RopeConfig = RopeConfig(10_000.0)
    rope_full: RopeConfig = RopeConfig(1_000_000.0, 0.25)
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = None
    max_position_embeddings: int = 262_144
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1

    def is_full(self, layer: int) -> bool:
        """Whether the layer sees the whole past (every sixth in the 12B) or only the window."""
        return self.layer_types[layer] == FULL

    def layer_head_dim(self, layer: int) -> int:
        return self.global_head_dim if self.is_full(layer) else self.head_dim

    def layer_kv_heads(self, layer: int) -> int:
        return self.num_global_key_value_heads if self.is_full(layer) else self.num_key_value_heads

    def shares_kv(self, layer: int) -> bool:
        """Whether the layer has no v_proj: its value is the raw key projection."""
        return self.attention_k_eq_v and self.is_full(layer)


@dataclass(frozen=True)
class VisionConfig:
    """The picture embedder (`vision_config`): one token for each patch of model_patch_size² pixels."""

    patch_size: int = 16
    pooling_kernel_size: int = 3
    mm_embed_dim: int = 3840
    mm_posemb_size: int = 1120
    num_soft_tokens: int = 280
    rms_norm_eps: float = 1e-6

    @property
    def model_patch_size(self) -> int:
        """Side of one token's patch, in pixels."""
        return self.patch_size * self.pooling_kernel_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch: side * side * RGB."""
        return 3 * self.model_patch_size**2


@dataclass(frozen=True)
class AudioConfig:
    """The sound embedder (`audio_config`): one token for each frame of raw 16 kHz samples."""

    audio_embed_dim: int = 640
    rms_norm_eps: float = 1e-6

    @property
    def audio_samples_per_token(self) -> int:
        return self.audio_embed_dim


@dataclass(frozen=True)
class ModelConfig:
    """`config.json` of a Gemma 4 Unified checkpoint."""

    text: TextConfig
    vision: VisionConfig | None
    audio: AudioConfig | None
    image_token_id: int = 258_880
    audio_token_id: int = 258_881
    video_token_id: int = 258_884
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    boa_token_id: int = 256_000
    eoa_token_id: int = 258_883
    tie_word_embeddings: bool = True
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = (1,)

    @property
    def modalities(self) -> tuple[str, ...]:
        vision = ("image", "video") if self.vision else ()
        return ("text", *vision, *(("audio",) if self.audio else ()))

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        return cls.from_hf(read_json(Path(folder) / "config.json"))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads both spellings: the published file's, and the one Transformers saves (`per_layer_config`).

        Raises ConfigError for another architecture, a missing or impossible number, or an unknown mathematical choice.
        """
        if data.get("model_type") != MODEL_TYPE:
            is_drafter = data.get("model_type") == DRAFTER_TYPE
            raise ConfigError(
                f"config.json: model_type is {data.get('model_type')!r}, not {MODEL_TYPE!r}",
                DRAFTER_HINT if is_drafter else "iolite runs the Gemma 4 Unified family only",
            )
        text_data = data.get("text_config")
        if not isinstance(text_data, Mapping):
            raise ConfigError("config.json: text_config is missing")
        text = _text_config(text_data)
        tie = _flag(data, "tie_word_embeddings", _flag(text_data, "tie_word_embeddings", True))
        config = cls(
            text=text,
            vision=_vision_config(_part(data, "vision_config")),
            audio=_audio_config(_part(data, "audio_config")),
            **{name: _count(data, key, default, 0) for name, key, default in _TOKEN_KEYS},
            tie_word_embeddings=tie,
            dtype=str(data.get("dtype") or data.get("torch_dtype") or "bfloat16"),
            eos_token_ids=_ids(data.get("eos_token_id", text_data.get("eos_token_id", 1))),
        )
        config._check_tokens()
        return config

    def _check_tokens(self) -> None:
        used = {name: getattr(self, name) for name, *_ in _TOKEN_KEYS}
        if not self.vision:
            used = {k: v for k, v in used.items() if k in ("audio_token_id", "boa_token_id", "eoa_token_id")}
        if not self.audio:
            used = {k: v for k, v in used.items() if k not in ("audio_token_id", "boa_token_id", "eoa_token_id")}
        pad, size = self.text.pad_token_id, self.text.vocab_size
        if pad >= size:  # every placeholder is embedded as padding; its own id may lie outside, as in the reference
            raise ConfigError(f"config.json: pad_token_id is {pad}, outside the vocabulary of {size}")
        if len(set(used.values())) != len(used):
            raise ConfigError("config.json: two media tokens have the same id")

    def to_hf(self) -> dict[str, Any]:
        """The published spelling of `config.json`, which Transformers reads too."""
        t = self.text
        text = {k: v for k, v in asdict(t).items() if k not in ("rope_sliding", "rope_full")}
        text |= {
            "model_type": "gemma4_unified_text",
            "layer_types": list(t.layer_types),
            "rope_parameters": {
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": t.rope_full.theta,
                    "partial_rotary_factor": t.rope_full.partial_rotary_factor,
                },
                SLIDING: {"rope_type": "default", "rope_theta": t.rope_sliding.theta},
            },
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_bidirectional_attention": "vision",
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,  # llama.cpp's converter wants it to be there
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        vision = self.vision and {
            "model_type": "gemma4_unified_vision",
            **asdict(self.vision),
            "model_patch_size": self.vision.model_patch_size,
            "output_proj_dims": self.vision.mm_embed_dim,
        }
        audio = self.audio and {"model_type": "gemma4_unified_audio", **asdict(self.audio)}
        eos = list(self.eos_token_ids)
        return {
            "architectures": ["Gemma4UnifiedForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "dtype": self.dtype,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            **{key: getattr(self, name) for name, key, _ in _TOKEN_KEYS},
            "text_config": text,
            "vision_config": vision,
            "audio_config": audio,
        }


# (our field, its key in config.json, the published value). The file spells one of them "_index".
_TOKEN_KEYS = (
    ("image_token_id", "image_token_id", 258_880),
    ("audio_token_id", "audio_token_id", 258_881),
    ("video_token_id", "video_token_id", 258_884),
    ("boi_token_id", "boi_token_id", 255_999),
    ("eoi_token_id", "eoi_token_id", 258_882),
    ("boa_token_id", "boa_token_id", 256_000),
    ("eoa_token_id", "eoa_token_index", 258_883),
)


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: how the checkpoint's authors want it sampled, and where it stops."""

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = (1,)
    suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, model: ModelConfig) -> GenerationConfig:
        """Where the file is absent: the card's sampling, the config's end token, eoi and eoa suppressed. Where it is
        there and silent: Transformers' defaults, which are greedy decoding, top_p 1 and top_k 50."""
        path = Path(folder) / "generation_config.json"
        data = read_json(path) if path.is_file() else {"do_sample": True, "top_p": 0.95, "top_k": 64}
        suppress = data.get("suppress_tokens", [model.eoi_token_id, model.eoa_token_id]) or []
        if not isinstance(suppress, list) or any(type(i) is not int for i in suppress):
            raise ConfigError(f"generation_config.json: suppress_tokens must be a list of token ids, not {suppress!r}")
        return cls(
            do_sample=_flag(data, "do_sample", False),
            temperature=_number(data, "temperature", 1.0, 0.0),
            top_p=_number(data, "top_p", 1.0, 0.0),
            top_k=_count(data, "top_k", 50, 0),
            min_p=_number(data, "min_p", 0.0, 0.0),
            repetition_penalty=_number(data, "repetition_penalty", 1.0, 1e-6),
            eos_token_ids=_ids(data.get("eos_token_id", list(model.eos_token_ids))),
            suppress_tokens=tuple(i for i in suppress if 0 <= i < model.text.vocab_size),
        )

    def to_hf(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {
            "eos_token_id": list(data.pop("eos_token_ids")),
            "suppress_tokens": list(self.suppress_tokens),
        }


@dataclass(frozen=True)
class ProcessorConfig:
    """`processor_config.json`: how media become tokens. Budgets are soft tokens for one picture or one video frame."""

    image_max_soft_tokens: int = 280
    video_max_soft_tokens: int = 70
    num_frames: int = 32
    sampling_rate: int = 16_000
    audio_samples_per_token: int = 640
    audio_seq_length: int = 750
    patch_size: int = 16  # as in VisionConfig
    pooling_kernel_size: int = 3
    image_budgets: tuple[int, ...] | None = OFFICIAL_IMAGE_BUDGETS  # None: any positive number
    transcribe_prompt: str | None = None

    @classmethod
    def from_folder(cls, folder: Path, model: ModelConfig) -> ProcessorConfig:
        path = Path(folder) / "processor_config.json"
        return cls.from_hf(read_json(path) if path.is_file() else {}, model)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], model: ModelConfig) -> ProcessorConfig:
        image, video, audio = (
            _section(data, key) for key in ("image_processor", "video_processor", "feature_extractor")
        )
        image_max = _count(image, "max_soft_tokens", model.vision.num_soft_tokens if model.vision else 280, 1)
        video_max = _count(video, "max_soft_tokens", min(70, image_max), 1)
        for name, section in (("image", image), ("video", video)):
            _check_pixels(f"{name}_processor", section, model.vision)
        _check_sound(audio, model.audio)
        spoken = data.get("transcribe_prompt")
        if spoken is not None and not isinstance(spoken, str):
            raise ConfigError(f"processor_config.json: transcribe_prompt must be a text, not {spoken!r}")
        official = image_max in OFFICIAL_IMAGE_BUDGETS and video_max in OFFICIAL_IMAGE_BUDGETS
        return cls(
            image_max_soft_tokens=image_max,
            video_max_soft_tokens=video_max,
            num_frames=_count(video, "num_frames", 32, 1),
            audio_samples_per_token=model.audio.audio_samples_per_token if model.audio else 640,
            audio_seq_length=_count(data, "audio_seq_length", 750, 1),
            patch_size=model.vision.patch_size if model.vision else 16,
            pooling_kernel_size=model.vision.pooling_kernel_size if model.vision else 3,
            image_budgets=OFFICIAL_IMAGE_BUDGETS if official else None,
            transcribe_prompt=spoken,
        )

    def to_hf(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"patch_size": self.patch_size, "pooling_kernel_size": self.pooling_kernel_size}
        sizes |= {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
        sizes |= {"do_convert_rgb": True, "resample": 3}
        sizes |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # llama.cpp's converter reads them
        data: dict[str, Any] = {
            "processor_class": "Gemma4UnifiedProcessor",
            "image_seq_length": self.image_max_soft_tokens,
            "audio_seq_length": self.audio_seq_length,
            "audio_ms_per_token": 1000 * self.audio_samples_per_token // self.sampling_rate,
            "image_processor": {
                "image_processor_type": "Gemma4UnifiedImageProcessor",
                "max_soft_tokens": self.image_max_soft_tokens,
                "do_normalize": False,
                **sizes,
            },
            "video_processor": {
                "video_processor_type": "Gemma4UnifiedVideoProcessor",
                "max_soft_tokens": self.video_max_soft_tokens,
                "num_frames": self.num_frames,
                "do_sample_frames": True,
                "do_normalize": False,
                **sizes,
            },
            "feature_extractor": {
                "feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor",
                "feature_size": self.audio_samples_per_token,
                "sampling_rate": self.sampling_rate,
                "padding_value": 0.0,
                "audio_samples_per_token": self.audio_samples_per_token,
            },
        }
        return data | ({"transcribe_prompt": self.transcribe_prompt} if self.transcribe_prompt else {})


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; keys may not repeat, since two readers would then see two different files."""

    def no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ConfigError(f"{path.name}: a key stands twice in one object")
        return found

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_repeats)
    except FileNotFoundError:
        raise ConfigError(f"{path.name} is missing in {path.parent}", "is this a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        why = _why_unreadable(error)
        raise ConfigError(f"{path.name} in {path.parent} cannot be read as JSON ({why})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} in {path.parent} holds no JSON object")
    return data


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a mistake in line {error.lineno}"
    if isinstance(error, OSError):
        return error.strerror or "no access"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number with thousands of digits"


def _text_config(data: Mapping[str, Any]) -> TextConfig:
    for key, allowed in _FIXED_TEXT.items():
        if key in data and data[key] not in allowed:
            raise ConfigError(f"config.json: text_config.{key} = {data[key]!r} is not supported (needs {allowed[0]!r})")
    num_layers = _count(data, "num_hidden_layers", None, 1, 1000)
    layer_types = data.get("layer_types") or [SLIDING if (i + 1) % 6 else FULL for i in range(num_layers)]
    known = isinstance(layer_types, list) and all(kind in (SLIDING, FULL) for kind in layer_types)
    if not known or len(layer_types) != num_layers or layer_types[-1] != FULL:
        raise ConfigError(
            f"config.json: layer_types must name {num_layers} layers, each {SLIDING!r} or {FULL!r}, the last one full"
        )
    heads, kv_heads = (_count(data, key, None, 1, 4096) for key in ("num_attention_heads", "num_key_value_heads"))
    head_dim = _count(data, "head_dim", 256, 2, 4096)
    share = _flag(data, "attention_k_eq_v", False)
    full_head_dim, full_kv_heads = _full_layer_sizes(data, layer_types, head_dim, kv_heads if share else None)
    for count in (kv_heads, full_kv_heads):
        if heads % count:
            raise ConfigError(f"config.json: {heads} query heads cannot share {count} key-value heads")
    if head_dim % 2 or full_head_dim % 2:
        raise ConfigError("config.json: head_dim must be even, since rotary embedding turns pairs")
    softcap = data.get("final_logit_softcapping")
    ropes = _ropes(data.get("rope_parameters"))
    return TextConfig(
        vocab_size=_count(data, "vocab_size", None, 1, 1 << 24),
        hidden_size=_count(data, "hidden_size", None, 1, 1 << 20),
        intermediate_size=_count(data, "intermediate_size", None, 1, 1 << 22),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        global_head_dim=full_head_dim,
        num_global_key_value_heads=full_kv_heads,
        attention_k_eq_v=share,
        sliding_window=_count(data, "sliding_window", None, 1),
        layer_types=tuple(layer_types),
        rope_sliding=ropes[0],
        rope_full=ropes[1],
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-6, 0.0),
        final_logit_softcapping=None if softcap is None else _number(data, "final_logit_softcapping", 30.0, 1e-6),
        max_position_embeddings=_count(data, "max_position_embeddings", 262_144, 1),
        pad_token_id=_count(data, "pad_token_id", 0, 0),
        bos_token_id=_count(data, "bos_token_id", 2, 0),
        eos_token_id=_ids(data.get("eos_token_id", 1))[0],
    )


def _full_layer_sizes(
    data: Mapping[str, Any], layer_types: Sequence[str], head_dim: int, shared_kv_heads: int | None
) -> tuple[int, int]:
    """(head_dim, kv heads) of the full-attention layers, from either spelling."""
    kv_heads = _count(data, "num_key_value_heads", None, 1, 4096)
    per_layer = data.get("per_layer_config")
    if per_layer is None:
        full_head_dim = _count(data, "global_head_dim", 512, 2, 4096)
        own = data.get("num_global_key_value_heads") if shared_kv_heads is not None else None
        return full_head_dim, _count(data, "num_global_key_value_heads", None, 1, 4096) if own else kv_heads
    if not isinstance(per_layer, Mapping):
        raise ConfigError("config.json: per_layer_config must be an object")
    # Transformers pads the layer numbers with zeros to one width: "05" and "11".
    by_layer = {str(key).lstrip("0") or "0": value for key, value in per_layer.items()}
    known = {"head_dim", "num_key_value_heads"}
    found = set()
    for layer, kind in enumerate(layer_types):
        own_sizes = _section(by_layer, str(layer))
        if set(own_sizes) - known:
            raise ConfigError(f"config.json: per_layer_config.{layer} sets {sorted(set(own_sizes) - known)}")
        sizes = (
            _count(own_sizes, "head_dim", head_dim, 2, 4096),
            _count(own_sizes, "num_key_value_heads", kv_heads, 1, 4096),
        )
        if kind == FULL:
            found.add(sizes)
        elif sizes != (head_dim, kv_heads):
            raise ConfigError(f"config.json: per_layer_config.{layer} changes a sliding layer, which is not supported")
    if len(found) != 1:
        raise ConfigError("config.json: per_layer_config gives the full-attention layers different sizes")
    return found.pop()


def _ropes(data: Mapping[str, Any] | None) -> tuple[RopeConfig, RopeConfig]:
    """(sliding, full). The one kind each may have is what the family was trained with."""
    if data is None:
        return RopeConfig(10_000.0), RopeConfig(1_000_000.0, 0.25)
    if not isinstance(data, Mapping):
        raise ConfigError("config.json: rope_parameters must be an object")
    sliding, full = _section(data, SLIDING), _section(data, FULL)
    for name, rope, kind in ((SLIDING, sliding, "default"), (FULL, full, "proportional")):
        if rope.get("rope_type", kind) != kind:
            raise ConfigError(f"config.json: rope_type {rope['rope_type']!r} for {name} is not supported")
        # "factor" divides the frequencies of other context lengths; Transformers obeys it for the proportional kind.
        if rope.get("factor") not in (None, 1):
            raise ConfigError(f"config.json: rope factor {rope['factor']!r} for {name} is not supported (needs 1)")
    factor = _number(full, "partial_rotary_factor", 1.0, 0.0)
    if factor > 1:
        raise ConfigError(f"config.json: partial_rotary_factor is {factor}, more than 1")
    return (
        RopeConfig(_number(sliding, "rope_theta", 10_000.0, 1.0)),
        RopeConfig(_number(full, "rope_theta", 1_000_000.0, 1.0), factor),
    )


def _vision_config(data: Mapping[str, Any] | None) -> VisionConfig | None:
    if data is None:
        return None
    config = VisionConfig(
        patch_size=_count(data, "patch_size", 16, 1, 4096),
        pooling_kernel_size=_count(data, "pooling_kernel_size", 3, 1, 64),
        mm_embed_dim=_count(data, "mm_embed_dim", 3840, 1, 1 << 20),
        mm_posemb_size=_count(data, "mm_posemb_size", 1120, 1, 1 << 20),
        num_soft_tokens=_count(data, "num_soft_tokens", 280, 1, 1 << 20),
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-6, 0.0),
    )
    for key, value in (
        ("output_proj_dims", config.mm_embed_dim),
        ("model_patch_size", config.model_patch_size),
    ):
        if data.get(key, value) != value:
            raise ConfigError(f"config.json: vision_config.{key} is {data[key]!r}, but its other sizes give {value}")
    return config


def _audio_config(data: Mapping[str, Any] | None) -> AudioConfig | None:
    if data is None:
        return None
    size = _count(data, "audio_embed_dim", 640, 1, 1 << 20)
    for key in ("audio_samples_per_token", "hidden_size", "output_proj_dims"):
        if data.get(key, size) != size:
            raise ConfigError(f"config.json: audio_config.{key} is {data[key]!r}, but audio_embed_dim is {size}")
    return AudioConfig(audio_embed_dim=size, rms_norm_eps=_number(data, "rms_norm_eps", 1e-6, 0.0))


def _check_pixels(name: str, section: Mapping[str, Any], vision: VisionConfig | None) -> None:
    """ConfigError for a way of making pixels that is not the family's: bicubic, divided by 255, not normalised."""
    sizes = {} if vision is None else {k: getattr(vision, k) for k in ("patch_size", "pooling_kernel_size")}
    fixed = {"do_resize": True, "do_rescale": True, "resample": 3, **sizes}
    if section.get("do_normalize"):
        fixed |= {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    for key, value in fixed.items():
        if section.get(key) not in (None, value):
            raise ConfigError(f"processor_config.json: {name}.{key} is {section[key]!r}; only {value!r} is supported")
    factor = _number(section, "rescale_factor", 1 / 255, 0.0)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"processor_config.json: {name}.rescale_factor is {factor}; only 1/255 is supported")


def _check_sound(section: Mapping[str, Any], audio: AudioConfig | None) -> None:
    size = audio.audio_samples_per_token if audio else None
    for key, value in (("sampling_rate", 16_000), ("feature_size", size), ("audio_samples_per_token", size)):
        if value is not None and section.get(key) not in (None, value):
            raise ConfigError(f"processor_config.json: {key} is {section[key]!r}; this model needs {value}")


def _section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {key} must be an object, not {type(value).__name__}")
    return value


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """A section whose absence means something else than an empty one."""
    return None if data.get(key) is None else _section(data, key)


def _flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = default if data.get(key) is None else data[key]
    if type(value) is not bool:
        raise ConfigError(f"config: {key} must be true or false, not {value!r}")
    return value


def _count(data: Mapping[str, Any], key: str, default: int | None, low: int, high: int = 1 << 31) -> int:
    value = default if data.get(key) is None else data[key]
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"config: {key} must be a whole number from {low} to {high}, not {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str, default: float, low: float) -> float:
    value = default if data.get(key) is None else data[key]
    if type(value) not in (int, float) or not low <= value <= sys.float_info.max:  # neither NaN nor a huge int
        raise ConfigError(f"config: {key} must be a finite number of at least {low:g}, not {value!r}")
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise ConfigError(f"config: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(ids)
