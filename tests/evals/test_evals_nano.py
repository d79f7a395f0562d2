"""The recipe and the benchmark of the embedded model, end to end on a store of a few voices."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import iolite
from iolite.checkpoint.folder import load_folder
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.cli import run_command
from iolite.errors import ProcessError, UsageError
from iolite.evals import nano
from iolite.kernels.ops import only_reference
from iolite.model.unified import Unified
from iolite.text.tokenizer import Tokenizer
from iolite.train.nano import fonts, recipe
from iolite.train.nano.speech import FRAME
from iolite.train.nano.store import SplitSize, StoreSize, build_store
from iolite.train.nano.tasks import TASKS, NanoData, Sample
from iolite.train.nano.tokenizer import train_tokenizer
from iolite.train.parallel import Group
from iolite.train.trainer import Settings

pytestmark = pytest.mark.usefixtures("espeak")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "store"
    split = fonts.find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    size = StoreSize(SplitSize(12, 2, 2, 2, 4), SplitSize(12, 2, 2, 4, 4))
    build_store(path, processes=1, size=size, fonts=split)
    return path


@pytest.fixture(scope="module")
def data(store: Path) -> NanoData:
    return nano.open_store(store)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, by the command line."""
    out = tmp_path_factory.mktemp("run")
    command = ["train", "nano", "--out", str(out), "--store", str(store), "--processes", "1", "--rows", "6"]
    assert run_command([*command, "--no-compile", "--ahead", "0", "--max-steps", "3", "--held-out", "2"]) == 0
    return out


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_the_same_every_time(data: NanoData, task: str) -> None:
    three, five = (list(nano.questions(data, task, n)) for n in (3, 5))
    assert [q.answer for q in three] == [q.answer for q in five[:3]]
    for question in five:
        assert question.messages[-1]["role"] == "user"
        for part in question.messages[0]["content"]:
            assert part["type"] == "text" or isinstance(part[part["type"]], np.ndarray)


@pytest.mark.parametrize(
    ("task", "answer", "group"),
    [
        ("read", "7", "1 digit"),
        ("transcribe", "123", "3 digits"),
        ("ask", "yes", "yes or no"),
        ("ask", "red", "colour"),
        ("spoken", "4", "number"),
        ("both", "red star, 12", "colour + shape + number"),
        ("talk", "i do not know.", ""),
    ],
)
def test_groups(task: str, answer: str, group: str) -> None:
    assert nano.group(Sample(task, [{"role": "assistant", "content": answer}])) == group


