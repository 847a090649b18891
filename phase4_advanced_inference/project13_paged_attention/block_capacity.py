"""
Block capacity

This file implements how much fits when memory is lent by the block, and what is known of a text already, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - admission and
  growth by blocks, preemption by recomputation or swapping
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - a radix tree over what lies
  in the blocks; what nobody uses is kept until its memory is needed

Each component is explained with paper references for educational purposes.
"""

import weakref

import numpy as np

from phase4_advanced_inference.project10_prompt_caching.prefix_cache import RadixCache
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache, Swapped

HELPING = 256  # the tree gives back at least this part of all blocks at a time: 1/256


class BlockSpan:
    """Some blocks in a row, as a `Span` of the tree: a reference to each, and nothing copied.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: the tree's nodes point to keys and values in a paged memory.
    INTUITION: a call number instead of the book.
    IMPLEMENTATION: splitting shares out the numbers; dropping gives the references back.
    WHY: the tree of project 10 as it stands; there spans hold copies of keys and values, here blocks.
    """

    def __init__(self, capacity: "Blocks", blocks: list[int]):
        self.capacity, self.blocks = capacity, blocks
        self.nbytes = len(blocks) * capacity.cache.block_bytes

    def __len__(self) -> int:
        return len(self.blocks) * self.capacity.cache.page

    def split(self, n: int) -> "tuple[BlockSpan, BlockSpan]":
        """The first n tokens, whole blocks, and the rest."""
        n //= self.capacity.cache.page
        return BlockSpan(self.capacity, self.blocks[:n]), BlockSpan(self.capacity, self.blocks[n:])

    def drop(self) -> None:
        """Give the references back."""
        self.capacity.in_tree[self.blocks] = False
        self.capacity.cache.allocator.release(self.blocks)


