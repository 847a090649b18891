"""
Rivals of a training step

This file implements the same model in all precisions, each ready to train, following:
- "Mixed Precision Training" (Micikevicius et al., 2017) - float16 with a scaled loss, ours and torch's
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - float8 in linear layers, ours and torchao's

Only benchmarks use it.

Each component is explained with paper references for educational purposes.
"""

import copy

import torch

from phase1_foundation.project3_pretrain.plans import Causal
from phase1_foundation.project3_pretrain.trainer import Step
from phase3_core_inference.project7_mixed_precision.float8 import convert_to_float8
from phase3_core_inference.project7_mixed_precision.loss_scaling import ScaledStep


def with_torchao(layers):
    """The same with torchao's float8 layers, one scale a tensor; None where it is not installed."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        return None
    return convert_to_float8_training(layers)


class Uniform(Causal):
    """
    The plan of whole rows for a model whose layers are all alike

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4: attention itself is not in float8.
    PAPER CONTEXT: only the inputs of the linear layers' products are cast.
    INTUITION: if all rooms have the same lock, one key is enough.
    IMPLEMENTATION: every layer asks for the specification of the first, so that compiled code is the same for all.
    WHY: each rival then costs one compilation, not one a layer.
    """

    def attend(self, layer, q, k, v):
        """Attend within each row."""
        return super().attend(0, q, k, v)


class TorchScaledStep(Step):
    """
    The step with `torch.amp.GradScaler`, as its documentation says

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2.
    PAPER CONTEXT: a scaled loss; a step whose gradients overflow is left out.
    INTUITION: the peer in the same seat as ours.
    IMPLEMENTATION: unscale, clip, step, update; the scale stays on the GPU.
    WHY: what our own scaler is timed against.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scaler = torch.amp.GradScaler(self.device.type)

    def backpropagate(self, loss):
        """Add the gradient of the scaled loss."""
        self.scaler.scale(loss).backward()

    def update(self, lr_scale):
        """Unscale, clip, step, update."""
        for optimizer in self.optimizer.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimizer in self.optimizer.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return float(norm)


def loss_scale(step):
    """What a step in float16 multiplies its loss by: it falls whenever a step is left out."""
    return step.scaler.get_scale() if isinstance(step, TorchScaledStep) else step.scaler.scale


def shared(model):
    """A copy of a model with the same parameters, not with equal ones."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rivals_of(model, device):
    """Name -> (model, class of the step, autocast's dtype); all train the very same parameters."""
    half = torch.bfloat16 if device.type == "cuda" else None
    rivals = {
        "float32": (model, Step, None),
        "bfloat16": (shared(model), Step, half),
        "float8, a scale a tensor": (convert_to_float8(shared(model), "tensor"), Step, half),
        "float8, a scale a row": (convert_to_float8(shared(model), "row"), Step, half),
    }
    if device.type == "cuda":
        halved = shared(model)
        rivals["float16"] = (halved, ScaledStep, torch.float16)
        rivals["float16, GradScaler"] = (halved, TorchScaledStep, torch.float16)
        theirs = shared(model)
        if (blocks := with_torchao(theirs.blocks)) is not None:
            theirs.blocks = blocks
            rivals["torchao"] = (theirs, Step, half)
    else:
        del rivals["bfloat16"]
    return rivals
