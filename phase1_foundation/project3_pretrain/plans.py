"""
Plans

This file implements who attends to whom following:
- "Attention Is All You Need" (Vaswani et al., 2017) - scaled dot-product attention and the causal mask
- "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023) - shared
  key and value heads
- "Longformer: The Long-Document Transformer" (Beltagy et al., 2020) - sliding windows

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class LayerSpec:
    """What a plan or a cache must know of one attention layer, local to this rank."""

    n_head: int
    n_kv_head: int
    head_size: int
    value_size: int
    window: int | None  # tokens a query sees, itself among them; None: all before it
    scale: float  # factor of q . k
    block_size: int | None = None  # positions the model can tell apart; None: any number


class Plan(Protocol):
    """Who attends to whom in one forward: the only thing the model knows of batching, padding and caches.

    `positions` is shaped like the tokens: (B, T) in training, (N,) for a ragged batch in the engine.
    """

    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (..., H, D), k (..., Hkv, D), v (..., Hkv, Dv) -> (..., H, Dv)."""
        ...

    def select(self, x: Tensor) -> Tensor:
        """The rows of x that need logits: all of them, or x[wanted]."""
        ...


class Kernel(Protocol):
    """How attention without a cache is computed; `Transformer.use_attention` sets one.

    Query i sees key j if j <= i (unless `causal` is False), j > i - window, and j >= starts[i]; `starts` (..., T) holds
    where the document of each token begins. T is the third dimension from the end.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window=None, starts=None, causal: bool = True
    ) -> Tensor:
        """q (..., T, H, D), k (..., T, Hkv, D), v (..., T, Hkv, Dv) -> (..., T, H, Dv)."""
        ...


class Causal:
    """Every token sees itself and all before it in its row, as far as the layer's window reaches.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.3.
    PAPER CONTEXT: positions in the decoder attend to all positions up to and including their own.
    INTUITION: reading with a card that covers the rest of the line.
    IMPLEMENTATION: positions 0 ... T-1 in each row; attention by the kernel, with the scale and window of the layer.
    WHY: the plan of training and scoring, and the one the model makes when it is given none.
    """

    def __init__(self, tokens: Tensor, specs: Sequence[LayerSpec], kernel: Kernel):
        self.positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
        self.specs, self.kernel = specs, kernel

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each row."""
        spec = self.specs[layer]
        return self.kernel(q, k, v, scale=spec.scale, window=spec.window)

    def select(self, x: Tensor) -> Tensor:
        """All rows."""
        return x


