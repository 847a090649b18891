"""
Packing

This file implements fitting conversations of unequal length into rows of one length, following:
- "Finetuned Language Models Are Zero-Shot Learners" (Wei et al., 2022) - several examples in one sequence
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - prompt, then answer

Each component is explained with paper references for educational purposes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from phase1_foundation.project3_pretrain.data import Batches
from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.plans import Packed
from phase2_finetuning.project4_sft.conversations import Message
from phase2_finetuning.project4_sft.template import ChatTemplate

SHORTEST = 8  # tokens that a sample may be cut down to


def render_within(template: ChatTemplate, messages: Sequence[Message], limit: int) -> tuple[list[int], list[int]]:
    """
    A conversation in at most `limit` tokens, of which some are to be learned: (tokens, loss mask)

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, appendix C.
    PAPER CONTEXT: prompts that leave no room for an answer are filtered out, and answers limited in length.
    INTUITION: of a long talk keep its beginning; of a long question its end, where it usually says what is wanted.
    IMPLEMENTATION: a deviation: cut, not filtered. First the system message goes; then exchanges from the end; the last
        one shares the room, half of it at least for the answer. A question loses words at its front, an answer its
        end, <|end|> included, so that nobody learns to stop in the middle.
    WHY: cutting all texts at the right, as is often done, leaves samples that consist of a question alone and teach
        nothing.
    """
    if limit < SHORTEST:
        raise ValueError(f"limit={limit} leaves no room for a question and an answer: use at least {SHORTEST}")
    messages = list(messages)
    tokens, mask = template.render(messages)
    while len(tokens) > limit and len(messages) > 2:
        messages = messages[1:] if messages[0]["role"] == "system" else messages[:-2]
        tokens, mask = template.render(messages)
    if len(tokens) <= limit:
        return tokens, mask
    answer = len(tokens) - 1 - tokens[::-1].index(template.begin_ids["assistant"])  # where it begins
    kept = min(len(tokens) - answer, max(limit - answer, limit // 2))
    question = limit - kept  # room for it: <|endoftext|>, <|user|>, its last words and <|end|>
    places = [*range(min(2, question)), *range(answer - max(0, question - 2), answer), *range(answer, answer + kept)]
    return [tokens[i] for i in places], [mask[i] for i in places]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Which samples share a row: lists of their numbers, each row's lengths adding up to at most `capacity`

    PAPER: "Finetuned Language Models Are Zero-Shot Learners", arXiv:2109.01652, section 2.4.
    PAPER CONTEXT: multiple training examples are packed into a single sequence.
    INTUITION: load the largest boxes first, each into the fullest van that still has room for it.
    IMPLEMENTATION: best fit decreasing; free spaces are kept sorted, so a sample finds its row by bisection.
    WHY: a row padded to the longest of a batch is mostly padding; rows packed like this are nearly full.

    Raises ValueError for a sample that fits no row.

    >>> pack([5, 3, 3, 2, 2], capacity=8)
    [[0, 1], [2, 3, 4]]
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens exceeds the {capacity} of a row: cut it first")
    rows, free = [], []  # free: (space, row) of every row, the tightest first
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[i], -1))
        if place == len(free):
            space, row = capacity, len(rows)
            rows.append([])
        else:
            space, row = free.pop(place)
        rows[row].append(i)
        insort(free, (space - lengths[i], row))
    return rows


class ConversationDataset:
    """
    Conversations in packed rows

    PAPER: "Finetuned Language Models Are Zero-Shot Learners", arXiv:2109.01652, section 2.4.
    PAPER CONTEXT: several examples share a sequence; there a special token separates inputs from targets.
    INTUITION: a page with several letters on it; each begins with the same flourish, and nobody reads the neighbour's.
    IMPLEMENTATION: a sample of n tokens takes n - 1 places (the last one is only a target). Targets that are not to be
        learned are -100; a row is filled up with <|endoftext|>, which `apart` takes for documents of their own.
    WHY: every forward has one shape, hardly any place is wasted, and no token's loss depends on its neighbours.

    Args:
        samples: (tokens, mask) as `render_within` gives them, at most `block_size` + 1 long.
        block_size: tokens of a row.
        start_id: the token that opens a sample and fills rows up.

    `tokens` and `targets` are int32 arrays (rows, block_size).
    """

    token_bytes = None  # answers are not compared by bytes

    def __init__(self, samples: Sequence[tuple[list[int], list[int]]], block_size: int, start_id: int):
        places = pack([len(tokens) - 1 for tokens, _ in samples], block_size)
        self.block_size, self.n_samples, self.start_id = block_size, len(samples), start_id
        self.tokens = np.full((len(places), block_size), start_id, dtype=np.int32)
        self.targets = np.full((len(places), block_size), IGNORE, dtype=np.int32)
        for row, members in enumerate(places):
            at = 0
            for member in members:
                tokens, mask = (np.array(values, dtype=np.int32) for values in samples[member])
                end = at + len(tokens) - 1
                self.tokens[row, at:end] = tokens[:-1]
                self.targets[row, at:end] = np.where(mask[1:] == 1, tokens[1:], IGNORE)
                at = end

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch."""
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Tokens that are learned in an epoch."""
        return int((self.targets != IGNORE).sum())

    @property
    def fill(self) -> float:
        """The part of all places that samples take: padding is what is missing to 1."""
        last = self.block_size - np.argmax(self.targets[:, ::-1] != IGNORE, axis=1)  # a row ends with an answer
        return float(last.sum() / self.tokens.size)

    def rows(self, places: np.ndarray, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows at `places`: (tokens, targets), int64 (len(places), block_size); every epoch has the same rows."""
        return tuple(torch.from_numpy(table[places].astype(np.int64)) for table in (self.tokens, self.targets))

    def batches(self, seed: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> Batches:
        """The training batches, by step."""
        return Batches(self, seed, batch_size, micro_batch_size, rank, world_size)

    def windows(self, batch_size: int, max_tokens: int | None = None):
        """The rows for evaluation: yields (tokens, targets), all batches of one shape.

        With `max_tokens` only some, evenly spread: rows are in the order of packing, the longest samples first. What is
        left of the last batch is filled up with targets of -100.
        """
        wanted = self.epoch_size if max_tokens is None else max(1, min(self.epoch_size, max_tokens // self.block_size))
        chosen = np.arange(wanted) * self.epoch_size // wanted
        batch_size = min(batch_size, wanted)
        for first in range(0, wanted, batch_size):
            tokens, targets = self.rows(chosen[first : first + batch_size], 0)
            missing = (0, 0, 0, batch_size - len(tokens))
            yield F.pad(tokens, missing, value=self.start_id), F.pad(targets, missing, value=IGNORE)


def apart(start_id: int):
    """What makes the plan of a packed batch: ``apart(start_id)(model, tokens)`` keeps samples apart."""

    def plan(model, tokens):
        return Packed.at_marks(tokens, start_id, model.specs, model.kernel)

    return plan
