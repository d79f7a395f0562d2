"""Chains of digests against a comparison token by token, media included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iolite.prefix.chain import SIZE, Chain, last_cut
from iolite.prompt import Prompt, Span

NOTHING = np.zeros((0, 1), np.float32)
IMAGE, AUDIO, VIDEO = 11, 14, 16  # placeholder ids


def prompt_of(parts: list[tuple]) -> Prompt:
    """(id,) is a token of text, (kind, digest, length) a span."""
    token = {"image": IMAGE, "audio": AUDIO, "video": VIDEO}
    ids, spans = [], []
    for part in parts:
        if len(part) == 1:
            ids.append(part[0])
        else:
            kind, digest, length = part
            spans.append(Span(kind, len(ids), length, NOTHING, None, digest))
            ids += [token[kind]] * length
    return Prompt(ids, "", tuple(spans))


def said(prompt: Prompt) -> list[tuple]:
    """Everything that tells one token from another, as it is."""
    told: list[tuple] = [(i,) for i in prompt.ids]
    for span in prompt.spans:
        for place in range(span.length):
            told[span.start + place] = (prompt.ids[span.start + place], span.kind, span.digest, place)
    return told


def common(a: list, b: list) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# Few ids, among them the placeholders without media, few digests and short spans: long common beginnings are likely.
PARTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from((1, 2, IMAGE, AUDIO))),
        st.tuples(st.sampled_from(("image", "audio", "video")), st.sampled_from(("a", "b")), st.integers(1, 3)),
    ),
    max_size=8,
)


@given(PARTS, PARTS, PARTS)
@example([(1,)], [("image", "a", 2)], [("image", "b", 2)])
@example([(1,)], [("image", "a", 2)], [(IMAGE,), (IMAGE,)])
@example([], [("image", "a", 1), ("image", "a", 1)], [("image", "a", 2)])
def test_the_common_prefix_is_the_one_that_is_compared_token_by_token(start, one, other):
    a, b = prompt_of(start + one), prompt_of(start + other)
    wanted = common(said(a), said(b))
    assert Chain.of(a).common(Chain.of(b)) == Chain.of(b).common(Chain.of(a)) == wanted
    assert (Chain.of(a).end == Chain.of(b).end) == (said(a) == said(b))


@given(PARTS, st.lists(st.integers(0, 300_000), max_size=5), st.integers(0, 30))
def test_a_chain_grows_token_by_token_and_is_cut(parts, drawn, length):
    prompt = prompt_of(parts)
    chain = Chain.of(prompt)
    for token in drawn:
        chain.extend([token])
    whole = Chain.of(Prompt([*prompt.ids, *drawn], "", prompt.spans))
    assert len(chain) == len(prompt.ids) + len(drawn)
    assert chain.end == whole.end
    chain.cut(length)
    assert len(chain) == min(length, len(whole)) == whole.common(chain)
    chain.extend([7])
    assert len(chain) == min(length, len(whole)) + 1


def test_seeds_part_what_is_otherwise_equal():
    prompt = prompt_of([(1,), (2,)])
    assert Chain.of(prompt, b"one").common(Chain.of(prompt, b"other")) == 0
    assert Chain.of(prompt, b"one").common(Chain.of(prompt, b"one")) == 2
    assert Chain(b"one").end != Chain(b"other").end


def test_rows_are_the_chain():
    chain = Chain.of(prompt_of([(1,), ("image", "a", 3), (2,)]), b"seed")
    again = Chain(b"seed").with_rows(chain.rows())
    assert chain.rows().shape == (5, SIZE)
    assert again.common(chain) == 5
    again.extend([1])
    chain.extend([1])
    assert again.end == chain.end
    empty = chain.with_rows(Chain(b"seed").rows())
    assert (len(empty), empty.end) == (0, Chain(b"seed").end)


@pytest.mark.parametrize("rows", [np.zeros((2, 15), np.uint8), np.zeros(16, np.uint8), np.zeros((2, 16), np.int8)])
def test_rows_of_another_form_are_refused(rows):
    with pytest.raises(ValueError, match="a chain is uint8"):
        Chain().with_rows(rows)


@given(PARTS, st.integers(0, 30))
def test_prompts_are_cut_outside_pictures_only(parts, length):
    prompt = prompt_of(parts)
    length = min(length, len(prompt.ids))
    cut = last_cut(prompt, length)
    inside = {s.start + n for s in prompt.spans if s.kind != "audio" for n in range(1, s.length)}
    assert cut == max(n for n in range(length + 1) if n not in inside)
