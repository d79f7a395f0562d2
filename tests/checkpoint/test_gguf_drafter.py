"""Drafters in GGUF files: what is written and read back is the same drafter, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.gguf_model import save_tiny, save_tiny_drafter

from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.gguf import GgufFile
from iolite.checkpoint.gguf_drafter import open_drafter, open_gguf_drafter, read_drafter_config, write_drafter
from iolite.checkpoint.gguf_source import GgufSource
from iolite.checkpoint.source import open_source
from iolite.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_drafter(tmp_path_factory.mktemp("drafter"))


def changed(folder: Path, target: Path, **values: object) -> Path:
    """The folder with other values in its config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_drafter_comes_back(folder: Path, tmp_path: Path) -> None:
    original = open_drafter(folder)
    write_drafter(tmp_path / "mtp.gguf", original, "bf16")
    back = open_gguf_drafter(tmp_path / "mtp.gguf")
    assert (back.text, back.backbone_hidden_size) == (original.text, original.backbone_hidden_size)
    assert json.loads(back.tokenizer.to_json()) == json.loads(original.tokenizer.to_json())
    assert back.shapes == original.shapes
    assert len(back.shapes) == 4 * 11 + 4
    for name in back.shapes:
        assert torch.equal(back.weight(name), original.weight(name).float()), name


def test_quantised(folder: Path, tmp_path: Path) -> None:
    original = open_drafter(folder)
    write_drafter(tmp_path / "mtp.gguf", original, "q8_0")
    kinds = {name: tensor.type for name, tensor in GgufFile(tmp_path / "mtp.gguf").tensors.items()}
    assert {kind for name, kind in kinds.items() if "norm" not in name and "scale" not in name} == {"F32", "Q8_0"}
    name = "pre_projection.weight"
    error = (open_gguf_drafter(tmp_path / "mtp.gguf").weight(name) - original.weight(name).float()).abs()
    assert error.max() <= original.weight(name).float().abs().max() / 127  # a step, at most


def test_beside_its_model(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(tmp_path / "tiny", "published")))
    written = to_gguf(source, tmp_path / "tiny.gguf", "q4_0", Beside(drafter=folder))
    assert [path.name for path in written] == ["tiny.gguf", "mmproj-tiny.gguf", "mtp-tiny.gguf"]
    assert open_source(f"{tmp_path}:tiny").config.modalities == ("text", "image", "video", "audio")
    with pytest.raises(ConfigError, match="holds a drafter"):
        GgufSource(written[2])


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"model_type": "gemma4_unified"}, "model_type is 'gemma4_unified'"),
        ({"backbone_hidden_size": "wide"}, "backbone_hidden_size"),
        ({"use_ordered_embeddings": True}, "only drafters whose layers"),
        ({"backbone_hidden_size": 512}, r"pre_projection\.weight has the shape"),
    ],
)
def test_folders_that_are_none(folder: Path, tmp_path: Path, values: dict[str, object], fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        open_drafter(changed(folder, tmp_path / "other", **values))


def test_its_layers_read_the_models_keys(folder: Path, tmp_path: Path) -> None:
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    other = changed(folder, tmp_path / "other", text_config=text | {"num_kv_shared_layers": 2})
    with pytest.raises(ConfigError, match="only drafters whose layers"):
        read_drafter_config(other)


def test_a_model_is_no_drafter(tmp_path: Path) -> None:
    source = open_source(str(save_tiny(tmp_path / "tiny", "published")))
    to_gguf(source, tmp_path / "tiny.gguf", "bf16", Beside(embedders=False))
    with pytest.raises(ConfigError, match="holds the architecture 'gemma4', not 'gemma4-assistant'"):
        open_gguf_drafter(tmp_path / "tiny.gguf")
