"""
Rules

This file implements two exact ways to let a draft and a target agree, for a batch of requests, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - speculative sampling
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) - modified rejection
  sampling

Each component is explained with paper references for educational purposes.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.graphs import capture
from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.sampling import Sampler
from phase3_core_inference.project8_kv_cache.work import power_of_two
from phase4_advanced_inference.project11_speculative_decoding.acceptance import (
    DEAL,
    DRAFT,
    LUCK,
    judge,
    keys_for,
    propose,
)
from phase4_advanced_inference.project11_speculative_decoding.proposals import Proposal


class Recorder:
    """Functions of tensors, recorded into a CUDA graph for each shape (elsewhere than on a GPU they are just called).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 3.3 (wall time).
    PAPER CONTEXT: the analysis counts runs of the models alone; what decides between them is taken to be free.
    INTUITION: dozens of small orders in one letter.
    IMPLEMENTATION: one recording for each function, its flag, and the shapes of its arguments. Rows are filled up to a
        power of two, so that few recordings serve a batch whose rows end one by one.
    WHY: launched one by one from Python, accepting would take longer than the draft.
    """

    def __init__(self, graphs: bool):
        self.graphs, self._recorded = graphs, {}

    def __call__(self, function: Callable, cuts: bool, *arguments: Tensor):
        """function(cuts, *arguments), of as many rows as the last argument has, or a multiple of these.

        The results (a tuple) may lie in buffers that the next call overwrites.
        """
        if not self.graphs:
            return function(cuts, *arguments)
        R = len(arguments[-1])
        filled = power_of_two(R) - R
        if filled:
            arguments = [F.pad(x, (*[0, 0] * (x.dim() - 1), 0, filled * len(x) // R), value=1) for x in arguments]
        key = (function, cuts, *(tuple(argument.shape) for argument in arguments))
        if key not in self._recorded:
            self._recorded[key] = capture(functools.partial(function, cuts), *arguments)
        return tuple(result[:R] for result in self._recorded[key](*arguments))


class CoupledRule:
    """Draft and target draw with the same noise; what both drew is kept. The text is that of plain decoding.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.3, in whose place it
        stands: shared Gumbel noise is no part of the paper.
    PAPER CONTEXT: drafts are tested against odds, so the text has the right distribution, but other words.
    INTUITION: two players are dealt the same cards. Whoever plays alike plays the same card.
    IMPLEMENTATION: project 8 draws token = argmax(log p + noise(seed, position)). The draft does so with its own p, the
        target draws at every place as if there were no draft; a drafted token stays if it is the one drawn.
    WHY: `generate` and speculation write the very same text, greedy or sampled, so that one can be tested by the other.
        It keeps less than rejection does: see `formulas.agreement`.

    Args:
        sampler: of the requests, which stand in its rows; k: the most tokens of a draft; recorder: for a GPU.
    """

    def __init__(self, sampler: Sampler, k: int, recorder: Recorder):
        self.sampler, self.k, self.recorder = sampler, k, recorder

    def draft(self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], drafted: Tensor):
        """Draw for a draft with these logits (R, V), behind what it drafted (R, j): (tokens (R,), odds or None)."""
        logits = self.penalized(logits, rows, drafted)
        tokens = self.sampler.launch(logits, rows, positions)
        if self._greedy():
            return tokens, None
        # Where candidates were not enough, the likeliest must do: a guess may be anything.
        return torch.where(tokens < 0, logits.argmax(-1), tokens), None

    def judge(self, logits: Tensor, rows: Sequence[int], starts: Sequence[int], proposal: Proposal):
        """Judge drafts by the target's logits, one row for each drafted token and one behind: [(kept, next token)].

        `starts`: the positions of the first drafted tokens.
        """
        flat, depths = self._places(rows, proposal.counts)
        places = [start + j for start, n in zip(starts, proposal.counts) for j in range(n + 1)]
        own = iter(self.sampler.choose(self.penalized(logits, flat, self._before(proposal, depths)), flat, places))
        verdicts = []
        for draft in proposal.tokens:
            drawn = [next(own) for _ in range(len(draft) + 1)]
            kept = next((j for j, (a, b) in enumerate(zip(draft, drawn)) if a != b), len(draft))
            verdicts.append((kept, drawn[kept]))
        return verdicts

    def penalized(self, logits: Tensor, rows: Sequence[int], drafted: Tensor) -> Tensor:
        """Logits (R, V) of these requests after their penalties, which count drafted tokens (R, j), too.

        A token that is none, V, counts nowhere.
        """
        return self.sampler.penalized(self.sampler.known(logits), rows, drafted)

    def _places(self, rows: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The row of each place that is judged, and how many drafted tokens stand before it."""
        flat = [row for row, n in zip(rows, counts) for _ in range(n + 1)]
        return flat, [j for n in counts for j in range(n + 1)]

    def _before(self, proposal: Proposal, depths: Sequence[int]) -> Tensor:
        """The drafted tokens before each place (places, K); V where there are none. Without a penalty nobody asks."""
        if self.sampler.adjustments.idle:
            return proposal.drafted
        device, V = self.sampler.device, self.sampler.vocab_size
        owner = on_device([i for i, n in enumerate(proposal.counts) for _ in range(n + 1)], device)
        drafted = proposal.drafted.to(device)[owner]
        before = torch.arange(drafted.shape[-1], device=device) < on_device(depths, device).unsqueeze(-1)
        return torch.where(before, drafted, V)

    def _greedy(self) -> bool:
        return all(params.greedy for params in self.sampler.params)


