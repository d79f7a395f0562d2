"""How iolite-nano is made: its sizes, its first weights, its learning rates, its mixture of tasks, and its training.

    iolite train nano --out runs/nano --minutes 110

makes the store of glyphs and clips (once), trains the tokenizer, trains the model in two processes and writes the
finished folder to runs/nano/model. `runs/nano/mixture.json`, if there, is read again every few seconds:
`{"read": 0.3, "transcribe": 0.3, …}` are the shares of the tasks from then on.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iolite.checkpoint.folder import save_folder
from iolite.checkpoint.safetensors import SafetensorsFile
from iolite.config import (
    FULL,
    SLIDING,
    AudioConfig,
    GenerationConfig,
    ModelConfig,
    ProcessorConfig,
    RopeConfig,
    TextConfig,
    VisionConfig,
)
from iolite.errors import ProcessError, UsageError
from iolite.model.unified import Unified
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer
from iolite.train.data import BucketBatch, DirectSource, Encoder, Example, Feeder, Layout, collate, plan_layout
from iolite.train.loss import exact_rows
from iolite.train.nano.curves import draw_in_background
from iolite.train.nano.speech import FRAME
from iolite.train.nano.tasks import TASKS, NanoData, Sample
from iolite.train.parallel import Group, group_of
from iolite.train.trainer import Scores, Settings, Source, Trainer

VOCABULARY = 1024
IMAGE_TOKENS = 3
TEMPLATE = Path(__file__).parents[2] / "nano" / "chat_template.jinja"

# Peak learning rate and decay of each kind of weight. The two media projections see inputs of very many dimensions,
# all of them alike, and diverge at the rate that suits the rest.
RATES: dict[str, tuple[float, float]] = {
    "hidden": (1e-3, 0.05),
    "small": (2e-3, 0.0),  # embeddings, norms and positions
    "audio": (4e-4, 0.0),
    "vision": (1e-4, 0.0),
    "patch_norm": (2e-4, 0.0),
}


def nano_config(tokenizer: Tokenizer) -> ModelConfig:
    """The architecture at 4.2 million weights, with the special tokens of this tokenizer."""

    def token(text: str) -> int:
        found = tokenizer.token_id(text)
        if found is None:
            raise ValueError(f"the tokenizer has no token {text!r}")
        return found

    text = TextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=256,
        layer_types=(SLIDING,) * 5 + (FULL,),
        rope_sliding=RopeConfig(10_000.0),
        rope_full=RopeConfig(1_000_000.0, 0.25),
        final_logit_softcapping=30.0,
        max_position_embeddings=4096,
        pad_token_id=token("<pad>"),
        bos_token_id=token("<bos>"),
        eos_token_id=token("<eos>"),
    )
    return ModelConfig(
        text=text,
        vision=VisionConfig(mm_embed_dim=192, mm_posemb_size=64, num_soft_tokens=IMAGE_TOKENS),
        audio=AudioConfig(),
        image_token_id=token("<|image|>"),
        audio_token_id=token("<|audio|>"),
        video_token_id=token("<|video|>"),
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        boa_token_id=token("<|audio>"),
        eoa_token_id=token("<audio|>"),
        eos_token_ids=(token("<eos>"), token("<turn|>"), token("<|tool_response>")),
    )


def initialise_(model: Unified, seed: int = 0) -> None:
    """First weights. Attention has no scale of its own, so q and k norms start at D^-1/4: logits of unit variance.
    What each half of a layer adds starts at 1/sqrt(2L), so that the stream keeps its size through L layers."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.text

    def normal_(weight: Tensor, deviation: float) -> None:
        weight.normal_(0, deviation, generator=generator)

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                normal_(module.weight, module.embedding_dim**-0.5)
            elif name.endswith(("q_norm", "k_norm")):
                module.weight.fill_(module.weight.numel() ** -0.25)
            elif name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
                module.weight.fill_((2 * text.num_hidden_layers) ** -0.5)
        normal_(model.vision_embedder.pos_embedding, 0.5)


def kind_of_weight(name: str) -> str:
    """The key of RATES for a parameter."""
    if name.startswith("vision_embedder.patch_ln1"):
        return "patch_norm"
    if name.startswith("vision_embedder.patch_dense.weight"):
        return "vision"
    if name.startswith("embed_audio"):
        return "audio"
    if name.endswith(("_proj.weight", "projection.weight")):
        return "hidden"
    return "small"


