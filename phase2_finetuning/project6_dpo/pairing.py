"""
Pairing

This file implements fitting pairs of answers into packed rows, following:
- "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al., 2023) - both
  answers of a pair in one forward
- "Finetuned Language Models Are Zero-Shot Learners" (Wei et al., 2022) - several examples in one sequence

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from phase1_foundation.project3_pretrain.data import Batches
from phase1_foundation.project3_pretrain.head import IGNORE
from phase2_finetuning.project4_sft.answering import prompt_within
from phase2_finetuning.project4_sft.packing import SHORTEST, ConversationDataset
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project6_dpo.preferences import Preference

Sample = tuple[list[int], list[int]]  # (tokens, loss mask), as `render_within` gives them


def render_pair(template: ChatTemplate, preference: Preference, limit: int) -> tuple[Sample, Sample]:
    """
    Both answers behind their prompt, each in at most `limit` tokens: (chosen, rejected)

    PAPER: arXiv:2305.18290 (DPO), section 3.
    PAPER CONTEXT: both answers are answers to the same prompt x; the loss compares their probabilities given x.
    INTUITION: two witnesses must be asked the same question, and heard at least up to where they disagree.
    IMPLEMENTATION: the prompt is cut once, for both: the oldest exchanges go first, then the front of the question.
        Answers lose their end, <|end|> included, but have at least half of the room. Where they would be cut before
        they differ, what both share is taken for a part of the prompt, and cut at its front.
    WHY: unlike prompts would be compared instead of answers; equal remains would have nothing to learn.

    Raises ValueError for a limit too small for a question and an answer.
    """
    if limit < 2 * SHORTEST:
        raise ValueError(f"limit={limit} leaves no room for a question and an answer: use at least {2 * SHORTEST}")
    prompt = template.prompt(preference.messages)
    answers = [[*template.tokenizer.encode(text), template.end_id] for text in preference[1:]]
    longest = max(map(len, answers))
    if len(prompt) + longest > limit:
        kept = min(longest, max(limit - len(prompt), limit // 2))
        shared = next(i for i, (one, other) in enumerate(zip(*answers)) if one != other)
        if shared < kept:
            prompt = prompt_within(template, preference.messages, limit - kept)
        else:
            common, answers = answers[0][:shared], [answer[shared:] for answer in answers]
            room = limit - min(max(map(len, answers)), limit // 2)
            prompt = prompt_within(template, preference.messages, room - len(common))
            prompt = [*prompt, *common[max(0, len(prompt) + len(common) - room) :]]
        answers = [answer[: limit - len(prompt)] for answer in answers]
    chosen, rejected = (([*prompt, *answer], [0] * len(prompt) + [1] * len(answer)) for answer in answers)
    return chosen, rejected


class PreferenceDataset:
    """
    Pairs in packed rows

    PAPER: arXiv:2305.18290 (DPO), equation 7.
    PAPER CONTEXT: the loss of a pair needs log pi(y|x) of both its answers, and the same of the reference.
    INTUITION: two letters in one envelope; several envelopes fill a page, and nobody reads the neighbour's.
    IMPLEMENTATION: a pair is one sample of project 4's packing: the chosen document, then the rejected one. As each
        begins with <|endoftext|>, document 2 i and 2 i + 1 of a row are the answers of its pair i: no list of places
        is kept. A row has room for two documents of `block_size`: any pair fits.
    WHY: padded to the longest of a batch, the usual way, half of the places hold nothing; here nearly all are used.

    Args:
        pairs: as `render_pair` gives them, each document at most `block_size` long.
        block_size: tokens of a document; a row has twice as many.
        start_id: the token that opens a document.

    `reference` (rows, P, 2) float32 holds the reference's log-probabilities of both answers of the (at most P) pairs of
    a row, NaN where a row has fewer; 0 until `remember_reference` fills it.
    """

    def __init__(self, pairs: Sequence[tuple[Sample, Sample]], block_size: int, start_id: int):
        joined = [(chosen[0] + rejected[0], chosen[1] + rejected[1]) for chosen, rejected in pairs]
        self.packed = ConversationDataset(joined, 2 * block_size, start_id)
        self.n_pairs, self.start_id = len(pairs), start_id
        answered = self.packed.targets != IGNORE
        last = np.where(answered, np.cumsum(self.packed.tokens == start_id, axis=1), 0).max(axis=1)  # 2 for each pair
        self.reference = np.zeros((len(last), last.max() // 2, 2), dtype=np.float32)
        self.reference[np.arange(last.max() // 2) >= last[:, None] // 2] = np.nan

    @property
    def block_size(self) -> int:
        """Tokens of a row."""
        return self.packed.block_size

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch."""
        return self.packed.epoch_size

    @property
    def fill(self) -> float:
        """The part of all places that pairs take."""
        return self.packed.fill

    def rows(self, places: np.ndarray, key: int) -> tuple[torch.Tensor, ...]:
        """The rows at `places`: (tokens (B, T), targets (B, T), reference (B, P, 2)); the same in every epoch."""
        return *self.packed.rows(places, key), torch.from_numpy(self.reference[places])

    def batches(self, seed: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> Batches:
        """The training batches, by step."""
        return Batches(self, seed, batch_size, micro_batch_size, rank, world_size)

    def windows(self, batch_size: int, max_tokens: int | None = None):
        """The rows for evaluation, in order, `batch_size` at a time; with `max_tokens` only some, evenly spread."""
        most = self.epoch_size if max_tokens is None else max(1, max_tokens // self.block_size)
        wanted = min(self.epoch_size, most)
        places = np.arange(wanted) * self.epoch_size // wanted
        for first in range(0, wanted, batch_size):
            yield self.rows(places[first : first + batch_size], 0)
