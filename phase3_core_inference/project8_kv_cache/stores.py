"""
Stores

This file implements where the keys and values of one layer lie, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - the memory that the cache takes
- "Fast Transformer Decoding: One Write-Head is All You Need" (Shazeer, 2019) - fewer heads of keys and values, fewer
  bytes a token

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec


class Store(Protocol):
    """The keys and values of one layer, in rows of slots. Other formats (int8, int4) have these methods, too.

    `n_slots` slots a row hold tokens; one more, the last, takes what padding tokens write, and is never read.
    """

    n_slots: int
    dtype: torch.dtype  # in which attention gets what is read

    def write(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k (N, Hkv, D) and v (N, Hkv, Dv) at rows (N,) and slots (N,)."""
        ...

    def first(self, n_rows: int, n_slots: int) -> tuple[Tensor, Tensor]:
        """The first slots of the first rows: keys (R, Hkv, S, D) and values (R, Hkv, S, Dv); a view, if it can be."""
        ...

    def gather(self, rows: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
        """The first slots of these rows, copied together."""
        ...

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What lies in some slots of a row, copied: keys (n, Hkv, D) and values (n, Hkv, Dv), as `write` takes them."""
        ...

    def clear(self, row: int, n_slots: int) -> None:
        """Forget the first slots of a row."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        ...


class PlainStore:
    """Keys and values as they come, in one type, head by head.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 3.3; "Fast Transformer Decoding: One
        Write-Head is All You Need", arXiv:1911.02150, section 2.4.1.
    PAPER CONTEXT: every step reads all keys and values; with large batches and long texts they outweigh the weights.
    INTUITION: one shelf a sequence, one board a head: a reader walks along one board and never jumps.
    IMPLEMENTATION: keys (rows, Hkv, slots, D): what one head reads lies together, and the first S slots of the first R
        rows are a view that a batched product takes without a copy. Zeros at first, so that nothing read is nan.
    WHY: the baseline format: the exact values, 2 Hkv D numbers a token and layer.
    """

    def __init__(self, spec: LayerSpec, n_rows: int, n_slots: int, dtype: torch.dtype, device):
        self.n_slots, self.dtype = n_slots, dtype
        shape = (n_rows, spec.n_kv_head, n_slots + 1)
        self.k = torch.zeros(*shape, spec.head_size, dtype=dtype, device=device)
        self.v = torch.zeros(*shape, spec.value_size, dtype=dtype, device=device)

    def write(self, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k (N, Hkv, D) and v (N, Hkv, Dv) at rows (N,) and slots (N,)."""
        self.k[rows, :, slots] = k.detach().to(self.dtype)
        self.v[rows, :, slots] = v.detach().to(self.dtype)

    def first(self, n_rows: int, n_slots: int) -> tuple[Tensor, Tensor]:
        """The first slots of the first rows, as views."""
        return self.k[:n_rows, :, :n_slots], self.v[:n_rows, :, :n_slots]

    def gather(self, rows: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
        """The first slots of these rows, copied together."""
        return self.k[:, :, :n_slots].index_select(0, rows), self.v[:, :, :n_slots].index_select(0, rows)

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What lies in some slots of a row, copied."""
        return tuple(x[row, :, start:stop].transpose(0, 1).contiguous() for x in (self.k, self.v))

    def clear(self, row: int, n_slots: int) -> None:
        """Forget the first slots of a row: a nan left there would pass through a mask, as 0 * nan is nan."""
        self.k[row, :, :n_slots].zero_()
        self.v[row, :, :n_slots].zero_()

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.k.nbytes + self.v.nbytes


def bytes_per_token(specs: Sequence[LayerSpec], dtype: torch.dtype = torch.bfloat16) -> int:
    """What one cached token takes.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 3.3; "Fast Transformer Decoding: One
        Write-Head is All You Need", arXiv:1911.02150, section 3.1.
    PAPER CONTEXT: the cache grows with heads of keys and values, head size, layers, batch and length.
    INTUITION: two vectors a head and a layer, for ever.
    IMPLEMENTATION: the sum over layers of Hkv (D + Dv) values; 2 L Hkv D for equal sizes.
    WHY: batch x length x this is the memory, and also what every step of decoding has to read.

    >>> from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
    >>> with torch.device("meta"):
    ...     bytes_per_token(Transformer(PRESETS["gpt2"]()).specs)     # 2 * 12 * 12 * 64 * 2 bytes: 36 KiB
    36864
    """
    return sum(spec.n_kv_head * (spec.head_size + spec.value_size) for spec in specs) * dtype.itemsize
