"""
Sampling

This file implements drawing the next token of every request in a batch following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.adjusting import Adjustments
from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.constraints import Constraint, mask_logits
from phase3_core_inference.project8_kv_cache.drawing import CANDIDATES, draw_among
from phase3_core_inference.project8_kv_cache.noise import keys_at, stem
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams


@dataclass(frozen=True)
class Drawn:
    """What was drawn for each request of a batch: on the host."""

    tokens: list[int]
    logprobs: list["Logprobs | None"]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token, by the model itself: before penalty, temperature and cuts."""

    chosen: float
    top: list[tuple[int, float]]  # (token, log-probability) of the likeliest ones, best first


def limits_of(params: SamplingParams, vocab_size: int) -> list[float]:
    """What `draw_among` must know of a request; a greedy one keeps one token, and gets no noise."""
    if params.greedy:
        return [1.0, 1, 1.0, 0.0, 0.0]
    top_k = min(params.top_k or vocab_size, vocab_size)
    return [params.temperature, top_k, 1.0 if params.top_p is None else params.top_p, params.min_p or 0.0, 1.0]


class Sampler:
    """Draws for a batch of requests, each with its own parameters.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: the next token is drawn from the truncated, renormalised distribution.
    INTUITION: one dealer at many tables, each with its own rules and its own pack of cards.
    IMPLEMENTATION: parameters are rows of numbers on the device; `put` gives a row to another request. Where tails are
        cut, the `CANDIDATES` likeliest tokens are looked at first; a row whose cuts leave more than these draws from
        all of them, and goes on doing so.
    WHY: the batch is drawn at once, and nothing of a request depends on who shares it.

    Args:
        n_rows: requests at a time; vocab_size: of the tokenizer; among: `draw_among`, or a `RecordedDraws`.
    """

    def __init__(self, n_rows: int, vocab_size: int, device, among: Callable = draw_among):
        self.vocab_size, self.device, self.among = vocab_size, torch.device(device), among
        self.params = [_NOBODY] * n_rows
        self.seeds = [0] * n_rows
        self.adjustments = Adjustments(n_rows, vocab_size, device)
        self.constraints: list[Constraint | None] = [None] * n_rows
        self._whole: set[int] = set()  # rows that draw from all tokens
        self._stems = np.zeros(n_rows, dtype=np.uint64)
        self._numbers = np.array([limits_of(_NOBODY, vocab_size)] * n_rows, dtype=np.float32)  # on the host
        self._on_device: Tensor | None = None  # the same; None: out of date

    @classmethod
    def of(cls, params: Sequence[SamplingParams], seeds, prompts, vocab_size: int, device, among=draw_among):
        """A sampler whose rows are these requests; prompts: their tokens, which the penalty counts."""
        sampler = cls(len(params), vocab_size, device, among)
        for row, request in enumerate(zip(params, seeds, prompts)):
            sampler.put(row, *request)
        return sampler

    def put(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        written: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """Give a row to a request: its text so far, prompt and what was written behind it, and what may come next."""
        self.params[row], self.seeds[row], self._stems[row] = params, seed, stem(seed)
        self._numbers[row] = limits_of(params, self.vocab_size)
        self._on_device = None
        self._whole.discard(row)
        self.adjustments.put(row, params, prompt, written)
        self.constraints[row] = constraint

    @property
    def limits(self) -> Tensor:
        """What `draw_among` must know of each row: (R, 5)."""
        if self._on_device is None:
            numbers = torch.from_numpy(self._numbers.copy())
            numbers = numbers.pin_memory() if self.device.type == "cuda" else numbers
            self._on_device = numbers.to(self.device, non_blocking=True)
        return self._on_device

    def draw(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Drawn:
        """Draw from logits (R, V) for these rows, whose tokens will stand at these positions."""
        raw = self.known(logits)
        tokens = self.choose(self.penalized(raw, rows), rows, positions)
        self.remember(rows, tokens)
        return Drawn(tokens, self.logprobs(raw, tokens, rows))

    def known(self, logits: Tensor) -> Tensor:
        """Logits (R, V) in float32 without the padding of the vocabulary, which is no token."""
        return logits[:, : self.vocab_size].float()

    def penalized(self, logits: Tensor, rows: Sequence[int], drafted: Tensor | None = None) -> Tensor:
        """Logits (R, V) after penalties, biases and constraints of these rows; drafted: see `Adjustments.apply`."""
        if not self.adjustments.idle:
            logits = self.adjustments.apply(logits, self.index(rows), drafted)
        bound = [place for place, row in enumerate(rows) if self.constraints[row] is not None]
        return mask_logits(logits, bound, [self.constraints[rows[place]] for place in bound]) if bound else logits

    def choose(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The tokens drawn from logits after the penalty; a row may stand there several times."""
        tokens = self.launch(logits, rows, positions).tolist()
        left = [i for i, token in enumerate(tokens) if token < 0]
        if left:
            own, places = [rows[i] for i in left], [positions[i] for i in left]
            self.draw_from_all(own)
            for i, token in zip(left, self.launch(logits[left], own, places).tolist()):
                tokens[i] = token
        return tokens

    def draw_from_all(self, rows: Sequence[int]) -> None:
        """From now on these rows draw from all tokens: candidates were not enough for them."""
        self._whole.update(rows)

    def launch(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """`choose` on the device, without waiting for it: tokens (R,); -1 where candidates were not enough."""
        if all(self.params[row].greedy for row in rows):
            return logits.argmax(-1)
        cuts, V = any(self.params[row].cuts for row in rows), self.vocab_size
        whole = [i for i, row in enumerate(rows) if row in self._whole] if cuts and V > CANDIDATES else []
        keys = on_device(keys_at(self._stems[list(rows)], np.array(positions)), self.device).unsqueeze(-1)  # (R, 1)
        limits = self.limits[self.index(rows)]
        if len(whole) == len(rows):
            return self.among(V, cuts, logits, limits, keys)
        tokens = self.among(CANDIDATES if cuts and V > CANDIDATES else V, cuts, logits, limits, keys)
        if whole:
            some = on_device(whole, self.device)
            drawn = self.among(V, cuts, logits[some], limits[some], keys[some])
            tokens = tokens.clone().index_copy_(0, some, drawn)
        return tokens

    def remember(self, rows: Sequence[int], tokens: Sequence[int] | Tensor) -> None:
        """Let the penalties see tokens that became part of these texts; -1 is none."""
        if not self.adjustments.idle:
            tokens = tokens if isinstance(tokens, Tensor) else on_device(tokens, self.device)
            self.adjustments.remember(on_device(rows, self.device), tokens)

    def index(self, rows: Sequence[int]) -> slice | Tensor:
        """What picks the columns of these rows."""
        everyone = list(rows) == list(range(len(self.params)))
        return slice(None) if everyone else on_device(rows, self.device)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], rows: Sequence[int]) -> list[Logprobs | None]:
        """What these rows want to know of their tokens, from logits (R, V) before the penalty."""
        wanted = [self.params[row].logprobs for row in rows]
        measured = self.measure(logits, on_device(tokens, self.device), wanted)
        return told(measured and [x.cpu() for x in measured], wanted)

    def measure(self, logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> list[Tensor] | None:
        """On the device: log-probabilities of tokens (R,), the likeliest tokens (R, n) and theirs; None: not wanted."""
        if all(n is None for n in wanted):
            return None
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(max(n or 0 for n in wanted), self.vocab_size), dim=-1)
        return [logprobs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1), top.indices, top.values]


def told(measured: Sequence[Tensor] | None, wanted: Sequence[int | None]) -> list[Logprobs | None]:
    """What `Sampler.measure` found, once it is on the host; `wanted`: each request's `logprobs`."""
    if measured is None:
        return [None] * len(wanted)
    chosen, ids, values = (x.tolist() for x in measured)
    pairs = [list(zip(*best)) for best in zip(ids, values)]
    return [None if n is None else Logprobs(own, best[:n]) for n, own, best in zip(wanted, chosen, pairs)]


_NOBODY = SamplingParams(temperature=0.0)  # of a row that nobody has
