"""The public interface over a whole folder with random weights, and over scripted answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.compressed import change_config, change_tensors
from support.folder import random_folder

import iolite
from iolite.checkpoint.plan import plan
from iolite.errors import CheckpointError, ContextError, DownloadError, MediaError, MessageError, UsageError
from iolite.text.stream import ContentDelta, ReasoningDelta, ToolCallEnd, ToolCallStart

DEMO = Path(__file__).parents[2] / "docs" / "demo"
NUMBER = [{"type": "image", "image": str(DEMO / "number.png")}, {"type": "text", "text": "What number is this?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}]
CALL = '<|tool_call>call:add{a:2,b:<|"|>x, {y}<|"|>}<tool_call|>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return iolite.load(folder)


@pytest.fixture
def script(model, monkeypatch) -> Callable[..., None]:
    """Makes the model say a text, then its end token."""

    def use(text: str, end: str = "<turn|>") -> None:
        ids = iter([*model.tokenizer.encode(text), model.tokenizer.token_id(end)])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            rows = torch.full((hidden.shape[0], model.config.text.vocab_size), -30.0)
            rows[-1, next(ids)] = 30.0
            return rows

        monkeypatch.setattr(model.network, "logits", logits)

    return use


# Loading


def test_a_model_says_what_it_computes_in_and_why(model):
    assert model.choice.dtype == torch.float32
    assert model.choice.reason == "float32 on the CPU: the checkpoint's own"
    assert model.context == 4096
    assert model.load_seconds > 0


def test_dtype_and_context_are_obeyed(folder):
    model = iolite.load(folder, dtype="bfloat16", device="cpu", kv="bf16", context=100)
    assert next(model.network.parameters()).dtype == torch.bfloat16
    assert model.context == 100
    assert model.logits("Hi").dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"quantize": "int3"}, "int3"),
        ({"drafter": "elsewhere"}, "drafter"),
        ({"kv": "fp4"}, "kv"),
        ({"context": 1}, "context"),
        ({"context": 5000}, "context"),
        ({"dtype": "int4"}, "int4"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_is_not_available_is_refused_by_name(folder, setting, named):
    with pytest.raises((UsageError, DownloadError), match=named):
        iolite.load(folder, **setting)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"image_token_id": 400}, r"<\|image\|> is token 400"),
        ({"text_config": {"bos_token_id": 500_000}}, "<bos> is token 500000"),
        ({"text_config": {"vocab_size": 455}}, r"has the shape \[456, 192\], but config.json makes it \[455, 192\]"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, config, named):
    other = shutil.copytree(folder, tmp_path / "other")
    data = json.loads((other / "config.json").read_text())
    data["text_config"] |= config.pop("text_config", {})
    (other / "config.json").write_text(json.dumps(data | config))
    with pytest.raises(CheckpointError, match=named):
        iolite.load(other)


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(folder, tmp_path):
    other, name = shutil.copytree(folder, tmp_path / "other"), "model.language_model.embed_tokens.weight"
    change_config(other, lambda config: config["text_config"].update(vocab_size=455))
    change_tensors(other, lambda tensors: tensors.update({name: tensors[name][:455].clone()}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 456 tokens, but config\.json has 455"):
        iolite.load(other)


@pytest.mark.parametrize("kv", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_formats_of_the_cache(kv, quantize):
    """Each is what the caches really hold, and none loses what the picture shows."""
    model, messages = iolite.load("nano", kv=kv, quantize=quantize), [{"role": "user", "content": NUMBER}]
    assert model.kv_dtype is {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[kv]
    assert model.chat(messages).text == iolite.load("nano").chat(messages).text
    (cache,) = (kept.cache for kept in model.prefixes._kept)
    assert {store.dtype for layer in cache.layers for store in layer.buffers} == {model.kv_dtype}


def test_a_tight_memory_makes_the_chunks_smaller(monkeypatch):
    """Down to where the next smaller chunk would be 256, as planned, and the answer stays what it was."""
    whole = iolite.load("nano", context=2048)
    assert whole.chunk == 512
    need = plan(whole.config, context=2048, dtype="float32", memory=1 << 40).total_bytes
    monkeypatch.setenv("IOLITE_MEMORY", f"{need - 1}B")
    tight = iolite.load("nano", context=2048)
    assert tight.chunk < 512
    assert tight.chat("How many corners has a square?").text == whole.chat("How many corners has a square?").text


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_packed_weights_compute_in_float32_and_keep_bfloat16(folder, scheme):
    model = iolite.load(folder, quantize=scheme, device="cpu")
    assert model.scheme == scheme
    assert model.choice.reason == f"{scheme} weights on the CPU, computing in float32"
    assert model.kv_dtype == torch.bfloat16
    assert iolite.load(folder, quantize=scheme, kv="float32", device="cpu").kv_dtype == torch.float32
    assert iolite.load(folder, device="cpu").kv_dtype is None
    with pytest.raises(UsageError, match="not in bfloat16"):
        iolite.load(folder, quantize=scheme, dtype="bfloat16", device="cpu")


def test_loading_tells_how_far_it_is(folder):
    steps = []
    model = iolite.load(folder, quantize="int4", progress=lambda *step: steps.append(step))
    count = len(model.network.state_dict())
    assert [(done, of) for done, of, _ in steps] == [(i, count) for i in range(count)]
    assert steps[0][2] == "packing language_model.embed_tokens.weight"


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_the_embedded_model_still_sees_when_it_is_packed(scheme):
    model = iolite.load("nano", quantize=scheme)
    demo = Path(__file__).parents[2] / "docs" / "demo"
    for picture, question, answer in (
        ("number.png", "What number is this?", "47"),
        ("shape.png", "What colour is the shape?", "blue"),
    ):
        parts = [{"type": "image", "image": str(demo / picture)}, {"type": "text", "text": question}]
        assert model.chat([{"role": "user", "content": parts}], temperature=0).text == answer


def test_a_model_that_is_not_here_is_an_error_with_a_hint():
    with pytest.raises(DownloadError) as caught:
        iolite.load("nobody/nothing")
    assert caught.value.hint


# The steps


def test_render_prompt_and_logits_fit_together(model):
    messages = [{"role": "user", "content": "the red circle"}]
    text = model.render(messages)
    prompt = model.prompt(messages)
    assert text == prompt.text == model.render("the red circle")
    assert text.endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert model.render(messages, thinking=True).endswith("<|turn>model\n")
    assert model.render(messages, add_generation_prompt=False).endswith("<turn|>\n")
    assert prompt.ids == model.tokenizer.encode(text)
    logits = model.logits(prompt)
    assert logits.shape == (len(prompt.ids), model.config.text.vocab_size)
    assert logits.dtype == torch.float32


def test_generate_gives_each_token_and_the_text_of_all(model):
    prompt = model.prompt("what number")
    pieces = list(model.generate(prompt, max_tokens=20, temperature=0.0))
    logits = model.logits(prompt)[-1]
    logits[list(model.defaults.suppress_tokens)] = -torch.inf
    assert pieces[0].id == int(logits.argmax())
    ids = [p.id for p in pieces if p.id not in model.defaults.eos_token_ids]
    assert "".join(p.text for p in pieces) == model.tokenizer.decode(ids)
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason in ("stop", "length")


def test_sampling_is_reproducible_by_seed(model):
    runs = [[p.id for p in model.generate("what", max_tokens=16, temperature=5.0, seed=seed)] for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_strings_end_generate(model, script):
    script("one two three")
    pieces = list(model.generate("x", temperature=0, stop="o t"))
    assert "".join(p.text for p in pieces) == "one tw"[: "one two three".find("o t", 1)]
    assert pieces[-1].finish_reason == "stop"


def test_generate_refuses_before_it_begins(model):
    with pytest.raises(ContextError):
        model.generate("word " * 5000)
    with pytest.raises(UsageError, match="vocabulary"):
        model.generate("x", logit_bias={10**6: 1})
    with pytest.raises(UsageError, match="unknown"):
        model.generate("x", beams=3)
    with pytest.raises(MessageError):
        model.generate([])


def test_media_reach_the_model(model):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (48, 144, 3), dtype=np.uint8)
    sound = rng.uniform(-0.5, 0.5, 1300).astype(np.float32)

    def prompt(picture, sound):
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what"}]
        parts.append({"type": "audio", "audio": sound, "sampling_rate": 16_000})
        return model.prompt([{"role": "user", "content": parts}])

    first = prompt(picture, sound)
    assert [span.length for span in first.spans] == [3, 3]
    logits = model.logits(first)[-1]
    for other in (prompt(255 - picture, sound), prompt(picture, sound[::-1].copy())):
        assert other.ids == first.ids
        assert (model.logits(other)[-1] - logits).abs().max() > 1e-3
    with pytest.raises(MediaError):
        model.chat([{"role": "user", "content": [{"type": "image", "image": "/nowhere.png"}]}])


# Chat


def test_an_answer(model, script):
    script("the red circle")
    reply = model.chat("what", temperature=0)
    assert (reply.text, reply.reasoning, reply.tool_calls) == ("the red circle", "", [])
    assert (reply.finish_reason, reply.notice) == ("stop", None)
    assert reply.usage.prompt_tokens == len(model.prompt("what").ids)
    assert reply.usage.completion_tokens == len(model.tokenizer.encode("the red circle")) + 1
    assert reply.message == {"role": "assistant", "content": "the red circle"}
    assert reply.timings.time_to_first_token > 0 and reply.timings.tokens_per_second > 0
    assert json.loads(reply.to_json())["usage"]["total_tokens"] == reply.usage.total_tokens


def test_thoughts_come_apart_from_the_answer(model, script):
    script("<|channel>thought\nred, I see\n<channel|>a circle")
    reply = model.chat("what", thinking=True, temperature=0)
    assert (reply.text, reply.reasoning) == ("a circle", "red, I see")
    assert 0 < reply.usage.reasoning_tokens < reply.usage.completion_tokens
    assert reply.message["reasoning_content"] == "red, I see"


def test_tool_calls_are_parsed_and_go_back_into_the_conversation(model, script):
    script(CALL + CALL, end="<|tool_response>")
    reply = model.chat("add", tools=TOOLS, temperature=0)
    assert reply.finish_reason == "tool_calls"
    assert [(c.name, c.arguments, c.error) for c in reply.tool_calls] == [("add", {"a": 2, "b": "x, {y}"}, None)] * 2
    assert len({c.id for c in reply.tool_calls}) == 2
    messages = [{"role": "user", "content": "add"}, reply.message]
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "7"} for c in reply.tool_calls]
    assert '<|tool_response>response:add{value:<|"|>7<|"|>}<tool_response|>' in model.render(messages, tools=TOOLS)


def test_a_call_that_is_cut_off_is_reported_and_not_to_be_run(model, script):
    script(CALL, end="<|tool_response>")
    reply = model.chat("add", tools=TOOLS, temperature=0, max_tokens=6)
    assert reply.finish_reason == "length"
    assert [call.error is None for call in reply.tool_calls] == [False]
    assert "tool_calls" not in reply.message
    assert "not usable" in reply.notice


@pytest.mark.parametrize(
    ("said", "tokens", "reason", "notice"),
    [
        ("", 9, "stop", "without an answer"),
        ("<|channel>thought\nred\n<channel|>", 99, "stop", "without an answer"),
        ("<|channel>thought\nred blue square", 5, "length", "went into thinking"),
        ("the red circle is a blue square", 3, "length", "cut off after 3"),
    ],
)
def test_an_answer_that_is_not_what_it_seems_says_so(model, script, said, tokens, reason, notice):
    script(said)
    reply = model.chat("what", thinking=True, temperature=0, max_tokens=tokens)
    assert reply.finish_reason == reason
    assert notice in reply.notice


def test_stop_strings_act_on_the_answer_only(model, script):
    script("<|channel>thought\nthe red\n<channel|>a red circle")
    reply = model.chat("what", thinking=True, temperature=0, stop=["red"])
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("a ", "the red", "stop")


def test_the_end_of_a_turn_ends_the_answer_whatever_the_stop_tokens_are(model, script):
    script("red<turn|>" + "blue" * 20)
    reply = model.chat("what", temperature=0, stop_ids=[model.tokenizer.token_id("<eos>")], max_tokens=15)
    assert (reply.text, reply.finish_reason, reply.notice) == ("red", "stop", None)
    assert reply.usage.completion_tokens < 15


def test_a_stop_string_that_never_comes_takes_nothing_away(model, script):
    script("a blue squ")
    assert model.chat("what", temperature=0, stop=["square"]).text == "a blue squ"


@pytest.mark.parametrize("said", ["Grüße, 世界 🎈", "<|channel>thought\nüber\n<channel|>ja " + CALL + "und"])
def test_streamed_is_what_is_not_streamed(model, script, said):
    script(said)
    whole = model.chat("what", tools=TOOLS, thinking=True, temperature=0)
    script(said)
    stream = model.chat("what", tools=TOOLS, thinking=True, temperature=0, stream=True)
    with pytest.raises(UsageError, match="not complete"):
        _ = stream.reply
    events = list(stream)
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == whole.text == stream.reply.text
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)).strip() == whole.reasoning
    assert [e.arguments for e in events if isinstance(e, ToolCallEnd)] == [c.arguments for c in whole.tool_calls]
    assert sum(isinstance(e, ToolCallStart) for e in events) == len(whole.tool_calls)
    assert "\N{REPLACEMENT CHARACTER}" not in whole.text


def test_a_stream_can_be_closed(model, script):
    script("the red circle is a blue square")
    stream = model.chat("what", temperature=0, stream=True)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.reply.text == first.text
    assert stream.reply.finish_reason == "stop"


def test_mistakes_are_raised_before_the_first_event(model):
    with pytest.raises(ContextError):
        model.chat("word " * 5000, stream=True)
    with pytest.raises(UsageError, match="schema"):
        model.chat("x", schema={"type": "nonsense"}, stream=True)
    with pytest.raises(UsageError, match="temperature"):
        model.chat("x", temperature=-1, stream=True)
    picture = {"type": "image", "image": np.zeros((48, 48, 3), np.uint8)}
    with pytest.raises(UsageError, match="image_tokens"):
        model.chat([{"role": "user", "content": [picture]}], image_tokens=10**6)
