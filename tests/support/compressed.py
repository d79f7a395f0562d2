"""Writes checkpoints in compressed-tensors' "pack-quantized" form, apart from the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORM: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "actorder": None,
                "dynamic": False,
            },
        }
    },
}


def random_lattice(rows: int, cols: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(whole numbers -8..7 [R, C], bfloat16 scales [R, C/32]) that look like trained weights in size."""
    values = torch.randint(-8, 8, (rows, cols), generator=rng)
    scales = (torch.rand(rows, cols // 32, generator=rng) + 0.2) / (8 * cols**0.5)
    return values, scales.bfloat16()


def three_tensors(values: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """What stands for a weight: its packed values, scales and shape, by the endings of their names."""
    rows, cols = values.shape
    packed = torch.zeros(rows, cols // 8, dtype=torch.int64)
    for place in range(8):  # the first of eight in the lowest four bits
        packed |= (values[:, place::8] + 8) << (4 * place)
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return {
        "weight_packed": signed.to(torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, cols]),
    }


def compress_folder(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Replaces every projection of the decoder in a float folder by random weights in this form; -> those weights as
    float32, by the published names."""
    path, rng = folder / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors, weights = safetensors.torch.load_file(path), {}
    for name in sorted(tensors):
        if "_proj.weight" not in name or "language_model.layers" not in name:
            continue
        values, scales = random_lattice(*tensors.pop(name).shape, rng)
        weights[name] = values.float() * scales.float().repeat_interleave(32, dim=1)
        tensors |= {name.removesuffix("weight") + end: t for end, t in three_tensors(values, scales).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FORM}))
    return weights


def change_tensors(folder: Path, change: Any) -> None:
    """Writes the folder's weights anew after change(dict of tensors)."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, change: Any) -> None:
    """Writes config.json anew after change(its data)."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