def test_a_run_leaves_a_model_that_loads_and_is_measured(
    trained: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    folder = trained / "model"
    wanted = {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
    wanted |= {"tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    assert wanted == {path.name for path in folder.iterdir()}
    assert (folder / "model.safetensors").stat().st_size < 16e6
    model = iolite.load(folder, dtype="float32")
    assert (model.processor.image_max_soft_tokens, model.processor.image_budgets) == (recipe.IMAGE_TOKENS, None)
    assert not model.defaults.do_sample

    asked = ["eval", str(folder), "--store", str(store), "--limit", "2", "--json", "--tasks", "read,both"]
    assert run_command([*asked, "--show-wrong"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert set(report["tasks"]) == {"read", "both"}
    assert report["tasks"]["read"]["n"] == 2
    assert 0 <= report["tasks"]["read"]["ci95"][0] <= report["tasks"]["read"]["accuracy"]
    assert "read: " in err
    assert report["quantize"] is None
    assert run_command([*asked, "--quantize", "int4", "--kv", "bf16"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert (packed["quantize"], packed["dtype"], packed["tasks"]["read"]["n"]) == ("int4", "float32", 2)
    assert run_command([*asked[:-3], "--tasks", "talk"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["task", "right", "95", "%", "n"]


def test_a_run_in_two_processes_ends_with_its_steps_and_with_an_error_when_one_is_killed(
    store: Path, tmp_path: Path
) -> None:
    settings = Settings(60, max_steps=3, log_every=0, average_from=-1, compile=False)
    recipe.train(recipe.Run(tmp_path / "whole", store, settings, rows=6, ahead=0, per_task=4), lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records[-2:]] == [("train", 3), ("eval", 3)]
    assert "averaged" in records[-1]

    killed = list[int | None]()

    def kill(line: str) -> None:
        if "step      2" in line:
            (peer,) = multiprocessing.active_children()
            peer.kill()
            peer.join()
            killed.append(peer.exitcode)

    with pytest.raises(ProcessError, match="another process of this run has ended"):
        recipe.train(recipe.Run(tmp_path / "killed", store, settings, rows=6, ahead=0, per_task=4), kill)
    assert killed == [-signal.SIGKILL]


def test_a_run_is_not_begun_twice_and_can_be_exported_as_it_stands(
    trained: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", "nano", "--out", str(trained), "--store", str(store)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_command(["train", "export", str(trained), str(tmp_path / "m"), "--weights", "averaged"]) == 0
    assert "averaged" in capsys.readouterr().err
    assert (tmp_path / "m" / "config.json").read_bytes() == (trained / "model" / "config.json").read_bytes()
    _, model = load_folder(tmp_path / "m", dtype=None, device="cpu")
    state = SafetensorsFile(trained / "state.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state.tensor(f"average.{name}").to(torch.bfloat16))
    assert run_command(["train", "export", str(tmp_path), str(tmp_path / "n")]) == 2


def test_unknown_tasks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["eval", "--tasks", "read,sing"]) == 2
    err = capsys.readouterr().err
    assert "'sing'" in err
    assert "transcribe" in err


def test_scores_of_training_are_those_of_greedy_decoding(trained: Path, store: Path) -> None:
    """A model that says one answer whatever it is asked is right about the samples with that answer, both ways."""
    model = iolite.load(trained / "model", dtype="float32")
    scorer = recipe.HeldOut(store, trained, Group(), 12)
    answers = [model.tokenizer.decode(e.ids[e.answer : -1].tolist()) for e in scorer.sets["transcribe"]]
    digit = max((a for a in answers if len(a) == 1), key=answers.count)
    token, end = model.tokenizer.encode(digit + "<turn|>")
    network = constant_answer(model.network, token, end)
    right, asked = scorer(network)["transcribe"]
    assert (right, asked) == (answers.count(digit), 12)
    assert model.chat("?", temperature=0.0, max_tokens=4).text == digit


def test_scores_of_training_are_the_same_with_and_without_kernels(store: Path) -> None:
    """Few samples are few tokens, which the kernels take, beside attention in the bfloat16 of autocast."""
    network = iolite.load("nano", dtype="float32").network
    scores = recipe.HeldOut(store, Path(iolite.__file__).parent / "nano", Group(), 3)
    found = scores(network)
    with only_reference():
        assert found == scores(network)
    assert sum(right for right, _ in found.values()) > sum(asked for _, asked in found.values()) / 2


def constant_answer(network: Unified, token: int, end: int) -> Unified:
    """Changes the weights so that `token` follows everything but itself, and `end` follows it."""
    text = network.language_model
    with torch.no_grad():
        for layer in text.layers:
            layer.post_attention_layernorm.weight.zero_()
            layer.post_feedforward_layernorm.weight.zero_()
        # What is left of the network is embedding, norm and head: the likeliest token is the likest embedding.
        embedding = text.embed_tokens.weight.fill_(0)
        embedding[:, 0] = 1e-3
        embedding[token, :3] = torch.tensor([1.0, -1.0, 1.0])
        embedding[end, 1] = -4
        text.norm.weight.fill_(1)
    return network


def test_weights_are_few_and_begin_at_unit_scale(trained: Path) -> None:
    config = recipe.nano_config(Tokenizer.from_folder(trained))
    model = Unified(config)
    recipe.initialise_(model)
    count = sum(p.numel() for p in model.parameters())
    assert count * 2 < 16e6
    grouped = [p for g in recipe.parameter_groups(model) for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    kinds = {recipe.kind_of_weight(name) for name, _ in model.named_parameters()}
    assert kinds == set(recipe.RATES)
    q = model.language_model.layers[0].self_attn.q_norm.weight.detach()
    assert float(q[0]) == pytest.approx(64**-0.25)
    with torch.no_grad():
        again = Unified(config)
        recipe.initialise_(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_mixture_is_read_while_training_runs(tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    mixture, rng = recipe.Mixture(path), np.random.default_rng(0)
    assert len({mixture.task(rng) for _ in range(512)}) == len(TASKS)
    path.write_text(json.dumps({task: float(task == "talk") for task in TASKS}))
    assert {mixture.task(rng) for _ in range(600)} == {"talk"}


@pytest.mark.parametrize("text", ["", "[]", '{"sing": 1}', '{"read": -1}', '{"read": "much"}', '{"read": NaN}'])
def test_a_bad_mixture_is_the_users_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mixture.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="mixture"):
        recipe.read_mixture(path)


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_a_faster_voice_keeps_its_words_in_place(speed: float) -> None:
    """Silence, then a tone under the word: played faster, the tone and the word begin sooner by that factor."""
    time = np.arange(20 * FRAME, dtype=np.float32)
    sound = np.where(time < 10 * FRAME, 0, np.sin(time / 20)).astype(np.float32)
    sample = Sample("transcribe", [], sounds=[sound], audio_dense=[[""] * 10 + ["7"] * 10])
    heard = recipe.stretched(sample, speed)
    samples, words = heard.sounds[0], heard.audio_dense[0]
    assert len(words) == -(-len(samples) // FRAME) == 20 / speed
    assert np.flatnonzero(samples)[0] == pytest.approx(10 * FRAME / speed, abs=2)
    assert words.index("7") == pytest.approx(10 / speed, abs=1)
    crossings = np.count_nonzero(np.diff(np.sign(samples[-4 * FRAME :])))
    assert crossings == pytest.approx(4 * FRAME * speed / 20 / np.pi, abs=2)


def test_samples_grow_harder_until_a_third_of_the_time() -> None:
    limits = [recipe.difficulty_limit(f) for f in (0, 0.04, 0.2, 0.35, 1)]
    assert limits == sorted(limits)
    assert (limits[0], limits[1], limits[-1]) == (0, 0, 1)
    assert 0 < limits[2] < 1


def test_a_short_text_of_the_tokenizer_is_enough(tmp_path: Path) -> None:
    train_tokenizer(["red star"] * 3, 560, tmp_path)
    config = recipe.nano_config(Tokenizer.from_folder(tmp_path))
    assert config.text.vocab_size <= 560
    assert set(recipe.generation_config(config).suppress_tokens) == {config.eoi_token_id, config.eoa_token_id}
