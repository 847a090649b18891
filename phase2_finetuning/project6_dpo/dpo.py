"""
Direct preference optimization

This file implements learning from preferences without a reward model, as a loss and as an objective, following:
- "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al., 2023) - DPO
- "A note on DPO with noisy preferences & relationship to IPO" (Mitchell, 2023) - cDPO: labels that may be flipped
- "A General Theoretical Paradigm to Understand Learning from Human Preferences" (Azar et al., 2023) - IPO
- "SimPO: Simple Preference Optimization with a Reference-Free Reward" (Meng et al., 2024) - SimPO
- "ORPO: Monolithic Preference Optimization without Reference Model" (Hong et al., 2024) - ORPO

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.head import IGNORE
from phase2_finetuning.project4_sft.packing import apart

SURE = -1e-6  # a mean log-probability above this counts as this: the odds of certainty are infinite


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
             beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """
    The loss of pairs, from the log-probabilities of their answers under the model and under its reference

    PAPER: arXiv:2305.18290 (DPO), equation 7; label smoothing: "A note on DPO with noisy preferences & relationship to
        IPO", equation 3.
    PAPER CONTEXT: the best policy of RLHF has the reward beta log(pi / reference) up to a term of the prompt alone.
    INTUITION: whoever praises an answer more than the old self did has shown a taste; make it that of the people.
    IMPLEMENTATION: -log sigmoid(h), h the chosen answer's reward less the rejected one's; label_smoothing is the chance
        that a label is flipped, so the flipped pair's loss counts that much.
    WHY: one classification loss for the reward model and the reinforcement learning behind it.

    All arguments are sums over the answers' tokens, of one shape, which the result has, too.

    >>> dpo_loss(*torch.tensor([-3.0, -5.0, -4.0, -4.0]), beta=1.0)     # log(1 + exp(-2))
    tensor(0.1269)
    """
    h = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def dpo_gradient(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
                 beta: float = 0.1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    The derivatives of `dpo_loss` by `chosen` and `rejected`, written down instead of derived

    PAPER: arXiv:2305.18290 (DPO), section 4.
    PAPER CONTEXT: the gradient raises the chosen answer and lowers the rejected one, weighted by how wrong the implicit
        reward orders them.
    INTUITION: what is ordered rightly already pulls no more; what is ordered wrongly pulls with all its weight.
    IMPLEMENTATION: beta sigmoid(-h), with h as in the loss, down for the chosen answer and up for the rejected one.
    WHY: both pull equally hard; as nothing holds the two in place, both may fall together, as in fact they often do.
    """
    h = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    weight = beta * torch.sigmoid(-h)
    return -weight, weight


