"""
Paged store

This file implements where the blocks of one layer lie following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - keys and
  values of a fixed number of tokens in each block

Each component is explained with paper references for educational purposes.
"""

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec


class PagedStore:
    """Keys and values of one layer in blocks of `page` tokens, and one block more.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.2.
    PAPER CONTEXT: the memory for keys and values is divided into blocks, allocated once, before any request.
    INTUITION: a wall of equal drawers.
    IMPLEMENTATION: (blocks, page, Hkv, D), token by token. Slot s is token s % page of block s // page. The last block
        takes what padding tokens write; it is read for them alone. Zeros at first, so that nothing read is nan.
    WHY: the plainest layout; a token's heads are written together, and any block can be copied as one piece.
    """

    def __init__(self, spec: LayerSpec, n_blocks: int, page: int, dtype: torch.dtype, device):
        self.page, self.dtype = page, dtype
        shape = (n_blocks + 1, page, spec.n_kv_head)
        self.k = torch.zeros(*shape, spec.head_size, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, spec.value_size, dtype=dtype, device=device)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k (N, Hkv, D) and v (N, Hkv, Dv) at slots (N,)."""
        self.k.flatten(0, 1)[slots] = k.detach().to(self.dtype)
        self.v.flatten(0, 1)[slots] = v.detach().to(self.dtype)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What lies at these slots, copied: keys (n, Hkv, D) and values (n, Hkv, Dv), as `write` takes them."""
        return self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots]

    def take(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Whole blocks, copied: keys (n, page, Hkv, D) and values (n, page, Hkv, Dv)."""
        return self.k[blocks], self.v[blocks]

    def put(self, blocks: Tensor, k: Tensor, v: Tensor) -> None:
        """Write whole blocks, as `take` gives them."""
        self.k[blocks], self.v[blocks] = k, v

    @property
    def nbytes(self) -> int:
        """Memory taken, without the block for padding."""
        return (self.k.nbytes + self.v.nbytes) * (len(self.k) - 1) // len(self.k)
