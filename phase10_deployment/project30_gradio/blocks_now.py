"""
Blocks at a moment

This file implements a record of who has which block of the cache, small enough to be sent and drawn, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - block tables,
  and reference counts of physical blocks
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - blocks that the tree of
  beginnings keeps

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from phase10_deployment.project28_serving.engine import Engine

MOST_SHOWN = 512  # blocks
PREVIEW = 60  # tokens of a text that are shown


class Row(NamedTuple):
    """A text that runs, and its block table."""

    row: int
    text: str  # how it ends
    n_tokens: int  # that have keys and values
    blocks: tuple[int, ...]


class Snapshot(NamedTuple):
    """All blocks at one moment."""

    rows: tuple[Row, ...]
    kept: tuple[int, ...]  # blocks that the tree has, shared with rows or alone
    n_blocks: int
    page: int  # tokens of a block
    block_bytes: int
    waiting: int  # texts in the queue
    asked: int  # tokens that were looked up in the tree since the beginning
    found: int  # of these, tokens that were there

    @property
    def owners(self) -> dict[int, list[int]]:
        """block -> the rows that have it."""
        found: dict[int, list[int]] = {}
        for row in self.rows:
            for block in row.blocks:
                found.setdefault(block, []).append(row.row)
        return found

    @property
    def saved(self) -> int:
        """Blocks that would be needed besides, if nothing was shared."""
        return sum(len(rows) - 1 for rows in self.owners.values())


def snapshot(engine: Engine) -> Snapshot:
    """Who has which block now.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        sections 4.2 to 4.4, figures 6 to 8.
    PAPER CONTEXT: block tables lead from logical to physical blocks; several may lead to the same one.
    INTUITION: a photograph of the cloakroom between two guests.
    IMPLEMENTATION: tables of the rows that run, and a flag for each block that the tree has; plain numbers, as it is
        sent from the engine's process to the page's.
    WHY: memory that is lent by the block is easy to explain and hard to believe before one has seen it.
    """
    cache, blocks = engine.cache, engine.blocks
    rows = []
    for request in sorted((r for r in engine.scheduler.running if r.row is not None), key=lambda r: r.row):
        told = engine.tokenizer.decode(request.tokens[-PREVIEW:])
        rows.append(Row(request.row, told, int(cache.lengths[request.row]), tuple(map(int, cache.blocks(request.row)))))
    gauges = engine.gauges()
    kept = tuple(map(int, np.flatnonzero(blocks.in_tree)))
    return Snapshot(tuple(rows), kept, cache.allocator.n_blocks, cache.page, cache.block_bytes, gauges.waiting,
                    gauges.asked, gauges.found)  # fmt: skip


def shown_blocks(snapshots: Sequence[Snapshot]) -> list[int]:
    """The blocks that are used at any of these moments, in order, and a few free ones behind them; not too many.

    >>> one = Snapshot((Row(0, "a", 20, (2, 5)),), (5,), 16, 16, 64, 0, 0, 0)
    >>> shown_blocks([one])
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    """
    n_blocks = snapshots[-1].n_blocks
    if n_blocks <= MOST_SHOWN:
        return list(range(n_blocks))
    used = sorted({block for each in snapshots for block in (*each.owners, *each.kept)})[:MOST_SHOWN]
    free = (block for block in range(n_blocks) if block not in set(used))
    return sorted([*used, *(next(free) for _ in range(min(32, MOST_SHOWN - len(used))))])
