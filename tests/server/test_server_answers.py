"""What is handed on of an answer: everything in its order, and what has come together as one piece."""

from __future__ import annotations

from iolite.engine.engine import Engine
from iolite.generate.logprobs import ScoredDelta
from iolite.generate.reply import TokenLogprobs, ToolCall
from iolite.generate.stream import ReplyStream
from iolite.server.answers import Answer, Item, _joined
from iolite.text.stream import ContentDelta, ReasoningDelta


def test_runs_of_text_and_of_thoughts_become_one_piece():
    call, other = ToolCall("call_1", "f", {}, None), ToolCall("call_2", "g", {}, None)
    a, b, c = (TokenLogprobs(i, text.encode(), -float(i), ()) for i, text in enumerate("abc"))
    items = [
        ReasoningDelta("a"), ReasoningDelta("b"), ContentDelta("c"), ContentDelta("d"), call, other, ContentDelta("e"),
    ]  # fmt: skip
    assert _joined(items) == [ReasoningDelta("ab"), ContentDelta("cd"), call, other, ContentDelta("e")]
    scored = [ScoredDelta("a", (a,)), ScoredDelta("bc", (b, c)), ReasoningDelta("d")]
    assert _joined(scored) == [ScoredDelta("abc", (a, b, c)), ReasoningDelta("d")]
    assert _joined([]) == []


def test_tokens_that_came_while_nobody_read_go_out_together(script):
    handed: list[list[Item | BaseException]] = []

    class Kept(Answer):
        def _put(self, choice, items):
            handed.append(list(items))

    script.say("one two three")
    with Engine(script.model, slots=1) as engine:
        prompt = script.model.prompt([{"role": "user", "content": "?"}])
        running = engine.submit(prompt, script.model.sampling(max_tokens=50, temperature=0))
        running.gather(60)  # until the last token is there
        Kept(None, None, [running]).read(0, ReplyStream(running, script.model.tokenizer, None))
    ((text, reply),) = handed
    assert text == ContentDelta("one two three") and reply.text == "one two three"
    assert reply.usage.completion_tokens > 3
