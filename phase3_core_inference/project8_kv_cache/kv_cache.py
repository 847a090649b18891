"""
KV cache

This file implements a cache of keys and values for a batch of sequences following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - what the cache costs in memory and time
- "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al., 2019) - reuse of what was
  computed for the past

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec, Plan
from phase3_core_inference.project8_kv_cache.attention import CacheKernel, best_kernel
from phase3_core_inference.project8_kv_cache.cache_plan import AlignedPlan, CachePlan, PromptPlan, Shape, SpreadPlan
from phase3_core_inference.project8_kv_cache.stores import PlainStore, Store, bytes_per_token
from phase3_core_inference.project8_kv_cache.work import (
    SHORT,
    Layout,
    Rounding,
    Work,
    check_work,
    power_of_two,
    quarter_octaves,
)

__all__ = ["ContiguousCache", "KVCache", "Work", "bytes_per_token"]


class KVCache(Protocol):
    """Keys and values of several sequences, one a row.

    Built as f(model.specs, n_rows, capacity, dtype=, device=); for `FastDecoder` also with padded=True and round_keys=,
    as of `ContiguousCache`.
    """

    lengths: list[int]  # tokens of each row: on the host, the only truth
    capacity: int  # the most tokens of a row
    step_limit: int  # the most new ones in one step
    ragged: bool  # whether attention needs no grid of rows by new tokens, so that one plan does for any mix of work

    def plan(self, work: Work, tokens: Sequence[int] | None = None) -> Plan:
        """Make room for `work`, [(row, n_new, n_wanted)]: decode 1,1; verify k+1,k+1; a chunk of a prompt n,0|1.

        Advances `lengths`. The plan is for one forward, which must come before the next call.
        """
        ...

    def keeps(self, plan: Plan) -> bool:
        """Whether a step of the same shape would get this very plan again; else what was recorded for it can go."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Undo what came after the first `length` tokens of a row (rejected speculation)."""
        ...

    def free(self, row: int) -> None:
        """Forget a row."""
        ...


