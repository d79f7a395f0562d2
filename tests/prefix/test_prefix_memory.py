"""Sequences in memory: what is found again, what is copied, what goes, and that every score stays the same."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import Audio, Image, Text
from support.prefix import CHUNK, NAME, SLACK, Reader, prompt_of, text, with_media

from iolite import cache
from iolite.cache import GrowingCache, KVCache, LayerCache, RingCache
from iolite.generate.loop import Decoding
from iolite.generate.sampling import SamplingParams
from iolite.kernels import ops
from iolite.prefix.chain import Chain
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt


def test_the_next_turn_reads_only_what_is_new(read):
    first, answer = prompt_of((1, 40)), text((2, 9))
    assert read(first, answer) == 0
    second = Prompt([*first.ids, *answer, *text((3, 12))], "")
    assert read(second, text((4, 5))) == len(first.ids) + len(answer)
    third = Prompt([*second.ids, *text((4, 5)), 30], "")
    assert read(third) == len(third.ids) - 1
    counters = read.prefixes.counters
    assert (counters.hits, counters.misses, counters.evictions) == (2, 1, 0)
    assert counters.reused + counters.prefilled == len(first.ids) + len(second.ids) + len(third.ids)
    assert counters.prefilled == len(first.ids) + 12 + 1
    assert len(read.prefixes) == 1


def test_an_answer_drawn_anew_and_an_edited_turn_go_back(read):
    first = prompt_of((1, 40), (2, 20))
    read(first, text((3, 9)))
    assert read(first, text((4, 9))) == len(first.ids) - 1
    second = Prompt([*first.ids, *text((4, 9), (5, 20))], "")
    assert read(second, text((6, 3))) == len(first.ids) + 9
    edited = Prompt([*second.ids[:-4], *text((7, 8))], "")
    assert read(edited) == len(second.ids) - 4
    assert len(read.prefixes) == 1


def test_a_template_that_ends_prompts_otherwise_costs_that_end(read):
    """The family's template begins an answer with an empty thought that the next prompt no longer has."""
    first = prompt_of((1, 30), (2, 5))
    read(first, text((3, 9)))
    second = Prompt([*first.ids[:-5], *text((3, 9), (4, 10))], "")
    assert read(second, text((5, 5))) == len(first.ids) - 5
    assert len(read.prefixes) == 1


def test_another_conversation_after_the_same_beginning_gets_a_copy(read):
    begin = (1, 20)
    read(prompt_of(begin, (2, 15)), text((3, 4)))
    assert read(prompt_of(begin, (4, 15)), text((5, 4))) == 21
    assert len(read.prefixes) == 2
    for seed in (2, 4):
        whole = prompt_of(begin, (seed, 15), (seed + 1, 4), (6, 1))
        assert read(whole) == len(whole.ids) - 1
    assert read(prompt_of((7, 15))) <= 1  # the token that begins every text
    assert len(read.prefixes) == 3


@pytest.mark.parametrize("pieces", [(Text(5), Image(4, 3), Text(9)), (Text(5), Audio(12), Text(9))])
def test_media_of_one_size_never_share(read, pieces):
    one, other = with_media(*pieces), with_media(*pieces, seed=1)
    start = one.spans[0].start
    other = replace(one, spans=tuple(replace(s, start=start) for s in other.spans))
    assert one.ids == other.ids
    assert read(one) == 0
    assert read(other) == start
    assert read(one) == len(one.ids) - 1
    assert read(other) == len(one.ids) - 1


def test_a_picture_is_read_whole_or_not_at_all(read):
    whole = with_media(Text(5), Image(4, 3), Text(9))
    span = whole.spans[0]
    read(whole)
    assert read(replace(whole, ids=whole.ids[: span.stop])) == span.start
    sound = with_media(Text(5), Audio(12), Text(9))
    read(sound)
    assert read(replace(sound, ids=sound.ids[: sound.spans[0].stop])) == sound.spans[0].stop - 1


