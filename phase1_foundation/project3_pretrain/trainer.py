"""
The training loop

This file implements the one loop of the roadmap, for every later training stage, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - next-token prediction
- "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022) - model FLOPs utilization

Each component is explained with paper references for educational purposes.
"""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.shuffle import mix


class DivergedError(ValueError):
    """A loss or the gradient is no longer a number; nothing was moved or saved after that was seen."""


class NextToken:
    """
    Next-token prediction, as a sum

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2, equation 1.
    PAPER CONTEXT: a language model factorises a text's probability into one conditional per token.
    INTUITION: at every position, pay the negative log of the probability that was given to what really came next.
    IMPLEMENTATION: the model gives the loss per token; this returns the sum over the batch and, separately, says how
        many tokens count. The trainer divides by the count over all micro batches and ranks.
    WHY: a mean of means weighs micro batches with unequal masks wrongly; a sum over a count cannot.

    Args:
        plan: ``plan(model, tokens)`` makes the `Plan` of a batch (None: whole rows, `Causal`); packed conversations
            and masked documents come in here.
    """

    unit = "tok"  # what `count` counts, as progress names it
    loss_unit = "nats a token"

    def __init__(self, plan=None):
        self.plan = plan or (lambda model, tokens: None)

    def count(self, batch):
        """How many targets of a batch (tokens, targets) count; known before the forward."""
        return int((batch[1] != IGNORE).sum())

    def __call__(self, model, batch):
        """The summed loss of a batch, in nats: a 0-d float32 tensor."""
        tokens, targets = batch
        counted = (targets != IGNORE).sum()  # `count`, left on the device: fetching it would make a GPU wait
        losses = model(tokens, self.plan(model, tokens), targets)
        # The trainer divides by the count: weighed by it, the auxiliary term weighs the same under every mask.
        return losses.sum() + model.auxiliary_losses() * counted


class Step:
    """
    One optimizer step: everything that precision and parallelism may replace

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019): large batches of tokens.
    PAPER CONTEXT: a batch of half a million tokens does not fit one forward; gradients of micro batches add up.
    INTUITION: walk through the micro batches, collect the gradient of the whole group, then move once.
    IMPLEMENTATION: `backward` sees the whole group (pipeline schedules need that) and divides each summed loss by the
        count over all micros and ranks, so gradients simply add; `update` sums them over ranks, clips and moves.
    WHY: mixed precision, pipelines and CUDA graphs subclass this (by DTYPE: the catalog's group "steps"), not `fit`.

    Args:
        model: takes (tokens, targets=...); already on its device.
        objective: has ``count(batch)``, ``objective(model, batch)``, `unit` and `loss_unit` as `NextToken`.
        optimizer: an `OptimizerSet`.
        clip: largest norm of the gradient (None: no clipping).
        dtype: autocast's type, ``torch.bfloat16`` on a GPU; None computes in the weights' own type.
    """

    def __init__(self, model, objective, optimizer, clip=1.0, dtype=None):
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.clip, self.dtype = clip, dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def autocast(self):
        """The context in which forwards run."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, micros, denominator):
        """Accumulate the gradient of a whole group of micro batches.

        Args:
            micros: batches (tuples of CPU tensors) of this rank.
            denominator: how many tokens count, over all micros and ranks.

        Returns:
            This rank's summed loss over `denominator`: a 0-d tensor on the device.
        """
        self.model.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for micro in micros:
            batch = self.to_device(micro)
            with self.autocast():
                loss = self.objective(self.model, batch) / denominator
            self.backpropagate(loss)
            total += loss.detach()
        return total

    def backpropagate(self, loss):
        """Add the gradient of one micro batch's loss to what there is."""
        loss.backward()

    def to_device(self, micro):
        """Move a batch to the device; the copy overlaps with computation."""
        if self.device.type != "cuda":
            return tuple(tensor.to(self.device) for tensor in micro)
        return tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in micro)

    def update(self, lr_scale):
        """Sum the gradient over ranks, clip it, and let the optimizer move.

        Returns:
            The norm of the gradient before clipping; infinite where a subclass left the step out.

        Raises:
            DivergedError: the gradient is not finite; nothing was moved.
        """
        self.reduce_gradients()
        norm = self.clip_gradients()
        self.move(lr_scale)
        return norm

    def gradients(self):
        """The gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def clip_gradients(self):
        """Shorten a gradient that is too long; returns its norm, raises DivergedError where that is not finite."""
        limit = self.clip if self.clip else float("inf")
        norm = float(torch.nn.utils.get_total_norm(self.gradients()))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient's norm became {norm}")
        if norm > limit:
            torch._foreach_mul_(self.gradients(), limit / (norm + 1e-6))
        return norm

    def move(self, lr_scale):
        """Let the optimizer take its step."""
        self.optimizer.set_lr_scale(lr_scale)
        self.optimizer.step()

    def reduce_gradients(self):
        """Add up the gradients of all ranks: one message, since one large one is faster than many small ones.

        A parameter that some ranks did not use (an expert that got no token) counts as zero there; one that no rank
        used keeps no gradient, as in a single process.
        """
        if self.world_size == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([used, *(grad.reshape(-1) for grad in grads)])
        dist.all_reduce(flat)
        used, *sums = flat.split([len(grads), *(grad.numel() for grad in grads)])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(sums, grads)])
        for parameter, grad, ranks in zip(self.parameters, grads, used.tolist()):
            parameter.grad = grad if ranks else None

    def sum_over_ranks(self, number):
        """Add up a number of all ranks."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def weights(self):
        """The model's weights as a checkpoint keeps them."""
        return self.model.state_dict()

    def load_weights(self, state):
        """Continue from `weights`."""
        self.model.load_state_dict(state)

    def state_dict(self):
        """What a checkpoint needs besides the model: the optimizers' states; a subclass's own go by the name "step"."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Continue from `state_dict`, of any other kind of step, too: what is not the optimizers' is left out."""
        self.optimizer.load_state_dict({name: part for name, part in state.items() if name != "step"})


