"""A run: it learns, goes on where it stopped, writes what it has measured; dialogues out of files and the recipe."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from support.compare import sample_for
from support.oracle import Image, Text

import iolite
from iolite.checkpoint.drafter import check_pair, find_drafter, load_drafter
from iolite.checkpoint.hub import nano_folder
from iolite.errors import UsageError
from iolite.generate.model import Model
from iolite.model.unified import Unified
from iolite.quant.linear import quantize_
from iolite.train.drafter import nano as recipe
from iolite.train.drafter.data import Answers, FileSource, Question, read_questions, split, with_paths
from iolite.train.drafter.measure import measure
from iolite.train.drafter.reading import Dialogue, read
from iolite.train.drafter.trainer import Chaining, DrafterTrainer, Shape, new_drafter, shaped_config
from iolite.train.nano import fonts
from iolite.train.nano.store import SplitSize, StoreSize, build_store
from iolite.train.trainer import Settings

Load = Callable[[str], Unified]


class Few:
    """The same few dialogues, in turn."""

    def __init__(self, some: Sequence[Dialogue], rows: int) -> None:
        self.some, self.rows, self.step = some, rows, 0

    def start(self, step: int) -> None:
        self.step = step

    def next_batch(self, fraction: float) -> list[Dialogue]:
        first = self.step * self.rows
        self.step += 1
        return [self.some[i % len(self.some)] for i in range(first, first + self.rows)]

    def close(self) -> None:
        pass


def trainer(model: Unified, folder: Path, *, seed: int = 0, rate: float = 3e-3, **settings: Any) -> DrafterTrainer:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = [sample_for("published", Text(5 + i), Image(2, 2), seed=i).prompt() for i in range(6)]
    some = [Dialogue(prompt, tuple(rng.integers(20, 96, 6).tolist())) for prompt in prompts]
    config = shaped_config(model.config, Shape(2, 32, 64))
    drafter = new_drafter(model, config, read(model, some), seed)
    chosen = Settings(**{"minutes": math.inf, "compile": False, "autocast": False, "warmup_steps": 5, **settings})
    held_out = {"them": some}
    return DrafterTrainer(
        drafter, model, Few(some, 4), 4, folder, chosen, Chaining(3, most=14, soft=False), rate=rate, held_out=held_out
    )


def test_a_few_answers_are_learnt(load_tiny: Load, tmp_path: Path) -> None:
    """By hard labels: the model's likeliest token behind every one of them."""
    one = trainer(load_tiny("published"), tmp_path, max_steps=150, evaluate_every=1e9)
    one.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["kind"] for r in records] == ["train", "eval"]
    assert float(one.step().total.detach()) < 0.1


def test_a_run_taken_up_again_is_the_same_run(load_tiny: Load, tmp_path: Path) -> None:
    """Bit by bit, with the rate that falls with the steps, and with some of the chains drawn."""
    model = load_tiny("published")

    def steps(one: DrafterTrainer, count: int) -> list[float]:
        return [float(one.step().total.detach()) for _ in range(count)]

    whole = trainer(model, tmp_path / "whole", max_steps=12)
    curve = steps(whole, 12)
    assert len(set(curve)) == 12
    first = trainer(model, tmp_path / "stopped", max_steps=12)
    assert steps(first, 5) == curve[:5]
    first.save()
    steps(first, 2)  # lost with the process
    again = trainer(model, tmp_path / "stopped", max_steps=12)
    assert again.resume()
    again.source.start(again.step_number)
    assert again.fraction == pytest.approx(5 / 12)
    assert steps(again, 7) == curve[5:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole.average, again.average, strict=True))


def test_replies_of_one_token_teach_nothing_and_harm_nothing(load_tiny: Load, tmp_path: Path) -> None:
    one = trainer(load_tiny("published"), tmp_path)
    prompts = [sample_for("published", Text(5), seed=i).prompt() for i in range(2)]
    one.source = Few([Dialogue(prompt, (30,)) for prompt in prompts], 2)
    assert float(one.step().total.detach()) == 0
    assert all(parameter.isfinite().all() for parameter in one.model.parameters())