def ipo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
             tau: float = 0.1) -> Tensor:  # fmt: skip
    """
    A loss that wants a certain margin, not an ever larger one; of *mean* log-probabilities

    PAPER: arXiv:2310.12036 (IPO), equation 17.
    PAPER CONTEXT: where one answer always wins, DPO's margin grows without bound, whatever beta; a square stops it.
    INTUITION: aim at a mark instead of throwing as far as possible.
    IMPLEMENTATION: (h - 1 / (2 tau))^2, h the difference of log-ratios. The paper writes pi(y|x) and says nothing of
        length; means over tokens are what its authors told the makers of `trl` to take (its pull request 1265).
    WHY: sums would make the mark a different one for every length.
    """
    return ((chosen - reference_chosen) - (rejected - reference_rejected) - 1 / (2 * tau)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """
    A loss without a reference, of *mean* log-probabilities

    PAPER: "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734, equation 6.
    PAPER CONTEXT: the reward is the average log-probability, which is also what generation maximises; a margin gamma
        is asked for on top.
    INTUITION: prefer what you would say yourself, and clearly so.
    IMPLEMENTATION: -log sigmoid(beta (chosen - rejected) - gamma).
    WHY: no second model; and the mean keeps the loss from rewarding length.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, weight: float = 0.1) -> Tensor:
    """
    Fine-tuning on the chosen answer and a penalty on the odds of the other one; of *mean* log-probabilities

    PAPER: "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691, equations 3 to 7.
    PAPER CONTEXT: L = L_SFT + lambda L_OR, L_OR = -log sigmoid(log of the odds ratio), odds(y|x) = P / (1 - P).
    INTUITION: learn the good answer by heart and, while at it, lean away from the bad one.
    IMPLEMENTATION: P = exp(mean log-probability) as in equation 3; `weight` is the paper's lambda; log(1 - P) by
        `expm1`, which keeps its digits where P is close to 1.
    WHY: one stage instead of two, and no reference.
    """
    log_odds = [p - torch.log(-torch.expm1(p.clamp(max=SURE))) for p in (chosen, rejected)]
    return -chosen - weight * F.logsigmoid(log_odds[0] - log_odds[1])


def answer_log_probs(nll: Tensor, tokens: Tensor, targets: Tensor, start_id: int, n: int) -> tuple[Tensor, Tensor]:
    """
    What a model says of the answers in packed rows: (sums of log-probabilities, numbers of tokens), both (B, n, 2)

    PAPER: arXiv:2305.18290 (DPO), section 3.
    PAPER CONTEXT: log pi(y|x) is the sum over the answer's tokens; those of the prompt are given, not said.
    INTUITION: a bill for each answer, to which every one of its tokens, the <|end|> among them, adds its price.
    IMPLEMENTATION: targets are next tokens already, and -100 outside of answers, so nothing is shifted here. Document
        2 i of a row is the chosen answer of its pair i, 2 i + 1 the rejected one (`PreferenceDataset`).
    WHY: one forward and one scatter for all answers. Padding falls into the last place, where it adds 0.

    nll, tokens, targets (B, T); `n` pairs a row at most; where a row has fewer, both are 0.
    """
    document = ((tokens == start_id).cumsum(dim=1) - 1).clamp(0, 2 * n - 1)  # (B, T)
    empty = nll.new_zeros(len(nll), 2 * n)
    sums = empty.scatter_add(1, document, -nll)
    lengths = empty.scatter_add(1, document, (targets != IGNORE).to(nll.dtype))
    return sums.unflatten(1, (n, 2)), lengths.unflatten(1, (n, 2))  # (B, n, 2)


def log_probs_of(model: nn.Module, tokens: Tensor, targets: Tensor, start_id: int, n: int) -> tuple[Tensor, Tensor]:
    """A forward of packed rows (B, T), as what `answer_log_probs` makes of it."""
    nll = model(tokens, apart(start_id)(model, tokens), targets)  # (B, T)
    return answer_log_probs(nll, tokens, targets, start_id, n)


# name -> loss(settings, sums, reference sums, lengths (..., 2): the chosen answer first) -> (...)
LOSSES = {
    "dpo": lambda s, sums, reference, n: dpo_loss(*_sides(sums), *_sides(reference), s.BETA, s.LABEL_SMOOTHING),
    "ipo": lambda s, sums, reference, n: ipo_loss(*_sides(sums / n), *_sides(reference / n), s.IPO_TAU),
    "simpo": lambda s, sums, reference, n: simpo_loss(*_sides(sums / n), s.SIMPO_BETA, s.SIMPO_GAMMA),
    "orpo": lambda s, sums, reference, n: orpo_loss(*_sides(sums / n), s.ORPO_WEIGHT),
}


def _sides(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of (..., 2)."""
    return pairs[..., 0], pairs[..., 1]


class PreferenceObjective:
    """
    Preferences as an objective of `Step`

    PAPER: arXiv:2305.18290 (DPO), section 4, outline.
    PAPER CONTEXT: collect pairs, then optimize the model against the given reference: no sampling, no value function.
    INTUITION: the loop of pre-training does not care whether it adds up tokens or pairs.
    IMPLEMENTATION: counts pairs and returns the *sum* of their losses, as `NextToken` does for tokens. The reference's
        numbers come with the batch; or, given `without_adapters`, from the same model with its adapters off.
    WHY: no second model in memory in either case.

    Args:
        loss: ``loss(sums, reference sums, lengths)``, one of `LOSSES` with its settings filled in.
        start_id: the token that opens a document.
        without_adapters: ``with without_adapters(model):`` turns the model into its reference for a while (project 5).
    """

    unit, loss_unit = "pairs", "a pair"

    def __init__(self, loss: Callable, start_id: int, without_adapters: Callable | None = None):
        self.loss, self.start_id, self.without_adapters = loss, start_id, without_adapters

    def count(self, batch) -> int:
        """How many pairs a batch (tokens, targets, reference) has."""
        return int(batch[2][..., 0].isfinite().sum())

    def __call__(self, model: nn.Module, batch) -> Tensor:
        """The summed loss of a batch: a 0-d float32 tensor."""
        tokens, targets, reference = batch
        sums, lengths = self.log_probs(model, tokens, targets, reference.shape[1])
        present = reference[..., 0].isfinite()  # (B, P)
        if self.without_adapters:
            reference = self.ask_reference(model, tokens, targets, reference.shape[1])
        # An absent pair must not even pass through the loss as NaN: 0 times its gradient would be NaN, too.
        losses = self.loss(sums, reference.nan_to_num(), lengths.clamp(min=1))
        # As in `NextToken`: the trainer divides by the count, and the auxiliary term is to weigh the same in any batch.
        return losses.where(present, 0).sum() + model.auxiliary_losses() * present.sum()

    def log_probs(self, model: nn.Module, tokens: Tensor, targets: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The sums and lengths (B, n, 2) of a batch's answers."""
        return log_probs_of(model, tokens, targets, self.start_id, n)

    @torch.no_grad()
    def ask_reference(self, model: nn.Module, tokens: Tensor, targets: Tensor, n: int) -> Tensor:
        """The sums (B, n, 2) of the model without its adapters and without dropout."""
        training = model.training
        model.eval()
        try:
            with self.without_adapters(model):
                return self.log_probs(model, tokens, targets, n)[0]
        finally:
            model.train(training)
