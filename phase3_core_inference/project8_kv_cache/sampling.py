"""
Sampling

This file implements drawing the next token of every request in a batch following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.drawing import CANDIDATES, draw_among, penalize
from phase3_core_inference.project8_kv_cache.noise import noise_keys
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
    IMPLEMENTATION: parameters are rows of numbers on the device. Where tails are cut, the `CANDIDATES` likeliest tokens
        are looked at first; a row whose cuts leave more than these draws from all of them.
    WHY: the batch is drawn at once, and nothing of a request depends on who shares it.

    Args:
        params, seeds: of each request; prompts: their tokens (the penalty counts them); vocab_size: of the tokenizer.
        among: `draw_among`, or a `RecordedDraws`.
    """

    def __init__(
        self, params: Sequence[SamplingParams], seeds, prompts, vocab_size: int, device, among: Callable = draw_among
    ):
        self.params, self.seeds, self.vocab_size, self.device = params, seeds, vocab_size, device
        self.among, self.seen = among, None
        if any(p.repetition_penalty != 1.0 for p in params):
            self.seen = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self.seen, prompts):
                row[torch.tensor(prompt, device=device)] = True
        self.penalty = torch.tensor([[p.repetition_penalty] for p in params], device=device)
        self.limits = torch.tensor([limits_of(p, vocab_size) for p in params], device=device)  # (R, 5)

    def draw(self, logits: Tensor, requests: Sequence[int], positions: Sequence[int]) -> Drawn:
        """Draw from logits (R, V) for these requests, whose tokens will stand at these positions."""
        raw = self.known(logits)
        logits = raw
        if self.seen is not None:
            index = self.index(requests)
            logits = penalize(logits, self.seen[index], self.penalty[index])
        tokens = self.choose(logits, requests, positions)
        self.remember(requests, tokens)
        return Drawn(tokens, self.logprobs(raw, tokens, requests))

    def known(self, logits: Tensor) -> Tensor:
        """Logits (R, V) in float32 without the padding of the vocabulary, which is no token."""
        return logits[:, : self.vocab_size].float()

    def choose(self, logits: Tensor, requests: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The tokens drawn from logits after the penalty; a request may stand there several times."""
        if all(self.params[i].greedy for i in requests):
            return logits.argmax(-1).tolist()
        return self._drawn(logits, requests, positions)

    def remember(self, requests: Sequence[int], tokens: Sequence[int]) -> None:
        """Let the penalty see tokens that became part of these texts."""
        if self.seen is not None:
            self.seen[list(requests), list(tokens)] = True

    def _drawn(self, logits, requests, positions) -> list[int]:
        """The tokens, drawn from the likeliest first; what these do not settle, from all."""
        tokens = [-1] * len(requests)
        cuts = any(self.params[i].cuts for i in requests)
        for n in (CANDIDATES, self.vocab_size) if cuts and self.vocab_size > CANDIDATES else (self.vocab_size,):
            left = [row for row, token in enumerate(tokens) if token < 0]
            if left:
                own, places = [requests[row] for row in left], [positions[row] for row in left]
                keys = torch.tensor(noise_keys([self.seeds[i] for i in own], places), device=self.device).unsqueeze(-1)
                rows = logits if len(left) == len(tokens) else logits[left]
                drawn = self.among(n, cuts, rows, self.limits[self.index(own)], keys)
                for row, token in zip(left, drawn.tolist()):
                    tokens[row] = token
        return tokens

    def index(self, requests: Sequence[int]) -> slice | Tensor:
        """What picks the columns of these requests."""
        everyone = list(requests) == list(range(len(self.params)))
        return slice(None) if everyone else torch.tensor(requests, device=self.device)

    def logprobs(self, logits: Tensor, tokens: Sequence[int], requests: Sequence[int]) -> list[Logprobs | None]:
        """What these requests want to know of their tokens, from logits (R, V) before the penalty."""
        params = [self.params[i] for i in requests]
        if all(p.logprobs is None for p in params):
            return [None] * len(params)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens, device=self.device).unsqueeze(-1)).squeeze(-1).tolist()
        top = logprobs.topk(min(max(p.logprobs or 0 for p in params), self.vocab_size), dim=-1)
        best = [list(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]
        return [
            None if p.logprobs is None else Logprobs(own, pairs[: p.logprobs])
            for p, own, pairs in zip(params, chosen, best)
        ]
