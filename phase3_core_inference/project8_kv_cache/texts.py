"""
Texts

This file implements what is known of a text while it is written following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - decoding adds a token at a time

Each component is explained with paper references for educational purposes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from phase3_core_inference.project8_kv_cache.sampling import Logprobs
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.stopping import TextStream


class Piece(NamedTuple):
    """What one token adds to one text; a tuple, as a server makes tens of thousands of them a second."""

    index: int  # of the prompt
    text: str  # may be empty: half a character, or what may become a stop text
    token: int | None  # None: the token that ended the text, or what was still held back
    finish_reason: str | None = None  # "stop" or "length", with the last piece
    logprobs: Logprobs | None = None


@dataclass
class Generation:
    """A whole continuation."""

    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[Logprobs] = field(default_factory=list)


def append(generation: Generation, piece: Piece) -> None:
    """Add what one token adds."""
    generation.text += piece.text
    generation.finish_reason = piece.finish_reason
    if piece.token is not None:
        generation.tokens.append(piece.token)
        if piece.logprobs:
            generation.logprobs.append(piece.logprobs)


class TextRequest:
    """One prompt on its way to its end.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: decoding extends each sequence of a batch token by token.
    INTUITION: a ticket: what was asked, what has been said so far, how much of it the model has read, and why it ended.
    IMPLEMENTATION: `accept` takes tokens one at a time, however many a step brought, and sees stop ids, stop texts and
        the limit between any two of them; `fed` counts those that lie in the cache.
    WHY: plain decoding, speculation and serving end a text by the same rules, at the same token.

    Args:
        index: its place among the prompts; prompt: its tokens; room: the most tokens of a text.
    """

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, tokenizer, room: int):
        self.index, self.tokens, self.params = index, list(prompt), params
        self.limit = min(len(prompt) + params.max_new_tokens, room)  # tokens in all
        self.fed, self.finish_reason = 0, None
        self.constraint = params.constraint() if params.constraint else None
        self.text = TextStream(tokenizer.decode, params.stop)
        eot = getattr(tokenizer, "eot_id", None)
        self.stop_ids = frozenset(({eot} - {None}) if params.stop_ids is None else params.stop_ids)

    @property
    def reading(self) -> bool:
        """Whether more than the newest token has yet to be read."""
        return len(self.tokens) - self.fed > 1 or not self.fed

    def accept(self, token: int, logprobs: Logprobs | None) -> Piece:
        """Take in a token that was drawn; nothing must come after the piece with a `finish_reason`."""
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return Piece(self.index, self.text.finish(), None, "stop")
        self.tokens.append(token)
        text = self.text.push(token)
        if not self.text.stopped and len(self.tokens) == self.limit:
            text, self.finish_reason = text + self.text.finish(), "length"
        if self.constraint is not None:
            self.constraint.accept(token)
            if self.constraint.finished and not self.text.stopped and not self.finish_reason:
                text, self.finish_reason = text + self.text.finish(), "stop"
        if self.text.stopped:
            self.finish_reason = "stop"
        return Piece(self.index, text, token, self.finish_reason, logprobs)
