"""
Speculation

This file implements guessing and judging, apart from who runs the steps, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - draft and verify
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) - the same, found apart

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

from torch import Tensor

from phase3_core_inference.project8_kv_cache.sampling import Logprobs, Sampler
from phase3_core_inference.project8_kv_cache.texts import TextRequest
from phase4_advanced_inference.project11_speculative_decoding.drafts import NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.formulas import Tally
from phase4_advanced_inference.project11_speculative_decoding.proposals import Ask, Draft, Proposal
from phase4_advanced_inference.project11_speculative_decoding.rules import RULES, CoupledRule, Recorder

Seated = Sequence[tuple[int, TextRequest]]  # (row, request)


class Speculation:
    """A draft and a rule: what is put before a step of the target, and what is made of its logits.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, algorithm 1.
    PAPER CONTEXT: the draft runs k times, the target once over all it wrote; then a prefix is kept and a token drawn.
    INTUITION: the apprentice and the rules of the house; the master, who only reads, is somebody else's.
    IMPLEMENTATION: `propose` before the step, `settle` after it. Any loop may stand between: a batch from beginning to
        end (`SpeculativeWriter`), or one that requests join and leave (project 13's Runner).
    WHY: which tokens stay depends on draft, logits and noise alone, never on who scheduled the step.

    Args:
        draft: serves this speculation alone; None: `NGramDraft()`; k: the most tokens of a draft.
        rule: "rejection" (the papers'), or "coupled" (the text of plain decoding); graphs: record what can be.

    `tally` counts what came of the drafts. Raises ValueError for a k or a rule that cannot be.
    """

    def __init__(self, draft: Draft | None = None, k: int = 4, rule: str = "rejection", graphs: bool = False):
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is unknown: use one of {', '.join(RULES)}")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1: the most tokens of a draft")
        self.draft = NGramDraft() if draft is None else draft
        self.k, self.tally = k, Tally()
        self._kind, self._recorder = RULES[rule], Recorder(graphs)
        self._vocab_size = 0

    def prepare(self, n_rows: int, capacity: int, vocab_size: int, step_limit: int) -> None:
        """Get ready for so many texts of so many tokens, over a cache that takes `step_limit` of a row at once."""
        if self.k >= step_limit:
            raise ValueError(f"k={self.k} must be at least 1, and k + 1 at most what the cache takes in one step "
                             f"({step_limit})")  # fmt: skip
        self._vocab_size = vocab_size
        self.draft.prepare(n_rows, capacity, vocab_size)

    def rule(self, sampler: Sampler) -> CoupledRule:
        """The rule for the requests of a sampler."""
        return self._kind(sampler, self.k, self._recorder)

    def propose(self, seated: Seated, rule: CoupledRule) -> Proposal:
        """Guess what comes after each text; raises ValueError for a draft that proposes what it must not.

        Ids that lie on a GPU are not looked at: what a draft draws by the rule is of this vocabulary.
        """
        # A step brings one token more than was drafted: none must exceed the limit. What a constraint allows behind a
        # guess is not known before it has accepted the guess.
        rooms = [0 if r.constraint is not None else r.limit - len(r.tokens) - 1 for _, r in seated]
        asks = [Ask(row, r.tokens, min(self.k, room)) for (row, r), room in zip(seated, rooms)]
        proposal = self.draft.propose(asks, rule.draft)
        if len(proposal.counts) != len(asks):
            raise ValueError(f"the draft answered {len(proposal.counts)} of {len(asks)} rows: give a list for each")
        shape, odds, most = tuple(proposal.drafted.shape), proposal.odds, max(proposal.counts, default=0)
        if len(shape) != 2 or shape[0] != len(asks) or shape[1] < most:
            raise ValueError(f"the draft says that {proposal.counts} tokens of its rows count, in a tensor of shape "
                             f"{shape}: give ({len(asks)}, {most} or more)")  # fmt: skip
        if odds is not None and odds.shape != (*shape, self._vocab_size):
            raise ValueError(f"the draft gave odds of shape {tuple(odds.shape)} for tokens of shape {shape}: give "
                             f"{(*shape, self._vocab_size)}")  # fmt: skip
        for ask, n in zip(asks, proposal.counts):
            if n > max(ask.most, 0):
                raise ValueError(f"the draft proposed {n} tokens for row {ask.row}: at most {ask.most} fit")
        self._check_ids(proposal)
        return proposal

    def _check_ids(self, proposal: Proposal) -> None:
        """Refuse what are no tokens, where a look at them costs no waiting."""
        if proposal.known:
            looked = proposal.tokens
        else:
            looked = [] if proposal.drafted.is_cuda else proposal.drafted.tolist()
        for draft in looked:
            if not all(0 <= token < self._vocab_size for token in draft):
                raise ValueError(f"the draft proposed {draft}, of which some are no tokens: ids go from 0 to "
                                 f"{self._vocab_size - 1}")  # fmt: skip

    def settle(
        self, rule: CoupledRule, logits: Tensor, seated: Seated, proposal: Proposal
    ) -> list[list[tuple[int, Logprobs | None]]]:
        """What each text gains, with what was asked to be known of it: the tokens that stay, and the one behind them.

        logits: (sum of counts + 1, V), behind the newest token of each text and each of its draft.
        """
        rows = [row for row, _ in seated]
        verdicts = rule.judge(logits, rows, [len(r.tokens) for _, r in seated], proposal)
        drafts = proposal.tokens
        bursts = [[*draft[:kept], token] for draft, (kept, token) in zip(drafts, verdicts)]
        known = iter(_logprobs(rule.sampler, logits, rows, drafts, bursts))
        self.tally.calls += 1
        for row, draft, burst in zip(rows, drafts, bursts):
            self.tally.add(len(draft), len(burst) - 1)
            rule.sampler.remember([row] * len(burst), burst)
        return [[(token, next(known)) for token in burst] for burst in bursts]


def _logprobs(sampler: Sampler, logits: Tensor, rows, drafts, bursts) -> list[Logprobs | None]:
    """What was asked to be known of each token that stays."""
    flat = [row for row, burst in zip(rows, bursts) for _ in burst]
    if all(sampler.params[row].logprobs is None for row in rows):
        return [None] * len(flat)
    starts = [sum(len(draft) + 1 for draft in drafts[:i]) for i in range(len(drafts))]
    places = [start + j for start, burst in zip(starts, bursts) for j in range(len(burst))]
    return sampler.logprobs(sampler.known(logits[places]), [token for burst in bursts for token in burst], flat)
