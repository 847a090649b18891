"""
Weights stored in float8

This file implements inference from weights of one byte following:
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - E4M3 for trained weights and activations, a scale beside
- "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023) - gradients through stored weights

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.modules import swap_modules
from phase1_foundation.project3_pretrain.head import autocast_dtype
from phase3_core_inference.project7_mixed_precision.few_rows import (
    FEW,
    few_rows_product,
    have_kernels,
    round_reference,
    round_rows,
)
from phase3_core_inference.project7_mixed_precision.float8 import E4M3, MULTIPLE, cast, product_for


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above x, positive and float32: its exponent bits alone.

    >>> power_of_two_below(torch.tensor([0.3, 4.0])).tolist()
    [0.25, 4.0]
    """
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


class StoredProduct(torch.autograd.Function):
    """
    x W^T with a weight that is stored in float8 and never trained

    PAPER: "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3, equation 5.
    PAPER CONTEXT: the stored weight is dequantized in both passes; its gradient is not needed, that of its input is.
    INTUITION: the notes are final, but whoever wrote into them what they were asked may still learn from the answer.
    IMPLEMENTATION: few rows have a kernel of their own (few_rows.py), many go to the tensor cores' float8 product.
        dx = g W, W = codes * scale, in the compute dtype; the rounding of x is passed straight through.
    WHY: rounding has no derivative, and neither have the tensor cores' products; adapters below need one.

    Args: x (N, in), codes (out, in) uint8, scale (out, 1), dtype of the result, `product`.
    """

    @staticmethod
    def forward(ctx, x, codes, scale, dtype, product):
        """x (N, in) -> (N, out)."""
        ctx.save_for_backward(codes, scale)
        ctx.dtype, ctx.of_x = dtype, x.dtype
        # Compiled code fuses the steps of the rounding with what comes before; launched one by one they take too long.
        fused = torch.compiler.is_compiling() or not have_kernels(x)
        x8, of_x = round_reference(x) if fused else round_rows(x)
        if have_kernels(x) and x.shape[0] <= FEW:
            return few_rows_product(x8, of_x, codes, scale, dtype)
        return product(x8.view(E4M3), codes.view(E4M3).t(), of_x, scale.float().t(), dtype, True)

    @staticmethod
    def backward(ctx, grad):
        """grad (N, out) -> dx (N, in)."""
        codes, scale = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            weight = (codes.view(E4M3).float() * scale.float()).to(ctx.dtype)  # (out, in)
            return cast(grad.to(ctx.dtype) @ weight, ctx.of_x), None, None, None, None


class StoredFloat8Linear(nn.Module):
    """
    A linear layer whose weight is kept in float8

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4 (inference with 8-bit weights).
    PAPER CONTEXT: networks trained in 16 bits keep their accuracy when weights and activations are cast to E4M3.
    INTUITION: the book is thrown away, the notes are kept: half the shelf, and half to carry for every answer.
    IMPLEMENTATION: bytes (out, in) and a scale (out, 1). Scales are powers of two, unlike in training: exact in
        bfloat16, and in float16 but for rows below about 1.3e-5, so that casting the model changes nothing; it costs at
        most one bit of reach. The paper scales activations per tensor; here each token has its own scale.
    WHY: decoding reads every weight for every token, so its time is the bytes of the weights.

    x (..., in) -> (..., out), in autocast's dtype where that is on, else in the dtype of x.
    """

    # which dimension of each tensor is output, which input
    DIMENSIONS: ClassVar[dict] = {"codes": (0, 1), "scale": (0, None), "bias": (0, None)}

    def __init__(self, linear: nn.Module):
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if weight.is_meta:  # the values come later
            codes = torch.empty(weight.shape, dtype=torch.uint8, device="meta")
            scale = torch.empty(self.out_features, 1, device="meta", dtype=weight.dtype)
        else:
            codes, scale = self.rounded(weight)
        self.register_buffer("codes", codes)  # as bytes: `model.to(dtype)` would turn float8 into something else
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.product = product_for(weight.device)

    @staticmethod
    def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes of a weight (out, in) and the scales (out, 1) by which to multiply them."""
        if not weight.isfinite().all():
            raise ValueError("a weight is infinite or NaN: it cannot be stored in float8, and the model is broken")
        wide = weight.float()
        largest = torch.finfo(E4M3).max
        amax = wide.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-100)
        scale = 2 * power_of_two_below(amax / largest * (1 - 2.0**-24))  # not below amax / largest
        form = torch.finfo(weight.dtype)
        scale = scale.clamp(
            min=form.smallest_normal * form.eps
        )  # float16: 2^-24, of which all its values are multiples
        return (wide / scale).clamp(-largest, largest).to(E4M3).contiguous().view(torch.uint8), scale.to(weight.dtype)

    def _apply(self, fn, recurse=True):
        """Moves to another device, which may multiply in another way."""
        super()._apply(fn, recurse)
        self.product = product_for(self.codes.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        dtype = autocast_dtype(x)
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)  # (N, in)
        y = StoredProduct.apply(rows, self.codes, self.scale, dtype, self.product)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def to_linear(self) -> nn.Linear:
        """The plain layer that this one stands for, in the type of the scale, which is that of the model."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter((self.codes.view(E4M3).float() * self.scale.float()).to(self.scale.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


def store_float8(model: nn.Module, skip: Sequence[str] = ()):
    """
    Keep the weights of all linear layers in float8, for inference

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4.
    PAPER CONTEXT: no calibration and no retraining is needed where int8 asks for both.
    INTUITION: pack the house for the move: what fits into small boxes goes into small boxes.
    IMPLEMENTATION: every `nn.Linear` with sizes that are multiples of 16; embeddings, norms and the head stay.
    WHY: recorded in the checkpoint's recipe as "fp8_weights", so `load` rebuilds it, and chats and servers can use it.

    Raises ValueError if no layer can be stored so.
    """

    def fits(name, module):
        return (
            isinstance(module, nn.Linear) and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
        )

    swap_modules(model, lambda name, linear: StoredFloat8Linear(linear), fits, skip)
    return model