class RejectionRule(CoupledRule):
    """Drafted tokens are kept with probability min(1, p / q). The text has the distribution of plain decoding.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, algorithm 1; "Accelerating
        Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, algorithm 2.
    PAPER CONTEXT: no approximation: any draft, whatever it proposes, leaves the target's distribution as it is.
    INTUITION: customs: what is declared is let through by the odds that it should be there; the rest is replaced.
    IMPLEMENTATION: `acceptance.verify` for all rows at once, over odds after penalty, temperature and cuts. Noise by
        counting from (seed, position, purpose): three purposes, so that no decision knows another's luck.
    WHY: no rule keeps more of a draft. Greedy requests alone need no odds: there both rules are the same comparison.

    Arguments and methods as of `CoupledRule`.
    """

    def draft(self, logits, rows, positions, drafted):
        """As of `CoupledRule`, with the odds (R, V) that were drawn from."""
        if self._greedy():
            return super().draft(logits, rows, positions, drafted)
        keys = self._keys(rows, positions, DRAFT).unsqueeze(-1)
        limits = self.sampler.limits[self.sampler.index(rows)]
        odds, tokens = self.recorder(propose, self._cuts(rows), self.penalized(logits, rows, drafted), limits, keys)
        return tokens, odds.clone()

    def judge(self, logits, rows, starts, proposal):
        """As of `CoupledRule`."""
        if self._greedy():
            return super().judge(logits, rows, starts, proposal)
        K, device, counts = self.k, logits.device, proposal.counts
        flat, depths = self._places(rows, counts)
        logits = self.penalized(logits, flat, self._before(proposal, depths))
        # Every row gets K + 1 places; those behind its draft repeat its last logits, and nobody looks at them.
        ends = [end - 1 for end in itertools.accumulate(n + 1 for n in counts)]
        source = [end - max(n - j, 0) for end, n in zip(ends, counts) for j in range(K + 1)]
        logits = logits[on_device(source, device)]  # (R (K+1), V)
        spread = [row for row in rows for _ in range(K + 1)]
        limits = self.sampler.limits[on_device(spread, device)]
        drafted = proposal.drafted.to(device)[:, :K]
        tokens = F.pad(drafted, (0, K - drafted.shape[1]))
        places = [start + j for start in starts for j in range(K + 1)]
        luck, deal = (self._keys(spread, places, purpose).view(len(rows), K + 1) for purpose in (LUCK, DEAL))
        if proposal.odds is None:
            q = torch.ones(len(rows), K, 1, device=device)
        else:
            q = F.pad(proposal.odds[:, :K], (0, 0, 0, K - drafted.shape[1]))
        kept, own = self.recorder(
            judge, self._cuts(rows), logits, limits, q, tokens, on_device(counts, device),
            luck[:, :K].contiguous(), deal,
        )  # fmt: skip
        return list(zip(*torch.stack([kept, own]).tolist()))

    def _cuts(self, rows) -> bool:
        return any(self.sampler.params[row].cuts or self.sampler.params[row].greedy for row in rows)

    def _keys(self, rows, positions, purpose) -> Tensor:
        return keys_for(purpose, [self.sampler.seeds[row] for row in rows], positions, self.sampler.device)


RULES = {"rejection": RejectionRule, "coupled": CoupledRule}
