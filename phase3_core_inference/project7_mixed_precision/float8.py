"""
Linear layers in float8

This file implements training with matrix products in 8 bits following:
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - E4M3 for weights and activations, E5M2 for gradients, a
  scale for each tensor
- "Mixed Precision Training" (Micikevicius et al., 2017) - the weights themselves stay in float32

Each component is explained with paper references for educational purposes.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.modules import swap_modules
from phase1_foundation.project3_pretrain.head import autocast_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of both sizes of a weight: what the tensor cores take

# product(a8 (M, K), b8 (K, N), unscale_a, unscale_b, dtype, fast) -> (M, N)
Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, bool], Tensor]


def to_float8(x: Tensor, dtype: torch.dtype, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """
    Scale a tensor so that its largest value is the format's, and cast

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, sections 2 and 3.
    PAPER CONTEXT: one scale cannot serve all tensors of a network; software keeps a factor for each, and any real
        number will do. How it is found is left open; libraries often take it from earlier steps (delayed scaling).
    INTUITION: choose the map's scale so that the whole country fits on the sheet.
    IMPLEMENTATION: scale = largest of the format / max |x|, over all of x or along `dim` (row by row); here from the
        very tensor (dynamic scaling): one more sweep, which compiles into what produces x, and no state.
    WHY: 4 or 5 bits of exponent reach 2^18 or 2^32 at most; where in float32's range they lie is the scale's business.

    Returns the codes (float8, shaped like x), and by what to multiply them, float32: (), or x's shape with `dim` at 1.
    Zeros give zeros, and so do values far below 2^-100; infinity and NaN give NaN, as nothing may hide them.
    """
    largest = torch.finfo(dtype).max
    wide = x.float()
    amax = wide.abs().amax() if dim is None else wide.abs().amax(dim=dim, keepdim=True)
    amax = amax.clamp(min=2.0**-100)  # below that the scale itself would be infinite; NaN passes
    scale = largest / amax
    # Rounding may push the largest value just above the format; inf * 0 and NaN pass the clamp as NaN.
    return (wide * scale).clamp(-largest, largest).to(dtype), amax / largest


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, left out where it would do nothing: PyTorch 2.11 compiles an autograd.Function whose forward ends
    in such a cast to one with gradients of zero, and says nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def emulated_product(a: Tensor, b: Tensor, unscale_a: Tensor, unscale_b: Tensor, dtype: torch.dtype, fast: bool):
    """
    The product of float8 matrices, wherever there is no hardware for it

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4 (its own results were emulated, too).
    PAPER CONTEXT: inputs are rounded to float8 values, products are accumulated in a wider format.
    INTUITION: what a small number costs is lost when it is rounded; after that any arithmetic may be used.
    IMPLEMENTATION: cast up, multiply in float32, unscale.
    WHY: tests and small runs on any machine, with the errors of the real thing; slower than without float8.

    a (M, K), b (K, N) -> (M, N) in `dtype`; `fast` changes nothing.
    """
    with torch.autocast(a.device.type, enabled=False):  # which would round the product before it is unscaled
        return cast(a.float() @ b.float() * unscale_a * unscale_b, dtype)


def column_major(x: Tensor) -> Tensor:
    """The same matrix, stored column by column (nothing is copied where it is already)."""
    return x.t().contiguous().t()


def hardware_product(a: Tensor, b: Tensor, unscale_a: Tensor, unscale_b: Tensor, dtype: torch.dtype, fast: bool):
    """The same on tensor cores, which want `a` row by row, `b` column by column; `fast` accumulates with fewer bits."""
    rows = unscale_a.ndim > 0  # scales of rows come with bfloat16 results alone
    out_dtype = torch.bfloat16 if rows else dtype
    a, b = a.contiguous(), column_major(b)
    y = torch._scaled_mm(a, b, unscale_a, unscale_b, out_dtype=out_dtype, use_fast_accum=fast)
    return cast(y, dtype)


def product_for(device: torch.device) -> Product:
    """What multiplies float8 matrices on a device: Ada and Hopper GPUs (8.9 and later) can, others emulate it."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return hardware_product if able else emulated_product


