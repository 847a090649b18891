"""
Master weights

This file implements models whose weights have 16 bits, and optimizers whose weights have 32, following:
- "Mixed Precision Training" (Micikevicius et al., 2017) - a float32 copy of the weights collects the updates

Each component is explained with paper references for educational purposes.
"""

import torch
from torch import nn

from common.modules import is_linear
from phase1_foundation.project3_pretrain.trainer import Step
from phase3_core_inference.project7_mixed_precision.loss_scaling import ScaledStep


def lowered_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name that may have 16 bits: matrices, and the biases of linear layers; norms stay float32."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and (parameter.ndim >= 2 or is_linear(prefix, module)):
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


class MasterStep(Step):
    """
    A step of a model in 16 bits, taken in 32

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.1, figure 1.
    PAPER CONTEXT: weights, activations and gradients are stored in 16 bits; the optimizer updates a float32 master
        copy, which is rounded for each forward. Without it, updates below half of the weight's last bit are lost.
    INTUITION: pay in coins, but keep the books in fractions of a coin: else a plan to save pennies saves nothing.
    IMPLEMENTATION: the optimizer is handed the masters in place of the weights. After each micro batch the gradients go
        to the masters, where they are summed in float32. Norms stay float32 (section 3.3), so forwards run in autocast.
    WHY: autocast casts each weight anew in every forward; here it is stored as it is used. Nothing is saved: 2 + 4
        bytes a weight in place of 4.

    A checkpoint holds the masters, so it is what any other DTYPE would have written.
    """

    def __init__(self, model, objective, optimizer, clip=1.0, dtype=torch.bfloat16):
        super().__init__(model, objective, optimizer, clip, dtype)
        trained = {id(p) for p in self.parameters}
        named = {name: p for name, p in lowered_parameters(model).items() if id(p) in trained}
        twins = {id(p): nn.Parameter(p.detach().float().clone()) for p in named.values()}
        self.masters = {name: twins[id(p)] for name, p in named.items()}  # a shared weight has two names, one master
        self.lowered = list({id(p): p for p in named.values()}.values())
        self.copies = [twins[id(p)] for p in self.lowered]
        self.parameters = [twins.get(id(p), p) for p in self.parameters]
        for group in optimizer.param_groups:
            group["params"] = [twins.get(id(p), p) for p in group["params"]]
        for parameter in self.lowered:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None  # of an earlier step, in another type

    def backpropagate(self, loss):
        """The gradient of one micro batch, in 16 bits; added to the masters' in 32."""
        super().backpropagate(loss)
        for weight, master in zip(self.lowered, self.copies):
            if weight.grad is not None:
                wide = weight.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                weight.grad = None

    @torch.no_grad()
    def move(self, lr_scale):
        """Move the masters, then round them."""
        super().move(lr_scale)
        torch._foreach_copy_(self.lowered, self.copies)

    def weights(self):
        """The model's weights as a checkpoint keeps them: where there is a master, the master."""
        return self.model.state_dict() | {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_weights(self, state):
        """Continue from `weights`."""
        super().load_weights(state)
        for name, master in self.masters.items():
            master.copy_(state[name])


class ScaledMasterStep(ScaledStep, MasterStep):
    """
    The paper's whole recipe: float16 weights, float32 masters, a scaled loss

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.
    PAPER CONTEXT: master weights and loss scaling together match float32 training over many kinds of networks.
    INTUITION: one trick for what is added to a weight, one for what flows back to it.
    IMPLEMENTATION: gradients are scaled when they reach the masters and unscaled there, in float32.
    WHY: what bfloat16, with float32's exponents, later made unnecessary, at the price of three bits of mantissa.
    """
