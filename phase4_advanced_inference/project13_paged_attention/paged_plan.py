"""
Paged plan

This file implements one forward that writes and reads blocks following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - block tables
  lead attention from a text's tokens to the blocks they lie in

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.buffers import StepBuffers
from phase3_core_inference.project8_kv_cache.cache_plan import Shape
from phase3_core_inference.project8_kv_cache.work import SHORT, Layout
from phase4_advanced_inference.project13_paged_attention.paged_attention import (
    paged_attention,
    queries_of_a_tile,
    splits_of,
)
from phase4_advanced_inference.project13_paged_attention.paged_store import PagedStore

FULL = 1024  # tokens of a mixed step, from which on it is worth the minute that compiling takes
ALIGNED = 4  # of int32, 16 bytes: Triton compiles a kernel anew for pointers that begin elsewhere


def write_tiles(begins: np.ndarray, block_q: int, rows: np.ndarray, firsts: np.ndarray) -> None:
    """What `tile_list` makes on the device, written into `rows` and `firsts` by a host that knows the lengths.

    >>> rows, firsts = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    >>> write_tiles(np.array([0, 1, 6]), 4, rows, firsts)
    >>> rows.tolist(), firsts[:3].tolist()      # row 0: token 0; row 1: tokens 1 to 4, and 5; a seat stays empty
    ([0, 1, 1, -1], [0, 1, 5])
    """
    starts = begins // block_q + np.arange(len(begins))  # the first seat of each row
    n = starts[-1]
    rows[:n], rows[n:] = np.arange(len(begins) - 1).repeat(np.diff(starts)), -1
    owners = rows[:n]
    firsts[:n] = begins[owners] + (np.arange(n) - starts[owners]) * block_q
    owners[firsts[:n] >= begins[owners + 1]] = -1


class PagedPlan:
    """Who attends to whom in one step over blocks.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        sections 4.1 and 4.3.
    PAPER CONTEXT: the kernel is given each sequence's block table, finds the blocks by it, and reads them one by one.
    INTUITION: an index at the front of a book whose pages are in no order.
    IMPLEMENTATION: as project 8's `CachePlan`: numbers at fixed places, filled by one copy. Tokens stay one ragged row;
        kernels need no grid. Where every row has equally many new tokens (`even`), shapes repeat and can be recorded.
    WHY: where blocks lie is data, not shape: recorded graphs serve any allocation.

    What stands where, for pages of 4 and work [(2, 3, 1), (5, 1, 1)], where row 2 held 4 tokens and row 5 held 7:

    name    shape     meaning                                        example
    rows    (N,)      the row of the cache of each token             2 2 2 5
    slots   (N,)      where it is written: block * page + place      4 5 6 31
    wanted  (W,)      the tokens whose logits are wanted             2 3
    begins  (R + 1,)  where the new tokens of each row begin         0 3 4
    ends    (R,)      length of each row after this step             7 8
    tables  (R, M)    blocks of each row, in order                   0 1 | 3 7

    Where rows differ, the tiles of the ragged kernel follow (`write_tiles`).
    """

    def __init__(self, specs: Sequence[LayerSpec], stores: Sequence[PagedStore], shape: Shape, even: bool, device):
        self.specs, self.stores, self.shape, self.even = specs, stores, shape, even
        self.n_each = shape.n_each if even else None
        N, W, R, _, M = shape
        sizes = [queries_of_a_tile(s.n_head, s.n_kv_head, s.head_size, s.value_size) for s in specs]
        self._sizes = [] if even else list(dict.fromkeys(sizes))
        parts = [R + 1, R, R * M, *(N // size + R for size in self._sizes for _ in ("rows", "firsts"))]
        room = [-(-n // ALIGNED) * ALIGNED for n in parts]
        self.buffers = StepBuffers({"tokens": N, "positions": N, "rows": N, "slots": N, "wanted": W,
                                    "places": sum(room)}, device)  # fmt: skip
        views = self.buffers.device
        self.tokens, self.positions, self.rows = views["tokens"], views["positions"], views["rows"]
        self.slots, self.wanted, self._places = views["slots"], views["wanted"], views["places"]
        # Kernels count places in int32: narrowed once a step, for all layers.
        self._narrow = torch.zeros(len(self._places), dtype=torch.int32, device=device)
        self.begins, self.ends, tables, *tiles = (x[:n] for x, n in zip(self._narrow.split(room), parts))
        self.tables = tables.view(R, M)
        host = np.split(self.buffers.open()["places"], np.cumsum(room)[:-1])
        self._begins, self._ends, tables, *self._seats = (x[:n] for x, n in zip(host, parts))
        self._tables = tables.reshape(R, M)
        keys = M * stores[0].page
        self._splits = [splits_of(R, spec.n_kv_head, keys, torch.device(device)) for spec in specs]
        pairs = dict(zip(self._sizes, zip(tiles[::2], tiles[1::2])))
        self._tiles: list[tuple[Tensor, Tensor] | None] = [pairs.get(size) for size in sizes]
        self.n_tokens = self.n_wanted = 0

    @property
    def compiles(self) -> bool:
        """Whether steps of this shape are worth compiling: those of decoding and verification, and full mixed ones."""
        return self._short or (self._mixed and self.shape.n_tokens >= FULL)

    @property
    def returns(self) -> bool:
        """Whether steps of this shape will come often enough to be recorded."""
        return self._short or self._mixed

    @property
    def _short(self) -> bool:
        return self.even and self.shape.n_each <= SHORT and self.shape.n_wanted == self.shape.n_tokens

    @property
    def _mixed(self) -> bool:
        return not self.even and self.shape.n_each == 0

    def fill(self, layout: Layout, slots: np.ndarray, tables: np.ndarray, tokens: Sequence[int] | None) -> None:
        """Write where everything stands, and send it off: slots (N,), and tables (R, M) of the rows in the layout."""
        part, most = self.buffers.open(), max(self.shape.n_each, 1)
        n, r = len(layout.positions), len(layout.rows)
        spare = self.stores[0].n_blocks  # the block for padding
        self.n_tokens, self.n_wanted = n, len(layout.wanted)
        for name, values, padding in (("positions", layout.positions, 0), ("rows", layout.token_rows, 0),
                                      ("slots", slots, spare * self.stores[0].page), ("tokens", tokens, 0),
                                      ("wanted", layout.wanted, 0)):  # fmt: skip
            m = 0 if values is None else len(values)
            part[name][:m] = values if m else 0
            part[name][m:] = padding
        self._begins[1 : r + 1], self._begins[r + 1 :] = layout.news.cumsum(), n  # the first is always 0
        self._ends[:r], self._ends[r:] = layout.ends, most  # padding rows read the block for padding
        self._tables[:r, : tables.shape[1]], self._tables[r:] = tables, spare
        for size, rows, firsts in zip(self._sizes, self._seats[::2], self._seats[1::2]):
            write_tiles(self._begins, size, rows, firsts)
        self.buffers.send()
        self._narrow.copy_(self._places)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k (N, Hkv, D) and v (N, Hkv, Dv), then let q (N, H, D) read what there is: (N, H, Dv)."""
        store, spec = self.stores[layer], self.specs[layer]
        store.write(self.slots, k, v)
        y = paged_attention(q.to(store.dtype), store.k, store.v, self.tables, self.begins, self.ends, spec.scale,
                            spec.window, self.n_each, self._splits[layer], self._tiles[layer])  # fmt: skip
        return y.to(q.dtype)

    def select(self, x: Tensor) -> Tensor:
        """The rows of x whose logits are wanted (W, C)."""
        return x if self.shape.n_wanted == self.shape.n_tokens else x.index_select(0, self.wanted)