def test_an_answer_longer_than_the_slack_is_forgotten_at_no_cost(read):
    """Thoughts are left out of the next prompt, however many there were."""
    first = prompt_of((1, 60))
    read(first, text((2, 3 * SLACK)))
    second = Prompt([*first.ids[:-5], *text((3, 20))], "")
    assert read(second, text((4, 3 * SLACK))) == len(first.ids) - 5
    other = Prompt([*first.ids[:-30], *text((5, 20))], "")
    assert read(other) == 0  # so far back no ring reaches


def test_after_a_long_answer_was_forgotten_the_next_turns_go_on(read):
    first = prompt_of((1, 60))
    read(first, text((2, 3 * SLACK)))
    second = Prompt([*first.ids[:-5], *text((3, 20))], "")
    assert read(second, text((4, 3))) == len(first.ids) - 5
    third = Prompt([*second.ids[:-5], *text((4, 3), (5, 9))], "")
    assert read(third, text((6, 3))) == len(second.ids) - 5
    assert read(Prompt([*third.ids, *text((6, 3), (7, 9))], "")) == len(third.ids) + 3


def test_a_checkpoint_of_what_was_forgotten_is_not_used(read):
    """The second prompt has other tokens where the first had its checkpoint; the third parts from it just there."""
    first = prompt_of((1, 60))
    read(first, text((2, 3 * SLACK)))
    second = Prompt([*first.ids[:-5], *text((3, 40))], "")
    read(second, text((4, 3 * SLACK)))
    assert read(Prompt([*second.ids[: len(first.ids) - 2], *text((5, 20))], "")) == 0


def test_thoughts_of_a_turn_with_many_calls_are_forgotten_at_no_cost(read):
    """Each call of a tool is a prompt of its own; the first prompt is what the next turn goes back to."""
    first = prompt_of((1, 60))
    ids = list(first.ids)
    for call in range(4):
        assert read(Prompt(ids, ""), text((10 + call, 40))) == (len(ids) - 15 if call else 0)
        ids += text((10 + call, 40), (20 + call, 15))
    assert read(Prompt([*first.ids[:-3], *text((5, 20))], "")) == len(first.ids) - 3


def test_rings_that_were_never_overwritten_go_back_anywhere(network):
    read = Reader(network, PrefixCache(lambda: KVCache(network.config.text, 1024)))
    read(prompt_of((1, 100)), text((2, 300)))
    assert read(prompt_of((1, 30), (3, 20))) == 31


def test_what_was_used_least_recently_goes_first(read, make):
    read(prompt_of((1, 40)))
    size = read.prefixes.num_bytes
    small = Reader(read.network, PrefixCache(make, int(2.5 * size)))
    for seed in (1, 2, 1, 3):
        small(prompt_of((seed, 40)))
        assert small.prefixes.num_bytes <= 2.5 * size
    assert small.prefixes.counters.evictions == 1
    assert [small(prompt_of((seed, 40), (9, 1))) for seed in (1, 3)] == [41, 41]
    assert small(prompt_of((2, 40))) <= 1
    assert len(Reader(read.network, PrefixCache(make, 0)).prefixes) == 0


def test_nothing_is_kept_where_there_is_no_budget(network, make):
    read = Reader(network, PrefixCache(make, 0))
    assert read(prompt_of((1, 40))) == read(prompt_of((1, 40))) == 0
    assert (len(read.prefixes), read.prefixes.num_bytes) == (0, 0)


def test_the_budget_is_by_default_one_cache_of_the_whole_context(read, make):
    assert read.prefixes.budget_bytes is None
    read(prompt_of((1, 1000)), text((2, 20)))
    full, rings = 0, 0
    for layer in make().layers:
        row = layer.layout.heads * sum(layer.layout.widths) * 4
        full += row * 1024 * isinstance(layer, GrowingCache)
        rings += row * (16 + SLACK) * isinstance(layer, RingCache)
    assert read.prefixes.budget_bytes == full + rings
    assert read(prompt_of((1, 1000), (2, 20), (3, 1))) == 1021  # checkpoints go before sequences do


