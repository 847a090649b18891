"""
Loss scaling

This file implements training in float16 following:
- "Mixed Precision Training" (Micikevicius et al., 2017) - the loss is scaled so that no gradient underflows; dynamic
  scaling skips a step that overflowed

Each component is explained with paper references for educational purposes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.trainer import DivergedError, Step

FLOOR = 2.0**-14  # a step that overflows below this scale has not overflowed because of it


class LossScaler:
    """
    The factor of the loss, and what is learned from each step about it

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2; the rule is that of `torch.amp.GradScaler`.
    PAPER CONTEXT: by the chain rule a scaled loss scales all gradients. The paper's factors are constants; an overflow
        shows as infinities and NaN in the weights' gradients, and the update may then be skipped.
    INTUITION: turn the volume up until it distorts, go down a step, try again after a while.
    IMPLEMENTATION: an overflow multiplies the scale by `backoff`, `interval` good steps in a row by `growth`. All are
        powers of two, so that scaling and unscaling change exponents alone and round nothing.
    WHY: float16 has no numbers below 2^-24, where a large part of the gradients lies; nobody has to know where.

    >>> scaler = LossScaler(scale=8.0, interval=2)
    >>> scaler.update(True), scaler.update(False), scaler.update(False)
    (4.0, 4.0, 8.0)

    Raises ValueError for values with which the scale could not move both ways.
    """

    def __init__(self, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000):
        if not (0 < scale < math.inf and growth > 1 and 0 < backoff < 1 and interval >= 1):
            raise ValueError(
                f"scale={scale}, growth={growth}, backoff={backoff}, interval={interval}: the scale must be positive, "
                f"growth above 1, backoff between 0 and 1, the interval at least 1 step: use 65536, 2, 0.5, 2000"
            )
        self.scale, self.growth, self.backoff, self.interval = float(scale), growth, backoff, interval
        self.good = 0  # steps in a row without overflow
        self.skipped = 0  # steps that overflowed, of all

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is large enough."""
        return loss * self.scale

    def unscale(self, gradients: Sequence[Tensor]) -> bool:
        """Divide gradients by the scale, in place; True if any of them is infinite or NaN (then all are useless)."""
        if not gradients:
            return False
        torch._foreach_mul_(gradients, 1 / self.scale)
        worst = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, math.inf)])
        return not bool(worst.isfinite().all())

    def update(self, overflowed: bool) -> float:
        """Learn from a step; returns the scale of the next."""
        self.good = 0 if overflowed else self.good + 1
        self.skipped += overflowed
        if overflowed:
            self.scale *= self.backoff
        elif self.good == self.interval:
            grown = float(torch.tensor(self.scale * self.growth, dtype=torch.float32))
            self.scale, self.good = (grown if math.isfinite(grown) else self.scale), 0
        return self.scale

    def state_dict(self) -> dict:
        """What a checkpoint must hold, so that a run goes on as if it had not stopped."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        self.scale, self.good, self.skipped = float(state["scale"]), int(state["good"]), int(state["skipped"])


class ScaledStep(Step):
    """
    An optimizer step with a scaled loss

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2.
    PAPER CONTEXT: scale the loss before the backward pass; unscale right after it, before gradients are clipped.
    INTUITION: the magnifying glass is taken away before anything is measured.
    IMPLEMENTATION: gradients of all micro batches and ranks are summed while scaled; then one look at all of them. A
        step that overflowed moves nothing and reports an infinite norm, which is no divergence: the scale is halved.
    WHY: `fit` runs unchanged, and the scale is part of the checkpoint.

    Raises DivergedError at the first overflow with a scale below 2^-14.
    """

    def __init__(self, model, objective, optimizer, clip=1.0, dtype=torch.float16, scaler=None):
        super().__init__(model, objective, optimizer, clip, dtype)
        self.scaler = scaler or LossScaler()

    def backpropagate(self, loss):
        """Add the gradient of one micro batch's scaled loss to what there is."""
        super().backpropagate(self.scaler.scaled(loss))

    def update(self, lr_scale):
        """Unscale, then clip and move; or leave the step out."""
        self.reduce_gradients()
        overflowed = self.scaler.unscale(self.gradients())
        if overflowed and self.scaler.scale < FLOOR:
            raise DivergedError(f"the gradient overflows float16 even at a loss scale of {self.scaler.scale:g}")
        norm = math.inf
        if not overflowed:
            norm = self.clip_gradients()
            self.move(lr_scale)
        self.scaler.update(overflowed)
        return norm

    def state_dict(self):
        """The optimizer's state and the scale."""
        return super().state_dict() | {"step": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Continue from `state_dict`, or from a run that scaled nothing."""
        super().load_state_dict(state)
        if "step" in state:
            self.scaler.load_state_dict(state["step"])
