"""
Paged cache

This file implements a cache whose rows are made of blocks following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - block tables,
  allocation on demand, sharing with copy-on-write, swapping

Each component is explained with paper references for educational purposes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.cache_plan import Shape
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase3_core_inference.project8_kv_cache.work import (
    SHORT,
    Layout,
    Rounding,
    Work,
    check_work,
    octaves,
    power_of_two,
    quarter_octaves,
)
from phase4_advanced_inference.project13_paged_attention.block_allocator import BlockAllocator, OutOfBlocks
from phase4_advanced_inference.project13_paged_attention.paged_plan import PagedPlan
from phase4_advanced_inference.project13_paged_attention.paged_store import PagedStore

RECORDED = 2048  # tokens of a mixed step, up to which launching it takes longer than running it

__all__ = ["BlockAllocator", "OutOfBlocks", "PagedCache", "Swapped"]


def mixed_size(n: int) -> int:
    """The number of tokens that a mixed step is filled up to: a power of two, or half way between two from 256 on.

    >>> [mixed_size(n) for n in (3, 100, 300, 1100, 1600)]
    [64, 128, 384, 1536, 2048]
    """
    whole = octaves(n)
    return whole * 3 // 4 if whole > 256 and n <= whole * 3 // 4 else whole


def mixed_sizes(most: int) -> list[int]:
    """All sizes of mixed steps of at most so many tokens.

    >>> mixed_sizes(700)
    [64, 128, 256, 384, 512, 768]
    """
    return sorted({mixed_size(n) for n in range(1, most + 1)})


@dataclass(eq=False)
class Swapped:
    """A text's keys and values on the host."""

    length: int
    layers: list[tuple[Tensor, Tensor]]  # whole blocks, (n, page, Hkv, D) and (n, page, Hkv, Dv)

    @property
    def nbytes(self) -> int:
        """Memory of the host that it takes."""
        return sum(x.nbytes for pair in self.layers for x in pair)


