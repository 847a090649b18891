"""
Rates of products

This file implements the work of one linear layer in bfloat16 and in float8, to be timed, following:
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - which factors of which products are in 8 bits

Only benchmark.py uses it.

Each component is explained with paper references for educational purposes.
"""

import torch

from phase3_core_inference.project7_mixed_precision.float8 import (
    E4M3,
    E5M2,
    column_major,
    emulated_product,
    product_for,
    to_float8,
)


def has_float8(device):
    """Whether products of float8 run on the hardware here."""
    return product_for(device) is not emulated_product


def plain_products(n_in, n_out, tokens, device):
    """y, dx and dW of one layer in bfloat16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if has_float8(device) else torch.float32
    x, w, g = (torch.randn(*n, device=device, dtype=dtype) for n in ((tokens, n_in), (n_out, n_in), (tokens, n_out)))
    return lambda: (x @ w.T, g @ w, g.T @ x)


def float8_products(n_in, n_out, tokens, device, scaling):
    """
    The three products of a layer in float8, of operands that were cast before

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 4.1.
    PAPER CONTEXT: activations, weights and gradients of the outputs are cast to FP8 before they are multiplied.
    INTUITION: what the hardware could gain if casting were free.
    IMPLEMENTATION: every operand lies as the tensor cores read it; scales along what is summed over, as in float8.py.
    WHY: the difference to a whole layer is the price of the casts, and both are reported.

    Returns a function that computes them.
    """
    along = (lambda dim: dim) if scaling == "row" else (lambda dim: None)
    backward = E4M3 if scaling == "row" else E5M2
    x, w, g = (torch.randn(*n, device=device) for n in ((tokens, n_in), (n_out, n_in), (tokens, n_out)))
    (x8, of_x), (w8, of_w), (g8, of_g) = (
        to_float8(t, dtype, along(1)) for t, dtype in ((x, E4M3), (w, E4M3), (g, backward))
    )
    (xc, of_xc), (wc, of_wc), (gc8, of_gc) = (
        to_float8(t, dtype, along(0)) for t, dtype in ((x, E4M3), (w, E4M3), (g, backward))
    )
    xc, wc, gt = column_major(xc), column_major(wc), gc8.t().contiguous()
    multiply, dtype = product_for(device), torch.bfloat16

    def run():
        multiply(x8, w8.t(), of_x, of_w.t() if of_w.ndim else of_w, dtype, True)
        multiply(g8, wc, of_g, of_wc, dtype, False)
        multiply(gt, xc, of_gc.t() if of_gc.ndim else of_gc, of_xc, dtype, False)

    return run


def layer_products(layer, x, grad):
    """The same by a layer as it trains, casts and all; compiled where float8 runs on the hardware.

    Returns a function that computes and returns y, dx and dW.
    """
    real = has_float8(x.device)
    call = torch.compile(layer, fullgraph=True) if real else layer

    def run():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=real):
            y = call(x)
        # detached: a kept graph would tie the next backward to the stream of this one
        return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)

    return run
