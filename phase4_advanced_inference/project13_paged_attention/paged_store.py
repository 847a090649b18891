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
        self.page, self.dtype, self.n_blocks = page, dtype, n_blocks
        shape = ((n_blocks + 1) * page, spec.n_kv_head)
        self.keys = torch.zeros(*shape, spec.head_size, dtype=dtype, device=device)  # (slots, Hkv, D)
        self.values = torch.zeros(*shape, spec.value_size, dtype=dtype, device=device)

    @property
    def k(self) -> Tensor:
        """The keys in blocks: (blocks + 1, page, Hkv, D), a view."""
        return self.keys.unflatten(0, (-1, self.page))

    @property
    def v(self) -> Tensor:
        """The values in blocks: (blocks + 1, page, Hkv, Dv), a view."""
        return self.values.unflatten(0, (-1, self.page))

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k (N, Hkv, D) and v (N, Hkv, Dv) at slots (N,)."""
        # Into the tensor itself: a compiler that writes through a view copies the whole of it first.
        self.keys[slots] = k.detach().to(self.dtype)
        self.values[slots] = v.detach().to(self.dtype)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What lies at these slots, copied: keys (n, Hkv, D) and values (n, Hkv, Dv), as `write` takes them."""
        return self.keys[slots], self.values[slots]

    def take(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Whole blocks, copied: keys (n, page, Hkv, D) and values (n, page, Hkv, Dv)."""
        return self.k[blocks], self.v[blocks]

    def put(self, blocks: Tensor, k: Tensor, v: Tensor) -> None:
        """Write whole blocks, as `take` gives them."""
        self.k[blocks], self.v[blocks] = k, v

    @property
    def nbytes(self) -> int:
        """Memory taken, without the block for padding."""
        return (self.keys.nbytes + self.values.nbytes) // (self.n_blocks + 1) * self.n_blocks
