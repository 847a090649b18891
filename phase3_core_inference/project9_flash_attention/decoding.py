"""
Decoding attention

This file implements attention of one new query over a long cache following:
- "Flash-Decoding for long-context inference" (Dao et al., 2023) - parallel over keys, merged by log-sum-exp

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
from torch import Tensor

from common import kernels
from phase3_core_inference.project9_flash_attention.tiles import width_of

BLOCK = 64  # keys of a tile
PROGRAMS = 8  # for each multiprocessor: enough to hide the latency of memory


@functools.cache
def gpu_code():
    """The module with the kernels: Triton is not there on every machine."""
    from phase3_core_inference.project9_flash_attention import decode_kernels

    return decode_kernels


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None, splits: int
) -> Tensor:
    """What the kernels compute: one query a row against its first `lengths` keys, the last `window` of them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    S, H, Hkv = k.shape[1], q.shape[1], k.shape[2]
    at = torch.arange(S, device=q.device)
    seen = at < lengths[:, None]  # (B, S)
    if window is not None:
        seen = seen & (at >= lengths[:, None] - window)
    scores = torch.einsum("bkgd,bskd->bkgs", q.unflatten(1, (Hkv, H // Hkv)).to(wide), k.to(wide)) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)  # a row without keys: 0
    values = v.to(wide).masked_fill(~seen[:, :, None, None], 0.0)  # what lies behind a row's end may be anything
    return torch.einsum("bkgs,bskv->bkgv", weights, values).flatten(1, 2).to(q.dtype)


def _shapes(q, k, v, lengths, scale, window, splits):
    """An empty result of `flash_decode_op`."""
    return q.new_empty(*q.shape[:2], v.shape[-1])


@kernels.op("flash_decode", reference, fake=_shapes, opaque=True)
def flash_decode_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None, splits: int
) -> Tensor:
    """Launch both kernels: the parts, and their merger."""
    (B, H, D), Hkv, V = q.shape, k.shape[2], v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    top, total = torch.empty(2, B, H, splits, dtype=torch.float32, device=q.device)
    parts = torch.empty(B, H, splits, V, dtype=torch.float32, device=q.device)
    o = _shapes(q, k, v, lengths, scale, window, splits)
    group, width = H // Hkv, width_of(V)
    gpu_code().split_kernel[(splits, Hkv, B)](
        q, k, v, lengths, top, total, parts, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        k.shape[1], D, V,
        window or 0, scale, GROUP=group, BLOCK_G=width_of(group), BLOCK_N=BLOCK, BLOCK_D=width_of(D), BLOCK_V=width,
        WINDOW=window is not None, STAGES=3, num_warps=4,
    )  # fmt: skip
    gpu_code().merge_kernel[(B * H,)](
        top, total, parts, o, splits, V, BLOCK_S=1 << (splits - 1).bit_length(), BLOCK_V=width, num_warps=4
    )
    return o


def choose_splits(rows: int, longest: int, device, programs: int = PROGRAMS) -> int:
    """Parts of the keys so that `rows` programs become `programs` for each multiprocessor, none shorter than a tile.

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023).
    PAPER CONTEXT: with a batch of 1, FlashAttention uses less than 1% of a GPU while it decodes.
    INTUITION: a hundred readers for one book, but no reader for less than a page.
    IMPLEMENTATION: from shapes alone, so that nothing waits for the device; the lengths stay there.
    WHY: the cache is read at the speed of the memory only if all multiprocessors read.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(programs * processors // rows, -(-longest // BLOCK), 128))


def flash_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None = None, splits: int | None = None
) -> Tensor:
    """One new query a row over the keys of a cache: q (B, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv) -> (B, H, Dv).

    PAPER: "Flash-Decoding for long-context inference" (Dao et al., 2023).
    PAPER CONTEXT: split the keys, attend to each part, and reduce by the log-sum-exp; up to 8 times faster generation.
    INTUITION: training has a thousand queries to keep a GPU busy, decoding one: so the keys must be shared out.
    IMPLEMENTATION: row b sees its first lengths[b] keys (int32, on the device), or the last `window` of them;
        `splits` is chosen from the shapes; no waiting for the device, so that it can be captured in a graph.
    WHY: what a decoding step costs is the one reading of the cache; see the benchmark for how near it comes.

    Raises:
        ValueError: shapes that do not fit.
    """
    if q.ndim != 3 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: pass (B, H, D), (B, S, Hkv, D) and "
            f"(B, S, Hkv, Dv), H a multiple of Hkv"
        )
    if lengths.shape != q.shape[:1] or lengths.device != q.device or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths {tuple(lengths.shape)} ({lengths.dtype}, {lengths.device}): pass one whole number a row, "
            f"({q.shape[0]},), on {q.device}"
        )
    if splits is None:
        splits = choose_splits(q.shape[0] * k.shape[2], k.shape[1], q.device)
    elif splits < 1:
        raise ValueError(f"splits={splits} must be at least 1: leave it out to have it chosen")
    return torch.ops.roadmap.flash_decode(q, k, v, lengths, scale, window, splits)
