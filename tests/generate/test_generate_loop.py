"""The decoding loop against Transformers' generate, and its borders: ends, context, stop strings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import FIRST_TEXT, MEDIA_TOKENS, VOCABULARY

from iolite.errors import ContextError, UsageError
from iolite.generate.loop import Decoding, StopStrings, check_fits, prompt_logits
from iolite.generate.sampling import SamplingParams
from iolite.model.batch import PaddedBatch
from iolite.prompt import Prompt, Span


def text_prompt(n: int, seed: int = 0) -> Prompt:
    ids = torch.randint(FIRST_TEXT, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt([2, *ids], "")


def media_prompt() -> Prompt:
    """Text, a picture of 4 x 3 patches, text, 7 frames of sound, text."""
    rng = np.random.default_rng(0)
    token = MEDIA_TOKENS
    picture = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2).astype(np.int64)
    ids = [2, 30, token["boi_token_id"], *[token["image_token_id"]] * 12, token["eoi_token_id"], 40, 41]
    ids += [token["boa_token_id"], *[token["audio_token_id"]] * 7, token["eoa_token_index"], 50]
    spans = (
        Span("image", 3, 12, rng.random((12, 48 * 48 * 3), np.float32), picture, "a"),
        Span("audio", 19, 7, rng.standard_normal((7, 640), np.float32), None, "b"),
    )
    return Prompt(ids, "", spans)


def drawn(network, prompt: Prompt, context: int = 4096, **settings) -> list[int]:
    params = SamplingParams(**({"temperature": 0, "max_tokens": 24} | settings))
    return [token.id for token in Decoding(network, prompt, params, context=context)]


def test_greedy_text_is_transformers_generate(load_tiny):
    from support.tiny import reference_model

    prompt = text_prompt(40)  # longer than the window of 16
    reference = reference_model("published").generate(
        torch.tensor([prompt.ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert drawn(load_tiny("published"), prompt) == reference[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id", "audio_token_id"])
def test_a_placeholder_without_media_is_read_as_transformers_reads_it(load_tiny, name):
    from support.tiny import reference_model

    ids = [2, 30, 31, MEDIA_TOKENS[name], 40, 41]
    with torch.inference_mode():
        expected = reference_model("published")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prompt_logits(load_tiny("published"), Prompt(ids, "")), expected, atol=1e-4, rtol=0)


def test_greedy_over_media_is_the_argmax_of_the_whole_sequence_computed_again_for_every_token(load_tiny):
    network, prompt = load_tiny("real-media"), media_prompt()
    ids = list(prompt.ids)
    with torch.inference_mode():
        for _ in range(12):
            again = PaddedBatch.from_prompts(network.config.text, [Prompt(ids, "", prompt.spans)])
            ids.append(int(network.logits(network(again.ids, again)[0, -1:]).argmax()))
    assert drawn(network, prompt, max_tokens=12) == ids[len(prompt.ids) :]


def test_prompt_logits_are_those_of_one_whole_pass(load_tiny):
    network, prompt = load_tiny("real-media"), media_prompt()
    whole = PaddedBatch.from_prompts(network.config.text, [prompt])
    with torch.inference_mode():
        wanted = network.logits(network(whole.ids, whole)[0])
    found = prompt_logits(network, prompt)
    assert found.dtype == torch.float32
    # Two orders of float32 sums over at most 1,120 products, through 6 layers, for logits of size 10: 1e-4 is ample.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_seed_draws_the_same_answer_again(load_tiny):
    network, prompt = load_tiny("published"), text_prompt(5)
    runs = [drawn(network, prompt, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_an_end_token_is_the_last_and_says_so(load_tiny):
    network, prompt = load_tiny("published"), text_prompt(5)
    free = drawn(network, prompt)
    end = free[3]
    params = SamplingParams(temperature=0, max_tokens=24, stop_ids=frozenset({end}))
    tokens = list(Decoding(network, prompt, params, context=4096))
    assert [t.id for t in tokens] == free[: free.index(end) + 1]
    assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["stop"]


def test_suppressed_tokens_never_come(load_tiny):
    network, prompt = load_tiny("published"), text_prompt(5)
    first = drawn(network, prompt)[0]
    assert first not in drawn(network, prompt, suppress_tokens=(first,))


def test_the_answer_ends_where_max_tokens_or_the_context_does(load_tiny):
    network, prompt = load_tiny("published"), text_prompt(9)
    assert len(drawn(network, prompt, max_tokens=1)) == 1
    assert len(drawn(network, prompt, context=13)) == 3
    params = SamplingParams(temperature=0, max_tokens=2)
    assert [t.finish_reason for t in Decoding(network, prompt, params, context=4096)] == [None, "length"]


def test_a_prompt_that_does_not_fit_is_refused_before_any_work():
    with pytest.raises(ContextError, match=r"10 tokens.*context is 10"):
        Decoding(None, text_prompt(9), SamplingParams(), context=10)
    with pytest.raises(UsageError, match="no tokens"):
        check_fits(Prompt([], ""), 10)


def test_time_is_kept_and_progress_told(load_tiny):
    seen = []
    run = Decoding(
        load_tiny("published"),
        text_prompt(600),
        SamplingParams(max_tokens=3),
        context=4096,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(list(run)) == run.count == 3
    assert seen == [(512, 601), (601, 601)]
    assert run.prefill_seconds > 0 and run.decode_seconds > 0


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@given(
    st.text("ab<|\n", max_size=30),
    st.lists(st.text("ab<|\n", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_hold_back_no_more_and_no_less_than_needed(text, stops, cuts):
    watch = StopStrings(tuple(stops))
    shown = ""
    for piece in cut(text, cuts):
        shown += watch.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += watch.flush()
    # Character by character, the text ends at the first moment at which it ends with a stop string.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    assert watch.found == bool(ends)
    if not ends:
        assert shown == text
    else:
        # What is shown ends where a stop string begins. Which one depends on the pieces: of "<" and "a<<" in "a<<" the
        # first is found as soon as "a<" has come.
        assert any(text.startswith(shown + stop) for stop in stops)


def test_a_stop_string_over_three_tokens_is_never_seen():
    watch = StopStrings(("END.",))
    assert [watch.push(piece) for piece in ("one E", "N", "D", ", two E", "ND. three", "four")] == [
        "one ",
        "",
        "",
        "END, two ",
        "",
        "",
    ]
    assert watch.found
    assert watch.flush() == ""
