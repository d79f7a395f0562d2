"""The chat template: rendered cases of the family, the grammar between them, and templates that mean harm."""

import json
import tracemalloc
from pathlib import Path

import pytest

from iolite.errors import CheckpointError, MessageError
from iolite.text.template import COMPLETION_TEMPLATE, MAX_SOURCE, ChatTemplate

ROOT = Path(__file__).parents[2]
CASES = json.loads((ROOT / "tests/data/chat_cases.json").read_text(encoding="utf-8"))
CALL = {"id": "7", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [True, None, "x"]}}}
CALL_TEXT = '<|tool_call>call:add{a:1,b:[true,null,<|"|>x<|"|>]}<tool_call|>'
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.from_folder(ROOT / "iolite/nano")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("name", CASES)
def test_reproduces_case(template, name):
    arguments = dict(CASES[name]["input"])
    messages, expected = arguments.pop("messages"), CASES[name]["rendered"]
    arguments["thinking"] = arguments.pop("enable_thinking", False)
    if not expected.startswith("ERROR"):
        assert template.render(messages, **arguments) == expected
        return
    kind, reason = expected.removeprefix("ERROR ").split(": ", 1)
    with pytest.raises(MessageError) as caught:
        template.render(messages, **arguments)
    assert type(caught.value.__cause__).__name__ == kind
    assert reason.removeprefix("chat_template: ") in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        pytest.param(
            [assistant("x"), assistant("y")],
            {"add_generation_prompt": False},
            "<|turn>model\nxy<turn|>\n",
            id="one turn",
        ),
        pytest.param(
            [user("a"), assistant("<|channel>thought\nR<channel|> x "), user("b")],
            {},
            "<|turn>user\na<turn|>\n<|turn>model\nx<turn|>\n<|turn>user\nb<turn|>\n<|turn>model\n" + EMPTY_THOUGHT,
            id="thoughts in contents are dropped",
        ),
        pytest.param(
            [
                {"role": "developer", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
                user("c"),
            ],
            {"thinking": True},
            "<|turn>system\n<|think|>\na b <turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n",
            id="parts of a system message",
        ),
        pytest.param(
            [user("a"), {"role": "system", "content": " b "}],
            {"add_generation_prompt": False},
            "<|turn>user\na<turn|>\n<|turn>system\nb<turn|>\n",
            id="later system message",
        ),
        pytest.param(
            [
                user("a"),
                assistant(None, tool_calls=[CALL], reasoning="R"),
                {"role": "tool", "tool_call_id": "7", "content": "1"},
                assistant("done"),
                user("b"),
            ],
            {"preserve_thinking": True, "add_generation_prompt": False},
            f"<|turn>user\na<turn|>\n<|turn>model\n<|channel>thought\nR\n<channel|>{CALL_TEXT}"
            '<|tool_response>response:add{value:<|"|>1<|"|>}<tool_response|>done<turn|>\n<|turn>user\nb<turn|>\n',
            id="a kept thought of a tool call",
        ),
        pytest.param(
            [
                user("a"),
                assistant(None, tool_calls=[CALL, CALL]),
                {"role": "tool", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
            ],
            {},
            f'<|turn>user\na<turn|>\n<|turn>model\n{CALL_TEXT}{CALL_TEXT}<|tool_response>response:unknown{{value:<|"|>see<|"|>}}'
            "<tool_response|><|image|>",
            id="a result of parts, name unknown",
        ),
        pytest.param(
            [
                user("a"),
                assistant(None, tool_calls=[CALL], tool_responses=[{"name": "add", "response": {"b": "y", "A": 2}}]),
            ],
            {"thinking": True},
            f"<|turn>system\n<|think|>\n<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n{CALL_TEXT}<|tool_response>"
            'response:add{A:2,b:<|"|>y<|"|>}<tool_response|><|channel>thought\n',
            id="a result inside the message",
        ),
    ],
)
def test_grammar(template, messages, options, expected):
    assert template.render(messages, **options) == "<bos>" + expected


