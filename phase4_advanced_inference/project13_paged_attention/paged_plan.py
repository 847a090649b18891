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
    tile_list,
)
from phase4_advanced_inference.project13_paged_attention.paged_store import PagedStore


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
    """

    def __init__(self, specs: Sequence[LayerSpec], stores: Sequence[PagedStore], shape: Shape, even: bool, device):
        self.specs, self.stores, self.shape, self.even = specs, stores, shape, even
        self.n_each = shape.n_each if even else None
        N, W, R, _, M = shape
        self.buffers = StepBuffers({"tokens": N, "positions": N, "rows": N, "slots": N, "wanted": W, "places": R + 1 + R
                                    + R * M}, device)  # fmt: skip
        views = self.buffers.device
        self.tokens, self.positions, self.rows = views["tokens"], views["positions"], views["rows"]
        self.slots, self.wanted, self._places = views["slots"], views["wanted"], views["places"]
        # Kernels count places in int32: narrowed once a step, for all layers.
        self._narrow = torch.zeros(len(self._places), dtype=torch.int32, device=device)
        self.begins, self.ends, tables = self._narrow.split([R + 1, R, R * M])
        self.tables = tables.view(R, M)
        self._sizes = [queries_of_a_tile(s.n_head, s.n_kv_head, s.head_size, s.value_size) for s in specs]
        keys = M * stores[0].page
        self._splits = [splits_of(R, spec.n_kv_head, keys, torch.device(device)) for spec in specs]
        self._tiles: dict[int, tuple[Tensor, Tensor] | None] = dict.fromkeys(self._sizes)
        for size in self._tiles if not even else ():
            self._tiles[size] = tuple(torch.zeros(2, N // size + R, dtype=torch.int32, device=device))
        self.n_tokens = self.n_wanted = 0

    @property
    def short(self) -> bool:
        """Whether this is a step of decoding or verification, which is worth compiling."""
        return self.even and self.shape.n_each <= SHORT and self.shape.n_wanted == self.shape.n_tokens

    @property
    def returns(self) -> bool:
        """Whether steps of this shape will come often enough to be recorded."""
        return self.short or (not self.even and self.shape.n_each == 0)

    def fill(self, layout: Layout, slots: np.ndarray, tables: np.ndarray, tokens: Sequence[int] | None) -> None:
        """Write where everything stands, and send it off: slots (N,), and tables (R, M) of the rows in the layout."""
        part, (N, _, R, T, M) = self.buffers.open(), self.shape
        n, r = len(layout.positions), len(layout.rows)
        spare = self.stores[0].n_blocks  # the block for padding
        self.n_tokens, self.n_wanted = n, len(layout.wanted)
        for name, values, padding in (("positions", layout.positions, 0), ("rows", layout.token_rows, 0),
                                      ("slots", slots, spare * self.stores[0].page), ("tokens", tokens, 0),
                                      ("wanted", layout.wanted, 0)):  # fmt: skip
            m = 0 if values is None else len(values)
            part[name][:m] = values if m else 0
            part[name][m:] = padding
        begins, ends, places = np.split(part["places"], [R + 1, R + 1 + R])
        begins[: r + 1] = np.concatenate(([0], layout.news.cumsum()))
        begins[r + 1 :] = n
        ends[:r], ends[r:] = layout.ends, max(T, 1)  # padding rows read the block for padding
        places = places.reshape(R, M)
        places[:r, : tables.shape[1]], places[r:] = tables, spare
        self.buffers.send()
        self._narrow.copy_(self._places)
        for size, kept in self._tiles.items() if not self.even else ():
            for old, new in zip(kept, tile_list(self.begins, N, size)):
                old.copy_(new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k (N, Hkv, D) and v (N, Hkv, Dv), then let q (N, H, D) read what there is: (N, H, Dv)."""
        store, spec = self.stores[layer], self.specs[layer]
        store.write(self.slots, k, v)
        y = paged_attention(q.to(store.dtype), store.k, store.v, self.tables, self.begins, self.ends, spec.scale,
                            spec.window, self.n_each, self._splits[layer], self._tiles[self._sizes[layer]])  # fmt: skip
        return y.to(q.dtype)

    def select(self, x: Tensor) -> Tensor:
        """The rows of x whose logits are wanted (W, C)."""
        return x if self.shape.n_wanted == self.shape.n_tokens else x.index_select(0, self.wanted)
