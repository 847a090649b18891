"""
Shapes

This file implements the objects in which OpenAI's interface answers: whole, or in chunks. It holds no thought of its
own; what is in the objects comes from choices.py.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic_core import to_json

from phase10_deployment.project28_serving.choices import Choice, Delta, TokenLogprob
from phase10_deployment.project28_serving.tools import ToolCall


class Usage(NamedTuple):
    """What an answer cost."""

    prompt: int  # tokens of the prompts
    cached: int  # of these, found in the cache
    completion: int = 0  # tokens that were written

    def as_dict(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion, "prompt_tokens_details": {"cached_tokens": self.cached},
        }  # fmt: skip


class ChatShape:
    """Answers of /v1/chat/completions."""

    def __init__(self, model: str, logprobs: bool = False):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.logprobs, self._calls = logprobs, {}  # calls told so far, by choice

    def opening(self, index: int) -> dict | None:
        """The first chunk of a choice: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, index: int, delta: Delta) -> list[dict]:
        """What a delta adds; why the text ended stands in a chunk of its own."""
        found = []
        if delta.text or delta.logprobs:
            found.append(self._chunk(index, {"content": delta.text}, self._logprobs(delta.logprobs)))
        for call in delta.calls:
            place = self._calls[index] = self._calls.get(index, -1) + 1
            found.append(self._chunk(index, {"tool_calls": [{"index": place, **call_of(call)}]}))
        if delta.finish_reason:
            found.append(self._chunk(index, {}, None, delta.finish_reason))
        return found

    def usage(self, usage: Usage) -> dict:
        """The chunk that says what it cost."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage.as_dict()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict:
        """The whole answer."""
        told = []
        for choice in choices:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": [call_of(call) for call in choice.calls]}
            told.append({"index": choice.index, "message": message, "logprobs": self._logprobs(choice.logprobs),
                         "finish_reason": choice.finish_reason})  # fmt: skip
        return {**self.head, "object": "chat.completion", "choices": told, "usage": usage.as_dict()}

    def _chunk(self, index: int, delta: dict, logprobs=None, finish_reason=None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict | None:
        if not self.logprobs:
            return None
        return {"content": [{**_token(t.spelled, t.logprob), "top_logprobs": [_token(*each) for each in t.top]}
                            for t in tokens], "refusal": None}  # fmt: skip


class CompletionShape:
    """Answers of /v1/completions."""

    def __init__(self, model: str, logprobs: bool = False, echoes: Sequence[str] | None = None):
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                     "model": model}  # fmt: skip
        self.logprobs, self.echoes = logprobs, echoes

    def opening(self, index: int) -> dict | None:
        """The prompt, if it is to be repeated."""
        return self._object([self._choice(index, self.echoes[index])]) if self.echoes else None

    def chunks(self, index: int, delta: Delta) -> list[dict]:
        """What a delta adds."""
        if delta.empty:
            return []
        return [self._object([self._choice(index, delta.text, delta.logprobs, delta.finish_reason)])]

    def usage(self, usage: Usage) -> dict:
        """The chunk that says what it cost."""
        return self._object([]) | {"usage": usage.as_dict()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict:
        """The whole answer."""
        told = [
            self._choice(c.index, (self.echoes[c.index] if self.echoes else "") + c.text, c.logprobs, c.finish_reason)
            for c in choices
        ]
        return self._object(told) | {"usage": usage.as_dict()}

    def _object(self, choices: list[dict]) -> dict:
        return {**self.head, "choices": choices}

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = (), finish_reason=None) -> dict:
        told = None
        if self.logprobs:
            told = {
                "tokens": [_named(token.spelled) for token in logprobs],
                "token_logprobs": [token.logprob for token in logprobs],
                "top_logprobs": [{_named(text): logprob for text, logprob in token.top} for token in logprobs],
                "text_offset": [token.offset for token in logprobs],
            }
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}


def call_of(call: ToolCall) -> dict:
    """A call of a tool as it is sent."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token(spelled: bytes, logprob: float) -> dict:
    return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}


def _named(spelled: bytes) -> str:
    r"""A token as text; one that is no whole characters as OpenAI writes it.

    >>> _named(b"a"), _named(b"\xe4\xb8")
    ('a', 'bytes:\\xe4\\xb8')
    """
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def event(body: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