def test_declaration_of_nested_items(template):
    items = {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"], "title": {"z": 1}}
    parameters = {"type": "object", "properties": {"list": {"type": "array", "items": items}, "o": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "D", "parameters": parameters}}]
    text = template.render([user("a")], tools=tools, add_generation_prompt=False)
    assert text == (
        '<bos><|turn>system\n<|tool>declaration:f{description:<|"|>D<|"|>,parameters:{properties:{list:{items:{'
        'properties:{k:{type:<|"|>NUMBER<|"|>}},required:[<|"|>k<|"|>],title:{<|"|>z<|"|>:1},type:<|"|>OBJECT<|"|>},'
        'type:<|"|>ARRAY<|"|>},o:{properties:{},type:<|"|>OBJECT<|"|>}},type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        "<|turn>user\na<turn|>\n"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [user([{"type": "smell"}])],
        [user("a"), {"role": "tool", "content": "nobody asked"}],
        [user([3])],
        [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": [1]}}])],
    ],
)
def test_wrong_messages_are_named(template, messages):
    with pytest.raises(MessageError):
        template.render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
        "{{ 'x' * 9999999999 }}",
        "{{ 'x' * 999999 * 999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d'|format(9999999999, 1) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ '{:9999999999}'.format('x') }}",
        "{{ '{:{}}'.format('x', '9999999999') }}",
        "{{ '{x:{w}}'.format_map({'x': 'x', 'w': 9999999999}) }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ 'x\\ny'|indent(9999999999) }}",
        "{{ messages|tojson(indent=9999999999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_template_is_stopped(source):
    with pytest.raises((CheckpointError, MessageError)):
        ChatTemplate(source).render([user("a")])


BIG = "{% set b = 'x' * 100000 %}"
NESTED = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
LISTS = "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(100000)|batch(1)|map('list')|map('batch',900000,'x')|map('list')|list }}",
        "{{ ([[1]*100000]*1000)|sum(start=[]) }}",
        "{{ 'x'|wordwrap(1, wrapstring='x') }}",
        "{{ ('\t'*1000).expandtabs(999999) }}",
        "{{ b.translate({120: b}) }}",
        "{{ b.replace('x', b) }}",
        "{{ b.replace('', b) }}",
        "{{ b|replace('x', b) }}",
        "{{ b|join(b) }}",
        "{{ range(99999)|map('string')|join(b) }}",
        "{{ ([b]*9999)|join }}",
        "{{ b.join(b) }}",
        "{{ b.join(['x']*99999) }}",
        "{{ ''.join([b]*9999) }}",
        "{{ ('{0}'*9999).format(b) }}",
        "{{ ('{x}'*9999).format_map({'x': b}) }}",
        "{{ ('{:9999}'*99999).format(*([1]*99999)) }}",
        "{{ '{:x>999999999}'.format(1) }}",
        "{{ '{0[}]:999999999}'.format({'}': 1}) }}",
        "{{ ('%(a)s'*9999) % {'a': b} }}",
        "{{ '%(a)999999999d' % {'a': 1} }}",
        "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ ('%s'*9999)|format(*([b]*9999)) }}",
        "{{ ('x\n'*99999)|indent(b) }}",
        "{{ ([b]*9999)|map('list')|list }}",
        "{{ ([b]*9999)|map('upper')|list }}",
        "{{ ([b]*9999)|string }}",
        "{{ [b]*9999 }}",
        "{{ [[b]*999]*999 ~ '' }}",
        "{{ ([b]*9999)|tojson }}",
        "{{ []|tojson(indent=b) }}",
        "{{ range(99999)|list|tojson(separators=(b, b)) }}",
        LISTS + "{% set n.x = n.x + [b[1:]] %}{% endfor %}",
        LISTS + "{% set n.x = n.x + [[" + "1," * 9999 + "]] %}{% endfor %}",
        LISTS + "{% set y = 'x'|indent(-999999999) %}{% set n.x = n.x + [b.upper()] %}{% endfor %}",
        NESTED + "{{ n.x }}",
        NESTED + "{{ {'a': n.x}.values() }}",
        NESTED + "{{ namespace(x=n.x) }}",
        NESTED + "{{ n.x ~ '' }}",
        NESTED + "{{ n.x|string }}",
        NESTED + "{{ n.x|trim }}",
        NESTED + "{{ n.x|join }}",
        NESTED + "{{ n.x|tojson }}",
        NESTED + "{{ '%s' % n.x }}",
        NESTED + "{{ '%r'|format(n.x) }}",
        NESTED + "{{ '{}'.format(n.x) }}",
        NESTED + "{{ messages[n.x].y }}",
        NESTED + "{{ raise_exception(n.x) }}",
    ],
)
def test_memory_is_not_filled(source):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            ChatTemplate(BIG + source).render([user("a")])
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_what_templates_do_with_text():
    source = (
        "{{ 'a-b'.replace('-', '+')|replace('+', ' ')|upper }} {{ ['x', 1]|map('string')|join(', ') }} "
        "{{ '/'.join(['a', 'b'][::-1]) }} {{ '%s: %3d'|format('n', 7) }} {{ '{}-{y:>3}'.format(1, y=2) }} "
        "{{ 'a\nb'|indent(2) }} {{ 'x'.split(',') + ['y'] }} {{ {'b': 1, 'a': [none]}|dictsort }} "
        "{{ {'b': 'é'}|tojson(indent=1) }} {{ [3, 1]|sort|first }} {{ ' a '|trim|length }} {{ '%d%%' % 5 }}"
    )
    assert ChatTemplate(source).render([user("a")]) == (
        "A B x, 1 b/a n:   7 1-  2 a\n  b ['x', 'y'] [('a', [None]), ('b', 1)] {\n \"b\": \"é\"\n} 1 1 5%"
    )


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x'|no_such_filter }}", "{#" + "x" * MAX_SOURCE + "#}"])
def test_unusable_template(source):
    with pytest.raises(CheckpointError):
        ChatTemplate(source)