class Blocks:
    """A `Capacity` of project 12 over a `PagedCache`: texts get blocks as they grow, and share what is alike.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.5.
    PAPER CONTEXT: when no block is free, whole sequences are evicted, the latest first; they are recomputed, or copied
        to the CPU's memory and back.
    INTUITION: a cloakroom without numbers reserved in advance: it closes when the hooks are taken, not before.
    IMPLEMENTATION: what a text leaves behind stays in the tree, and counts as free: `available` is what no row uses.
        A text is let in if all it has to read fits, and one block more for each that runs.
    WHY: reserved rows (project 12's Slots) are as long as the longest text that may come; most of it is never used.

    Args:
        share: keep a tree of beginnings; swap_bytes: memory of the host for preempted texts (0: they are read anew).
    """

    def __init__(self, cache: PagedCache, share: bool = True, swap_bytes: int = 0):
        self.cache, self.swap_bytes = cache, swap_bytes
        self.tree = RadixCache(page=cache.page) if share else None
        self.in_tree = np.zeros(cache.allocator.n_blocks, dtype=bool)
        self._rows = list(range(len(cache.lengths)))[::-1]
        self._grown: list[Request] = []  # whose prompts have new blocks, which the tree does not know yet
        self._swapped: weakref.WeakSet[Swapped] = weakref.WeakSet()
        self.n_swapped = 0  # times that a text was copied out

    @property
    def step_limit(self) -> int:
        """The most new tokens of a row in one step."""
        return self.cache.step_limit

    @property
    def available(self) -> int:
        """Blocks that are free, or that only the tree has: all that no row uses."""
        return self.cache.allocator.n_free + int((self.in_tree & (self.cache.allocator.counts == 1)).sum())

    def _n_blocks(self, n_tokens: int) -> int:
        return -(-n_tokens // self.cache.page)

    def check(self, request: Request) -> None:
        """Raise ValueError if a request can never fit."""
        if request.limit > self.cache.capacity:
            raise ValueError(f"a text of {request.limit} tokens will never fit in rows of {self.cache.capacity}")

    def admit(self, request: Request) -> bool:
        """Give a request a row, what the tree has of its beginning, or what was swapped out of it."""
        if not self._rows:
            return False
        self._tell_tree()
        n_running = len(self.cache.lengths) - len(self._rows)
        if request.kept is not None:
            if self._n_blocks(request.kept.length + 1) + n_running > self.available:
                return False
            self._swap_in(request)
            return True
        if self.tree is None:
            return self._begin(request, [], n_running)
        # The beginning of a text that the tree has: never all of it, as one token must be read.
        with self.tree.match(request.keys(-1), counted=False) as match:
            known = [block for span, n in match.parts for block in span.blocks[: n // self.cache.page]]
            begun = self._begin(request, known, n_running)
            if begun:
                self.tree.count(match)
        return begun

    def _begin(self, request: Request, known: list[int], n_running: int) -> bool:
        """Give a request a row that begins with the blocks known of its text, if the others fit."""
        blocks = np.array(known, dtype=np.int64)
        taken = int((self.cache.allocator.counts[blocks] == 1).sum())  # of the available ones, by this request
        if self._n_blocks(len(request.tokens) + 1) - len(known) + n_running > self.available - taken:
            return False
        request.row = self._rows.pop()
        self.cache.adopt(request.row, blocks)
        request.begin(self.cache.lengths[request.row])
        return True

    def _swap_in(self, request: Request) -> None:
        kept = request.kept
        self._evict(self._n_blocks(kept.length))
        self.cache.swap_in(self._rows[-1], kept)  # no row is taken if it fails
        request.row = self._rows.pop()
        self.cache.truncate(request.row, request.fed)  # a token may have been taken back meanwhile
        self._swapped.discard(kept)
        request.kept = None

    def grow(self, request: Request, n: int) -> bool:
        """Take the blocks for the next n tokens, from the tree if need be; False if they are not to be had."""
        missing = self.cache.missing(request.row, n)
        if missing > self.cache.allocator.n_free:
            if missing > self.available:
                return False
            # Other rows will ask in this step, too; but where little is left, nobody takes more than is needed.
            self._evict(max(missing, min(self.cache.allocator.n_blocks // HELPING, self.available // 2)))
        self.cache.reserve(request.row, n)
        if request.reading and self.tree is not None:
            self._grown.append(request)
        return True

    def _evict(self, n: int) -> None:
        """Have n free blocks, which are available; what the tree drops but a row uses frees nothing."""
        while (short := n - self.cache.allocator.n_free) > 0 and self.tree.evict(short * self.cache.block_bytes):
            pass

    def _tell_tree(self) -> None:
        """Let the tree know of prompts as soon as a step will write them.

        PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
        PAPER CONTEXT: requests that come together share a prefix as well as those that come later.
        INTUITION: who queues behind me may read over my shoulder.
        IMPLEMENTATION: a block may be shared before it is filled: in each layer of a step all new keys are written
            before any are read. So a request that is admitted into the very same step finds it.
        WHY: a batch of questions about one text reads it once, not once for each.
        """
        for request in self._grown:
            self._keep(request)
        self._grown.clear()

    def _keep(self, request: Request) -> None:
        """Give the tree the full blocks of a text."""
        if self.tree is None:
            return
        blocks, page = self.cache.blocks(request.row), self.cache.page

        def span(start: int, stop: int) -> BlockSpan:
            some = blocks[start // page : stop // page]
            self.cache.allocator.share(some)
            self.in_tree[some] = True
            return BlockSpan(self, some)

        self.tree.insert(request.keys(min(request.fed, len(request.tokens))), span)

    def preempt(self, request: Request) -> None:
        """Take the row of a request that will come back: to the host if there is room, else to be read anew.

        Its blocks stay in the tree as long as nobody needs them, so reading anew may cost little.
        """
        size = self.cache.n_held[request.row] * self.cache.block_bytes
        if size and sum(kept.nbytes for kept in self._swapped) + size <= self.swap_bytes:
            request.kept = self.cache.swap_out(request.row)
            self._swapped.add(request.kept)
            self.n_swapped += 1
            self._leave(request)
        else:
            self.release(request)
            request.fed = 0

    def release(self, request: Request) -> None:
        """Take the row of a request that has ended; the tree keeps its full blocks."""
        self._keep(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        self._grown = [other for other in self._grown if other is not request]
        self.cache.free(request.row)
        self._rows.append(request.row)
        request.row = None

    def fork(self, request: Request, other: Request) -> bool:
        """Let another request go on from where this one is, in a row of its own; False if there is none."""
        if not self._rows or self.available <= len(self.cache.lengths) - len(self._rows):
            return False
        other.row = self._rows.pop()
        self.cache.fork(request.row, other.row)
        other.begin(request.fed)
        return True

    def clear(self) -> None:
        """Forget what no row uses."""
        self._grown.clear()
        if self.tree is not None:
            self.tree.clear()