@dataclass
class TrainState:
    """What hooks see after each step; they may set `val_loss` and `stop`."""

    step: Step
    total: int  # steps of the whole run
    iter: int = 0  # steps finished
    tokens: int = 0  # tokens that counted in the last step
    seconds: float = 0.0  # the last step took
    train_loss: float = math.nan  # nats per token of the last step
    val_loss: float = math.nan  # the latest evaluation
    grad_norm: float = math.nan
    lr_scale: float = 0.0
    stop: bool = False
    extra: dict = field(default_factory=dict)  # hooks' own additions to the checkpoint


def fit(step, batches, schedule, hooks=(), start=0, seed=0, state=None):
    """
    The one training loop

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.
    PAPER CONTEXT: the papers differ in data, objective and precision; the loop around them is always this one.
    INTUITION: fetch, count, backward, update, tell the hooks.
    IMPLEMENTATION: `batches[i]` and the seed of step i are pure functions of (seed, i, rank), so resuming is starting
        at another i. Everything that is not the step itself (progress, evaluation, checkpoints) is a hook.
    WHY: pre-training, fine-tuning, preference and distillation runs share it and differ only in their arguments.

    Args:
        step: a `Step`.
        batches: ``batches[i]`` is the list of micro batches of step i on this rank.
        schedule: ``schedule[i]`` is the learning-rate multiplier of step i; its length is the run's.
        hooks: called with the `TrainState` after each step, in order; where they have it, ``close(state)`` is called
            at the end, and ``remedy(state)`` says where to go back to after a divergence.
        start: steps already done.
        seed: of dropout and all else that is random in a step.
        state: a `TrainState` to fill in place of a new one (with something in its `extra`, say).

    Returns:
        The final `TrainState`.

    Raises:
        DivergedError: a loss or the gradient is not a number; seen before the optimizer moves.
        ValueError: no token of a step counts.
    """
    state = state or TrainState(step, len(schedule))
    state.iter = start
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        for i in range(start, len(schedule)):
            began = time.perf_counter()
            micros = batches[i]
            torch.manual_seed(mix(seed, i, rank))  # dropout: a function of (seed, step, rank)
            try:
                _advance(state, micros, schedule[i])
                state.iter, state.seconds = i + 1, time.perf_counter() - began
                for hook in hooks:
                    hook(state)
            except DivergedError as error:
                ways = [hook.remedy(state) for hook in hooks if hasattr(hook, "remedy")]
                advice = " ".join(["Use a lower learning rate or a longer warm-up.", *ways])
                raise DivergedError(f"training diverged at step {i + 1}: {error}. {advice}") from error
            if state.stop:
                break
    finally:
        for hook in hooks:
            if hasattr(hook, "close"):
                hook.close(state)
    return state


def _advance(state, micros, lr_scale):
    """Take one step, unless its loss or gradient says that it must not be taken."""
    step = state.step
    state.tokens = int(step.sum_over_ranks(sum(step.objective.count(micro) for micro in micros)))
    if not state.tokens:
        raise ValueError(
            f"step {state.iter + 1} has no token that counts, all its targets are masked (-100): leave such texts out "
            f"of the data, or take larger batches"
        )
    state.train_loss = step.sum_over_ranks(float(step.backward(micros, state.tokens)))
    if not math.isfinite(state.train_loss):
        raise DivergedError(f"the loss became {state.train_loss}")
    state.lr_scale = lr_scale
    state.grad_norm = step.update(lr_scale)


def flops_per_token(model, length):
    """
    Training FLOPs of one token, for MFU

    PAPER: arXiv:2204.02311 (PaLM), appendix B.
    PAPER CONTEXT: MFU counts the operations the model needs, not what recomputation adds.
    INTUITION: every matrix weight multiplies and adds once forward and twice backward: 6 per token.
    IMPLEMENTATION: 6 N + 12 L H D T, with N the weights of all matrix products (a tied head counts once; position
        tables and norms do not count) and attention counted in full, not halved for causality, as the paper does. A
        frozen weight has no gradient of its own: 4 in place of 6.
    WHY: utilization = tokens/s * this / peak FLOP/s compares runs of different models and machines.
    """
    # walking over the list counts a shared block as often as it runs
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    products = sum((6 if p.requires_grad else 4) * p.numel() for p in [*matrices, model.head.weight])  # tied or not
    attention = sum(12 * spec.n_head * spec.head_size * min(length, spec.window or length) for spec in model.specs)
    return products + attention