def test_environment():
    source = (
        "{% for m in messages %}\n    {% if m.role == 'skip' %}\n        {% continue %}\n    {% endif %}\n"
        "{{ loop.index }}/{{ loop.length }} {{ m.content | tojson }}\n{% break %}\n{% endfor %}\n{{ '%02d' % 3 }}"
    )
    text = ChatTemplate(source).render([{"role": "skip"}, user("<é>"), user("b")])
    assert text == '2/3 "<é>"\n03'
    with pytest.raises(MessageError, match="lipsum"):
        ChatTemplate("{{ lipsum(n=100000) }}").render([user("a")])
    with pytest.raises(MessageError, match="no way"):
        ChatTemplate("{{ raise_exception('no way') }}").render([user("a")])


def test_a_base_model_goes_on_with_one_text():
    base = ChatTemplate(COMPLETION_TEMPLATE)
    assert base.render([user(" Once upon\n")]) == "<bos> Once upon\n"
    parts = [{"type": "image"}, {"type": "text", "text": " shows"}]
    assert base.render([{"role": "user", "content": parts}]) == "<bos><|image|> shows"
    for messages in ([user("a"), user("b")], [{"role": "system", "content": "a"}]):
        with pytest.raises(MessageError, match="base model"):
            base.render(messages)


def test_where_a_template_is_found(tmp_path):
    assert ChatTemplate.from_folder(tmp_path).source == COMPLETION_TEMPLATE
    (tmp_path / "chat_template.json").write_text('{"chat_template": "C"}')
    assert ChatTemplate.from_folder(tmp_path).source == "C"
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_folder(tmp_path).source == "B"
    (tmp_path / "chat_template.jinja").write_text("A")
    assert ChatTemplate.from_folder(tmp_path).source == "A"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_long_conversation_stays_in_budget(template):
    turns = [
        user("a"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "7", "content": "x" * 2000},
    ]
    assert len(template.render(turns * 400)) > 800_000


@pytest.mark.parametrize("messages", [[user("a"), assistant("b")] * 5000, [user("a" * 20_000_000)]])
def test_too_much_for_any_template_is_no_fault_of_the_checkpoint(template, messages):
    with pytest.raises(MessageError, match="more than a chat template can write"):
        template.render(messages)