def test_a_long_conversation_is_taken_over_where_there_is_no_room_for_two(network, make):
    begin = (1, 20)
    probe = Reader(network, PrefixCache(make))
    probe(prompt_of(begin, (2, 15)))
    read = Reader(network, PrefixCache(make, int(1.5 * probe.prefixes.num_bytes)))
    read(prompt_of(begin, (2, 15)))
    assert read(prompt_of(begin, (3, 15))) == 21
    assert len(read.prefixes) == 1


def test_what_is_in_use_counts(network, make):
    prefixes = PrefixCache(make)
    read = Reader(network, prefixes)
    read(prompt_of((1, 40)))
    size = prefixes.num_bytes
    lease = prefixes.take(prompt_of((2, 40)))
    assert prefixes.num_bytes == 2 * size
    prefixes.give(lease, lease.prompt.ids)
    assert prefixes.num_bytes == size  # nothing was read
    lease = prefixes.take(prompt_of((2, 40)))
    del lease  # neither given back nor dropped
    gc.collect()
    assert prefixes.num_bytes == size
    prefixes.clear()
    assert prefixes.num_bytes == len(prefixes) == 0


def test_two_threads_read_the_same_prompt_in_two_caches(read):
    """They begin alike, and each is lent a sequence that the other does not have."""
    begin, seen, faults = prompt_of((1, 30)), [], []
    read(begin)
    gate = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            for turn in range(3):
                gate.wait()
                lease = read.prefixes.take(begin)
                gate.wait()
                seen.append((turn, id(lease.cache)))
                read.prefixes.give(lease, begin.ids)
                gate.wait()
                read(prompt_of((1, 30), (seed, 5 + turn)), text((seed, 4)))
        except BaseException as fault:
            faults.append(fault)
            gate.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(set(seen)) == len(seen) == 12
    assert read.prefixes.counters.misses >= 1


def drawn(network, prefixes: PrefixCache | None, prompt: Prompt, tokens: int) -> tuple[list[int], Decoding]:
    run = Decoding(network, prompt, SamplingParams(temperature=0, max_tokens=tokens), context=1024, prefixes=prefixes)
    return [token.id for token in run], run


def test_answers_are_those_of_a_cold_run(network, make):
    prefixes = PrefixCache(make)
    prompt = with_media(Text(9), Image(4, 3), Text(30), Audio(8), Text(20))
    read = 0  # the last token of an answer is drawn, not read
    for turn in range(4):
        cold, _ = drawn(network, None, prompt, 30)
        warm, run = drawn(network, prefixes, prompt, 30)
        again, second = drawn(network, prefixes, prompt, 30)
        assert warm == again == cold
        assert (run.cached_tokens, second.cached_tokens) == (read, len(prompt.ids) - 1)
        read = len(prompt.ids) + len(cold) - 1
        prompt = Prompt([*prompt.ids, *cold, *text((turn, 20))], "", prompt.spans)


def test_an_answer_that_is_closed_early_is_kept(network, make):
    prefixes, prompt = PrefixCache(make), prompt_of((1, 30))
    stream = iter(Decoding(network, prompt, SamplingParams(temperature=0), context=1024, prefixes=prefixes))
    ids = [next(stream).id for _ in range(4)]
    assert len(prefixes) == 0
    stream.close()
    assert len(prefixes) == 1
    assert drawn(network, prefixes, Prompt([*prompt.ids, *ids], ""), 1)[1].cached_tokens == len(prompt.ids) + 3


