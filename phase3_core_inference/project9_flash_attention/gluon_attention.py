"""
Gluon attention

This file implements FlashAttention whose forward is scheduled by hand for Hopper GPUs, as an operator, following:
- "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (Shah et al., 2024) - the schedule
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - the backward

Each component is explained with paper references for educational purposes.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from common import kernels
from phase1_foundation.project3_pretrain.head import autocast_dtype
from phase3_core_inference.project9_flash_attention import reference
from phase3_core_inference.project9_flash_attention.flash_attention import (
    differentiate,
    flash_attention,
    heads_first,
    readable,
    remember,
    runs_on_kernels,
)

ROWS = 64  # queries of a warp group: what one wgmma takes
REGISTERS = 168  # a thread, at launch; the roles then share them out as 240, 240 and 24
OLDEST = (3, 6)  # Triton whose Gluon has what the kernel uses


class Schedule(NamedTuple):
    """How the roles of the kernel work together: keys of a tile, tiles in flight, whether consumers take turns."""

    keys: int
    stages: int
    ping_pong: bool


# Head size -> what was fastest on an H100 (for 64, taking turns or not makes no difference). `keys` is the number of
# queries of a program: one tile then holds its whole diagonal.
SCHEDULES = {64: Schedule(128, 4, True), 128: Schedule(128, 2, False)}


@functools.cache
def gpu_code():
    """The module with the kernel: Triton is not there on every machine."""
    from phase3_core_inference.project9_flash_attention import gluon_kernel

    return gluon_kernel


def require_hopper() -> None:
    """Refuse a machine that the kernel cannot run on: ValueError with what was found."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    new_enough = version != "none" and tuple(int(part) for part in version.split(".")[:2]) >= OLDEST
    if gpu == "no GPU" or torch.cuda.get_device_capability() != (9, 0) or not new_enough:
        raise ValueError(
            f"gluon=true needs a Hopper GPU and Triton {OLDEST[0]}.{OLDEST[1]} or later, but here are {gpu} and Triton "
            f"{version}: leave the option out for the kernel in plain Triton"
        )


def described(x: Tensor, rows: int):
    """A descriptor for tiles (rows, D) of x (B, T, H, D), swizzled in shared memory the way that wgmma reads them."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, x.shape[3]]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(x, *heads_first(x), block, gl.NVMMASharedLayout.get_default_for(block, kind))


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """What the kernel computes."""
    return reference.tiled_forward(q, k, v, None, scale, causal)


def _shapes(q, k, v, scale, causal):
    """Empty results of `gluon_forward`."""
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@kernels.op("gluon_forward", _reference, fake=_shapes, opaque=True)
def gluon_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward: o (B, T, H, D) and the natural log-sum-exp of each row (B, H, T).

    PAPER: "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", arXiv:2407.08608, 3.1-3.2.
    PAPER CONTEXT: Hopper's copies and matrix products run by themselves; a kernel has to keep both of them busy.
    INTUITION: a kitchen with a runner who only fetches, and two cooks: nobody waits at the cold store's door.
    IMPLEMENTATION: one program for 2 x ROWS queries; the schedule of the head size decides tiles and turns.
    WHY: Triton's compiler pipelines a loop; who does what, and when, is only for Gluon to say.
    """
    q, k, v = readable(q), readable(k), readable(v)
    B, T, H, D = q.shape
    o, lse = _shapes(q, k, v, scale, causal)
    schedule = SCHEDULES[D]
    gpu_code().gluon_forward_kernel[(-(-T // (2 * ROWS)), H, B)](
        described(q, ROWS), described(k, schedule.keys), described(v, schedule.keys), described(o, ROWS), lse, T, scale,
        H // k.shape[2], ROWS=ROWS, KEYS=schedule.keys, D=D, STAGES=schedule.stages, CAUSAL=causal,
        PING_PONG=schedule.ping_pong, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return o, lse


def _remember(ctx, inputs, output) -> None:
    """Keep for the backward what `flash_forward` keeps: there are no lower bounds."""
    q, k, v, scale, causal = inputs
    remember(ctx, (q, k, v, None, scale, causal), output)


def _differentiate(ctx, do: Tensor, dlse: Tensor) -> tuple:
    """The Triton backward: it needs o and the log-sum-exp, whoever computed them."""
    return (*differentiate(ctx, do, dlse)[:3], None, None)


gluon_forward.register_autograd(_differentiate, setup_context=_remember)


def gluon_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, starts: Tensor | None = None,
    causal: bool = True,
) -> Tensor:  # fmt: skip
    """`flash_attention` with the Gluon forward where it applies; a `plans.Kernel`, for `model.use_attention`.

    PAPER: "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", arXiv:2407.08608, 3.
    PAPER CONTEXT: FlashAttention-2 reaches 35% of an H100's peak: made for GPUs that copy and multiply in turn.
    INTUITION: the same arithmetic with the work shared out anew.
    IMPLEMENTATION: whole rows, causal or full, of head sizes 64 and 128 in half precision on a GPU; windows, documents
        and all other sizes are left to `flash_attention`, whose backward serves both.
    WHY: the last third between a compiler's schedule and the vendor's library, in code that can be read.

    Args:
        q, k, v: (..., T, H, D), (..., T, Hkv, D), (..., T, Hkv, Dv).
    """
    whole = starts is None and (window is None or window >= q.shape[-3])
    dtype = autocast_dtype(q)
    sized = q.shape[-1] == v.shape[-1] and q.shape[-1] in SCHEDULES
    if not (whole and sized and scale > 0 and q.is_cuda and runs_on_kernels(q.to(dtype))):
        return flash_attention(q, k, v, scale=scale, window=window, starts=starts, causal=causal)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    reference.check_shapes(q, k, v)
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    o, _ = torch.ops.roadmap.gluon_forward(*flat, scale, causal)
    return o.reshape(q.shape)
