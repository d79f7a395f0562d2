"""The names and shapes of a checkpoint's tensors, as tables.

Three spellings of one tensor:

    ours             the state dict of `iolite.model.unified.Unified`     vision_embedder.patch_dense.weight
    published        the files on the Hub, and what we write              model.vision_embedder.patch_dense.weight
    Transformers'    its modules' names since 5.2x, in some files         model.embed_vision.patch_dense.weight

Nothing here imports the model: a checkpoint can be checked and described from its config.json and its headers alone.
"""

from __future__ import annotations

from iolite.config import ModelConfig

LM_HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"

# (beginning of a name in a file, what it begins with here); the first that fits is taken.
_PREFIXES = (
    ("model.embed_vision.multimodal_embedder.", "embed_vision."),
    ("model.embed_vision.patch_", "vision_embedder.patch_"),
    ("model.embed_vision.pos_", "vision_embedder.pos_"),
    ("model.", ""),
)

# The parts people ask about, by the beginning of our names.
PARTS = (
    ("embedding", EMBEDDING),
    ("head", LM_HEAD),
    ("decoder", "language_model."),
    ("vision", "vision_embedder."),
    ("vision", "embed_vision."),
    ("audio", "embed_audio."),
)


def from_file(name: str) -> str:
    """Our name of a tensor in a file, whichever way the file spells it."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def published(name: str) -> str:
    """The published spelling of one of our names."""
    return name if name == LM_HEAD else f"model.{name}"


def part(name: str) -> str:
    """Which of PARTS one of our names belongs to."""
    return next(part for part, prefix in PARTS if name.startswith(prefix))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must have, by our names, with its shape.

    For the 12B: 11,959,730,176 parameters, and 48 `layer_scalar` buffers.
    """
    text = config.text
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (text.vocab_size, text.hidden_size)}
    for layer in range(text.num_hidden_layers):
        own = _layer_shapes(config, layer)
        shapes |= {f"language_model.layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes["language_model.norm.weight"] = (text.hidden_size,)
    if config.vision is not None:
        vision, width = config.vision, config.vision.mm_embed_dim
        shapes |= {
            "vision_embedder.patch_ln1.weight": (vision.patch_dim,),
            "vision_embedder.patch_ln1.bias": (vision.patch_dim,),
            "vision_embedder.patch_dense.weight": (width, vision.patch_dim),
            "vision_embedder.patch_dense.bias": (width,),
            "vision_embedder.patch_ln2.weight": (width,),
            "vision_embedder.patch_ln2.bias": (width,),
            "vision_embedder.pos_embedding": (vision.mm_posemb_size, 2, width),
            "vision_embedder.pos_norm.weight": (width,),
            "vision_embedder.pos_norm.bias": (width,),
            "embed_vision.embedding_projection.weight": (text.hidden_size, width),
        }
    if config.audio is not None:
        shapes["embed_audio.embedding_projection.weight"] = (text.hidden_size, config.audio.audio_embed_dim)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (text.vocab_size, text.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    text = config.text
    hidden, head_dim = text.hidden_size, text.layer_head_dim(layer)
    query = text.num_attention_heads * head_dim
    key = text.layer_kv_heads(layer) * head_dim
    value = {} if text.shares_kv(layer) else {"self_attn.v_proj.weight": (key, hidden)}
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        **value,
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (text.intermediate_size, hidden),
        "mlp.up_proj.weight": (text.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, text.intermediate_size),
        "layer_scalar": (1,),
    }


def is_buffer(name: str) -> bool:
    """Whether the tensor is stored but not trained, and so not counted as a parameter."""
    return name.endswith(".layer_scalar")
