"""
Speculative decoding

This file implements text that is drafted cheaply and checked by the model, several tokens a step, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - draft and verify
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) - the same, found apart
- "Prompt Lookup Decoding" (Saxena, 2023) - drafts from the text itself

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Iterator, Sequence

from phase3_core_inference.project8_kv_cache.generation import (
    Generation,
    Piece,
    Prompt,
    SamplingParams,
    Writer,
    append,
    is_one,
    prepare,
)
from phase3_core_inference.project8_kv_cache.texts import TextRequest
from phase4_advanced_inference.project11_speculative_decoding.drafts import Ask, Draft, NGramDraft, Proposal
from phase4_advanced_inference.project11_speculative_decoding.formulas import Tally
from phase4_advanced_inference.project11_speculative_decoding.rules import RULES, CoupledRule, Recorder

__all__ = ["SpeculativeWriter", "speculative_generate"]


class SpeculativeWriter(Writer):
    """A `Writer` whose steps check a draft, and so bring several tokens of a row.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2 and algorithm 1;
        "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, algorithm 2.
    PAPER CONTEXT: scoring a short continuation in parallel takes about as long as drawing one token from the target.
    INTUITION: reading a sentence takes the master no longer than writing a word; so let the apprentice write it.
    IMPLEMENTATION: prompts are read as ever. Then every row drafts; one step reads the newest token and the draft of
        all rows; a rule says how many stay; the cache forgets the others. Texts take in their tokens one by one, so
        that they end where plain decoding ends them.
    WHY: at small batches a step waits for the weights, and then k + 1 tokens cost what one costs.

    Args:
        model, tokenizer, and further options: as of `Writer`.
        draft: a `Draft`, which serves this writer alone; None: `NGramDraft()`.
        k: the most tokens of a draft; rule: "rejection" (the papers'), or "coupled" (the text of plain decoding).

    `tally` counts what came of the drafts. Raises ValueError for a k or a rule that cannot be.
    """

    def __init__(self, model, tokenizer, draft: Draft | None = None, k: int = 4, rule: str = "rejection", **options):
        super().__init__(model, tokenizer, **options)
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is unknown: use one of {', '.join(RULES)}")
        if not 1 <= k < self.cache.step_limit:
            raise ValueError(f"k={k} must be at least 1, and k + 1 at most what the cache takes in one step "
                             f"({self.cache.step_limit})")  # fmt: skip
        self.draft = NGramDraft() if draft is None else draft
        self.k, self.rule, self.tally = k, RULES[rule], Tally()
        self.recorder = Recorder(options.get("graphs", False))
        self.draft.prepare(len(self.cache.lengths), self.room, self.vocab_size())

    def free(self, row: int) -> None:
        """Forget a row, here and in the draft."""
        super().free(row)
        self.draft.free(row)

    def steps(self, requests: list[TextRequest], held: set[int]) -> Iterator[Piece]:
        """From prefill to the last request's end."""
        sampler = self.sampler(requests)
        rule = self.rule(sampler, self.k, self.recorder)
        while rows := [row for row, request in enumerate(requests) if request.finish_reason is None]:
            if any(requests[row].reading for row in rows):
                work, tokens = self.next_work(rows, requests)
                yield from self.draw_all(self.decoder.step(work, tokens), work, requests, sampler, held)
            else:
                yield from self._speculate(rows, requests, rule, held)

    def _speculate(self, rows: list[int], requests: list[TextRequest], rule: CoupledRule, held) -> Iterator[Piece]:
        """One step of the target for all rows: draft, check, keep."""
        asks = []
        for row in rows:  # a step brings one token more than was drafted: none must exceed the limit
            request = requests[row]
            asks.append(Ask(row, request.tokens, min(self.k, request.limit - len(request.tokens) - 1)))
        proposal = self.draft.propose(asks, rule.draft)
        self._check(asks, proposal)
        work = [(ask.row, 1 + len(draft), 1 + len(draft)) for ask, draft in zip(asks, proposal.tokens)]
        fed = [token for ask, draft in zip(asks, proposal.tokens) for token in (ask.tokens[-1], *draft)]
        logits = self.decoder.step(work, fed)
        verdicts = rule.judge(logits, rows, [len(ask.tokens) for ask in asks], proposal.tokens, proposal.odds)
        self.tally.calls += 1
        bursts = [[*draft[:kept], token] for draft, (kept, token) in zip(proposal.tokens, verdicts)]
        logprobs = iter(self._logprobs(rule.sampler, logits, rows, work, bursts))
        for row, draft, burst in zip(rows, proposal.tokens, bursts):
            requests[row].fed += len(burst)
            self.cache.truncate(row, requests[row].fed)  # forget what was rejected
            self.tally.add(len(draft), len(burst) - 1)
            rule.sampler.remember([row] * len(burst), burst)
        for row, burst in zip(rows, bursts):
            known = [next(logprobs) for _ in burst]
            for token, logprob in zip(burst, known):
                piece = self.take(row, requests[row], token, logprob, held)
                yield piece
                if piece.finish_reason:  # what was kept behind the end is no part of the text
                    break

    def _check(self, asks: Sequence[Ask], proposal: Proposal) -> None:
        """Refuse what a draft must not propose."""
        if len(proposal.tokens) != len(asks):
            raise ValueError(f"the draft answered {len(proposal.tokens)} of {len(asks)} rows: give a list for each")
        for ask, draft in zip(asks, proposal.tokens):
            if len(draft) > max(ask.most, 0):
                raise ValueError(f"the draft proposed {len(draft)} tokens for row {ask.row}: at most {ask.most} fit")
            if not all(0 <= token < self.vocab_size() for token in draft):
                raise ValueError(f"the draft proposed {draft}, of which some are no tokens: ids go from 0 to "
                                 f"{self.vocab_size() - 1}")  # fmt: skip

    def _logprobs(self, sampler, logits, rows, work, bursts) -> list:
        """What was asked to be known of each token that stays."""
        flat = [row for row, burst in zip(rows, bursts) for _ in burst]
        if all(sampler.params[row].logprobs is None for row in rows):
            return [None] * len(flat)
        starts = [sum(n for _, n, _ in work[:i]) for i in range(len(work))]
        places = [start + j for start, burst in zip(starts, bursts) for j in range(len(burst))]
        return sampler.logprobs(sampler.known(logits[places]), [t for burst in bursts for t in burst], flat)


def speculative_generate(
    model,
    tokenizer,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    draft: Draft | None = None,
    k: int = 4,
    rule: str = "rejection",
    **options,
) -> Generation | list[Generation]:
    """Continue one prompt, or many at once: project 8's `generate`, several tokens a step.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.
    PAPER CONTEXT: the distribution of the output does not change, and neither do architecture, training or weights.
    INTUITION: the same call, sooner answered.
    IMPLEMENTATION: a `SpeculativeWriter` with as much room as is needed; the pieces of each prompt are put together.
    WHY: what most callers want; who wants to see text as it comes, or the counts, keeps a `SpeculativeWriter`.

    Args:
        prompts, params, options: as of `generate`; draft, k, rule: as of `SpeculativeWriter`.

    Returns a Generation, or for a list a list of them.
    """
    options = options | {"draft": draft, "k": k, "rule": rule}
    writer, many, params = prepare(SpeculativeWriter, model, tokenizer, prompts, params, options)
    texts = [Generation(len(writer.encode(prompt))) for prompt in many]
    for piece in writer.stream(many, params):
        append(texts[piece.index], piece)
    return texts[0] if is_one(prompts) else texts
