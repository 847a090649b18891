"""
Learning-rate schedules

This file implements the two schedules of modern pre-training following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT: linear warm-up, then cosine
- "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies" (Hu et al., 2024) -
  warm-up, stable, decay (WSD)

Each component is explained with paper references for educational purposes.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """
    Learning rate as a pure function of the step

    PAPER: arXiv:2404.06395 (MiniCPM), section 4: schedules as functions of the step number.
    PAPER CONTEXT: a schedule multiplies the peak learning rate; warm-up is linear in every recipe used here.
    INTUITION: start gently while Adam's averages are empty, travel fast, and settle down at the end.
    IMPLEMENTATION: `schedule[i]` is the multiplier of step i in (0, 1]; nothing is remembered between steps.
    WHY: a pure function resumes by being asked for step i; there is no scheduler state to save or to lose.
    """

    total: int  # steps of the whole run
    warmup: int  # steps of linear warm-up
    shape: object  # after the warm-up: progress in [0, 1] -> multiplier

    def __post_init__(self):
        """Refuse a warm-up that leaves nothing to train."""
        if self.total < 1 or not 0 <= self.warmup <= self.total:
            raise ValueError(f"a schedule needs 0 <= warm-up <= total steps, not {self.warmup} and {self.total}")

    def __len__(self):
        return self.total

    def __getitem__(self, step):
        if not 0 <= step < self.total:
            raise IndexError(f"step {step} is outside of the schedule's {self.total} steps")
        if step < self.warmup:
            return (step + 1) / self.warmup  # never zero: the first step should already move
        return self.shape((step - self.warmup) / max(1, self.total - self.warmup))


def cosine(total, warmup, floor=0.1):
    """
    Linear warm-up, then half a cosine down to `floor`

    PAPER: "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018), section 4.1.
    PAPER CONTEXT: GPT-1 anneals to zero with a cosine; GPT-3's successors stop at a tenth of the peak.
    INTUITION: the slope is gentle at both ends and steep in the middle.
    IMPLEMENTATION: floor + (1 - floor) * (1 + cos(pi * progress)) / 2.
    WHY: needs no tuning, but the length of the run must be known before it starts.
    """
    return Schedule(total, warmup, lambda progress: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_stable_decay(total, warmup, decay_fraction=0.4, floor=0.0):
    """
    Linear warm-up, a plateau, then a linear decay (WSD)

    PAPER: arXiv:2404.06395 (MiniCPM), section 4.2, with a linear decay instead of the paper's exponential one.
    PAPER CONTEXT: most of the loss drop happens in the short decay; the plateau can be prolonged or branched at will.
    INTUITION: explore at full speed, then let the noise of the large steps die out.
    IMPLEMENTATION: the last `decay_fraction` of the steps falls linearly from 1 to `floor`.
    WHY: the plateau's checkpoint can be trained on for longer, which a cosine's cannot without a new warm-up.
    """
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"decay_fraction={decay_fraction} must be in (0, 1]: it is the part of the steps that decays")
    if warmup + int(decay_fraction * total) > total:
        raise ValueError(
            f"a warm-up of {warmup} steps and a decay of decay_fraction={decay_fraction} overlap in a run of {total} "
            f"steps: shorten one of them"
        )

    def shape(progress):
        # progress counts from the end of the warm-up; the decay begins where 1 - progress falls below its share
        share = decay_fraction * total / max(1, total - warmup)
        return floor + (1 - floor) * min(1.0, (1 - progress) / share)

    return Schedule(total, warmup, shape)


SCHEDULES = {"cosine": cosine, "wsd": warmup_stable_decay}
