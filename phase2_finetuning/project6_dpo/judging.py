"""
Judging

This file implements how a model's preferences are measured, and how far it went for them, following:
- "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al., 2023) - the
  implicit reward, its accuracy and margin; reward against KL
- "SimPO: Simple Preference Optimization with a Reference-Free Reward" (Meng et al., 2024) - length

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.evaluation import evaluating, tokens_at_once, within_memory
from phase1_foundation.project3_pretrain.head import IGNORE
from phase2_finetuning.project4_sft.answering import Template, answer
from phase2_finetuning.project4_sft.packing import apart
from phase2_finetuning.project6_dpo.dpo import log_probs_of
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset


@dataclass(frozen=True)
class Judgement:
    """What a model and its reference say of n pairs: float64 tensors (n, 2), the chosen answer first."""

    sums: Tensor  # log-probabilities
    reference: Tensor  # the reference's
    lengths: Tensor  # tokens

    @property
    def log_ratios(self) -> Tensor:
        """log(pi / reference) of each answer (n, 2): its implicit reward over beta."""
        return self.sums - self.reference

    @property
    def accuracy(self) -> float:
        """The share of pairs whose chosen answer has the higher implicit reward; a tie counts half."""
        return _share(_gaps(self.log_ratios))

    @property
    def margin(self) -> float:
        """By how many nats the chosen answer's log-ratio is the higher one, on average (times beta: in reward)."""
        return float(_gaps(self.log_ratios).mean())

    @property
    def likelier(self) -> float:
        """The share of pairs whose chosen answer is the likelier one: what a model prefers without any reference."""
        return _share(_gaps(self.sums))

    @property
    def likelier_per_token(self) -> float:
        """The same by the mean log-probability of a token, which does not punish length."""
        return _share(_gaps(self.sums / self.lengths))

    @property
    def chosen(self) -> float:
        """Mean log-probability of the chosen answers, in nats."""
        return float(self.sums[:, 0].mean())

    @property
    def rejected(self) -> float:
        """Mean log-probability of the rejected answers, in nats."""
        return float(self.sums[:, 1].mean())

    @property
    def figures(self) -> dict[str, float]:
        """What a training logs of it."""
        names = ("accuracy", "margin", "chosen", "rejected")
        return {name: getattr(self, name) for name in names}

    @property
    def longer_chosen(self) -> float:
        """The share of pairs whose chosen answer is the longer one: the accuracy of always preferring the longer."""
        return _share(_gaps(self.lengths))

    @property
    def longer_preferred(self) -> float:
        """Where the answers are unequally long: the share in which the longer one has the higher implicit reward."""
        sides = _gaps(self.log_ratios) * _gaps(self.lengths)
        return _share(sides[_gaps(self.lengths) != 0])


def _gaps(pairs: Tensor) -> Tensor:
    """Chosen less rejected: (n, 2) -> (n,)."""
    return pairs[:, 0] - pairs[:, 1]


def _share(gaps: Tensor) -> float:
    """The share of positive ones; a zero counts half, and of none at all it is a half."""
    return float((gaps.sign() + 1).mean() / 2) if len(gaps) else 0.5


def judge(model, data: PreferenceDataset, max_tokens=None, dtype=None) -> Judgement:
    """
    Ask a model for the log-probabilities of a dataset's answers

    PAPER: arXiv:2305.18290 (DPO), section 5.1.
    PAPER CONTEXT: a language model is its own reward model, so it can be judged as one: by how it orders pairs.
    INTUITION: a taster is tested with pairs, not with marks.
    IMPLEMENTATION: the forward of training in evaluation mode; of each pair a few numbers are kept, on the CPU.
    WHY: accuracy, margin, loss and length bias are all read off them, whatever loss a model was trained with.

    Args:
        max_tokens: only so many places of rows, evenly spread (None: all).
        dtype: autocast's type, or None.
    """
    sums, reference, lengths = _ask(model, data, max_tokens, dtype)
    present = lengths[..., 0] > 0
    return Judgement(sums[present], reference[present], lengths[present])


