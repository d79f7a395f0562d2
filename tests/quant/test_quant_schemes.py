"""What a scheme packs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iolite.checkpoint.names import expected_shapes
from iolite.config import ModelConfig
from iolite.errors import CheckpointError, UsageError
from iolite.quant.formats import INT4, INT8, packed_bytes
from iolite.quant.schemes import SCHEMES, format_for, quantise_named

CONFIG = Path(__file__).parents[1] / "data" / "gemma-4-12B-config.json"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    folder = tmp_path_factory.mktemp("12B")
    (folder / "config.json").write_bytes(CONFIG.read_bytes())
    return expected_shapes(ModelConfig.from_folder(folder))


def test_every_projection_and_the_table_are_packed(shapes: dict[str, tuple[int, ...]]) -> None:
    packed = {name for name, shape in shapes.items() if format_for(name, shape, "int4")}
    # 48 layers of seven projections, but for the values of the 8 full layers, and the table.
    assert len(packed) == 48 * 7 - 8 + 1
    rest = {name.rsplit(".layers.", 1)[-1].split(".", 1)[-1] for name in shapes.keys() - packed}
    assert all("norm" in name or "layer_scalar" in name or not name.startswith(("self_attn", "mlp")) for name in rest)
    for name in ("vision_embedder.patch_dense.weight", "embed_audio.embedding_projection.weight"):
        assert name in shapes and name not in packed


def test_bytes_of_the_12b(shapes: dict[str, tuple[int, ...]]) -> None:
    """What a token reads: 11.9 G weights at 4.5 bits, and what the head costs in 8.5."""

    def total(head: object) -> int:
        chosen = {n: format_for(n, s, "int4", head=head) for n, s in shapes.items()}  # type: ignore[arg-type]
        return sum(packed_bytes(*shapes[n], f) for n, f in chosen.items() if f)  # type: ignore[call-arg]

    weights = sum(s[0] * s[1] for n, s in shapes.items() if format_for(n, s, "int4"))
    assert total(INT4) == weights * 9 // 16
    assert total(INT8) - total(INT4) == 262_144 * 3840 // 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_head_is_an_option(scheme: str) -> None:
    for name in ("lm_head.weight", "language_model.embed_tokens.weight"):
        assert format_for(name, (96, 48), scheme) is SCHEMES[scheme].head
        assert format_for(name, (96, 48), scheme, head=INT8) is INT8
    projection = "language_model.layers.10.mlp.down_proj.weight"
    assert format_for(projection, (48, 104), scheme, head=INT8) is SCHEMES[scheme].layers


@pytest.mark.parametrize(
    "name",
    [
        "language_model.norm.weight",
        "language_model.layers.0.self_attn.q_norm.weight",
        "language_model.layers.0.layer_scalar",
        "language_model.layers.0.mlp.down_proj.weight.more",
        "model.language_model.layers.0.mlp.down_proj.weight",
        "vision_embedder.pos_embedding",
        "embed_vision.embedding_projection.weight",
    ],
)
def test_others_stay(name: str) -> None:
    assert format_for(name, (48, 48), "int4") is None


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="int3") as error:
        format_for("lm_head.weight", (96, 48), "int3")
    assert error.value.hint and "int4" in error.value.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7])
def test_a_bad_tensor_is_named(bad: float) -> None:
    weight = torch.zeros(16, 32)
    weight[3, 4] = bad
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj"):
        quantise_named("language_model.layers.0.mlp.up_proj.weight", weight, INT4)