class Packed:
    """Several documents in one row: positions begin anew in each, and no token sees another document.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.3; packing is practice rather than a paper.
    PAPER CONTEXT: illegal connections are masked out before the softmax; here also those that cross a document's edge.
    INTUITION: strangers share a train, each reads only the own book.
    IMPLEMENTATION: lengths [3, 5] for tokens (8,), or [[3, 5], [8]] for tokens (2, 8). The mask follows from `starts`,
        the index at which each token's document begins: one tensor, so changing lengths recompiles nothing.
    WHY: batches without padding for texts of unequal length, with the logits that each text would get alone.

    >>> Packed([2, 3], specs=[], kernel=sdpa).positions.tolist()
    [0, 1, 0, 1, 2]
    """

    def __init__(self, lengths: Sequence, specs: Sequence[LayerSpec], kernel: Kernel, device=None):
        rows = lengths if lengths and isinstance(lengths[0], Sequence) else [lengths]
        totals = [sum(row) for row in rows]
        if not totals[0] or len(set(totals)) > 1 or any(length < 1 for row in rows for length in row):
            raise ValueError(
                f"lengths={lengths} must be positive and add up to the same total in every row (they give {totals}): "
                f"let a last document fill each row"
            )
        longest, limit = max(max(row) for row in rows), specs[0].block_size if specs else None
        if limit is not None and longest > limit:
            raise ValueError(f"a document of {longest} tokens exceeds block_size={limit}: cut it into parts")
        starts = torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in rows])
        self._set(starts if rows is lengths else starts[0], specs, kernel, device)

    @classmethod
    def at_marks(cls, tokens: Tensor, mark: int, specs: Sequence[LayerSpec], kernel: Kernel) -> "Packed":
        """The documents of a token stream (..., T), each begun by the token `mark`, as token files write them
        (<|endoftext|> stands before a document); runs on the device, also when compiled.

        >>> Packed.at_marks(torch.tensor([5, 0, 7, 8, 0, 9]), 0, specs=[], kernel=sdpa).positions.tolist()
        [0, 0, 1, 2, 0, 1]
        """
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        starts = ((tokens == mark) * places).cummax(dim=-1).values  # what stands before the first mark begins at 0
        plan = cls.__new__(cls)
        plan._set(starts, specs, kernel, tokens.device)
        return plan

    def _set(self, starts: Tensor, specs, kernel, device) -> None:
        self.starts = starts.to(device)
        self.positions = torch.arange(starts.shape[-1], device=device) - self.starts
        self.specs, self.kernel = specs, kernel

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each document."""
        spec = self.specs[layer]
        return self.kernel(q, k, v, scale=spec.scale, window=spec.window, starts=self.starts)

    def select(self, x: Tensor) -> Tensor:
        """All rows."""
        return x


def visible(
    T: int, window: int | None = None, starts: Tensor | None = None, causal: bool = True, device=None
) -> Tensor:
    """The mask of a `Kernel`, spelled out: True where query i (row) sees key j (column).

    PAPER: "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.1 (sliding window).
    PAPER CONTEXT: each token attends to a fixed number of neighbours; stacked layers see ever further.
    INTUITION: a window slides along the text; what fell out of it is reachable only through the layers below.
    IMPLEMENTATION: (T, T), or (..., 1, T, T) with `starts`; comparisons of indices, nothing to keep in step.
    WHY: the definition that every faster kernel is tested against.

    >>> visible(3, window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    j = torch.arange(T, device=device)
    i = j.unsqueeze(-1)
    mask = (j <= i) if causal else torch.ones(T, T, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (j > i - window)
    if starts is not None:
        mask = mask & (j >= starts.unsqueeze(-1)).unsqueeze(-3)
    return mask


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window=None, starts: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Scaled dot-product attention by PyTorch's fused kernels.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, equation 1.
    PAPER CONTEXT: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V.
    INTUITION: each token asks (q), the others offer a label (k) and content (v); what matches is mixed in.
    IMPLEMENTATION: plain causal attention names no mask, so that flash and cuDNN kernels may run; a window that cuts
        something, or documents, give a mask, and then keys are repeated, as masked kernels know no groups.
    WHY: the default kernel on every device; projects 9, 20 and 22 write their own. Built per call, as a kept mask would
        outlive inference mode and CUDA graphs; a compiled model builds it once a forward.
    """
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (..., H, T, D)
    T = q.shape[-2]
    if starts is None and (window is None or window >= T):
        grouped = q.shape[-3] != k.shape[-3]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    else:
        group = q.shape[-3] // k.shape[-3]
        k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))  # (..., H, T, D)
        mask = visible(T, window, starts, causal, q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(-3, -2)  # (..., T, H, D)


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def prefer(*names: str) -> Callable[..., Tensor]:
    """`sdpa` with the back ends that PyTorch may use, best first; one that cannot run a call is passed over.

    Raises ValueError for an unknown name.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"attention back ends {list(names)}: choose among {', '.join(BACKENDS)}")
    order = [BACKENDS[name] for name in names]

    def kernel(q, k, v, *, scale, window=None, starts=None, causal=True):
        with sdpa_kernel(order, set_priority=True):
            return sdpa(q, k, v, scale=scale, window=window, starts=starts, causal=causal)

    return kernel


def use_cudnn_attention(model):
    """Prefer cuDNN's attention, the fastest on Hopper; where it cannot run, flash, efficient or math take over."""
    return model.use_attention(prefer("cudnn", "flash", "efficient", "math"))
