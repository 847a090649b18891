"""
Choices

This file implements what is shown of a text while it is written following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2015) - tokens are pieces of words

Each component is explained with paper references for educational purposes.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phase3_core_inference.project8_kv_cache.stopping import TextStream
from phase3_core_inference.project8_kv_cache.texts import Piece
from phase10_deployment.project28_serving.tools import ToolCall, ToolParser


class TokenLogprob(NamedTuple):
    """What is told of one token; its bytes may be no whole characters."""

    spelled: bytes
    logprob: float
    top: list[tuple[bytes, float]]  # the likeliest ones, best first
    offset: int  # characters of the text before it


class Words(NamedTuple):
    """What tokens mean."""

    decode: Callable[[list[int]], str]
    spelled: Sequence[bytes]  # the bytes of each token


_HALVES = re.compile("[\ud800-\udfff]")


def sendable(text: str) -> str:
    r"""The text with U+FFFD for halves of surrogate pairs, which a model may spell, and UTF-8 cannot hold.

    >>> sendable("a" + chr(0xD9A6) + "b") == "a\ufffdb"
    True
    """
    return text if text.isascii() else _HALVES.sub("\ufffd", text)


@dataclass(slots=True)
class Delta:
    """What some pieces add to a choice."""

    text: str = ""
    finish_reason: str | None = None
    calls: Sequence[ToolCall] = ()
    logprobs: Sequence[TokenLogprob] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show yet."""
        return not (self.text or self.calls or self.logprobs or self.finish_reason)


class Choice:
    """One of the texts of an answer.

    PAPER: "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: a token is a piece of a word, here of its bytes: where tokens end and where characters end differ.
    INTUITION: subtitles: what is known of a word is shown with the word, not before it.
    IMPLEMENTATION: log-probabilities wait until the text of their token is shown, so that what stops a text is not
        betrayed by them. Calls of tools are taken out of the text. A whole answer is the sum of its deltas.
    WHY: a stream, put together, is the very answer that would have come in one piece.

    Args:
        index: of the choice; words: None if no log-probabilities are wanted; tools: whether the text may hold calls.
    """

    def __init__(self, index: int, words: Words | None = None, tools: bool = False):
        self.index, self.words = index, words
        self.parser = ToolParser() if tools else None
        self.text, self.calls, self.logprobs = "", [], []
        self.finish_reason: str | None = None
        self.n_tokens = 0
        self._told: deque[TokenLogprob] = deque()  # of tokens whose text is not shown yet
        self._stream = TextStream(words.decode) if words else None
        self._read = self._shown = 0  # characters of the tokens, and of what is shown

    def take(self, piece: Piece) -> Delta:
        """What a piece adds."""
        self.n_tokens += 1
        if piece.logprobs is not None and piece.token is not None and self.words:
            self._tell(piece)
        self._shown += len(piece.text)
        delta = Delta(sendable(piece.text), piece.finish_reason)
        if self.parser:
            self._parse(delta)
        if self._told:
            delta.logprobs = self._tellable(piece.finish_reason == "length")
            self.logprobs += delta.logprobs
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        return delta

    def _parse(self, delta: Delta) -> None:
        """Take calls of tools out of the text."""
        parts = self.parser.push(delta.text) + (self.parser.finish() if delta.finish_reason else [])
        delta.text = "".join(part for part in parts if isinstance(part, str))
        delta.calls = [part for part in parts if not isinstance(part, str)]
        self.calls += delta.calls
        if delta.finish_reason == "stop" and self.calls:
            delta.finish_reason = "tool_calls"

    def _tellable(self, all_of_them: bool) -> list[TokenLogprob]:
        """What may be told now of tokens: of those whose text is shown."""
        told = []
        while self._told and (all_of_them or self._told[0].offset < self._shown):
            told.append(self._told.popleft())
        return told

    def _tell(self, piece: Piece) -> None:
        spelled = self.words.spelled
        top = [(spelled[token], logprob) for token, logprob in piece.logprobs.top]
        before, self._read = self._read, self._read + len(self._stream.push(piece.token))
        # What was half a character until now, and turned out to be none, comes with this token, but is not its own.
        own = max(before, self._read - len(self.words.decode([piece.token])))
        self._told.append(TokenLogprob(spelled[piece.token], piece.logprobs.chosen, top, own))
