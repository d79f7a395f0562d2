"""The loop on a model of a few thousand weights: it learns, it measures, and it goes on where it was killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iolite.config import FULL, SLIDING, AudioConfig, ModelConfig, TextConfig, VisionConfig
from iolite.errors import CheckpointError
from iolite.model.unified import Unified
from iolite.train.data import ANSWER, DENSE, BucketBatch, DirectSource, Example, Layout
from iolite.train.loss import exact_rows, labelled_loss
from iolite.train.nano.recipe import initialise_, parameter_groups
from iolite.train.parallel import FlatGradients, Group, group_of
from iolite.train.trainer import Scores, Settings, Trainer

LAYOUT = Layout(((8, 4), (12, 2)))
NONE = np.zeros(0, np.int64)


def tiny_config(hidden: int = 32) -> ModelConfig:
    text = TextConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=16,
        layer_types=(SLIDING, FULL),
    )
    vision = VisionConfig(patch_size=2, pooling_kernel_size=1, mm_embed_dim=16, mm_posemb_size=4)
    tokens = dict(zip(("image", "audio", "video", "boi", "eoi", "boa", "eoa"), range(30, 37), strict=True))
    return ModelConfig(
        text, vision, AudioConfig(audio_embed_dim=8), **{f"{name}_token_id": i for name, i in tokens.items()}
    )


class Draw:
    """Four questions with one answer each; the last is a picture or a sound whose content is the answer."""

    def __call__(self, rng: np.random.Generator, _: float = 0.0) -> Example:
        kind = int(rng.integers(4))
        base = Example("words", NONE, 5, None, None, None, None, None, None, NONE, NONE)
        if kind < 2:
            return dataclasses.replace(base, ids=np.array([2, 5 + kind, 7, 8, 9, 20 + kind, 3]))
        value = int(rng.integers(2))
        ids = np.array([2, 31 + 2 * (kind == 2), 30 + (kind == 3), 34, 9, 22 + value, 3])
        here = np.array([2])
        dense = {"dense_index": here, "dense_labels": np.array([22 + value])}
        if kind == 2:
            pixels = np.array([[10 + 200 * value, 200 * (1 - value)] * 6], np.uint8)
            media: dict[str, Any] = {"pixels": pixels, "positions": np.zeros((1, 2), np.int64), "pixel_index": here}
            blocks = np.array([0, 0, 1, 0, 0, 0, 0])
            return dataclasses.replace(base, task="see", ids=ids, blocks=blocks, **media, **dense)
        frames = np.array([[1, 2 * value - 1] * 4], np.float16)
        return dataclasses.replace(base, task="hear", ids=ids, frames=frames, frame_index=here, **dense)


def trainer(folder: Path, *, seed: int = 0, group: Group | None = None, hidden: int = 32, **settings: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    model = Unified(tiny_config(hidden))
    initialise_(model, seed)
    rank = group.rank if group else 0
    source = DirectSource(LAYOUT, Draw(), (7, rank))
    chosen = Settings(**{"minutes": 60, "compile": False, "autocast": False, "warmup_steps": 5, **settings})
    return Trainer(model, parameter_groups(model), source, LAYOUT, folder, chosen, group=group, evaluate=score)


def score(model: Unified) -> Scores:
    return {"all": (int(model.config.text.vocab_size > 0), 1)}


def losses(one: Trainer, steps: int) -> list[float]:
    return [float(one.step().total.detach()) for _ in range(steps)]


def weights(one: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def test_a_few_samples_are_learnt_in_seconds(tmp_path: Path) -> None:
    one = trainer(tmp_path, autocast=True)
    curve = losses(one, 250)
    assert curve[0] > 3  # about log(40) and .3 of it again
    assert np.mean(curve[-10:]) < 0.1


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    curve = losses(whole, 12)
    first = trainer(tmp_path / "killed")
    assert losses(first, 5) == curve[:5]
    first.save()
    losses(first, 2)  # lost with the process

    second = trainer(tmp_path / "killed", seed=9)
    assert second.resume()
    assert (second.step_number, second.samples) == (5, 5 * LAYOUT.num_rows)
    second.source.start(second.step_number)
    assert losses(second, 7) == curve[5:]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole.average, second.average, strict=True))


def test_no_state_is_no_resume_and_a_foreign_state_is_an_error(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    assert not one.resume()
    one.step()
    one.save()
    with pytest.raises(CheckpointError, match="another model"):
        trainer(tmp_path, hidden=16).resume()


def test_a_run_logs_measures_saves_and_ends(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=6, log_every=0, evaluate_every=0, save_every=1e9)
    one.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["tasks"] for r in records if r["kind"] == "eval"] == [{"all": 1.0}] * 6
    assert trainer(tmp_path).resume()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    plain = one.step

    def step() -> Any:
        if one.step_number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain()

    one.step = step  # type: ignore[method-assign]
    one.run()
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step_number == 4
    assert 0 < again.seconds < 60


def test_the_run_ends_with_its_time(tmp_path: Path) -> None:
    one = trainer(tmp_path, minutes=0.005)
    one.run()
    assert one.fraction == 1
    assert one.step_number > 1


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    s = Settings(minutes=1, warmup_steps=10, flat_until=0.5)
    assert s.rate(0, 0) == pytest.approx(0.1)
    assert s.rate(100, 0.5) == 1
    assert s.rate(100, 0.75) == pytest.approx(0.5)
    assert s.rate(100, 1) == 0


def test_the_average_follows_the_weights_late_only(tmp_path: Path) -> None:
    one = trainer(tmp_path, average_every=1, average_from=0.5, average_decay=0.9)
    one.step()
    assert all(torch.equal(a, p) for a, p in zip(one.average, one.names, strict=True))
    one.seconds = 0.6 * 3600
    before = [a.clone() for a in one.average]
    one.step()
    for old, new, parameter in zip(before, one.average, one.names, strict=True):
        # One float32 rounding of each of the two products, which are smaller than the weights.
        torch.testing.assert_close(new, 0.9 * old + 0.1 * parameter, rtol=1e-5, atol=1e-7)


def test_loss_is_the_mean_over_answers_and_a_part_of_the_mean_over_words() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    labels, kinds = torch.tensor([0, 1, 1]), torch.tensor([ANSWER, ANSWER, DENSE])
    each = -logits.log_softmax(-1)[torch.arange(3), labels]
    loss = labelled_loss(logits, labels, kinds, 0.3)
    assert float(loss.total) == pytest.approx(float((each[0] + each[1]) / 2 + 0.3 * each[2]), rel=1e-6)
    assert float(labelled_loss(logits[:2], labels[:2], kinds[:2], 0.3).dense) == 0


def test_exact_means_every_token() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3]]
    owners = torch.tensor([0, 0, 1, 2])
    assert exact_rows(logits, torch.tensor([0, 1, 2, 0]), owners, 3).tolist() == [True, True, False]


def test_gradients_are_clipped_as_one_vector() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    flat = FlatGradients(parameters, extra=1)
    (3 * parameters[0][0] + 4 * parameters[1][1]).backward()
    assert flat.average_(Group(), max_norm=1.0) == pytest.approx(5)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0, 0], rel=1e-5)
    assert flat.extra.tolist() == [0]


def _peer(folder: Path, group: Group) -> None:
    """One of two processes: three steps, then its weights and the gradient norm of the last."""
    torch.set_num_threads(1)
    one = trainer(folder, group=group)
    losses(one, 3)
    torch.save(weights(one) | {"norm": torch.tensor(one.norm)}, folder / f"{group.rank}.pt")


def test_two_processes_take_the_step_of_their_mean_gradient(tmp_path: Path) -> None:
    context, groups = multiprocessing.get_context("spawn"), group_of(2)
    peers = [context.Process(target=_peer, args=(tmp_path, group)) for group in groups]
    for peer, group in zip(peers, groups, strict=True):
        peer.start()
        group.close()
    # The same in one process: two models' gradients, averaged by hand.
    both = [trainer(tmp_path / str(rank)) for rank in range(2)]
    both[1].source = DirectSource(LAYOUT, Draw(), (7, 1))
    for _ in range(3):
        _joint_step(both)
    for peer in peers:
        peer.join()
        assert peer.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in weights(both[0]).items():
        assert torch.equal(found[0][name], found[1][name]), name
        # Equal sums in another order: Adam divides by the gradient's size, so a rounding of 2^-24 moves a weight by
        # at most a few thousandths of the step, which is 2e-3 at most.
        torch.testing.assert_close(found[0][name], tensor, atol=1e-5, rtol=1e-5)


def _joint_step(both: list[Trainer]) -> None:
    """Each trainer's gradient, their mean to both, and the same update in both."""

    class Mean(Group):
        def sum_(self, values: Tensor) -> Tensor:
            return values

    for one in both:
        one.group = Mean()
    waiting = [one.optimizer.step for one in both]
    for one in both:
        one.optimizer.step = lambda: None  # type: ignore[method-assign,assignment,return-value]
        one.settings = dataclasses.replace(one.settings, max_norm=1e9)
        one.step()
    mean = (both[0].gradients.gradients + both[1].gradients.gradients) / 2
    norm = float(mean.norm())
    mean *= min(1.0, 1.0 / (norm + 1e-6))
    for one, step in zip(both, waiting, strict=True):
        one.gradients.gradients.copy_(mean)
        one.optimizer.step = step  # type: ignore[method-assign]
        step()


def test_a_step_stays_on_the_models_device() -> None:
    """On the meta device, standing in for a GPU: a tensor left on the CPU would meet one that is not there."""
    config = tiny_config()
    source = DirectSource(LAYOUT, Draw(), (0, 0))
    source.start(0)
    model = Unified(config).to("meta")
    gradients = FlatGradients(list(model.parameters()), extra=6)
    batch = BucketBatch(config.text, LAYOUT, source.next_batch(0.0), "meta")
    logits = model.logits(model(batch.ids, batch).index_select(0, batch.label_index))
    loss = labelled_loss(logits, batch.labels, batch.label_kind, 0.3)
    loss.total.backward()
    assert {t.device.type for t in (loss.total, gradients.buffer, batch.positions)} == {"meta"}
