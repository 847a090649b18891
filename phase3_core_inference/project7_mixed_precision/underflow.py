"""
Where gradients lie

This file implements the measurement behind loss scaling following:
- "Mixed Precision Training" (Micikevicius et al., 2017) - the histogram of activation gradients, and float16's range

Each component is explained with paper references for educational purposes.
"""

import torch
from torch import Tensor, nn

from phase3_core_inference.project7_mixed_precision.formats import FORMATS, lost

LOWEST, HIGHEST = -60, 20  # exponents of a histogram; what lies outside is counted at its ends


class GradientRecorder:
    """
    The gradients that flow back through the linear layers of a model

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2, figure 3.
    PAPER CONTEXT: the gradients of activations, collected from all layers of a network that trains in float32: many lie
        below what float16 can hold, while the upper part of its range is unused.
    INTUITION: a gauge in every pipe.
    IMPLEMENTATION: a hook on each linear layer keeps the gradient of its output; the model is to compute in float32.
    WHY: in 16 bits these tensors are what is rounded: each product of the backward pass reads one.

    Use it as a context: ``with GradientRecorder(model) as recorder: loss.backward()``; then `recorder.tensors`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.tensors, self._handles = model, {}, []

    def __enter__(self):
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_full_backward_hook(self._keep(name)))
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _keep(self, name):
        """A hook that stores what arrives."""

        def hook(module, grad_input, grad_output):
            self.tensors[name] = grad_output[0].detach().float().cpu()

        return hook


def histogram(tensors: dict[str, Tensor]) -> tuple[list[int], list[float]]:
    """
    How many percent of the nonzero values have which exponent

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2, figure 3.
    PAPER CONTEXT: the paper's figure counts values by the power of two of their magnitude.
    INTUITION: sort the pebbles by size, each sieve twice as fine as the last.
    IMPLEMENTATION: the exponent e of |x| = m 2^e with 1 <= m < 2, read from the number itself.
    WHY: a scale of 2^k moves the whole picture k places to the right: one sees which k is needed.

    >>> exponents, shares = histogram({"x": torch.tensor([0.0, 1.0, 1.5, 4.0])})
    >>> round(shares[exponents.index(0)], 1), round(shares[exponents.index(2)], 1)
    (66.7, 33.3)
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    exponents = (torch.frexp(flat[flat != 0].double().abs()).exponent - 1).clamp(LOWEST, HIGHEST)
    counts = torch.bincount(exponents - LOWEST, minlength=HIGHEST - LOWEST + 1).double()
    return list(range(LOWEST, HIGHEST + 1)), (100 * counts / counts.sum().clamp(min=1)).tolist()


def losses_of_formats(tensors: dict[str, Tensor], scale: float) -> dict[str, tuple[float, float, float]]:
    """
    What each format makes of the gradients: the share of zeros without a scale, with one, and with one a tensor

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3, for the scale of each tensor.
    PAPER CONTEXT: float8 reaches so little that the tensors of a network do not fit under one scale.
    INTUITION: no glasses, the same glasses for all, glasses to measure.
    IMPLEMENTATION: one scale a tensor is the format's largest value over the tensor's.
    WHY: it shows why float16 needs a scale, why bfloat16 does not, and why a loss scale does not save float8.

    Returns format -> (share lost unscaled, under `scale`, under scales of their own).
    """
    count = sum(int((tensor != 0).sum()) for tensor in tensors.values())
    found = {}
    for name in ("float16", "bfloat16", "e5m2", "e4m3"):
        largest, shares = FORMATS[name].largest, [0.0, 0.0, 0.0]
        for tensor in tensors.values():
            own = largest / float(tensor.abs().max().clamp(min=1e-38))
            weight = int((tensor != 0).sum()) / max(count, 1)
            shares = [s + weight * lost(tensor, name, factor) for s, factor in zip(shares, (1.0, scale, own))]
        found[name] = tuple(shares)
    return found