def remember_reference(model, data: PreferenceDataset, dtype=None) -> None:
    """
    Write what a model says of all answers into the dataset, as the word of the reference

    PAPER: arXiv:2305.18290 (DPO), section 4.
    PAPER CONTEXT: the reference is the model as supervised fine-tuning left it, and it never changes.
    INTUITION: hear the witness once, take it down, and let him go home.
    IMPLEMENTATION: two numbers a pair; to be called before the optimizer moves anything.
    WHY: no second model in memory, and no second forward in every step.

    Raises ValueError if a log-probability is not finite.
    """
    sums, _, lengths = _ask(model, data, None, dtype)
    if not sums.isfinite().all():
        raise ValueError("the reference gives an answer a log-probability that is not a number: use a sound model")
    data.reference = sums.masked_fill(lengths == 0, torch.nan).float().numpy()


def _ask(model, data, max_tokens, dtype) -> list[Tensor]:
    """Sums, reference sums and lengths of the data's rows: float64 (rows, P, 2), on the CPU."""
    parts, size = [], max(1, tokens_at_once(model) // data.block_size)
    with evaluating(model, dtype) as device:
        for batch in data.windows(size, max_tokens):
            tokens, targets, reference = (tensor.to(device) for tensor in batch)
            with within_memory(model, tokens.numel()):
                sums, lengths = log_probs_of(model, tokens, targets, data.start_id, reference.shape[1])
            parts.append([values.cpu().double() for values in (sums, reference, lengths)])
    return [torch.cat(column) for column in zip(*parts)]


class Distance:
    """
    How far a model went from its reference: KL(pi || reference), in nats a token

    PAPER: arXiv:2305.18290 (DPO), section 6.1.
    PAPER CONTEXT: methods are compared by the reward they get for the KL they spend; beta is its price.
    INTUITION: a taste is cheap if nothing is left of the language.
    IMPLEMENTATION: exact over the vocabulary (no sampling) and averaged over the answer tokens of some held-out rows,
        chosen and rejected ones; the reference's distributions there are kept, about `most` of them. It is not the KL
        of whole answers as the model would write them, which the paper estimates by sampling.
    WHY: without it, any margin can be had.

    Args:
        model: the reference, as it is now.
        data: held-out pairs.
        most: at about how many tokens (each keeps a distribution over the vocabulary, in float32).
        dtype: autocast's type, or None.
    """

    def __init__(self, model, data: PreferenceDataset, most: int = 1024, dtype=None):
        self.plan, self.dtype = apart(data.start_id), dtype
        rows = max(1, round(most * data.epoch_size / data.packed.n_targets))
        self.batches = [batch[:2] for batch in data.windows(1, rows * data.block_size)]
        with evaluating(model, dtype) as device:
            self.reference = [self._log_probs(model, *batch, device) for batch in self.batches]

    def _log_probs(self, model, tokens, targets, device):
        """The log-distributions (N, V) at the answer tokens of a row."""
        tokens = tokens.to(device)
        logits = model(tokens, self.plan(model, tokens))[targets.to(device) != IGNORE]
        return logits.float().log_softmax(dim=-1)

    def __call__(self, model) -> float:
        """The mean KL of `model` to the reference."""
        parts = []
        with evaluating(model, self.dtype) as device:
            for batch, theirs in zip(self.batches, self.reference):
                ours = self._log_probs(model, *batch, device)
                parts.append((ours.exp() * (ours - theirs)).sum(dim=-1))
        return float(torch.cat(parts).mean())


def answers_to(model, template: Template, prompts: Sequence, max_new_tokens: int = 96, seed: int = 0) -> list[str]:
    """A sampled answer to each of some conversations, each drawn from `seed`."""
    return ["".join(answer(model, template, messages, max_new_tokens, seed=seed)) for messages in prompts]


def mean_length(template: Template, answers: Sequence[str]) -> float:
    """Tokens of an answer, on average."""
    return sum(len(template.tokenizer.encode(text)) for text in answers) / max(1, len(answers))