class TensorScaled(torch.autograd.Function):
    """
    x W^T with one scale for each tensor

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, sections 3 and 4.
    PAPER CONTEXT: E4M3 for weights and activations, E5M2 for gradients, which need reach more than precision.
    INTUITION: three products a layer, and each gets its two factors in 8 bits.
    IMPLEMENTATION: y = x W^T, dx = g W, dW = g^T x. What is kept for the backward is x and W as they came: the compiler
        decides whether it keeps their codes instead. Tensor cores want the second factor column by column, so a
        tensor is written in both ways where both are needed.
    WHY: half the bytes and twice the rate of bfloat16 in all three products, which are most of a large model's work.

    Args: x (N, in), weight (out, in), dtype of the result and of dx, `product`. dW has the weight's dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype, product):
        """x (N, in) -> (N, out)."""
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.product = dtype, product
        x8, of_x = to_float8(x, E4M3)
        w8, of_w = to_float8(weight, E4M3)
        return product(x8, w8.t(), of_x, of_w, dtype, True)

    @staticmethod
    def backward(ctx, grad):
        """grad (N, out) -> dx (N, in), dW (out, in)."""
        x, weight = ctx.saved_tensors
        grad_x = grad_w = None
        g8, of_g = to_float8(grad, E5M2)
        if ctx.needs_input_grad[0]:
            w8, of_w = to_float8(weight, E4M3)
            grad_x = cast(ctx.product(g8, w8, of_g, of_w, ctx.dtype, False), x.dtype)
        if ctx.needs_input_grad[1]:  # else the weight is frozen, under adapters
            x8, of_x = to_float8(x, E4M3)
            grad_w = ctx.product(g8.t(), x8, of_g, of_x, ctx.dtype, False)
            grad_w = cast(grad_w, weight.dtype)
        return grad_x, grad_w, None, None


class RowScaled(torch.autograd.Function):
    """
    x W^T with a scale for each row of the left factor and each column of the right one

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3: a scale a tensor; rows are later practice.
    PAPER CONTEXT: a scale can be taken out of a sum, so every row of a product may have its own.
    INTUITION: one loud token no longer decides how finely all the others are drawn.
    IMPLEMENTATION: scales run along what is summed over, and that is another dimension in each of the three products:
        every tensor is scaled and cast twice. E4M3 for gradients, too, as is usual: a row needs less reach.
    WHY: outliers cost less precision; the price is more casting, and a slower kernel than with one scale.

    Arguments as for `TensorScaled`.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype, product):
        """x (N, in) -> (N, out)."""
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.product = dtype, product
        x8, of_x = to_float8(x, E4M3, dim=1)  # (N, 1)
        w8, of_w = to_float8(weight, E4M3, dim=1)  # (out, 1)
        return product(x8, w8.t(), of_x, of_w.t(), dtype, True)

    @staticmethod
    def backward(ctx, grad):
        """grad (N, out) -> dx (N, in), dW (out, in)."""
        x, weight = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:  # sums over out
            g8, of_g = to_float8(grad, E4M3, dim=1)  # (N, 1)
            w8, of_w = to_float8(weight, E4M3, dim=0)  # (1, in)
            grad_x = cast(ctx.product(g8, w8, of_g, of_w, ctx.dtype, False), x.dtype)
        if ctx.needs_input_grad[1]:  # sums over tokens
            g8, of_g = to_float8(grad, E4M3, dim=0)  # (1, out)
            x8, of_x = to_float8(x, E4M3, dim=0)  # (1, in)
            grad_w = ctx.product(g8.t(), x8, of_g.t(), of_x, ctx.dtype, False)
            grad_w = cast(grad_w, weight.dtype)
        return grad_x, grad_w, None, None


SCALINGS = {"tensor": TensorScaled, "row": RowScaled}