def parameter_groups(model: Unified) -> list[dict[str, Any]]:
    """What AdamW is given."""
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in RATES}
    for name, parameter in model.named_parameters():
        members[kind_of_weight(name)].append(parameter)
    return [{"params": members[kind], "lr": rate, "weight_decay": decay} for kind, (rate, decay) in RATES.items()]


def difficulty_limit(fraction: float) -> float:
    """How hard samples may be: only the easy ones at first, since reading does not start on free colours; all after
    35 % of the time."""
    return min(1.0, max(0.0, (fraction - 0.04) / 0.31))


@dataclass(frozen=True)
class Draw:
    """Makes examples of the training split in the proportions of the mixture. Picklable; calling it opens the store."""

    store: Path
    folder: Path  # of the run: tokenizer, mixture
    seed: int

    def __call__(self) -> Callable[[np.random.Generator, float], Example]:
        data, encode = NanoData(self.store, "train", self.seed), encoder(self.folder)
        mixture = Mixture(self.folder / "mixture.json")

        def draw(rng: np.random.Generator, fraction: float) -> Example:
            limit = difficulty_limit(fraction)
            difficulty = limit if rng.random() < 0.6 else limit * rng.random()
            sample = data.sample(mixture.task(rng), rng, difficulty)
            if sample.sounds and rng.random() < 0.6:
                sample = stretched(sample, math.exp(rng.uniform(-0.14, 0.14)))
            return encode(sample)

        return draw


