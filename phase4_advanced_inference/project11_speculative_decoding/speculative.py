"""
Speculative decoding

This file implements text that is drafted cheaply and checked by the model, several tokens a step, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - draft and verify
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) - the same, found apart
- "Prompt Lookup Decoding" (Saxena, 2023) - drafts from the text itself

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.decoder import FastDecoder
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
from phase4_advanced_inference.project11_speculative_decoding.proposals import Draft, Proposal
from phase4_advanced_inference.project11_speculative_decoding.rules import CoupledRule
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation

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
        model, tokenizer, and further options: as of `Writer`; draft, k, rule: as of `Speculation`.
    """

    def __init__(self, model, tokenizer, draft: Draft | None = None, k: int = 4, rule: str = "rejection", **options):
        super().__init__(model, tokenizer, **options)
        self.speculation = Speculation(draft, k, rule, graphs=options.get("graphs", False))
        self.speculation.prepare(len(self.cache.lengths), self.room, self.vocab_size(), self.cache.step_limit)
        self._even = isinstance(self.decoder, FastDecoder)

    @property
    def tally(self):
        """Counts of what came of the drafts."""
        return self.speculation.tally

    def free(self, row: int) -> None:
        """Forget a row, here and in the draft."""
        super().free(row)
        self.speculation.draft.free(row)

    def steps(self, requests: list[TextRequest], held: set[int]) -> Iterator[Piece]:
        """From prefill to the last request's end."""
        sampler = self.sampler(requests)
        rule = self.speculation.rule(sampler)
        while rows := [row for row, request in enumerate(requests) if request.finish_reason is None]:
            if any(requests[row].reading for row in rows):
                work, tokens = self.next_work(rows, requests)
                yield from self.draw_all(self.decoder.step(work, tokens), work, requests, sampler, held)
            else:
                yield from self._speculate([(row, requests[row]) for row in rows], rule, held)

    def _speculate(self, seated: list[tuple[int, TextRequest]], rule: CoupledRule, held) -> Iterator[Piece]:
        """One step of the target for all rows: draft, check, keep."""
        proposal = self.speculation.propose(seated, rule)
        logits = self._check(seated, proposal)
        bursts = self.speculation.settle(rule, logits, seated, proposal)
        for (row, request), burst in zip(seated, bursts):
            request.fed += len(burst)
            self.cache.truncate(row, request.fed)  # forget what was rejected
        for (row, request), burst in zip(seated, bursts):
            for token, logprobs in burst:
                piece = self.take(row, request, token, logprobs, held)
                yield piece
                if piece.finish_reason:  # what was kept behind the end is no part of the text
                    break

    def _check(self, seated: list[tuple[int, TextRequest]], proposal: Proposal) -> Tensor:
        """Logits behind the newest token of each row and behind each token of its draft.

        Drafts of unequal length are filled up where steps are compiled or recorded, if there is room: what is read
        behind a draft changes nothing before it, and is forgotten with what was rejected.
        """
        rows, widths = [row for row, _ in seated], [1 + n for n in proposal.counts]
        most = 1 + self.speculation.k if any(proposal.counts) else 1
        room = all(self.cache.lengths[row] + most <= self.cache.capacity for row in rows)
        fill = self._even and room and min(widths) < most
        read = [most] * len(rows) if fill else widths
        tokens = proposal.behind([request.tokens[-1] for _, request in seated], read)
        logits = self.decoder.step([(row, n, n) for row, n in zip(rows, read)], tokens)
        if not fill:
            return logits
        return logits[on_device([i * most + j for i, n in enumerate(widths) for j in range(n)], logits.device)]


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