class Float8Linear(nn.Linear):
    """
    A linear layer that multiplies in float8, forward and backward

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4.
    PAPER CONTEXT: all linear layers of a Transformer run in FP8; the rest, and the weights that are updated, do not.
    INTUITION: the recipe stays in the book in full, what goes to the kitchen is a note.
    IMPLEMENTATION: the parameters are those of the `nn.Linear` that it replaces, under the same names. Ragged
        numbers of tokens are filled up with zeros to a multiple of 16, for the product that sums over tokens.
    WHY: checkpoints, optimizers, adapters and exporters see a plain linear layer.

    x (..., in) -> (..., out), in autocast's dtype where that is on, else in the dtype of x.
    """

    # which dimension of each tensor is output, which input
    DIMENSIONS: ClassVar[dict] = {"weight": (0, 1), "bias": (0, None)}

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, scaling: str = "tensor"):
        super().__init__(in_features, out_features, bias, device)
        check_scaling(scaling)
        self.scaling, self.function = scaling, SCALINGS[scaling]
        self.product = product_for(self.weight.device)

    @classmethod
    def of(cls, linear: nn.Linear, scaling: str = "tensor") -> "Float8Linear":
        """A layer with the parameters of another, shared."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", scaling)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.product = product_for(linear.weight.device)
        return layer

    def _apply(self, fn, recurse=True):
        """Moves to another device, which may multiply in another way."""
        super()._apply(fn, recurse)
        self.product = product_for(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        dtype = autocast_dtype(x)
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)  # (N, in)
        ragged = -rows.shape[0] % MULTIPLE if rows.shape[0] else MULTIPLE  # no tokens are filled up, too
        filled = F.pad(rows, (0, 0, 0, ragged)) if ragged else rows
        y = self.function.apply(filled.to(dtype), self.weight, dtype, self.product)[: rows.shape[0]]
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def to_linear(self) -> nn.Linear:
        """The plain layer with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{super().extra_repr()}, scaling={self.scaling}"


def check_scaling(scaling: str) -> None:
    """Raise ValueError for a kind of scale that is not there."""
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} is unknown: use one of {', '.join(SCALINGS)}")


def convert_to_float8(model: nn.Module, scaling: str = "tensor", skip: Sequence[str] = ()):
    """
    Let all linear layers of a model multiply in float8

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4.
    PAPER CONTEXT: only the inputs of matrix products are FP8; embeddings, norms, softmax and residuals are not.
    INTUITION: put the whole kitchen on short notes, but not the cash desk.
    IMPLEMENTATION: every `nn.Linear`, also those inside adapters; one whose sizes are no multiples of 16 stays, and a
        warning names it. The output head, no `nn.Linear`, stays as well: a deviation, since the paper's networks cast
        their last fully connected layer, too.
    WHY: one call, or `--use fp8`, or `--use "fp8:scaling=row"`; nothing of it is in a checkpoint.

    Args:
        scaling: "tensor" (one scale a tensor) or "row" (one for each row and column).
        skip: names to leave alone, as `swap_modules` takes them (["blocks.0", "down_proj"]).

    Raises ValueError for an unknown scaling, or if no layer can be converted.
    """
    check_scaling(scaling)
    odd = []

    def make(name, linear):
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            odd.append(f"{name} ({linear.in_features} -> {linear.out_features})")
            return linear
        return Float8Linear.of(linear, scaling)

    swapped, candidates = swap_modules(model, make, lambda name, module: isinstance(module, nn.Linear), skip)
    if swapped == len(odd):
        raise ValueError(
            f"none of {candidates} linear layers can multiply in float8: {', '.join(odd[:3]) or 'all are skipped'}; "
            f"both sizes of a weight must be multiples of {MULTIPLE}"
        )
    if odd:
        warnings.warn(
            f"{len(odd)} of {candidates} linear layers stay as they are, since their sizes are no multiples of "
            f"{MULTIPLE}: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}",
            stacklevel=2,
        )
    return model
