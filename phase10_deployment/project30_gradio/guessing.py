"""
Guessing

This file implements one step of speculation that can be watched, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - guess several tokens, check
  them all at once
- "Prompt Lookup Decoding" (Saxena, 2023) - the text itself is where guesses come from

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from phase3_core_inference.project8_kv_cache.sampling import Sampler
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.texts import TextRequest
from phase4_advanced_inference.project11_speculative_decoding.drafts import NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase10_deployment.project28_serving.engine import Engine


class Guess(NamedTuple):
    """What came of a step: tokens of the draft, how many of them stayed, and the model's own token behind these."""

    draft: list[int]
    kept: int
    own: int

    @property
    def gained(self) -> list[int]:
        """The tokens by which the text grew."""
        return [*self.draft[: self.kept], self.own]


@torch.no_grad()
def guess(engine: Engine, tokens: Sequence[int], k: int, temperature: float = 0.0, seed: int = 0) -> Guess | None:
    """Guess up to k tokens behind a text, and let the model check them in one forward; None where no room is left.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, algorithm 1.
    PAPER CONTEXT: the model scores all guesses in parallel; a prefix of them is kept, and one token comes for free.
    INTUITION: finish somebody's sentence: what was right need not be said, and the first wrong word is corrected.
    IMPLEMENTATION: project 11's n-gram draft and its coupled rule, which keeps a guess if plain decoding with the same
        seed had written it. Without a cache, so that it disturbs nobody: one call is one step of the model.
    WHY: text that repeats itself is guessed right, new text is not; watching both says when speculation pays.
    """
    V, n = engine.vocab_size(), len(tokens)
    room = engine.model.config.block_size - n - 1
    if room < 1:
        return None
    params = SamplingParams(room + 1, temperature, seed=seed, stop_ids=())
    speculation = Speculation(NGramDraft(), min(k, room), "coupled")
    speculation.prepare(1, n + room + 1, V, n + room + 1)
    sampler = Sampler.of([params], [seed], [list(tokens)], V, engine.device)
    rule, seated = (
        speculation.rule(sampler),
        [(0, TextRequest(0, list(tokens), params, engine.tokenizer, n + room + 1))],
    )
    proposal = speculation.propose(seated, rule)
    draft = proposal.tokens[0]
    x = torch.tensor([[*tokens, *draft]], device=engine.device)  # (1, T)
    logits = engine.model(x)[0, n - 1 :]  # behind the text, and behind each guess
    burst = [token for token, _ in speculation.settle(rule, logits, seated, proposal)[0]]
    return Guess(draft, len(burst) - 1, burst[-1])
