"""
Formulas

This file implements what speculation is expected to bring, and counts what it brought, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - acceptance rate, tokens a step,
  improvement of the wall time

Each component is explained with paper references for educational purposes.
"""

from collections import Counter

from torch import Tensor


def expected_tokens(alpha: float, k: int) -> float:
    """Tokens that a step of the target brings.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 3.1, equation 1.
    PAPER CONTEXT: (1 - alpha^(gamma + 1)) / (1 - alpha), if acceptances are independent.
    INTUITION: the first token comes anyway; the next with probability alpha, the one after with alpha squared, ...
    IMPLEMENTATION: the sum itself, which also holds for alpha = 1.
    WHY: measured tokens a step that differ show that acceptances come in runs: easy passages and hard ones.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4), expected_tokens(0.0, 4)
    (1.75, 5.0, 1.0)
    """
    return float(sum(alpha**i for i in range(k + 1)))


def expected_speedup(alpha: float, k: int, cost: float, verification: float = 1.0) -> float:
    """How many times as fast the text comes.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 3.3, theorem 3.8.
    PAPER CONTEXT: (1 - alpha^(gamma + 1)) / ((1 - alpha) (gamma c + 1)), c: time of a draft's step / of a target's.
    INTUITION: what a step brings over what it costs: k guesses and one check.
    IMPLEMENTATION: `verification`: time of a step over k + 1 tokens / over one; 1 in the paper (arithmetic to spare).
    WHY: says before any code is written whether a draft pays: alpha must exceed c.

    >>> round(expected_speedup(0.7, 4, 0.2), 2), round(expected_speedup(0.2, 4, 0.2), 2)
    (1.54, 0.69)
    """
    return expected_tokens(alpha, k) / (k * cost + verification)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """How often rejection keeps a token of q: the sum of min(p, q), (..., V) -> (...).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 3.2, theorem 3.5.
    PAPER CONTEXT: beta = 1 - D_LK(p, q) = sum of min(p, q); alpha is its mean over the text.
    INTUITION: the ground that two hills share.
    IMPLEMENTATION: as written; 1 less the total variation.
    WHY: no rule can keep more: two variables with these distributions agree with at most this probability.
    """
    return p.minimum(q).sum(-1)


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """How often draws from p and q with the same Gumbel noise agree: (..., V) -> (...).

    PAPER: "Fast Inference from Transformers via Speculative Decoding", section 3.2, has `overlap`; none has this.
    PAPER CONTEXT: beta is the probability that a drafted token is kept.
    INTUITION: two races with the same weather: x wins both if it beats every y in the race that suits y better.
    IMPLEMENTATION: exponential races: x wins both with probability 1 / sum over y of max(p_y / p_x, q_y / q_x).
    WHY: the price of a text that does not change: between (1 - TV) / (1 + TV) and the 1 - TV of `overlap`.
    """
    both = (p > 0) & (q > 0)  # who cannot win one of the races cannot win both
    p_x, q_x = (x.masked_fill(~both, 1.0).unsqueeze(-1) for x in (p, q))  # (..., V, 1)
    slower = (p.unsqueeze(-2) / p_x).maximum(q.unsqueeze(-2) / q_x).sum(-1)
    return (both / slower).sum(-1)


class Tally:
    """What came of all drafts.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, sections 3.1 and 3.2.
    PAPER CONTEXT: alpha is the mean probability that a drafted token is kept, given that those before it were.
    INTUITION: a list of strokes, one for every check.
    IMPLEMENTATION: counts of (drafted, kept), a row and step each. Tokens behind the first rejected one were never
        tested: alpha = kept / tested, not kept / drafted, as other programs report it.
    WHY: from these counts alone come alpha, tokens a step, and what the formula says to them.

    >>> tally = Tally()
    >>> for drafted, kept in ((4, 4), (4, 1), (4, 0)):
    ...     tally.add(drafted, kept)
    >>> tally.tokens_per_step, round(tally.alpha, 3), round(tally.kept_of_drafted, 3)
    (2.6666666666666665, 0.714, 0.417)
    """

    def __init__(self):
        self.checks: Counter[tuple[int, int]] = Counter()
        self.calls = 0  # steps of the target; each checks as many rows as are not yet done

    def add(self, drafted: int, kept: int) -> None:
        """Count one check of one row."""
        self.checks[drafted, kept] += 1

    def clear(self) -> None:
        """Begin anew."""
        self.checks.clear()
        self.calls = 0

    @property
    def steps(self) -> int:
        """Checks."""
        return self.checks.total()

    @property
    def drafted(self) -> int:
        """Tokens that were proposed."""
        return sum(n * drafted for (drafted, _), n in self.checks.items())

    @property
    def kept(self) -> int:
        """Tokens of these that stayed."""
        return sum(n * kept for (_, kept), n in self.checks.items())

    @property
    def tested(self) -> int:
        """Proposed tokens up to the first rejected one of their step."""
        return sum(n * min(kept + 1, drafted) for (drafted, kept), n in self.checks.items())

    @property
    def alpha(self) -> float:
        """The acceptance rate; nan before anything was tested."""
        return self.kept / self.tested if self.tested else float("nan")

    @property
    def kept_of_drafted(self) -> float:
        """The share of proposed tokens that stayed."""
        return self.kept / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step of the target brought a row, those behind an end of text included."""
        return (self.kept + self.steps) / self.steps if self.steps else float("nan")

    @property
    def expected_tokens_per_step(self) -> float:
        """What the formula says for this alpha and for drafts of these lengths."""
        if not self.steps:
            return float("nan")
        alpha = self.alpha if self.tested else 0.0
        return sum(n * expected_tokens(alpha, drafted) for (drafted, _), n in self.checks.items()) / self.steps
