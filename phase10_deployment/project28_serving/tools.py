"""
Tools

This file implements calls of functions for models that know only text following:
- "Finetuned Language Models Are Zero-Shot Learners" (Wei et al., 2022) - a task that is described is carried out
- "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models" (Dong et al., 2024) - a call
  is written by a grammar, so that it can be carried out

The format is that of Hermes and Qwen: signatures stand in the system message, a call is JSON between <tool_call> and
</tool_call>, its result comes back between <tool_response> and </tool_response> as if the user had said it.

Each component is explained with paper references for educational purposes.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from phase3_core_inference.project8_kv_cache.stopping import held_back
from phase10_deployment.project28_serving.grammar import check_grammar, json_rule

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 16  # in a text that must be calls: a model that has no token to end with would go on for ever
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as OpenAI's interface has it
CHOICES = ("none", "auto", "required")
ANY_OBJECT = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
STRING = re.compile(r'"(?:[^"\\]|\\.)*("|\\?\Z)', re.DOTALL)  # of JSON; group 1 is no quote where it does not end

INSTRUCTIONS = """# Tools

These functions are at your disposal; each line describes one of them in JSON:
<tools>
{tools}
</tools>

To call one, write its name and its arguments as a JSON object between two tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>
What it returns comes back between <tool_response> and </tool_response>."""


# -- what the model is told


def plain_messages(messages: Sequence[dict], tools: Sequence[dict] = ()) -> list[dict]:
    """Messages of OpenAI's interface as a conversation of system, user and assistant, in texts alone.

    PAPER: "Finetuned Language Models Are Zero-Shot Learners", arXiv:2109.01652, section 2.
    PAPER CONTEXT: a model that has learned to follow instructions does what an instruction describes, also a new task.
    INTUITION: a clerk who reads notes aloud to somebody on the telephone, and writes down what comes back.
    IMPLEMENTATION: all instructions and the tools come first, calls and results become texts, neighbours of one role
        one message.
    WHY: templates know three roles in turn, and every model that was trained on this format understands it.

    Raises ValueError that names the message.
    """
    told, system, turns, made = described(tools), [], [], []
    for i, message in enumerate(messages):
        role, text = message.get("role"), _text_of(message, i)
        if role in ("system", "developer"):
            system.append(text)
        elif role == "user":
            turns.append(("user", text))
        elif role == "assistant":
            calls = message.get("tool_calls") or []
            written = [_call_text(call, i) for call in calls]
            made += [call.get("id") for call in calls]
            turns.append(("assistant", "\n".join([text, *written] if text else written)))
        elif role == "tool":
            if message.get("tool_call_id") not in made:
                raise ValueError(
                    f"message {i} answers the call {message.get('tool_call_id')!r:.60}, which no message before it "
                    f"made: give the assistant's message with its tool_calls, too"
                )
            turns.append(("user", f"<tool_response>\n{text}\n</tool_response>"))
        else:
            raise ValueError(f"message {i} has the role {role!r:.60}: use system, user, assistant or tool")
    if not turns or turns[0][0] != "user":
        raise ValueError("the conversation must begin with a message of the user, behind those of the system: add one")
    if turns[-1][0] != "user":
        raise ValueError("the last message is the assistant's: end with one of the user, or with the result of a tool")
    first = [{"role": "system", "content": "\n\n".join([*system, told] if told else system)}] if system or told else []
    merged = [(role, [text for _, text in group]) for role, group in groupby(turns, key=lambda turn: turn[0])]
    return first + [{"role": role, "content": "\n\n".join(texts)} for role, texts in merged]


def _text_of(message: dict, i: int) -> str:
    """The text of a message."""
    content, role = message.get("content"), message.get("role")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list) or not content:
        raise ValueError(f"message {i} has the content {content!r:.60}: give a text, or a list of parts of type text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"message {i} has a part of type {kind!r:.60}: this model reads parts of type text alone")
    return "\n".join(part["text"] for part in content)


def _call_text(call: dict, i: int) -> str:
    """A call that was made, as the model wrote it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'message {i} has the call {call!r:.60}: give {{"id", "function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments") or "{}"
    with contextlib.suppress(ValueError, RecursionError):  # of a call that was cut off: it is told as it is
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return f"{OPEN}\n{_dump({'name': function['name'], 'arguments': arguments})}\n{CLOSE}"


