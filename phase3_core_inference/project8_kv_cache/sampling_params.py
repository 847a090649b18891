"""
Sampling parameters

This file implements what a request may ask of sampling following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from phase1_foundation.project1_minimal_gpt.sampling import check_sampling
from phase3_core_inference.project8_kv_cache.constraints import Constraint


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its text.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, sections 3.1 to 3.3; "Hierarchical Neural
        Story Generation", arXiv:1805.04833. min-p, the penalties and the bias are practice.
    PAPER CONTEXT: the unreliable tail derails a text, so it is cut: a fixed number of tokens, or a share of the odds.
    INTUITION: how bold, how far from the likeliest word, how long, and what ends it.
    IMPLEMENTATION: applied in this order: penalties, bias, constraint, temperature, top-k, top-p, min-p; None turns
        one off.
    WHY: plain frozen values: a batch may hold requests that each want something else.

    Raises ValueError for values that make no distribution.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    min_p: float | None = None  # only tokens at least this likely, relative to the likeliest
    repetition_penalty: float = 1.0  # logits of tokens that occurred: divided by this if positive, else multiplied
    presence_penalty: float = 0.0  # taken off the logits of tokens that were written
    frequency_penalty: float = 0.0  # the same, once for each time that they were
    # Added to the logits of these tokens; -100 bans one.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    constraint: Callable[[], Constraint] | None = None  # makes what says, for one text, which tokens may come next
    stop: tuple[str, ...] = ()  # texts that end the text; not part of it
    stop_ids: Collection[int] | None = None  # tokens that end it; None: the tokenizer's end of text
    seed: int | None = None  # the same text every time; None: another one
    logprobs: int | None = None  # report the log-probability of each token, and of so many likeliest ones

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1, or be none to keep all tokens")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive: 1 changes nothing")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie between -2 and 2: 0 changes nothing")
        for token, bias in (self.logit_bias or {}).items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0 or not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias={{{token!r}: {bias!r}}}: give token ids, from 0 on, and a number between "
                                 f"-100 and 100 for each")  # fmt: skip
        if not all(self.stop):
            raise ValueError(f"stop={self.stop} holds an empty text, which would end everything at once: leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} must be 0 (the drawn token alone) or more, or none")

    def check(self, vocab_size: int) -> None:
        """Raise ValueError for what only the vocabulary can tell."""
        if self.logit_bias and max(self.logit_bias) >= vocab_size:
            raise ValueError(f"logit_bias names token {max(self.logit_bias)}: ids go from 0 to {vocab_size - 1}")

    @property
    def penalties(self) -> tuple[float, float, float]:
        """For repetition, presence and frequency."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    @property
    def penalized(self) -> bool:
        """Whether it matters which tokens occurred."""
        return self.penalties != (1.0, 0.0, 0.0)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0

    @property
    def cuts(self) -> bool:
        """Whether a part of the distribution is cut off."""
        return not self.greedy and not (self.top_k is None and self.top_p in (None, 1.0) and self.min_p in (None, 0.0))
