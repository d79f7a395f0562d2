"""Dialogues of a .jsonl file, for training a drafter: every line `{"messages": [...]}` in the shapes that `chat` takes.

Every turn of the assistant is an answer to learn from, behind the prompt that the template makes of what came before
it, as in use. Where a line ends with another's turn the model answers itself, greedily; it can also be made to answer
everything anew. What it has said is kept in a file, so that a run taken up again does not ask twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from iolite.errors import IoliteError, UsageError
from iolite.generate.loop import Decoding
from iolite.generate.model import Model
from iolite.prompt import Prompt
from iolite.train.drafter.reading import Dialogue

END_OF_TURN = "<turn|>"

# Keys of a media part that hold a path or a URL; what stands under "data" is the thing itself.
_PATHS = frozenset(
    f"{before}{kind}{after}"
    for kind in ("image", "audio", "video")
    for before, after in (("", ""), ("", "_url"), ("input_", ""))
) | {"url", "path", "frames"}


@dataclass(frozen=True)
class Question:
    """Messages to answer. reply: the tokens of the data's own answer with its end, None where the model is to give it.
    where: file and line."""

    where: str
    line: int
    messages: list[dict[str, Any]]
    reply: tuple[int, ...] | None


def read_questions(path: Path, model: Model, anew: bool) -> list[Question]:
    """All that the file asks, with every line checked the whole way: JSON, messages, media, length.

    anew: the data's own answers are left out. Raises UsageError that names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{path} cannot be read: {reason}", 'give a .jsonl file, {"messages": [...]} a line') from None
    found: list[Question] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            found += _line(line, f"{path}, line {number}", number, model, path.parent, anew)
    if not found:
        raise UsageError(f"{path} holds no dialogue", 'give one {"messages": [...]} a line')
    return found


def _line(line: str, where: str, number: int, model: Model, folder: Path, anew: bool) -> list[Question]:
    try:
        data = json.loads(line)
        messages = data["messages"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise UsageError(f'{where} is no JSON object with "messages"', "mend the line, or remove it") from None
    try:
        messages = with_paths(messages, folder)
        model.render(messages, add_generation_prompt=False)  # every message, of whatever shape
        found = _answers(messages, where, number, model)
        if not found:
            raise UsageError("there is no answer to learn from", "answers are an assistant's turns of plain text")
        found = [replace(q, reply=None) if anew else q for q in found]
        longest = build(model, found[-1])  # has the media of all the others
        if len(longest.ids) + max(1, len(found[-1].reply or ())) > model.context:
            raise UsageError(f"{len(longest.ids)} tokens and an answer are more than the context of {model.context}")
    except IoliteError as error:
        raise UsageError(f"{where}: {error}", error.hint or "mend the line, or remove it") from None
    return found


def _answers(messages: list[dict[str, Any]], where: str, number: int, model: Model) -> list[Question]:
    """One question for every answer of plain text, and one for a last turn that is not the assistant's."""
    found = []
    for i, message in enumerate(messages):
        if i and message["role"] in ("assistant", "model") and not message.get("tool_calls"):
            text = _plain_text(message["content"])
            if text:
                reply = tuple(model.tokenizer.encode(text + END_OF_TURN))
                found.append(Question(where, number, messages[:i], reply))
    if messages[-1]["role"] not in ("assistant", "model"):
        found.append(Question(where, number, messages, None))
    return found


def _plain_text(content: Any) -> str:
    """The text of an answer, "" where it has other parts."""
    if isinstance(content, str):
        return content.strip()
    texts = [part if isinstance(part, str) else part.get("text") for part in content or ()]
    return "" if None in texts else "".join(texts).strip()


def with_paths(messages: Any, folder: Path) -> Any:
    """Messages whose relative paths begin at a folder. What has another shape stays as it is."""
    if not isinstance(messages, list):
        return messages

    def moved(value: Any) -> Any:
        if isinstance(value, str) and ":" not in value and not value.startswith("~"):
            return os.fspath(folder / value)
        if isinstance(value, list):
            return [moved(one) for one in value]
        return part(value)

    def part(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: moved(inner) if key in _PATHS else inner for key, inner in value.items()}

    def message(value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("content"), list):
            return value
        return {**value, "content": [part(one) for one in value["content"]]}

    return [message(one) for one in messages]


def build(model: Model, question: Question) -> Prompt:
    return model.prompt(question.messages)


def answer(model: Model, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
    """The model's own greedy answer, its end token included unless it ran out of tokens."""
    context = min(model.context, len(prompt.ids) + max_tokens)
    params = model.sampling(temperature=0.0, max_tokens=max_tokens)
    decoding = Decoding(model.network, prompt, params, context=context, chunk=model.chunk, kv_dtype=model.kv_dtype)
    return tuple(drawn.id for drawn in decoding)


class Answers:
    """The model's answers, looked up in a file or given now and written there."""

    def __init__(self, path: Path, model: Model, max_tokens: int) -> None:
        self.path, self.model, self.max_tokens = path, model, max_tokens
        self._known: dict[str, tuple[int, ...]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = tuple(record["ids"])
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a killed run was writing: it is asked for again

    def of(self, questions: Sequence[Question], note: Callable[[int, int], None]) -> list[Question]:
        """The questions with the model's replies in them. note(done, in all) after each."""
        found = []
        for question in questions:
            found.append(replace(question, reply=self._reply(question)))
            note(len(found), len(questions))
        return found

    def _reply(self, question: Question) -> tuple[int, ...]:
        key = self._key(question)
        if key not in self._known:
            self._known[key] = answer(self.model, build(self.model, question), self.max_tokens)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "where": question.where, "ids": self._known[key]}) + "\n")
        return self._known[key]

    def _key(self, question: Question) -> str:
        asked = json.dumps([self.model.name, self.max_tokens, question.messages], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()


def split(questions: Sequence[Question], held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """(to learn from, to measure with): whole lines apart, `held_out` of them, chosen by the seed."""
    lines = sorted({q.line for q in questions})
    if len(lines) <= held_out:
        raise UsageError(
            f"{held_out} of {len(lines)} dialogues are to be kept for measuring, which leaves none to learn from",
            "give more dialogues, or a smaller --held-out",
        )
    kept = set(np.random.default_rng(seed).permutation(lines)[:held_out].tolist())
    return [q for q in questions if q.line not in kept], [q for q in questions if q.line in kept]


class FileSource:
    """Steps over questions in a new order each time through; a step's dialogues follow from its number alone."""

    def __init__(self, model: Model, questions: Sequence[Question], rows: int, seed: int) -> None:
        """Every question has its reply."""
        self.model, self.questions, self.rows, self.seed = model, questions, rows, seed
        self.step = 0

    def start(self, step: int) -> None:
        self.step = step

    def next_batch(self, fraction: float) -> list[Dialogue]:
        first = self.step * self.rows
        self.step += 1
        return [self._dialogue(i) for i in range(first, first + self.rows)]

    def _dialogue(self, number: int) -> Dialogue:
        epoch, place = divmod(number, len(self.questions))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.questions))
        question = self.questions[order[place]]
        assert question.reply is not None
        return Dialogue(build(self.model, question), question.reply)

    def close(self) -> None:
        pass