def described(tools: Sequence[dict]) -> str:
    """What the model is told of its tools; nothing where there is none."""
    functions = [
        {key: value for key, value in function.items() if key in ("name", "description", "parameters") and value}
        for function in functions_of(tools)
    ]
    lines = "\n".join(_dump({"type": "function", "function": function}) for function in functions)
    return INSTRUCTIONS.format(tools=lines) if lines else ""


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def functions_of(tools: Sequence[dict]) -> list[dict]:
    """The functions among OpenAI's `tools`; ValueError for what is none, or has no name of its own."""
    functions = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise ValueError(f'tool {i} is {tool!r:.60}: give {{"type": "function", "function": {{"name", ...}}}}')
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in CHOICES:
            raise ValueError(f"tool {i} has the name {name!r:.80}: use 1 to 64 of the letters a to z and A to Z, "
                             f"digits, _ and -, but not {', '.join(CHOICES)}")  # fmt: skip
        if name in [other["name"] for other in functions]:
            raise ValueError(f"tool {i} has the name {name}, as one before it: give each a name of its own")
        functions.append(function)
    return functions


# -- what the model may write


def tool_grammar(tools: Sequence[dict], choice: str = "auto", parallel: bool = True) -> str | None:
    """The grammar of a text that may hold calls, or must; None where anything may be written.

    PAPER: "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", arXiv:2411.15100.
    PAPER CONTEXT: grammars for parts of a text, such as calls of functions, go together with free text around them.
    INTUITION: talk as you like, but whoever takes a form from the pile fills it in to the end.
    IMPLEMENTATION: text up to <tool_call> is one lazy lexeme: as soon as the tag stands there, nothing fits but a name
        and arguments by its schema. `choice`: "auto", "required" (calls alone), "none", or the name of a function.
    WHY: small models write calls that nearly parse; these always do.

    A schema that cannot be honoured raises ValueError if the function is `strict`; else any object is allowed.
    """
    functions = functions_of(tools)
    names = [function["name"] for function in functions]
    if choice not in (*CHOICES, *names):
        raise ValueError(f"tool_choice={choice!r:.80} is no tool: use {', '.join((*CHOICES, *names))}")
    if choice == "none" or not functions:
        return None
    if choice in names:
        functions = [function for function in functions if function["name"] == choice]
    bodies = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"call_{i}: {_call_rule(function)}" for i, function in enumerate(functions)]
    if choice == "auto":
        start = "call* text" if parallel else "text | call"
        rules = [f"start: {start}", "text: TEXT", "TEXT: /(?s:.*)/", f'begin[lazy]: TEXT "{OPEN}"',
                 f"call: begin ({bodies})", *rules]  # fmt: skip
    else:
        more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if parallel else ""
        rules = [f"start: call{more}", f'call: "{OPEN}" ({bodies})', *rules]
    grammar = "\n".join(rules)
    check_grammar(grammar)
    return grammar


def _call_rule(function: dict) -> str:
    """A call of this function, behind <tool_call>."""
    schema = function.get("parameters")
    schema = NO_ARGUMENTS if schema is None else schema
    try:
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise ValueError('its parameters are no {"type": "object", ...}')
        rule = json_rule({"type": "object", **schema})
        check_grammar(f"start: {rule}")
    except ValueError as error:
        if function.get("strict") or not isinstance(schema, dict):
            raise ValueError(f"the function {function['name']}: {error}") from None
        rule = json_rule(ANY_OBJECT)
    head, tail = f'\n{{"name": "{function["name"]}", "arguments": ', f"}}\n{CLOSE}"
    return f"{json.dumps(head)} {rule} {json.dumps(tail)}"


# -- what the model wrote


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: str  # a JSON object, as text
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