class PagedCache:
    """Every row has the blocks that its tokens fill, and no more; rows may share blocks.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.
    PAPER CONTEXT: keys and values of a sequence lie in blocks that need not be adjacent, mapped by its block table and
        allocated as it grows; blocks that several sequences map are copied when one of them writes.
    INTUITION: an operating system's memory: a program sees one long shelf, the machine lends it page by page.
    IMPLEMENTATION: a KVCache as project 8's, so that whatever runs over one runs over this. `reserve` takes blocks
        before a step; `plan` does it for whoever has not. Tables live on the host, and travel with each step.
    WHY: a text wastes at most one block, so that several times as many texts fit as with a row for the longest.

    Args:
        specs, n_rows, capacity, dtype, device: as of `ContiguousCache`; capacity: the most tokens of a row.
        n_blocks: of all rows together; None: enough for all rows to be full. page: tokens of a block, a power of two.
        store: the format; padded: round the number of rows up, for compiled models and CUDA graphs.
        round_keys: how the number of rows is rounded then; keys need it not, as kernels are told each row's length.

    Raises ValueError for what cannot be, OutOfBlocks where memory ends (nothing is changed then).
    """

    ragged = True

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        n_rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        n_blocks: int | None = None,
        page: int = 16,
        store: Callable[..., PagedStore] = PagedStore,
        padded: bool = False,
        round_keys: Rounding = quarter_octaves,
    ):
        block_size = min((spec.block_size for spec in specs if spec.block_size), default=capacity)
        if n_rows < 1 or not 1 <= capacity <= block_size:
            raise ValueError(f"n_rows={n_rows} must be at least 1, and capacity={capacity} lie between 1 and the "
                             f"model's block_size={block_size}")  # fmt: skip
        if page < 1 or page & (page - 1):
            raise ValueError(f"page={page} must be a power of two: 16 is a good choice")
        self.specs, self.page, self.device = list(specs), page, torch.device(device)
        self.padded, self.round_rows = padded, round_keys
        self.n_most = -(-capacity // page)  # blocks of the longest row
        self.allocator = BlockAllocator(n_rows * self.n_most if n_blocks is None else n_blocks)
        self.capacity = min(capacity, self.allocator.n_blocks * page)
        self.lengths = [0] * n_rows
        self.n_held = [0] * n_rows  # blocks of each row
        self._reserved = [0] * n_rows  # up to here each row may write without asking
        self.tables = np.zeros((n_rows, self.n_most), dtype=np.int64)
        self._kept: dict[tuple, PagedPlan] = {}
        self.block_bytes = bytes_per_token(specs, dtype) * page
        with torch.no_grad():
            self.stores = [store(spec, self.allocator.n_blocks, page, dtype, device) for spec in specs]

    @property
    def step_limit(self) -> int:
        """The most new tokens of a row in one step."""
        return self.capacity

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take."""
        return sum(store.nbytes for store in self.stores)

    @property
    def waste(self) -> float:
        """The part of the blocks in use by rows that holds no token: places behind the ends of texts."""
        filled = np.full(self.allocator.n_blocks, -1)  # places of each block, -1 where no row uses it
        for row, length in enumerate(self.lengths):
            blocks = self.tables[row, : self.n_held[row]]
            here = np.clip(length - np.arange(len(blocks)) * self.page, 0, self.page)
            filled[blocks] = np.maximum(filled[blocks], here)  # of those that share it, the longest counts
        used = filled[filled >= 0]
        return 1 - float(used.mean()) / self.page if len(used) else 0.0

    # -- blocks of a row

    def blocks(self, row: int) -> list[int]:
        """The blocks of a row, in order."""
        return self.tables[row, : self.n_held[row]].tolist()

    def missing(self, row: int, n: int) -> int:
        """How many blocks n tokens more take from the free ones, a copy of a shared one among them."""
        end = self.lengths[row] + n
        if end <= self._reserved[row] or not n:
            return 0
        return max(0, -(-end // self.page) - self.n_held[row]) + self._shares_end(row)

    def _shares_end(self, row: int) -> bool:
        """Whether the next token falls into a block that somebody else has, too."""
        at = self.lengths[row] // self.page
        return at < self.n_held[row] and self.allocator.counts[self.tables[row, at]] > 1

    def reserve(self, row: int, n: int) -> None:
        """Take the blocks that n tokens more need; raises OutOfBlocks, with nothing changed, if too few are free.

        PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
            sections 4.3 and 4.4 (copy-on-write).
        PAPER CONTEXT: a block with a reference count above one is copied before it is written, and the count lowered.
        INTUITION: whoever wants to write on a shared page makes a copy, and gives the shared one back.
        IMPLEMENTATION: only the block in which the row ends can be written, so at most one is copied. A block that was
            taken, or found to be the row's own, is its to fill: no need to ask again for each token.
        WHY: texts that begin alike share all whole blocks for good, and part where they differ.
        """
        self._check_row(row)
        if self.lengths[row] + n <= self._reserved[row]:
            return
        if self.lengths[row] + n > self.capacity:
            raise ValueError(f"row {row} holds {self.lengths[row]} tokens, and {n} more exceed capacity="
                             f"{self.capacity}: build the cache with more capacity")  # fmt: skip
        missing = self.missing(row, n)
        if missing > self.allocator.n_free:
            raise OutOfBlocks(f"row {row} needs {missing} blocks for {n} tokens more, and {self.allocator.n_free} are "
                              f"free: free a row, or give the cache more blocks")  # fmt: skip
        at = self.lengths[row] // self.page
        if self._shares_end(row):
            old, new = int(self.tables[row, at]), self.allocator.allocate()[0]
            self.tables[row, at] = new
            self.allocator.release([old])  # before the copy, so that no block is lost if that fails
            self._copy_block(old, new)
            missing -= 1
        self._append(row, self.allocator.allocate(missing))
        self._reserved[row] = self.n_held[row] * self.page

    @torch.no_grad()
    def _copy_block(self, old: int, new: int) -> None:
        source, target = (torch.tensor([block], device=self.device) for block in (old, new))
        for store in self.stores:
            store.put(target, *store.take(source))

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.lengths):
            raise ValueError(f"row {row} is unknown: this cache has the rows 0 to {len(self.lengths) - 1}")

    def _check_empty(self, row: int) -> None:
        self._check_row(row)
        if self.n_held[row]:
            raise ValueError(f"row {row} holds {self.n_held[row]} blocks: free it first")

    def _append(self, row: int, blocks: Sequence[int]) -> None:
        held = self.n_held[row]
        self.tables[row, held : held + len(blocks)] = blocks
        self.n_held[row] = held + len(blocks)

    def adopt(self, row: int, blocks: Sequence[int]) -> None:
        """Let an empty row begin with these blocks, which are full and stay shared with whoever has them."""
        self._check_empty(row)
        if len(blocks) * self.page > self.capacity:
            raise ValueError(f"{len(blocks)} blocks of {self.page} tokens exceed capacity={self.capacity}: give at "
                             f"most {self.capacity // self.page}")  # fmt: skip
        self.allocator.share(blocks)
        self._append(row, blocks)
        self.lengths[row] = self._reserved[row] = len(blocks) * self.page

    def fork(self, row: int, target: int) -> None:
        """Let an empty row go on from where another is: all blocks are shared, the last one until one of them writes.

        PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
            section 4.4.
        PAPER CONTEXT: parallel samples of one prompt share its blocks; the last, partly filled one is copied on write.
        INTUITION: two endings for one story: the pages before are printed once.
        IMPLEMENTATION: one reference more for each block, and the same table; `reserve` does the rest.
        WHY: several answers to one prompt cost the memory of the answers.
        """
        self._check_row(row)
        self._check_empty(target)
        blocks = self.blocks(row)[: -(-self.lengths[row] // self.page)]  # those only reserved stay the row's own
        self.allocator.share(blocks)
        self._append(target, blocks)
        self.lengths[target] = self._reserved[target] = self._reserved[row] = self.lengths[row]

    def truncate(self, row: int, length: int) -> None:
        """Undo what came after the first `length` tokens of a row; blocks that are empty then are given back."""
        if not 0 <= row < len(self.lengths) or not 0 <= length <= self.lengths[row]:
            held = self.lengths[row] if 0 <= row < len(self.lengths) else None
            raise ValueError(f"row {row} cannot be truncated to {length} tokens: it holds {held} (rows go from 0 to "
                             f"{len(self.lengths) - 1})")  # fmt: skip
        keep = -(-length // self.page)
        if self.n_held[row] > keep:
            self.allocator.release(self.blocks(row)[keep:])
        self.lengths[row], self.n_held[row] = length, keep
        self._reserved[row] = min(self._reserved[row], length)

    def free(self, row: int) -> None:
        """Forget a row."""
        self.truncate(row, 0)

    # -- steps

    def plan(self, work: Work, tokens: Sequence[int] | None = None) -> PagedPlan:
        """The plan of one step; with `tokens` (in the order of the work) it holds them, padded, as `plan.tokens`."""
        layout = Layout.of(work, self.lengths, self.capacity)
        if tokens is not None and len(tokens) != len(layout.positions):
            raise ValueError(f"{len(tokens)} tokens were given for work that has {len(layout.positions)}: {work}")
        self._reserve_all(work)
        numbers, places = np.divmod(layout.positions, self.page)
        slots = self.tables[layout.token_rows, numbers] * self.page + places
        plan = self._find(*self._shape(layout))
        plan.fill(layout, slots, self.tables[layout.rows, : plan.shape.n_keys], tokens)
        for row, end in zip(layout.rows.tolist(), layout.ends.tolist()):
            self.lengths[row] = end
        return plan

    def _reserve_all(self, work: Work) -> None:
        """Take the blocks of all rows, or of none."""
        needs = [(row, n) for row, n, _ in work if self.lengths[row] + n > self._reserved[row]]
        total = sum(self.missing(row, n) for row, n in needs)
        ends = Counter(self.tables[row, self.lengths[row] // self.page] for row, _ in needs if self._shares_end(row))
        total -= sum(n == self.allocator.counts[block] for block, n in ends.items())  # the last owner copies nothing
        if total > self.allocator.n_free:
            raise OutOfBlocks(f"this step needs {total} blocks more, and {self.allocator.n_free} are free: free a row, "
                              f"or give the cache more blocks")  # fmt: skip
        for row, n in needs:
            self.reserve(row, n)

    def _shape(self, layout: Layout) -> tuple[Shape, bool]:
        """The sizes of a step, and whether every row has equally many new tokens.

        Where shapes must return, a mixed step is one of few: so many tokens in any rows, said by n_each = 0.
        """
        n_tokens, n_wanted, n_rows = len(layout.positions), len(layout.wanted), len(layout.rows)
        n_each, all_wanted = int(layout.news.max()), n_wanted == n_tokens
        even = n_each <= SHORT and bool((layout.news == n_each).all())
        if not self.padded:
            return Shape(n_tokens, n_wanted, n_rows, n_each, -(-int(layout.ends.max()) // self.page)), even
        if even and all_wanted:
            n_rows = self.rows_of(n_rows)
            return Shape(n_rows * n_each, n_rows * n_each, n_rows, n_each, self.n_most), True
        if n_tokens <= RECORDED and n_wanted <= len(self.lengths):
            n_tokens = max(mixed_size(n_tokens), power_of_two(len(self.lengths) + 1))
            return Shape(n_tokens, len(self.lengths), len(self.lengths), 0, self.n_most), False
        return Shape(n_tokens, n_wanted, n_rows, n_each, self.n_most), False

    def rows_of(self, n: int) -> int:
        """The number of rows that n are filled up to: so few sizes that code can be recorded for each."""
        # Roundings are made for keys, whose steps are of 64: in steps of 8 for rows.
        rounded = power_of_two(n) if n < 8 else -(-self.round_rows(8 * n) // 8)
        return min(max(n, rounded), len(self.lengths))

    def _find(self, shape: Shape, even: bool) -> PagedPlan:
        """The plan of this shape: the same one each time, unless it was not needed for long."""
        plan = self._kept.pop((shape, even), None) or PagedPlan(self.specs, self.stores, shape, even, self.device)
        self._kept[shape, even] = plan  # now the newest
        if len(self._kept) > (64 if self.padded else 8):
            del self._kept[next(iter(self._kept))]
        return plan

    def keeps(self, plan: PagedPlan) -> bool:
        """Whether a step of the same shape would get this very plan again."""
        return self._kept.get((plan.shape, plan.even)) is plan

    # -- copies

    def _slots(self, row: int, start: int, stop: int) -> Tensor:
        places = np.arange(start, stop)
        return torch.from_numpy(self.tables[row, places // self.page] * self.page + places % self.page).to(self.device)

    @torch.no_grad()
    def read_tokens(self, row: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Keys (n, Hkv, D) and values (n, Hkv, Dv) of some tokens of a row, copied, one pair a layer."""
        if not 0 <= row < len(self.lengths) or not 0 <= start <= stop <= self.lengths[row]:
            raise ValueError(f"tokens {start} to {stop} of row {row} are not in this cache: {self.lengths}")
        return [store.read(self._slots(row, start, stop)) for store in self.stores]

    @torch.no_grad()
    def append_tokens(self, row: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append tokens whose keys and values are known, as `read_tokens` gives them, without a forward."""
        if len(layers) != len(self.stores):
            raise ValueError(f"keys and values of {len(layers)} layers for a cache of {len(self.stores)}")
        n = layers[0][0].shape[0]
        check_work([(row, n, 0)], self.lengths, self.capacity)
        start = self.lengths[row]
        self.reserve(row, n)
        slots = self._slots(row, start, start + n)
        for store, (k, v) in zip(self.stores, layers):
            store.write(slots, k, v)
        self.lengths[row] = start + n

    @torch.no_grad()
    def swap_out(self, row: int) -> Swapped:
        """A row's blocks, copied to the host; the row is free then.

        PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
            section 4.5.
        PAPER CONTEXT: evicted blocks are copied to the CPU's memory, and back when the sequence goes on.
        INTUITION: a desk is cleared into a box, with the bookmarks left in.
        IMPLEMENTATION: asynchronous copies into pinned memory, in the order of the steps, so that nothing waits.
        WHY: a long text comes back for the price of a copy instead of a prefill.
        """
        self._check_row(row)
        on_gpu, full = self.device.type == "cuda", -(-self.lengths[row] // self.page)  # none that is only reserved
        blocks = torch.tensor(self.blocks(row)[:full], dtype=torch.long, device=self.device)
        saved = [tuple(x.to("cpu", non_blocking=on_gpu) for x in store.take(blocks)) for store in self.stores]
        swapped = Swapped(self.lengths[row], saved)
        self.free(row)
        return swapped

    @torch.no_grad()
    def swap_in(self, row: int, swapped: Swapped) -> None:
        """Put a text back into an empty row; raises OutOfBlocks if it does not fit now."""
        self._check_empty(row)
        self.reserve(row, swapped.length)
        blocks = torch.tensor(self.blocks(row), dtype=torch.long, device=self.device)
        try:
            for store, pair in zip(self.stores, swapped.layers):
                store.put(blocks, *(x.to(self.device, non_blocking=True) for x in pair))
        except BaseException:  # out of memory for the copies, say
            self.free(row)
            raise
        self.lengths[row] = swapped.length
