"""
Memory of attention

This file implements the count of what attention keeps in memory, plain and tiled, following:
- "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (Dao et al., 2022) - algorithm 0 (the
  standard implementation) and theorem 1 (what tiles need in its place)

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from phase1_foundation.project3_pretrain.plans import visible


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, starts: Tensor | None = None,
    causal: bool = True,
) -> Tensor:  # fmt: skip
    """Attention by its formula, with the whole matrix of scores; a `plans.Kernel`.

    PAPER: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135, algorithm 0.
    PAPER CONTEXT: load Q, K; write S; read S; write P = softmax(S); load P, V; write O.
    INTUITION: every number that was ever needed is written down before the next is computed.
    IMPLEMENTATION: q (..., T, H, D), k and v (..., T, Hkv, D or Dv); keys are repeated for the heads of their group.
    WHY: the definition that tiles are compared with, in values and in memory.
    """
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * scale  # (..., H, T, T)
    scores = scores.masked_fill(~visible(q.shape[-2], window, starts, causal, q.device), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(-3, -2)


class PeakMemory(TorchDispatchMode):
    """Within this block, the most bytes that tensors made here held at one time: `peak`.

    PAPER: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135, theorem 1.
    PAPER CONTEXT: O(N) additional memory beyond inputs and output.
    INTUITION: a doorkeeper who counts heads after every arrival, and remembers the largest number.
    IMPLEMENTATION: every operation passes through here; the storages of its results are held weakly, so those that have
        been freed are gone from the sum. What an operation needs inside is not seen.
    WHY: exact to the byte and the same on every machine, which the memory of a process is not.

    >>> with PeakMemory() as memory:
    ...     x = torch.zeros(100, dtype=torch.float32) + 1      # for a moment there are two
    >>> memory.peak
    800
    """

    def __init__(self):
        super().__init__()
        self.peak, self._alive = 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, then count."""
        inside = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and id(x.untyped_storage()) not in inside:  # a view of an input is nothing new
                self._alive[x.untyped_storage()] = x.untyped_storage().nbytes()
                self.peak = max(self.peak, sum(self._alive.values()))
        return result


def peak_of(kernel: Callable, inputs: list[Tensor], scale: float, backward: bool) -> int:
    """The peak of one forward, or of forward and backward, in bytes beyond the inputs."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    with PeakMemory() as memory:
        out = kernel(*inputs, scale=scale)
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    return memory.peak
