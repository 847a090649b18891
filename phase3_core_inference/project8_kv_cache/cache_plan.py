"""
Plans over a cache

This file implements one forward that writes and reads a cache following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - prefill and decode over one cache
- "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al., 2019) - new tokens attend to
  kept states

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.attention import CacheKernel
from phase3_core_inference.project8_kv_cache.buffers import StepBuffers
from phase3_core_inference.project8_kv_cache.stores import Store
from phase3_core_inference.project8_kv_cache.work import SHORT, Layout


class Shape(NamedTuple):
    """The sizes of a step, after rounding: plans of one shape share buffers, compiled code and CUDA graphs."""

    n_tokens: int  # N
    n_wanted: int  # W; equal to N only if the logits of all tokens are wanted
    n_rows: int  # R of the grid that attention works on
    n_each: int  # T of the grid: new tokens a row
    n_keys: int  # S: slots that are read


class Group(NamedTuple):
    """Layers whose tokens lie at the same slots and see equally far."""

    n_slots: int
    window: int | None


class CachePlan:
    """Who attends to whom in one step of decoding: what the model is given beside the tokens.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2; masks by position: "Attention Is
        All You Need", arXiv:1706.03762, section 3.2.3.
    PAPER CONTEXT: new tokens write their keys and values and attend to everything before them.
    INTUITION: the host writes a list of places; the device only follows it, and always finds it at the same address.
    IMPLEMENTATION: one int64 buffer on the device, cut into named parts, filled by one asynchronous copy. Attention
        works on a grid of R rows and T places: here tokens are brought to their cells, rows of the cache gathered.
    WHY: nothing in a forward depends on a value that the host would have to wait for, so it can be compiled, and
        captured in a CUDA graph.

    `tokens` (N,), `positions` (N,): the step's, padded; `n_tokens`, `n_wanted`: how many of them are real.

    The other parts, and what stands in them for work [(2, 3, 1), (5, 1, 1)] where row 2 held 4 tokens and row 5 held 7
    (a grid of R = 2 and T = 3, six cells counted line by line):

    name    shape      meaning                                      example
    rows    (N,)       the row of the cache of each token           2 2 2 5
    slots   (groups N) where it is written there, for each group    4 5 6 7
    wanted  (W,)       the tokens whose logits are wanted           2 3
    cell    (N,)       the cell of the grid of each token           0 1 2 3
    source  (R T,)     the token in each cell; empty: the first     0 1 2 3 0 0
    grid    (R T,)     its position; empty: 0                       4 5 6 7 0 0
    ends    (R,)       length of each line's row after this step    7 8
    picked  (R,)       the row of the cache of each line            2 5
    """

    aligned = False

    def __init__(self, specs: Sequence[LayerSpec], stores: Sequence[Store], kernel: CacheKernel, shape: Shape, device):
        self.specs, self.stores, self.kernel, self.shape = specs, stores, kernel, shape
        self.groups = list(dict.fromkeys(Group(s.n_slots, spec.window) for s, spec in zip(stores, specs)))
        self.group_of = [self.groups.index(Group(s.n_slots, spec.window)) for s, spec in zip(stores, specs)]
        self.keys = [min(shape.n_keys, group.n_slots) for group in self.groups]
        N, W, R, T, _ = shape
        sizes = {"tokens": N, "positions": N, "rows": N, "slots": N * len(self.groups), "wanted": W, "cell": N,
                 "source": R * T, "grid": R * T, "ends": R, "picked": R}  # fmt: skip
        self.buffers = StepBuffers(sizes, device)
        views = self.buffers.device
        self.tokens, self.positions, self.rows = views["tokens"], views["positions"], views["rows"]
        self.slots = views["slots"].view(len(self.groups), N)
        self.wanted, self.cell, self.source, self.picked = (views[n] for n in ("wanted", "cell", "source", "picked"))
        self._grid, self._ends = views["grid"].view(R, T), views["ends"]
        self._prepare_masks(stores[0].dtype, device)
        self.n_tokens = self.n_wanted = 0

    def _prepare_masks(self, dtype: torch.dtype, device) -> None:
        _, _, R, T, _ = self.shape
        self.bias = [torch.empty(R, T, n, dtype=dtype, device=device) for n in self.keys]
        self._seen, self._unseen = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -torch.inf))
        self._places = torch.arange(max(self.keys), device=device)

    @property
    def compiles(self) -> bool:
        """Whether steps of this shape are worth compiling: those of decoding and verification."""
        return self.shape.n_each <= SHORT and self.shape.n_wanted == self.shape.n_tokens

    @property
    def returns(self) -> bool:
        """Whether steps of this shape will come often enough to be recorded."""
        return self.compiles

    def fill(self, layout: Layout, tokens: Sequence[int] | None) -> None:
        """Write where everything stands, and send it off."""
        part, n = self.buffers.open(), len(layout.positions)
        for name in ("tokens", "positions", "rows", "wanted", "cell", "source", "grid", "picked"):
            part[name].fill(0)
        part["ends"].fill(1)
        self.n_tokens, self.n_wanted = n, len(layout.wanted)
        part["positions"][:n] = layout.positions
        part["rows"][:n] = layout.token_rows
        part["wanted"][: self.n_wanted] = layout.wanted
        if tokens is not None:
            part["tokens"][:n] = tokens
        for places, group in zip(part["slots"].reshape(len(self.groups), -1), self.groups):
            places[:n] = layout.positions % group.n_slots
            places[n:] = group.n_slots  # padding: into the spare slot
        line = self._line(layout)  # the row of the grid of each item of the work
        cell = line[layout.token_order] * self.shape.n_each + layout.offsets
        part["cell"][:n] = cell
        part["source"][cell] = np.arange(n)
        part["grid"][cell] = layout.positions
        part["ends"][line] = layout.ends
        part["picked"][line] = layout.rows
        self.buffers.send()
        self._see()

    def _line(self, layout: Layout) -> np.ndarray:
        return np.arange(len(layout.rows))

    @torch.no_grad()
    def _see(self) -> None:
        """Who sees whom: once a step, for all layers of a group."""
        for bias, group, n_keys in zip(self.bias, self.groups, self.keys):
            there, here = self._places[:n_keys], self._grid.unsqueeze(-1)  # (S,), (R, T, 1)
            if self.shape.n_keys > n_keys:  # a ring that went round: slot j holds the last position that is j modulo it
                last = (self._ends - 1).unsqueeze(-1)  # (R, 1)
                there = (last - (last - there) % group.n_slots).unsqueeze(1)  # (R, 1, S)
            seen = there <= here
            if group.window is not None:
                seen = seen & (there > here - group.window)
            if self.shape.n_keys > n_keys:
                seen = seen & (there >= 0)
            torch.where(seen, self._seen, self._unseen, out=bias)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k (N, Hkv, D) and v (N, Hkv, Dv), then let q (N, H, D) read what there is: (N, H, Dv)."""
        group, store = self.group_of[layer], self.stores[layer]
        store.write(self.rows, self.slots[group], k, v)
        keys, values = self._read(store, self.keys[group])
        ends = self._ends if self.groups[group].window is None else None
        scale = self.specs[layer].scale
        y = self.kernel(self._to_grid(q).to(store.dtype), keys, values, self.bias[group], scale, ends)
        return self._from_grid(y).to(q.dtype)

    def select(self, x: Tensor) -> Tensor:
        """The rows of x whose logits are wanted (W, C)."""
        return x if self.aligned and self.shape.n_wanted == self.shape.n_tokens else x.index_select(0, self.wanted)

    def _read(self, store: Store, n_keys: int) -> tuple[Tensor, Tensor]:
        return store.gather(self.picked, n_keys)

    def _to_grid(self, q: Tensor) -> Tensor:
        # An empty cell gets the first token's query; nobody asks for what comes of it.
        return q.index_select(0, self.source).unflatten(0, (self.shape.n_rows, -1))  # (R, T, H, D)

    def _from_grid(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1).index_select(0, self.cell)  # (N, H, Dv)