class ContiguousCache:
    """Every row has room for `capacity` tokens, reserved from the start.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: keys and values of past tokens are stored and reused; their size and the time to read them bound
        batch and context.
    INTUITION: a shelf as long as the longest book for each reader: simple, quick, and mostly empty.
    IMPLEMENTATION: `plan` works on the host: it checks, counts, picks a plan for the shape and fills its buffers.
        Format, kernel, and the rounding of shapes are arguments.
    WHY: the fastest layout to read; what it wastes is what project 13's pages are for.

    Args:
        specs: `model.specs`; n_rows: sequences at a time; capacity: tokens of each, up to the model's block_size.
        dtype, device: of what is stored: the model's.
        store: the format, made for each layer as store(spec, n_rows, n_slots, dtype, device).
        kernel: how queries read it (attention.py); None: the best for the device.
        padded: round the number of tokens up, too: for compiled models and CUDA graphs, whose shapes must return. The
            model is then given `plan.tokens`, and only the first `plan.n_wanted` logits are real.
        round_keys: how many keys are read for a length.

    Raises ValueError for sizes that cannot be, and from `plan` for work that cannot be done (nothing is changed then).

    >>> from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
    >>> model, tokens = Transformer(PRESETS["cpu-tiny"]()).eval(), torch.arange(9)
    >>> cache = ContiguousCache(model.specs, n_rows=2, capacity=16)
    >>> _ = model(tokens[:8], cache.plan([(1, 8, 0)]))                 # a prompt in row 1
    >>> logits = model(tokens[8:], cache.plan([(1, 1, 1)]))            # one token more
    >>> cache.lengths, torch.allclose(logits[0], model(tokens)[-1], atol=1e-5)
    ([0, 9], True)
    """

    ragged = False

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        n_rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        store: Callable[..., Store] = PlainStore,
        kernel: CacheKernel | None = None,
        padded: bool = False,
        round_keys: Rounding = quarter_octaves,
    ):
        block_size = min((spec.block_size for spec in specs if spec.block_size), default=capacity)
        if n_rows < 1 or not 1 <= capacity <= block_size:
            raise ValueError(f"n_rows={n_rows} must be at least 1, and capacity={capacity} lie between 1 and the "
                             f"model's block_size={block_size}")  # fmt: skip
        self.specs, self.capacity, self.device = list(specs), capacity, torch.device(device)
        self.kernel, self.round_keys = kernel or best_kernel(device), round_keys
        self.lengths = [0] * n_rows
        if padded:  # few shapes, each of them worth keeping: code or a graph may belong to it
            self._sizes, self._most_kept = self._padded, 64
        else:
            self._sizes, self._most_kept = self._exact, 8
        self._kept: dict[tuple, CachePlan] = {}
        self._passing: dict[tuple, CachePlan] = {}  # those of prompts, so that they push out nothing recorded
        with torch.no_grad():
            self.stores = [store(spec, n_rows, self._slots(spec), dtype, device) for spec in specs]
        # On a CPU a mask that is there beats one that each layer makes; windows and rings need one anyway.
        self._unmasked = self.device.type == "cuda" and all(spec.window is None for spec in specs)

    def _slots(self, spec: LayerSpec) -> int:
        """How many tokens of a row a layer keeps."""
        return self.capacity

    def plan(self, work: Work, tokens: Sequence[int] | None = None) -> CachePlan:
        """The plan of one step; with `tokens` (in the order of the work) it holds them, padded, as `plan.tokens`."""
        layout = Layout.of(work, self.lengths, self.capacity)
        self._check(work)
        if tokens is not None and len(tokens) != len(layout.positions):
            raise ValueError(f"{len(tokens)} tokens were given for work that has {len(layout.positions)}: {work}")
        kind, shape = self._shape(layout)
        plan = self._find(kind, shape)
        plan.fill(layout, tokens)
        for row, end in zip(layout.rows, layout.ends):
            self._advance(int(row), int(end))
        return plan

    def _check(self, work: Work) -> None:
        """What else a cache must refuse."""

    def _advance(self, row: int, length: int) -> None:
        self.lengths[row] = length

    def _shape(self, layout: Layout) -> tuple[type[CachePlan], Shape]:
        """The plan for these tokens, and its sizes."""
        n_rows, n_each, span = len(layout.rows), int(layout.news.max()), int(layout.rows.max()) + 1
        if self._unmasked and n_rows == 1 and n_each > SHORT:
            return PromptPlan, Shape(n_each, len(layout.wanted), 1, n_each, int(layout.ends[0]))
        n_keys = min(self.round_keys(int(layout.ends.max())), self.capacity)
        # The rows of the cache as they lie are read without a copy; worth it unless many of them would idle.
        spread = span <= (2 * n_rows if n_each <= SHORT else n_rows)
        grid_rows, grid_each, n_tokens, n_wanted = self._sizes(layout, span if spread else n_rows, n_each)
        shape = Shape(n_tokens, n_wanted, grid_rows, grid_each, n_keys)
        if not spread:
            return CachePlan, shape
        in_order = n_rows == grid_rows and bool((layout.rows == range(n_rows)).all())
        full = in_order and len(layout.positions) == n_tokens == grid_rows * grid_each
        return AlignedPlan if full else SpreadPlan, shape

    def _exact(self, layout: Layout, n_rows: int, n_each: int) -> tuple[int, int, int, int]:
        return n_rows, n_each, len(layout.positions), len(layout.wanted)

    def _padded(self, layout: Layout, n_rows: int, n_each: int) -> tuple[int, int, int, int]:
        n_rows = min(power_of_two(n_rows), len(self.lengths))
        even = bool((layout.news == n_each).all())
        if even and n_each <= SHORT:  # decode and verify: tokens fill the grid
            n_tokens = n_rows * n_each
        else:
            n_each = max(power_of_two(n_each), SHORT)
            n_tokens = n_each if n_rows == 1 else max(power_of_two(len(layout.positions)), SHORT)
        # As many wanted as tokens says that all are: then, and only then, nothing has to be selected.
        all_wanted = len(layout.wanted) == len(layout.positions)
        n_wanted = n_tokens if all_wanted else min(power_of_two(len(layout.wanted)), n_tokens - 1)
        return n_rows, n_each, n_tokens, n_wanted

    def _find(self, kind: type[CachePlan], shape: Shape) -> CachePlan:
        """The plan of this kind and shape: the same one each time, unless it was not needed for long."""
        found = self._kept.pop((kind, shape), None) or self._passing.pop((kind, shape), None)
        plan = found or kind(self.specs, self.stores, self.kernel, shape, self.device)
        shelf, most = (self._kept, self._most_kept) if plan.returns else (self._passing, 8)
        shelf[kind, shape] = plan  # now the newest
        if len(shelf) > most:
            del shelf[next(iter(shelf))]
        return plan

    def keeps(self, plan: CachePlan) -> bool:
        """Whether a step of the same shape would get this very plan again."""
        shelf = self._kept if plan.returns else self._passing
        return shelf.get((type(plan), plan.shape)) is plan

    @property
    def step_limit(self) -> int:
        """The most new tokens of a row in one step."""
        return self.capacity

    @torch.no_grad()
    def read_tokens(self, row: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Keys (n, Hkv, D) and values (n, Hkv, Dv) of some tokens of a row, copied, one pair a layer."""
        if not 0 <= row < len(self.lengths) or not 0 <= start <= stop <= self.lengths[row]:
            raise ValueError(f"tokens {start} to {stop} of row {row} are not in this cache: {self.lengths}")
        return [store.read(row, start, stop) for store in self.stores]

    @torch.no_grad()
    def append_tokens(self, row: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append tokens to a row whose keys and values are known, as `read_tokens` gives them, without a forward.

        They must have been computed at the positions where they come to lie. Raises ValueError where they do not fit.
        """
        if len(layers) != len(self.stores):
            raise ValueError(f"keys and values of {len(layers)} layers for a cache of {len(self.stores)}")
        n = layers[0][0].shape[0]
        check_work([(row, n, 0)], self.lengths, self.capacity)
        start = self.lengths[row]
        rows = torch.full((n,), row, device=self.device)
        slots = torch.arange(start, start + n, device=self.device)
        for store, (k, v) in zip(self.stores, layers):
            store.write(rows, slots, k, v)
        self._advance(row, start + n)

    def truncate(self, row: int, length: int) -> None:
        """Undo what came after the first `length` tokens of a row; raises ValueError for what it does not hold."""
        if not 0 <= row < len(self.lengths) or not 0 <= length <= self.lengths[row]:
            held = self.lengths[row] if 0 <= row < len(self.lengths) else None
            raise ValueError(f"row {row} cannot be truncated to {length} tokens: it holds {held} (rows go from 0 to "
                             f"{len(self.lengths) - 1})")  # fmt: skip
        self.lengths[row] = length

    def free(self, row: int) -> None:
        """Forget a row: its slots are cleared for the next sequence."""
        self.truncate(row, 0)
        for store in self.stores:
            store.clear(row, store.n_slots)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take."""
        return sum(store.nbytes for store in self.stores)
