"""
Looking into a model

This file implements what only the model itself can show, asked of its engine between two steps, following:
- "Attention Is All You Need" (Vaswani et al., 2017) - which tokens a token looks at, head by head
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - the distribution that the next token is drawn
  from

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phase1_foundation.project1_minimal_gpt.sampling import next_token_probabilities
from phase1_foundation.project3_pretrain.plans import Causal, visible
from phase10_deployment.project28_serving.engine import Engine

LONGEST = 64  # tokens of a map of attention: more could not be told apart on a page


class Shape(NamedTuple):
    """What can be looked at."""

    n_layer: int
    n_head: int
    block_size: int


class Watching(Causal):
    """A plan that also keeps who looked at whom in one layer.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, equation 1, and its figures 3 to 5.
    PAPER CONTEXT: softmax(Q K^T / sqrt(d_k)): one row of weights for each token and head, which add up to 1.
    INTUITION: a glass floor above the readers: see where each of them points while the sentence is read.
    IMPLEMENTATION: fused kernels never write the weights down, so they are computed once more beside the kernel, with
        the same scale, window and groups of heads; what the model computes stays the kernel's.
    WHY: the seam that caches and batches use, a plan, is enough to look inside; no line of the model changes.

    `maps` is (H, T, T) after the forward of tokens (1, T).
    """

    def __init__(self, tokens: Tensor, specs, kernel, layer: int):
        super().__init__(tokens, specs, kernel)
        self.layer, self.maps = layer, torch.empty(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As of `Causal`."""
        if layer == self.layer:
            spec, T = self.specs[layer], q.shape[-3]
            q_, k_ = (x[0].transpose(0, 1).float() for x in (q, k))  # (H, T, D), (Hkv, T, D)
            k_ = k_.repeat_interleave(len(q_) // len(k_), dim=0)  # heads of a group share their keys
            scores = q_ @ k_.transpose(-1, -2) * spec.scale
            scores = scores.masked_fill(~visible(T, spec.window, device=q.device), float("-inf"))
            self.maps = scores.softmax(-1)
        return super().attend(layer, q, k, v)


def shape_of(engine: Engine) -> Shape:
    """What there is to look at."""
    specs = engine.model.specs
    return Shape(len(specs), max(spec.n_head for spec in specs), engine.model.config.block_size)


@torch.no_grad()
def attention_maps(engine: Engine, tokens: Sequence[int], layer: int) -> list[list[list[float]]]:
    """How much each token of a text looks at each other in one layer: (H, T, T), each row adds up to 1.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 4 and figures 3 to 5.
    PAPER CONTEXT: heads learn different tasks, and many of them behave as if they knew of syntax and reference.
    INTUITION: ask each word of a sentence whom it is thinking of.
    IMPLEMENTATION: one forward without cache, under a plan that keeps one layer.
    WHY: what a head does is easier to see than to describe: the token before, the first token, the same word earlier.

    tokens: at most `LONGEST`; layer: from 0 on.
    """
    if not 0 < len(tokens) <= LONGEST:
        raise ValueError(f"{len(tokens)} tokens: a map has at least 1 and at most {LONGEST}")
    model = engine.model
    x = torch.tensor([tokens], device=engine.device)  # (1, T)
    plan = Watching(x, model.specs, model.kernel, layer)
    model(x, plan)
    return plan.maps.tolist()


@torch.no_grad()
def next_logprobs(engine: Engine, tokens: Sequence[int]) -> list[float]:
    """The log-probability of every token of the vocabulary behind a text, by the model itself: (V,).

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: a text is drawn token by token from P(x | what came before).
    INTUITION: all the model's bets on one word.
    IMPLEMENTATION: one forward without cache over the last block_size tokens, before temperature and cuts.
    WHY: a server tells the likeliest twenty; what temperature does to the rest needs all of them.
    """
    model = engine.model
    x = torch.tensor([list(tokens)[-model.config.block_size :]], device=engine.device)  # (1, T)
    logits = model(x)[0, -1, : engine.vocab_size()]
    return logits.float().log_softmax(-1).tolist()


def reshaped(logprobs: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The odds that a token is really drawn from.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.1 (top-p) and 3.3 (temperature).
    PAPER CONTEXT: the tail holds many unlikely tokens that together are likely; cutting it off keeps a text on its way.
    INTUITION: bend the odds, then send those home who have hardly any.
    IMPLEMENTATION: project 1's formula for temperature, top-k and top-p; then min-p, relative to the likeliest.
    WHY: the reference that the batched sampler of project 8 is tested against, on a list short enough to be drawn.

    top_k: 0 keeps all. Of a list that is not the whole vocabulary, the odds are among its tokens.

    >>> import math
    >>> half = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    >>> [round(p, 3) for p in reshaped(half, 1.0, 0, 0.6, 0.0)], reshaped(half, 0.0, 0, 1.0, 0.0)
    ([0.625, 0.375, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    >>> [round(p, 3) for p in reshaped(half, 1.0, 0, 1.0, 0.2)]
    [0.526, 0.316, 0.158, 0.0]
    """
    odds = next_token_probabilities(torch.tensor([logprobs]), temperature, int(top_k) or None, top_p or 1e-6)[0]
    odds = odds.masked_fill(odds < min_p * odds.max(), 0.0)
    return (odds / odds.sum()).tolist()


def entropy(odds: Sequence[float]) -> float:
    """How open a choice is, in bits.

    >>> entropy([0.25] * 4), entropy([1.0, 0.0])
    (2.0, 0.0)
    """
    p = torch.tensor([each for each in odds if each > 0.0], dtype=torch.float64)
    return abs(float(-(p * p.log2()).sum()))