def break_off(monkeypatch, calls: int, fault: type[BaseException]) -> None:
    """The layers store keys and values that many times, then something happens, in the middle of a pass: the rows are
    overwritten, and nothing has been noted of it. So the layers are not gone through in one call."""
    monkeypatch.setattr(ops, "stack", lambda *_: None)
    put, left = LayerCache.put, [calls]

    def breaking(self, *args):
        put(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise fault

    monkeypatch.setattr(LayerCache, "put", breaking)


@pytest.mark.parametrize("calls", [1, 5, 12, 13, 30, 60, 12 * 7 + 1, 12 * 7 + 6, 12 * 9 + 12])
def test_after_ctrl_c_in_the_middle_of_a_pass_nothing_wrong_is_used(read, monkeypatch, calls):
    """Twelve layers; seven passes for what is new of the prompt, then one for each token."""
    first, second = prompt_of((1, 60)), prompt_of((1, 60), (2, 65))
    read(first)
    with monkeypatch.context() as patch:
        break_off(patch, calls, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            read(second, text((3, 20)))
    done = (calls - 1) // 12
    wanted = min(61 + CHUNK * min(done, 7), 126) + max(0, done - 7)
    assert read(prompt_of((1, 60), (2, 65), (3, 20), (4, 5))) == wanted


@pytest.mark.parametrize("calls", [12 * 7 + 1, 12 * 7 + 6, 12 * 12])
@pytest.mark.parametrize("back", [0, 7, 22, 23, 24, 25, 26, 40])  # around the slack
def test_after_ctrl_c_nothing_that_was_overwritten_is_gone_back_to(read, monkeypatch, calls, back):
    first = prompt_of((1, 70))
    with monkeypatch.context() as patch:
        break_off(patch, calls, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            read(first, text((2, 20)))
    held = read.prefixes._kept[0].cache.length
    assert held >= 70
    read(Prompt([*first.ids[: held - back], *text((3, 9))], ""))


def test_after_ctrl_c_while_buffers_grow_the_sequence_is_dropped(read, monkeypatch):
    """Where memory is not given page by page: 64 rows, then twice as many."""
    monkeypatch.setattr(cache, "_pages", lambda *_: None)
    read(prompt_of((1, 59)))
    with monkeypatch.context() as patch:
        break_off(patch, 12, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            read(prompt_of((1, 59), (2, 30)))
    assert len(read.prefixes) == 0


def test_ctrl_c_in_the_first_pass_leaves_nothing(read, monkeypatch):
    with monkeypatch.context() as patch:
        break_off(patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            read(prompt_of((1, 60)))
    assert len(read.prefixes) == 0
    assert read(prompt_of((1, 60))) == 0


def test_after_any_other_fault_the_sequence_is_dropped(read, monkeypatch):
    read(prompt_of((1, 60)))
    with monkeypatch.context() as patch:
        break_off(patch, 14, RuntimeError)
        with pytest.raises(RuntimeError):
            read(prompt_of((1, 60), (2, 30)))
    assert len(read.prefixes) == 0
    assert read(prompt_of((1, 60), (2, 30))) == 0


RUNS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from((1, 7, 25, 60))), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    turns=st.lists(st.tuples(RUNS, st.sampled_from((0, 1, 10, 40))), min_size=2, max_size=8),
    budget=st.sampled_from((None, 150_000, 400_000)),
    slack=st.sampled_from((0, 5, 24, 200)),
)
def test_whatever_is_read_in_whatever_order_the_scores_are_those_of_a_cold_run(load_tiny, turns, budget, slack):
    network = load_tiny(NAME)
    read = Reader(network, PrefixCache(lambda: KVCache(network.config.text, 1024, slack=slack), budget))
    for runs, answer in turns:
        prompt = prompt_of(*runs)
        assert found(read.prefixes, prompt) == likeliest(read.prefixes, prompt)
        read(prompt, text((0, answer)))
        assert budget is None or read.prefixes.num_bytes <= budget
        assert read.prefixes.num_bytes == sum(kept.num_bytes for kept in read.prefixes._kept)


def found(prefixes: PrefixCache, prompt: Prompt) -> tuple[int, int, int]:
    """How much the chosen sequence has of a prompt, and which it is."""
    kept, reused = prefixes._best(prompt, Chain.of(prompt))
    return (0, 0, 0) if kept is None else (reused, -len(kept.chain), kept.used)


def likeliest(prefixes: PrefixCache, prompt: Prompt) -> tuple[int, int, int]:
    """The same by looking at all of them."""
    chain = Chain.of(prompt)
    every = ((kept.usable(prompt, chain), -len(kept.chain), kept.used) for kept in prefixes._kept)
    return max((one for one in every if one[0]), default=(0, 0, 0))
