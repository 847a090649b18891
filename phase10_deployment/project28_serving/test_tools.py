"""Tools: what the model is told, what it may write, and what is read out of its text."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase2_finetuning.project4_sft.conversations import check_messages
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer

pytest.importorskip("llguidance")

from phase10_deployment.project28_serving.grammar import Grammars
from phase10_deployment.project28_serving.tools import ToolCall, ToolParser, functions_of, plain_messages, tool_grammar

TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, [TOKENIZER.eot_id])
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"day": {"enum": ["today", "tomorrow"]}},
        },
        "strict": True,
    },
}
GET = {"type": "function", "function": {"name": "get"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "day": "today"}}\n</tool_call>'
PLAIN = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
ROME = ToolCall("get_weather", '{"city": "Rome", "day": "today"}')


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name, **more}}


# -- what the model is told


def test_messages_become_a_conversation_of_texts():
    made = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Zürich"}'}}
    other = {"id": "call_2", "type": "function", "function": {"name": "get", "arguments": ""}}
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [made, other]},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "{}"}]},
        {"role": "assistant", "content": "It snows."},
        {"role": "assistant", "content": None, "tool_calls": [other | {"id": "call_3"}]},
        {"role": "system", "content": "Be kind."},
        {"role": "tool", "tool_call_id": "call_3", "content": "[]"},
        {"role": "user", "content": "Thanks."},
    ]
    told = plain_messages(messages)
    check_messages(told, answered=False)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in told] == [
        "Be brief.\n\nBe kind.",
        "Hello\nthere\n\nWeather?",
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n' + PLAIN,
        "<tool_response>\nsnow\n</tool_response>\n\n<tool_response>\n{}\n</tool_response>",
        "It snows.\n\n" + PLAIN,
        "<tool_response>\n[]\n</tool_response>\n\nThanks.",
    ]


def test_tools_are_described_a_line_each_in_the_first_message():
    told = plain_messages(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], [WEATHER, GET]
    )
    check_messages(told, answered=False)
    text = told[0]["content"]
    assert text.startswith("Be kind.\n\n") and told[1:] == [{"role": "user", "content": "Hi"}]
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    known = {key: value for key, value in WEATHER["function"].items() if key != "strict"}
    assert [json.loads(line) for line in lines] == [{"type": "function", "function": known}, GET]
    assert plain_messages([{"role": "user", "content": "Hi"}], [GET])[0]["role"] == "system"
    assert plain_messages([{"role": "user", "content": "Hi"}]) == [{"role": "user", "content": "Hi"}]


def test_what_is_told_of_calls_is_read_as_these_calls():
    """The example of the instructions, and calls of the conversation, are in the format that the parser reads."""
    call = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "</tool_call>", "n": [1.5, null]}'}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "b"}]  # fmt: skip
    assert parse([plain_messages(talk)[1]["content"]]) == [
        ToolCall("get_weather", '{"city": "</tool_call>", "n": [1.5, null]}')
    ]
    broken = {"id": "1", "function": {"name": "get", "arguments": '{"ci'}}
    talk[1] = {"role": "assistant", "tool_calls": [broken]}
    assert '{"name": "get", "arguments": "{\\"ci"}' in plain_messages(talk)[1]["content"]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must begin with a message of the user"),
        ([{"role": "system", "content": "a"}], "must begin with a message of the user"),
        ([{"role": "assistant", "content": "a"}, USER], "must begin with a message of the user.*add one"),
        ([USER, {"role": "assistant", "content": "a"}], "the last message is the assistant's: end with"),
        ([USER, {"role": "tool", "tool_call_id": "x", "content": "a"}], "message 1 answers the call 'x', which no"),
        ([USER, {"role": "tool", "content": "a"}], "message 1 answers the call None"),
        ([USER, {"role": "robot", "content": "a"}], "message 1 has the role 'robot'"),
        ([USER, {"role": "user", "content": None}], "message 1 has the content None"),
        ([{"role": "user"}], "message 0 has the content None"),
        ([{"role": "user", "content": []}], r"message 0 has the content \[\]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "message 0 has a part of type 'image_",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 has a part of type 'text'"),
        ([{"role": "user", "content": ["a"]}], "message 0 has a part of type 'a'"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}, USER], "message 1 has the call"),
        ([USER, {"role": "assistant", "tool_calls": ["x"]}, USER], "message 1 has the call"),
    ],
)
def test_conversations_that_are_none_are_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        plain_messages(messages)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([tool("a b")], "tool 0 has the name 'a b'"),
        ([tool('f"')], "tool 0 has the name"),
        ([GET, tool("\ud800")], "tool 1 has the name"),
        ([tool("x" * 65)], "1 to 64"),
        ([tool("auto")], "but not none, auto, required"),
        ([tool(None)], "tool 0 has the name None"),
        ([GET, GET], "tool 1 has the name get, as one before it"),
        ([{"type": "function"}], "tool 0 is"),
        ([{"type": "web_search", "function": {"name": "f"}}], "tool 0 is"),
        (["f"], "tool 0 is 'f'"),
    ],
)
def test_tools_that_are_none_are_refused(tools, reason):
    for reader in (functions_of, tool_grammar, lambda tools: plain_messages([USER], tools)):
        with pytest.raises(ValueError, match=reason):
            reader(tools)


# -- what the model may write


def tokens_in(mask) -> list[int]:
    return np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def may_end(grammar: str, text: str) -> bool | None:
    """Whether a text may end here; None: it could not even be written."""
    constraint = GRAMMARS.constraint(grammar)
    for token in TOKENIZER.encode(text):
        if constraint.finished or token not in tokens_in(constraint.allowed()):
            return None
        constraint.accept(token)
    assert constraint.failed is None
    return constraint.finished or TOKENIZER.eot_id in tokens_in(constraint.allowed())


def walk(grammar: str, begin: str, seed: int, n: int = 500) -> tuple[str, bool]:
    """A text drawn evenly from what is allowed, that likes to end; and whether it did."""
    constraint, rng, ids = GRAMMARS.constraint(grammar), random.Random(seed), TOKENIZER.encode(begin)
    for token in ids:
        assert token in tokens_in(constraint.allowed())
        constraint.accept(token)
    while not constraint.finished and len(ids) < n:
        allowed = tokens_in(constraint.allowed())
        closing = [token for token in allowed if token in (*b'"]}', TOKENIZER.eot_id)]
        token = rng.choice(closing if closing and rng.random() < 0.3 else allowed)
        constraint.accept(token)
        if token != TOKENIZER.eot_id:
            ids.append(token)
    assert constraint.failed is None
    return TOKENIZER.decode(ids), constraint.finished


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "expected"),
    [
        ("auto", True, "", True), ("auto", True, "Hello <tool> </tool_call>", True),
        ("auto", True, CALL, True), ("auto", True, f"Wait. {CALL} and {PLAIN}, done", True),
        ("auto", True, "<tool_call>", False), ("auto", True, "<tool_call>x", None),
        ("auto", True, '<<tool_call>\n{"name": "no', None), ("auto", True, PLAIN.replace("{}", '{"a": 1}'), None),
        ("auto", True, CALL.replace("Rome", "A long name"), None), ("auto", True, CALL.replace("today", "now"), None),
        ("auto", False, "Hello", True), ("auto", False, f"Wait. {CALL}", True), ("auto", False, CALL + ".", None),
        ("required", True, "", False), ("required", True, "H", None), ("required", True, CALL, True),
        ("required", True, f"{CALL}\n{PLAIN}\n{CALL}", True), ("required", True, f"{CALL} ", None),
        ("required", True, "\n".join([PLAIN] * 16), True), ("required", True, "\n".join([PLAIN] * 17), None),
        ("required", False, CALL, True), ("required", False, CALL + "\n", None),
        ("get", True, PLAIN, True), ("get", True, CALL, None), ("get", False, PLAIN + "\n", None),
        ("get_weather", False, CALL, True), ("get_weather", False, PLAIN, None),
    ],
)  # fmt: skip
def test_which_texts_may_be_written(choice, parallel, text, expected):
    assert may_end(tool_grammar([WEATHER, GET], choice, parallel), text) is expected


@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
@pytest.mark.parametrize("parallel", [False, True])
def test_calls_satisfy_their_schemas(choice, parallel):
    jsonschema = pytest.importorskip("jsonschema")
    grammar = tool_grammar([WEATHER, GET], choice, parallel)
    schemas, n_calls = {"get_weather": WEATHER["function"]["parameters"], "get": {"maxProperties": 0}}, []
    for seed in range(12):
        text, ended = walk(grammar, "Let me see. <tool_call>" if choice == "auto" else "", seed)
        parts = parse([text])
        calls = [part for part in parts if isinstance(part, ToolCall)]
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            assert choice in ("auto", "required", call.name)
        if ended:
            n_calls.append(len(calls))
            assert calls and (parallel or len(calls) == 1)
            assert "<tool_call>" not in "".join(part for part in parts if isinstance(part, str))
            assert choice == "auto" or calls == parts
    assert len(n_calls) >= 8 and (max(n_calls) > 1) <= parallel


def test_nothing_is_bound_without_tools_or_with_none():
    assert tool_grammar([], "auto") is None and tool_grammar([], "required") is None
    assert tool_grammar([WEATHER], "none") is None
    with pytest.raises(ValueError, match="tool_choice='f' is no tool: use none, auto, required, get"):
        tool_grammar([GET], "f")
    with pytest.raises(ValueError, match="tool_choice='f' is no tool"):
        tool_grammar([], "f")


def test_a_schema_that_cannot_be_honoured_is_refused_if_strict_else_any_object_will_do():
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(ValueError, match=r"the function f: .*uniqueItems"):
        tool_grammar([tool(parameters=schema, strict=True)])
    for parameters in (schema, {"type": "array"}, {"description": "x" * 40_000}, {}):
        grammar = tool_grammar([tool(parameters=parameters)], "required")
        assert may_end(grammar, '<tool_call>\n{"name": "f", "arguments": {"a": [1, 1]}}\n</tool_call>') is True
        assert may_end(grammar, '<tool_call>\n{"name": "f", "arguments": [') is None
    for parameters in ([], "x", {"type": "array"}):
        with pytest.raises(ValueError, match="the function f"):
            tool_grammar([tool(parameters=parameters, strict=True)])


def test_names_that_begin_alike():
    grammar = tool_grammar([tool(name, parameters={}) for name in ("get", "get_a", "g", "get-b")], "required", False)
    for name in ("get", "get_a", "g", "get-b"):
        assert may_end(grammar, f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": 1}}}}\n</tool_call>') is True
    assert may_end(grammar, '<tool_call>\n{"name": "get_"') is None


# -- what the model wrote


def parse(pieces) -> list[str | ToolCall]:
    """What comes out of a text that comes in pieces, neighbouring texts joined."""
    parser, parts = ToolParser(), []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        assert part != ""
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []), ("Hello", ["Hello"]), (" <tool_call", [" <tool_call"]), ("a </tool_call>", ["a </tool_call>"]),
        (CALL, [ROME]), (f"Wait.\n{CALL}\n", ["Wait.\n", ROME]),
        (f"{CALL}\n \n{PLAIN} ok ", [ROME, ToolCall("get", "{}"), "ok "]),
        (CALL.removesuffix("</tool_call>"), [ROME]),
        ('<tool_call>{"arguments": {"a": "</tool_call> \\" "}, "name": "f"}</tool_call>!',
         [ToolCall("f", '{"a": "</tool_call> \\" "}'), "!"]),
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
        ("<tool_call>no</tool_call> " + CALL, ["<tool_call>no</tool_call> ", ROME]),
        ("<tool_call><tool_call>" + PLAIN, ["<tool_call><tool_call>" + PLAIN]),
        ('<tool_call>{"a</tool_call> ' + CALL, ['<tool_call>{"a</tool_call> ', ROME]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', ['<tool_call>{"name": "f", "arguments": {"a": 1']),
        *((f'<tool_call>{body}</tool_call>', [f'<tool_call>{body}</tool_call>']) for body in (
            "[]", "1", '{"name": 1}', '{"name": "a b", "arguments": {}}', '{"name": "f", "arguments": []}',
            '{"name": "f",}', '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": 1e999}}',
            '{"name": "\\ud800"}',
            '{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}", "{" * 5000, "9" * 5000)),
    ],
)  # fmt: skip
def test_calls_are_found_and_everything_else_stays_text(text, expected):
    assert parse([text]) == expected
    assert parse(text) == expected  # a character at a time


def test_arguments_are_json_that_says_the_same():
    given = '{"z": "é\\ud83d\\ude00", "a": [1, -2.50, 1e3, true, null, {"": "\\ud800"}]}'
    (call,) = parse([f'<tool_call>{{"name": "f", "arguments": {given}}}</tool_call>'])
    assert json.loads(call.arguments) == json.loads(given)
    call.arguments.encode("utf-8")  # also what UTF-8 does not know


def test_calls_have_names_of_their_own():
    calls = parse([CALL + CALL])
    assert calls == [ROME, ROME] and len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") and len(call.id) > 20 for call in calls)


def test_what_is_certain_comes_at_once():
    parser = ToolParser()
    assert parser.push("Hello <b>") == ["Hello <b>"]
    assert parser.push(" <tool") == [" "] and parser.push("s>") == ["<tools>"]
    assert parser.push(CALL[:-1]) == [] and parser.push(CALL[-1] + "a<") == [ROME, "a"]
    assert parser.finish() == ["<"] and parser.finish() == []


PIECES = ["<tool_call>", "</tool_call>", "<tool", "_call>", "<", "\n", " ", '"', "\\", "{", "}", CALL, PLAIN, "text",
          '{"name": "f", "arguments": {"a": "', '"}}', "</tool_", "call>", "é"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.randoms(use_true_random=False))
def test_pieces_do_not_matter(text, rng):
    whole = parse([text])
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    assert parse([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]) == whole
    assert parse(text) == whole
    if "<tool_call>" not in text:
        assert whole == ([text] if text else [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.text("ab {<\n", min_size=1), st.dictionaries(st.text(), st.text() | st.integers()))))
def test_what_was_written_is_read_back(parts):
    calls = [ToolCall("f", json.dumps(part)) for part in parts if isinstance(part, dict)]
    text = "".join(
        part if isinstance(part, str)
        else f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(part, ensure_ascii=False)}}}\n</tool_call>'
        for part in parts
    )  # fmt: skip
    read = parse([text])
    assert [part for part in read if isinstance(part, ToolCall)] == calls
    said = "".join("".join(part.split()) for part in parts if isinstance(part, str))
    assert "".join("".join(part.split()) for part in read if isinstance(part, str)) == said


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
