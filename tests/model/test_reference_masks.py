"""The masks that the comparisons hand to Transformers, and the ones iolite builds, against the rule itself.

The rule (model documentation of Gemma 4 Unified): a full layer is causal; a sliding layer allows
`kv > q - window and (kv <= q or same block)`, a block being one picture or one video frame.
"""

from __future__ import annotations

import pytest
import torch
from support.oracle import Audio, Image, Piece, Sample, Text, Video, make_sample, reference_masks
from support.tiny import TINY, reference_model
from torch import Tensor

from iolite.model.batch import may_look

WINDOW = TINY["published"].window

PROMPTS: dict[str, tuple[Piece, ...]] = {
    "text": (Text(3 * WINDOW),),
    "image at the start": (Image(5), Text(20)),
    "images side by side": (Text(3), Image(4), Image(4), Image(3, 2)),
    "frames": (Text(5), Video(4, 3, 2), Text(9)),
    "sound": (Text(5), Audio(30), Text(4)),
    "everything": (Text(4), Image(3, 3), Audio(7), Text(20), Video(2, 4), Image(2), Text(6)),
    # Blocks of one window less one, exactly, and more: only the first two fit into a window.
    **{f"block of {n}": (Text(7), Image(n), Text(11)) for n in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)},
    # Blocks that begin or end on a multiple of the window (two tokens, bos and boi, come before the picture's first).
    "begins on a border": (Text(WINDOW - 2), Image(6), Text(20)),
    "ends on a border": (Text(WINDOW - 2 - 6), Image(6), Text(20)),
}


def by_the_rule(sample: Sample) -> dict[str, Tensor]:
    """Written out position by position, on purpose: nothing in it is shared with either implementation."""
    n, blocks = len(sample.ids), sample.blocks().tolist()
    full, sliding = (torch.zeros(n, n, dtype=torch.bool) for _ in range(2))
    for q in range(n):
        for kv in range(n):
            same_block = blocks[q] != 0 and blocks[q] == blocks[kv]
            full[q, kv] = kv <= q
            sliding[q, kv] = kv > q - WINDOW and (kv <= q or same_block)
    return {"full_attention": full, "sliding_attention": sliding}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_references_masks_follow_the_rule(name: str) -> None:
    sample = make_sample(*PROMPTS[name])
    masks = reference_masks(reference_model("published"), torch.from_numpy(sample.token_types())[None])
    for kind, expected in by_the_rule(sample).items():
        assert torch.equal(masks[kind][0, 0] == 0, expected), kind  # additive: 0 where allowed, very negative elsewhere


def test_the_references_masks_follow_the_rule_in_a_batch() -> None:
    samples = [make_sample(*PROMPTS[name]) for name in ("everything", "block of 17", "sound")]
    longest = max(len(s.ids) for s in samples)
    types, real = (torch.zeros(len(samples), longest, dtype=torch.long) for _ in range(2))
    for row, sample in enumerate(samples):
        types[row, : len(sample.ids)] = torch.from_numpy(sample.token_types())
        real[row, : len(sample.ids)] = 1
    masks = reference_masks(reference_model("published"), types, real)
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        for kind, expected in by_the_rule(sample).items():
            assert torch.equal(masks[kind][row, 0, :n, :n] == 0, expected), (row, kind)
            assert not (masks[kind][row, 0, :n, n:] == 0).any(), (row, kind)


@pytest.mark.parametrize("name", PROMPTS)
def test_our_masks_follow_the_rule(name: str) -> None:
    sample = make_sample(*PROMPTS[name])
    expected = by_the_rule(sample)
    positions, blocks = torch.arange(len(sample.ids)), torch.from_numpy(sample.blocks())
    assert torch.equal(may_look(positions, positions, blocks, blocks, None), expected["full_attention"])
    assert torch.equal(may_look(positions, positions, blocks, blocks, WINDOW), expected["sliding_attention"])
    if not blocks.any():
        assert torch.equal(may_look(positions, positions, None, None, WINDOW), expected["sliding_attention"])