class ToolParser:
    r"""Finds calls in a text that is still being written.

    PAPER: "Finetuned Language Models Are Zero-Shot Learners", arXiv:2109.01652, section 2.1.
    PAPER CONTEXT: what a model is to answer is fixed by the instruction, so that a program can read it.
    INTUITION: a mail room: letters are passed on at once, and forms when they are complete.
    IMPLEMENTATION: outside of calls, text waits only while it may become <tool_call>. A call ends at the first
        </tool_call> that is no part of a string in it. Blanks behind a call are left out.
    WHY: clients see words as they come, and calls as data. What only looks like a call stays text: nothing gets lost.

    >>> parser = ToolParser()
    >>> parser.push("Wait. <tool"), parser.push('_call>{"name": "f", "arguments": {}}</tool_ca')
    (['Wait. '], [])
    >>> parser.push("ll>\n"), parser.finish()                               # doctest: +ELLIPSIS
    ([ToolCall(name='f', arguments='{}', id='call_...')], [])
    """

    def __init__(self):
        self._rest = ""  # what has not come out
        self._inside = False  # whether it begins with OPEN
        self._searched = 0  # characters of it in which no end of the call was found
        self._behind = False  # whether nothing but blanks came since the last call

    def push(self, text: str) -> list[str | ToolCall]:
        """Add text; returns what can come out now, in order."""
        self._rest += text
        return self._take(final=False)

    def finish(self) -> list[str | ToolCall]:
        """No text comes any more: returns the rest."""
        return self._take(final=True)

    def _take(self, final: bool) -> list[str | ToolCall]:
        parts: list[str | ToolCall] = []
        while self._rest:
            found = self._call(final) if self._inside else self._text(final)
            if found is None:
                break
            parts += self._shown(found)
        return parts

    def _text(self, final: bool) -> str | None:
        """The text up to the next call, or what is certain of it; None: nothing is."""
        place = self._rest.find(OPEN)
        held = 0 if final or place >= 0 else held_back(self._rest, [OPEN])
        end = place if place >= 0 else len(self._rest) - held
        self._inside, self._searched = place >= 0, len(OPEN)
        if end == 0 and place < 0:
            return None
        return self._cut(end)

    def _call(self, final: bool) -> str | ToolCall | None:
        """The call that the rest begins with, or the text that it is; None: it goes on."""
        while (place := self._rest.find(CLOSE, self._searched)) >= 0:
            self._searched = place + len(CLOSE)
            body = self._rest[len(OPEN) : place]
            if (call := read_call(body)) is not None or not _in_string(body):
                self._inside = False
                text = self._cut(self._searched)
                return text if call is None else call
        self._searched = max(self._searched, len(self._rest) - len(CLOSE) + 1)
        if not final:
            return None
        self._inside = False  # it never ended: a call without its end, or words
        if (call := read_call(self._rest[len(OPEN) :])) is not None:
            self._rest = ""
            return call
        return self._cut(len(OPEN))

    def _cut(self, n: int) -> str:
        text, self._rest = self._rest[:n], self._rest[n:]
        return text

    def _shown(self, part: str | ToolCall) -> list[str | ToolCall]:
        """The part as it comes out: without blanks behind a call."""
        if isinstance(part, ToolCall):
            self._behind = True
            return [part]
        part = part.lstrip() if self._behind else part
        self._behind = self._behind and not part
        return [part] if part else []


def read_call(body: str) -> ToolCall | None:
    """The call that stands between the tags, if it is one."""
    try:
        call = json.loads(body, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not NAME.fullmatch(call["name"]):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _in_string(body: str) -> bool:
    """Whether what follows belongs to a string of JSON."""
    return any(match[1] != '"' for match in STRING.finditer(body))


def _finite(text: str) -> float:
    """A number that JSON can hold again; ValueError for one that is too large."""
    number = float(text)
    return number if abs(number) < float("inf") else _no_number(text)


def _no_number(text: str):
    raise ValueError(f"{text} is no number of JSON")