def test_a_model_in_bfloat16_trains_a_drafter_in_float32(load_tiny: Load, tmp_path: Path) -> None:
    one = trainer(copy.deepcopy(load_tiny("published")).bfloat16(), tmp_path)
    first = float(one.step().total.detach())
    assert math.isfinite(first)
    assert min(float(one.step().total.detach()) for _ in range(30)) < first
    assert {parameter.dtype for parameter in one.model.parameters()} == {torch.float32}


def test_a_packed_model_gets_a_new_drafter(load_tiny: Load, tmp_path: Path) -> None:
    packed = copy.deepcopy(load_tiny("published"))
    quantize_(packed, "int4")
    one = trainer(packed, tmp_path)
    first = float(one.step().total.detach())
    assert min(float(one.step().total.detach()) for _ in range(30)) < first


@pytest.fixture(scope="module")
def nano() -> Model:
    return iolite.load("nano", dtype="float32")


def line(*turns: tuple[str, Any], **more: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more})


def test_every_turn_of_the_assistant_is_an_answer(nano: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(
        line(("user", "hi"), ("assistant", "hello."), ("user", "who are you?"), ("model", " i am iolite-nano. "))
        + "\n\n"
        + line(
            ("system", "be kind"), ("user", "hi"), ("assistant", [{"type": "text", "text": "hello."}]), ("user", "?")
        )
    )
    found = read_questions(path, nano, anew=False)
    assert [(q.line, len(q.messages), q.reply is None) for q in found] == [
        (1, 1, False), (1, 3, False), (3, 2, False), (3, 4, True),
    ]  # fmt: skip
    assert found[1].where == f"{path}, line 1"
    assert found[1].reply == tuple(nano.tokenizer.encode("i am iolite-nano.<turn|>"))
    assert found[0].reply == found[2].reply
    assert all(q.reply is None for q in read_questions(path, nano, anew=True))

    learnt, kept = split(found, 1, seed=0)
    assert len(learnt) == len(kept) == 2
    assert not {q.line for q in learnt} & {q.line for q in kept}


def test_paths_begin_at_the_file(tmp_path: Path) -> None:
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "b/c.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/c.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video", "video": ["0.png", str(tmp_path / "1.png")]},
        {"type": "text", "text": "a.png"},
    ]
    (message,) = with_paths([{"role": "user", "content": parts}], tmp_path)
    found = message["content"]
    assert found[0]["image"] == str(tmp_path / "a.png")
    assert found[1]["image_url"] == {"url": str(tmp_path / "b" / "c.png"), "detail": "low"}
    assert found[2:4] == parts[2:4]
    assert found[4]["video"] == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert found[5] == parts[5]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "line 2 is no JSON object"),
        ("[]", "line 2 is no JSON object"),
        ('{"text": "a"}', "line 2 is no JSON object"),
        ('{"messages": []}', "line 2: messages must be a non-empty list"),
        ('{"messages": ["hi"]}', "line 2: message 0 is not an object"),
        (line(("user", "hi"), ("robot", "hello.")), "line 2: message 1 has the role 'robot'"),
        (line(("user", "hi"), ("assistant", "")), "line 2: there is no answer to learn from"),
        (line(("assistant", "hello.")), "line 2: there is no answer to learn from"),
        (line(("user", [{"type": "image", "image": "none.png"}])), "line 2: the picture '.*none.png' is not there"),
        (line(("user", "hi " * 9000)), "line 2: .* tokens and an answer are more than the context of 4096"),
    ],
)
def test_a_bad_line_is_named(nano: Model, tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(line(("user", "hi"), ("assistant", "hello.")) + "\n" + text)
    with pytest.raises(UsageError, match=fault) as error:
        read_questions(path, nano, anew=False)
    assert str(path) in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_dialogues(nano: Model, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"talk\.jsonl (holds no dialogue|cannot be read: it is not UTF-8)"):
        read_questions(path, nano, anew=False)


def test_the_model_is_not_asked_twice(nano: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question("f", i, [{"role": "user", "content": text}], None) for i, text in enumerate(("hi", "bye"))]
    seen: list[tuple[int, int]] = []
    found = Answers(tmp_path / "answers.jsonl", nano, 8).of(questions, lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    for question in found:
        expected = [piece.id for piece in nano.generate(question.messages, max_tokens=8, temperature=0.0)]
        assert question.reply == tuple(expected)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    monkeypatch.setattr("iolite.train.drafter.data.answer", lambda *_: pytest.fail("it was asked again"))
    again = Answers(tmp_path / "answers.jsonl", nano, 8)
    assert again.of(questions, lambda *_: None) == found
    with pytest.raises(pytest.fail.Exception, match="asked again"):  # a shorter answer is another one
        Answers(tmp_path / "answers.jsonl", nano, 2).of(questions, lambda *_: None)


def test_a_file_is_gone_through_in_ever_new_orders(nano: Model) -> None:
    questions = [Question("f", i, [{"role": "user", "content": "hi"}], (100 + i, 3)) for i in range(5)]
    source = FileSource(nano, questions, 2, seed=0)
    source.start(0)
    drawn = [dialogue.reply[0] for _ in range(10) for dialogue in source.next_batch(0.0)]
    epochs = [tuple(drawn[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(100, 105)) for epoch in epochs)
    assert len(set(epochs)) > 1
    source.start(7)
    assert [dialogue.reply[0] for dialogue in source.next_batch(0.0)] == drawn[14:16]


def test_the_shipped_drafter_belongs_to_the_embedded_model(nano: Model) -> None:
    folder = nano_folder() / "drafter"
    source = find_drafter(folder)
    check_pair(nano.config.text, source.text, source.backbone_hidden_size)
    assert (folder / "model.safetensors").stat().st_size <= 2 << 20
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, espeak: None) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "store"
    found = fonts.find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    build_store(path, processes=1, size=StoreSize(SplitSize(12, 2, 2, 2, 4), SplitSize(12, 2, 2, 4, 4)), fonts=found)
    return path


def test_the_shipped_drafter_saves_passes(nano: Model, store: Path) -> None:
    """On a few dozen held-out questions: most of what can be saved, where a fresh drafter saves nothing."""
    seen: list[tuple[int, int]] = []
    sets = recipe.held_out(nano, store, 12, lambda *step: seen.append(step))
    assert seen[-1] == (96, 96)
    assert {name: len(some) for name, some in sets.items()} == dict.fromkeys(sets, 12)
    shipped = load_drafter(nano_folder() / "drafter", dtype=torch.float32)
    found = measure(shipped, nano.network, sets, 4)
    fresh = new_drafter(nano.network, shipped.config, read(nano.network, sets["talk"]), seed=0)
    chance = measure(fresh, nano.network, sets, 4)
    for name in ("mixture", "talk", "shape", "both"):
        assert found[name].mean_length > 1 + 0.6 * (found[name].most - 1), name
        assert chance[name].mean_length < 1 + 0.2 * (found[name].most - 1), name


def test_samples_of_the_recipe(nano: Model, store: Path) -> None:
    """A step's follow from its number, and look as the model is asked in use."""
    source = recipe.NanoSource(nano, store, 6, seed=0)
    source.start(3)
    some = source.next_batch(0.0)
    source.start(3)
    assert [d.reply for d in source.next_batch(0.0)] == [d.reply for d in some]
    assert len({d.prompt.text for d in itertools.chain(some, source.next_batch(0.0))}) > 3
    end = nano.tokenizer.token_id("<turn|>")
    assert all(d.reply[-1] == end and len(d.reply) > 1 for d in some)
    assert any(d.prompt.spans for d in some)
    asked = nano.prompt("hi").text
    opening = asked[asked.index("<turn|>") :]  # from the end of the user's turn on
    assert all(d.prompt.text.endswith(opening) for d in some)


def test_the_recipe_needs_a_model_that_sees_and_hears(nano: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.check_target(nano)
    monkeypatch.setattr(type(nano.config), "modalities", ("text", "image"))
    with pytest.raises(UsageError, match="does not take audio"):
        recipe.check_target(nano)
