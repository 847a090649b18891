"""
Optimizers

This file implements AdamW and Muon following:
- "Adam: A Method for Stochastic Optimization" (Kingma & Ba, 2014) - step sizes from running moments of the gradient
- "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2017) - AdamW: decay the weights, not the gradient
- "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024) - orthogonalised momentum
- "Muon is Scalable for LLM Training" (Liu et al., 2025) - weight decay and an update size that matches AdamW's

Each component is explained with paper references for educational purposes.
"""

import math
from collections import defaultdict

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    """
    Adam with decoupled weight decay

    PAPER: arXiv:1711.05101 (AdamW), algorithm 2; arXiv:1412.6980 (Adam), algorithm 1.
    PAPER CONTEXT: dividing the averaged gradient by its own typical size makes steps insensitive to its scale.
    INTUITION: momentum says where to go, the second moment says how much to trust each coordinate.
    IMPLEMENTATION: `torch._foreach_*` treats all parameters of a group that took as many steps in one call per line of
        the algorithm; the bias corrections are folded into scalars. Equal to `torch.optim.AdamW`.
    WHY: the baseline of every language model, and what embeddings, norms and the head use here.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step for every parameter that has a gradient."""
        for group in self.param_groups:
            same_age = defaultdict(list)  # steps taken -> parameters: an expert may get its first gradient late
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    state["step"] += 1
                    same_age[state["step"]].append(p)
            for steps, params in same_age.items():
                self._move(params, steps, group)

    def _move(self, params, steps, group):
        """Take step number `steps` (it decides the bias corrections) of some parameters."""
        grads = [p.grad for p in params]
        means = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])  # decoupled decay (AdamW, line 12)
        torch._foreach_lerp_(means, grads, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        torch._foreach_mul_(squares, beta2)  # v = beta2 v + (1 - beta2) g^2
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2**steps))  # bias correction of v
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, means, roots, -lr / (1 - beta1**steps))  # with the correction of m


# Coefficients of an odd quintic whose iteration drives singular values quickly into about [0.7, 1.2] (Jordan et al.).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices, steps=5):
    """
    Newton-Schulz iteration: the nearest (semi-)orthogonal matrix, approximately

    PAPER: Muon post (Jordan et al., 2024), on the Newton-Schulz iteration.
    PAPER CONTEXT: G = U S V^T is sent to about U V^T by five matrix-product-only steps, stable in bfloat16.
    INTUITION: every direction that the momentum contains gets the same step length, the rare ones, too.
    IMPLEMENTATION: X <- aX + (bA + cA^2) X with A = X X^T, after scaling to Frobenius norm 1; the smaller side of the
        matrix stands first; a stack (n, rows, columns) is treated at once.
    WHY: an SVD would be exact, and far too slow on a GPU.
    """
    a, b, c = _QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # all singular values at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """
    Momentum, orthogonalised: for hidden matrices

    PAPER: Muon post (Jordan et al., 2024); arXiv:2502.16982 (Liu et al., 2025), equation 4.
    PAPER CONTEXT: with decay and update scale set, Liu et al. report about twice AdamW's compute efficiency.
    INTUITION: Adam rescales coordinates one by one; Muon rescales whole directions of a matrix.
    IMPLEMENTATION: Nesterov momentum, `orthogonalize`, then a step of 0.2 sqrt(max(rows, columns)) * lr, which has the
        root-mean-square size of an AdamW step, so both share learning rate and decay. Equal shapes are stacked.
    WHY: lower loss at equal tokens; embeddings, head and vectors stay with AdamW, as both papers advise.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, steps=5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        wrong = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if wrong:
            raise ValueError(f"Muon takes matrices; give the shapes {wrong} to AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step for every matrix that has a gradient."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, params in same_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p] = {"momentum": torch.zeros_like(p)}
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: look one step further
                updates = orthogonalize(torch.stack(ahead), group["steps"]).unbind()
                size = 0.2 * math.sqrt(max(shape))  # equation 4 of Liu et al.: the size of an AdamW step
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-group["lr"] * size)


class OptimizerSet:
    """
    Several optimizers, each with its own parameters, behind the face of one

    PAPER: Muon post (Jordan et al., 2024): hidden matrices to Muon, the rest to AdamW.
    PAPER CONTEXT: embeddings, head, norms and biases are trained by AdamW even where Muon does the heavy work.
    INTUITION: two drivers for two kinds of road, one steering wheel.
    IMPLEMENTATION: each parameter group keeps its peak in ``group["peak_lr"]``; `set_lr_scale` moves all together.
    WHY: the trainer, schedules and checkpoints need not know how many optimizers there are.
    """

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)
        for group in self.param_groups:
            group.setdefault("peak_lr", group["lr"])

    @property
    def param_groups(self):
        """The parameter groups of all members."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr_scale(self, scale):
        """Set every learning rate to `scale` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def step(self):
        """Let every member take its step."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        """The members' states by class name."""
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self.optimizers}

    def load_state_dict(self, state):
        """Take over the moments written by `state_dict`; learning rates, decay and betas stay those of this run.

        Raises:
            ValueError: the state belongs to another set of optimizers, or to other parameter groups.
        """
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        if sorted(names) != sorted(state):
            raise ValueError(f"the checkpoint holds the optimizers {sorted(state)}, this run uses {sorted(names)}")
        for name, optimizer in zip(names, self.optimizers):
            groups = optimizer.state_dict()["param_groups"]
            sizes, saved = ([len(group["params"]) for group in g] for g in (groups, state[name]["param_groups"]))
            if sizes != saved:
                raise ValueError(f"the checkpoint's {name} has groups of {saved} parameters, this run's has {sizes}")
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": groups})


def build_optimizer(model, name, lr, weight_decay, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, embed_lr=None):
    """Sort a model's parameters into groups and build the optimizer.

    Matrices inside ``model.blocks`` go to Muon (or AdamW with decay), everything else to AdamW; vectors (norms,
    biases) are never decayed. An optimizer that would have no parameters is left out.

    Args:
        model: has ``blocks``; frozen parameters are left out.
        name: ``"muon"`` or ``"adamw"``.
        lr: peak learning rate of the hidden matrices and the vectors.
        embed_lr: peak learning rate of embeddings and head; by default `lr`.

    Raises:
        ValueError: an unknown name, or nothing to train.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"OPTIMIZER={name} is unknown: use adamw or muon")
    hidden, tables, vectors = [], [], []
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = vectors if parameter.ndim < 2 else hidden if key.startswith("blocks.") else tables
            kind.append(parameter)
    if not hidden + tables + vectors:
        raise ValueError("every parameter of the model is frozen: there is nothing to train")
    groups = [
        {"params": tables, "lr": lr if embed_lr is None else embed_lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    members = []
    if name == "muon" and hidden:
        members.append(Muon(hidden, lr, momentum, weight_decay))
    elif hidden:
        groups.append({"params": hidden, "lr": lr, "weight_decay": weight_decay})
    groups = [group for group in groups if group["params"]]
    if groups:
        members.append(AdamW(groups, lr, betas, eps))
    return OptimizerSet(*members)
