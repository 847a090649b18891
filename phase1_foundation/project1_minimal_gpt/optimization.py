"""
Optimisation

This file implements how the weights are updated following:
- "Adam: A Method for Stochastic Optimization" (Kingma & Ba, 2014) - a step size for every weight
- "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2017) - AdamW
- "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018) - warm-up, then a cosine

Each component is explained with paper references for educational purposes.
"""

import math

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Make AdamW with two groups: matrices and embeddings decay, biases and LayerNorm gains do not.

    PAPER: "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, algorithm 1; "Decoupled Weight Decay
        Regularization", arXiv:1711.05101, algorithm 2; the groups: GPT-1, section 4.1.
    PAPER CONTEXT: Adam divides a running mean m of the gradient by the root of its running square v, both corrected for
        their start at 0; AdamW shrinks the weights directly: in the gradient, decay would be rescaled by v.
    INTUITION: every weight moves about one learning rate per step, in the direction its gradients agree on.
    IMPLEMENTATION: PyTorch's AdamW, fused where there is such a kernel (project 3 writes the formula out).
    WHY: pulling a gain or a bias towards 0 would fight what normalisation needs it for.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    free = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = decayed[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def learning_rate_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Return the learning rate of a step: a linear rise over `warmup` steps, then half a cosine down to `floor`.

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 4.1.
    PAPER CONTEXT: increased linearly from zero over the first 2000 updates, then annealed to 0 with a cosine schedule.
    INTUITION: feel the way, run, then tread ever more softly, so that the noise of small batches averages out.
    IMPLEMENTATION: a pure function of the step, so that a resumed run needs no scheduler state.
    WHY: Adam's first estimates of v rest on a few batches; full steps on them would throw the weights far off.

    >>> [round(learning_rate_at(step, 1.0, 0.1, warmup=2, total=10), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.134]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)  # 0 at the peak, 1 after the last step
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor, clip: float,
    autocast: torch.autocast,
) -> torch.Tensor:  # fmt: skip
    """Forward, backward, clip, update: returns the loss before the update, still on its device.

    `clip` is the largest norm that all gradients together may have; 0 leaves them alone. It keeps one odd batch from
    undoing the work of a hundred.
    """
    with autocast:
        loss = model(inputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.detach()
