"""
Block allocator

This file implements who owns which block of the cache following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - blocks of
  fixed size, handed out one by one, shared by reference counts

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free; nothing was given out."""


class BlockAllocator:
    """Numbers of blocks, free or with so many owners.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        sections 4.2 (block manager) and 4.4 (sharing).
    PAPER CONTEXT: physical blocks are allocated on demand; a reference count says how many logical blocks map to one.
    INTUITION: a library's desk: books lie on the shelf, or are out, and some are read by several people together.
    IMPLEMENTATION: a stack of free numbers and an array of counts. What lies in a block, the allocator does not know.
    WHY: all blocks are alike, so memory never falls apart into holes, and a text wastes less than one block.

    Raises OutOfBlocks from `allocate`, and ValueError for what would corrupt the counts.

    >>> allocator = BlockAllocator(4)
    >>> mine = allocator.allocate(3)
    >>> allocator.share(mine[:1])                  # another text begins alike
    >>> allocator.release(mine)
    >>> allocator.n_free, allocator.references(mine[0])
    (3, 1)
    """

    def __init__(self, n_blocks: int):
        if n_blocks < 1:
            raise ValueError(f"n_blocks={n_blocks} must be at least 1: give the cache more memory")
        self.n_blocks = n_blocks
        self.counts = np.zeros(n_blocks, dtype=np.int32)
        self._free = list(range(n_blocks))[::-1]

    @property
    def n_free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many owners a block has."""
        return int(self.counts[block])

    def allocate(self, n: int = 1) -> list[int]:
        """So many free blocks, each with one owner; raises OutOfBlocks if there are fewer."""
        if n > len(self._free):
            raise OutOfBlocks(f"{n} blocks were asked for, and {len(self._free)} of {self.n_blocks} are free")
        blocks = [self._free.pop() for _ in range(n)]
        self.counts[blocks] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One owner more for each of these."""
        numbers, owners = self._counted(blocks)
        self._check(numbers, owners, np.ones_like(owners))
        self.counts[numbers] += owners

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each of these; blocks without owners are free."""
        numbers, owners = self._counted(blocks)
        self._check(numbers, owners, owners)
        self.counts[numbers] -= owners
        self._free += [block for block in dict.fromkeys(blocks) if not self.counts[block]]

    def _counted(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The different blocks among these, and how often each stands there: (k,) and (k,)."""
        numbers, owners = np.unique(np.array(blocks, dtype=np.int64), return_counts=True)
        if len(numbers) and (numbers[0] < 0 or numbers[-1] >= self.n_blocks):
            raise ValueError(self._refusal(int(numbers[0] if numbers[0] < 0 else numbers[-1]), 1))
        return numbers, owners.astype(np.int32)

    def _check(self, numbers: np.ndarray, owners: np.ndarray, needed: np.ndarray) -> None:
        """Raise ValueError for a block that has fewer owners than are needed."""
        wrong = needed > self.counts[numbers]
        if wrong.any():
            raise ValueError(self._refusal(int(numbers[wrong.argmax()]), int(owners[wrong.argmax()])))

    def _refusal(self, block: int, n: int) -> str:
        return (f"block {block} is free, or none of the {self.n_blocks}, or has not {n} owners: it is nobody's to "
                f"share or give back")  # fmt: skip