class SpreadPlan(CachePlan):
    """Nearly all of the first rows have a few new tokens: the grid has the rows of the cache, some of them idle.

    PAPER: "Fast Transformer Decoding: One Write-Head is All You Need", arXiv:1911.02150, section 2.4.1.
    PAPER CONTEXT: the time of a decode step is that of reading keys and values.
    INTUITION: moving a few queries to the shelves is cheaper than moving the shelves.
    IMPLEMENTATION: line i of the grid is row i of the cache, whose keys are then a view; idle rows compute nonsense.
    WHY: gathering rows would read their keys, write them and read them again: three times the traffic.
    """

    def _line(self, layout: Layout) -> np.ndarray:
        return layout.rows

    def _read(self, store: Store, n_keys: int) -> tuple[Tensor, Tensor]:
        return store.first(self.shape.n_rows, n_keys)


class AlignedPlan(SpreadPlan):
    """Exactly the first rows in order, equally many tokens each: the tokens are the grid.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: one decode step adds one token to each sequence of the batch.
    INTUITION: everybody already sits in the right place.
    IMPLEMENTATION: two views in place of two gathers.
    WHY: the plain decode step of a full batch, in two launches less a layer.
    """

    aligned = True

    def _to_grid(self, q: Tensor) -> Tensor:
        return q.unflatten(0, (self.shape.n_rows, -1))

    def _from_grid(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1)


class PromptPlan(CachePlan):
    """Many new tokens of one row, which see all that came before: no mask is written down.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.3.
    PAPER CONTEXT: every position sees those up to its own; here the last query stands at the last key.
    INTUITION: a staircase needs no plan of every step, only the number of the first.
    IMPLEMENTATION: exactly as many keys as the row has then; PyTorch's causal bias, aligned to the lower right, lets
        the fused kernels skip what no query sees and share keys among a group's heads.
    WHY: a mask is a matrix of new tokens by all tokens that every layer reads, and kernels that take one are slower.
    """

    aligned = True

    def _prepare_masks(self, dtype: torch.dtype, device) -> None:
        from torch.nn.attention.bias import causal_lower_right  # here, as it loads the compiler, for seconds

        self.bias = [causal_lower_right(self.shape.n_each, self.shape.n_keys)]

    def fill(self, layout: Layout, tokens: Sequence[int] | None) -> None:
        """Write where everything stands, and send it off."""
        super().fill(layout, tokens)
        self._row = int(layout.rows[0])

    def _see(self) -> None:
        """It is seen from the sizes alone."""

    def _read(self, store: Store, n_keys: int) -> tuple[Tensor, Tensor]:
        keys, values = store.first(self._row + 1, n_keys)
        return keys[self._row :], values[self._row :]

    def _to_grid(self, q: Tensor) -> Tensor:
        return q.unsqueeze(0)

    def _from_grid(self, y: Tensor) -> Tensor:
        return y.squeeze(0)