def stretched(sample: Sample, speed: float) -> Sample:
    """The sample with its sounds played at another speed, and thereby pitch: a voice that the store does not have."""
    sounds, words = [], []
    for sound, labels in zip(sample.sounds, sample.audio_dense, strict=True):
        at = np.arange(int((len(sound) - 1) / speed) + 1, dtype=np.float32) * speed
        sounds.append(np.interp(at, np.arange(len(sound)), sound).astype(np.float32))
        frames = -(-len(at) // FRAME)
        words.append([labels[min(int((i + 0.5) * speed), len(labels) - 1)] for i in range(frames)])
    return replace(sample, sounds=sounds, audio_dense=words)


class Mixture:
    """Shares of the tasks: TASKS, or what the file says while it is there."""

    def __init__(self, path: Path) -> None:
        self.path, self._read, self._age = path, -1.0, 0
        self._names, self._edges = self._from(TASKS)

    @staticmethod
    def _from(shares: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
        return list(shares), np.cumsum(list(shares.values())) / sum(shares.values())

    def task(self, rng: np.random.Generator) -> str:
        if self._age % 512 == 0 and self.path.is_file() and self.path.stat().st_mtime != self._read:
            self._read = self.path.stat().st_mtime
            self._names, self._edges = self._from(read_mixture(self.path))
        self._age += 1
        return self._names[min(int(np.searchsorted(self._edges, rng.random())), len(self._names) - 1)]


def read_mixture(path: Path) -> dict[str, float]:
    """Shares from a file; tasks it leaves out keep theirs. Raises UsageError for anything else in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        shares = TASKS | {str(task): float(share) for task, share in data.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        raise UsageError(f"{path} holds no JSON object of task: share") from None
    if set(shares) != set(TASKS) or any(not 0 <= s < math.inf for s in shares.values()) or not sum(shares.values()):
        raise UsageError(f"{path}: shares must be positive numbers, of the tasks {', '.join(TASKS)}")
    return shares


def encoder(folder: Path) -> Encoder:
    """The encoder of a run, from the tokenizer in its folder."""
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"))
    return Encoder(tokenizer, template, nano_config(tokenizer), image_tokens=IMAGE_TOKENS)


def measured_layout(store: Path, folder: Path, rows: int, samples: int = 2000) -> Layout:
    """Buckets that fit the lengths of samples in the present mixture, but for the longest 0.5 %."""
    draw, rng = Draw(store, folder, 0)(), np.random.default_rng(0)
    lengths = sorted(len(draw(rng, 1.0 if i % 2 else 0.2).ids) for i in range(samples))
    return plan_layout(lengths[: samples - samples // 200], rows)


class HeldOut:
    """A fixed set of held-out samples, scored by whether every token of the answer is the likeliest one."""

    def __init__(self, store: Path, folder: Path, group: Group, per_task: int) -> None:
        data, encode = NanoData(store, "held_out", 1), encoder(folder)
        self.sets: dict[str, list[Example]] = {}
        for name, task, difficulty in [(t, t, 1.0) for t in TASKS] + [
            (f"easy {t}", t, 0.0) for t in ("read", "transcribe")
        ]:
            rng = np.random.default_rng(list(name.encode()))
            examples = [encode(data.sample(task, rng, difficulty)) for _ in range(per_task)]
            self.sets[name] = sorted(examples, key=lambda e: len(e.ids))[group.rank :: group.size]

    def __call__(self, model: Unified) -> Scores:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return {name: (self._right(model, examples), len(examples)) for name, examples in self.sets.items()}

    def _right(self, model: Unified, examples: Sequence[Example]) -> int:
        right, device = 0, next(model.parameters()).device
        for i in range(0, len(examples), 32):
            some = examples[i : i + 32]
            layout = Layout(((max(len(e.ids) for e in some), len(some)),))
            batch = BucketBatch(model.config.text, layout, collate(layout, [replace_dense(e) for e in some]), device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model.logits(model(batch.ids, batch).index_select(0, batch.label_index))
            counts = torch.tensor([len(e.ids) - e.answer for e in some])
            owners = torch.repeat_interleave(torch.arange(len(some)), counts)
            right += int(exact_rows(logits.cpu(), batch.labels.cpu(), owners, len(some)).sum())
        return right


def replace_dense(example: Example) -> Example:
    """The example without its dense labels."""
    none = np.zeros(0, np.int64)
    return replace(example, dense_index=none, dense_labels=none)


@dataclass(frozen=True)
class Run:
    """One training run, as the command line describes it. Picklable."""

    folder: Path
    store: Path
    settings: Settings
    rows: int = 48  # of a step, over all processes
    processes: int = 2
    resume: bool = False
    seed: int = 0
    fresh: float = 1.0
    ahead: int = 6  # batches made ahead, in another process; 0 makes each when it is wanted
    per_task: int = 256  # held-out samples of each task at every evaluation
    device: str = "cpu"


def train(run: Run, progress: Callable[[str], None]) -> None:
    """Trains (or resumes), then writes the finished folder. Raises UsageError before work starts where it cannot."""
    prepare(run, progress)
    layout = measured_layout(run.store, run.folder, max(1, run.rows // run.processes))
    progress(f"a step of one process: {layout.num_tokens} tokens in rows of " + _shape(layout))
    lead, *others = group_of(run.processes)
    context = multiprocessing.get_context("spawn")
    peers = list[SpawnProcess]()
    try:
        for group in others:
            peer = context.Process(target=_follow, args=(run, layout, group))
            peer.start()
            peers.append(peer)
            group.close()  # it is the peer's now
        _work(run, layout, lead, progress)
    finally:
        lead.close()
        for peer in peers:
            peer.join(timeout=60)
            if peer.is_alive():
                peer.kill()  # it takes SIGTERM for a wish to stop after the next step


def _shape(layout: Layout) -> str:
    return ", ".join(f"{rows} x {length}" for length, rows in layout.buckets)


def prepare(run: Run, progress: Callable[[str], None]) -> None:
    """The folder, the store and the tokenizer, each made unless it is there."""
    from iolite.train.nano.store import build_store

    state = run.folder / "state.safetensors"
    if state.exists() and not run.resume:
        raise UsageError(f"{run.folder} holds a run already", "give --resume to go on with it, or another --out")
    run.folder.mkdir(parents=True, exist_ok=True)
    if (run.folder / "mixture.json").exists():
        read_mixture(run.folder / "mixture.json")
    if not (run.store / "store.json").exists():  # a finished one is taken whatever its size
        build_store(
            run.store,
            processes=run.processes,
            progress=lambda done, total, name: progress(f"store: {done}/{total} parts"),
        )
    if not (run.folder / "tokenizer.json").exists():
        from iolite.train.nano.tokenizer import train_tokenizer

        train_tokenizer(NanoData(run.store, "train").texts(), VOCABULARY, run.folder)


def _follow(run: Run, layout: Layout, group: Group) -> None:
    """A process beside the lead. When another has ended it ends too, and leaves it to the lead to tell."""
    try:
        _work(run, layout, group)
    except ProcessError:
        sys.exit(1)
    finally:
        group.close()


def _work(run: Run, layout: Layout, group: Group, progress: Callable[[str], None] | None = None) -> None:
    """One process of the run."""
    torch.set_num_threads(1)
    model = Unified(nano_config(Tokenizer.from_file(run.folder / "tokenizer.json")))
    initialise_(model, run.seed)
    model.to(run.device)
    draw, seed = Draw(run.store, run.folder, run.seed + group.rank), (run.seed, group.rank)
    source: Source = DirectSource(layout, draw(), seed)
    if run.ahead:
        source = Feeder(layout, draw, seed, ahead=run.ahead, fresh=run.fresh)
    report = Reporter(run.folder, progress) if progress else None
    trainer = Trainer(
        model,
        parameter_groups(model),
        source,
        layout,
        run.folder,
        run.settings,
        group=group,
        evaluate=HeldOut(run.store, run.folder, group, run.per_task),
        report=report,
    )
    if run.resume:
        trainer.resume()
    try:
        trainer.run()
    finally:
        if report:
            report.wait()


class Reporter:
    """Prints a line for every record of the log, and redraws the curves after an evaluation."""

    def __init__(self, folder: Path, progress: Callable[[str], None]) -> None:
        self.folder, self.progress = folder, progress
        self._drawing: subprocess.Popen[bytes] | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        start = f"{record['minutes']:6.1f} min  step {record['step']:6d}  {record['samples']:8d} samples"
        if record["kind"] == "train":
            self.progress(
                f"{start}  {record['samples_per_second']:4.0f}/s  loss {record['loss']:.3f}  "
                f"dense {record['dense']:.3f}  norm {record['norm']:.2f}  rate {record['rate']:.2f}"
            )
            return
        for key in ("tasks", "averaged"):
            if key in record:
                shares = "  ".join(f"{task} {share:.3f}" for task, share in record[key].items())
                self.progress(f"{start}  {key}: {shares}")
        self.wait()
        self._drawing = draw_in_background(self.folder / "log.jsonl", self.folder / "curves.png")

    def wait(self) -> None:
        """Until the curves are drawn."""
        if self._drawing:
            self._drawing.wait()


def export(run_folder: Path, out: Path, averaged: bool | None = None) -> bool:
    """Writes the finished checkpoint folder of a run's present state, in bf16, and says whether the average was taken.

    averaged takes the average of the last weights, or the last; None takes what the last evaluation found better.
    """
    averaged = average_is_better(run_folder / "log.jsonl") if averaged is None else averaged
    path = run_folder / "state.safetensors"
    if not path.is_file():
        raise UsageError(f"{run_folder} holds no run", "give the --out folder of `iolite train nano`")
    file, start = SafetensorsFile(path), "average." if averaged else "weights."
    config = nano_config(Tokenizer.from_file(run_folder / "tokenizer.json"))
    model = Unified(config)
    stored = [name for name in list(file.keys()) if name.startswith(start)]
    missing = model.load_state_dict({name.removeprefix(start): file.tensor(name) for name in stored}, strict=False)
    assert all(name.endswith("layer_scalar") for name in missing.missing_keys), "the state lacks a weight"
    model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(run_folder / name, out / name)
    if out.resolve() != TEMPLATE.parent:
        shutil.copyfile(TEMPLATE, out / TEMPLATE.name)
    save_folder(out, model, config, generation=generation_config(config), processor=processor_config())
    return averaged


def average_is_better(log: Path) -> bool:
    """Whether the last evaluation of a log found the average of the weights right more often, over all tasks."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    last: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "eval"), {})
    return "averaged" in last and sum(last["averaged"].values()) > sum(last["tasks"].values())


def generation_config(config: ModelConfig) -> GenerationConfig:
    """Greedy: the answers of this model are right or wrong, not varied."""
    return GenerationConfig(
        do_sample=False,
        eos_token_ids=config.eos_token_ids,
        suppress_tokens=(config.eoi_token_id, config.eoa_token_id),
    )


def processor_config() -> ProcessorConfig:
    return ProcessorConfig(
        image_max_soft_tokens=IMAGE_TOKENS,
        video_max_soft_tokens=IMAGE_TOKENS,
        num_frames=8,
        audio_seq_length=250,
        image_budgets=None,
        transcribe_prompt="Transcribe the speech.",
    )
