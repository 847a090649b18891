"""
Block picture

This file implements a drawing of who has which block of the cache, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - block tables,
  and reference counts of physical blocks (its figures 6 to 8)

Each component is explained with paper references for educational purposes.
"""

from collections import Counter
from collections.abc import Mapping

from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache

ACROSS = 16  # blocks in one line of the map
WIDEST_BAR = 16  # signs for the tokens of a block
LEGEND = (
    "tables: the blocks of each row in order; * other rows have it, too; [##..] how full it is, where it is not full\n"
    "map: for each block how many rows have it; + the tree has it, too, or alone; . nobody: it is free"
)


def draw_blocks(cache: PagedCache, names: Mapping[int, str] | None = None) -> str:
    """The block table of every row that has blocks, and below them a map of all blocks with their owners.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        sections 4.2 to 4.4, figures 6 to 8.
    PAPER CONTEXT: block tables lead from logical to physical blocks; a reference count says how many share one.
    INTUITION: two views of one library: each reader's list of books, and each shelf with the number of its readers.
    IMPLEMENTATION: the rows that have a block are counted from their tables; an owner beyond these is the tree.
    WHY: what is shared, kept and free is seen at once, and so is whether tables and counts agree.

    `names` says what sits in a row. `LEGEND` explains the signs.

    >>> from phase1_foundation.project3_pretrain.plans import LayerSpec
    >>> spec = LayerSpec(1, 1, 4, 4, None, 0.5)
    >>> cache = PagedCache([spec], n_rows=3, capacity=16, page=4, n_blocks=6)
    >>> _ = cache.plan([(0, 6, 1)])
    >>> cache.fork(0, 1)                           # row 1 goes on from where row 0 is
    >>> cache.allocator.share(cache.blocks(0)[:1])  # as the tree does
    >>> _ = cache.plan([(1, 3, 1)])                # the block in which they part is copied
    >>> print(draw_blocks(cache, {0: "a text"}))
    row 0  a text    6 tokens  0* 1[##..]
    row 1            9 tokens  0* 2 3[#...]
    block 0  2+ 1  1  1  .  .
    """
    names = names or {}
    rows = [row for row, held in enumerate(cache.n_held) if held]
    having = Counter(block for row in rows for block in cache.blocks(row))
    wide = max((len(names.get(row, "")) for row in rows), default=0)
    lines = []
    for row in rows:
        name, table = names.get(row, ""), " ".join(table_of(cache, row, having))
        lines.append(f"row {row:<2} {name:<{wide}}  {cache.lengths[row]:>3} tokens  {table}")
    return "\n".join([*lines, *map_of(cache, having)])


def table_of(cache: PagedCache, row: int, having: Mapping[int, int]) -> list[str]:
    """The blocks of a row, each with a mark if it is shared, and with a bar if it is not full."""
    page, width = cache.page, min(cache.page, WIDEST_BAR)
    cells = []
    for place, block in enumerate(cache.blocks(row)):
        filled = min(max(cache.lengths[row] - place * page, 0), page)
        signs = -(-filled * width // page)
        bar = f"[{'#' * signs}{'.' * (width - signs)}]" if filled < page else ""
        cells.append(f"{block}{'*' if having[block] > 1 else ''}{bar}")
    return cells


def map_of(cache: PagedCache, having: Mapping[int, int]) -> list[str]:
    """All blocks with their owners, so many in a line; lines in which all are free are left out."""
    counts, digits = cache.allocator.counts, len(str(cache.allocator.n_blocks))
    lines, left_out = [], 0
    for first in range(0, len(counts), ACROSS):
        line = range(first, min(first + ACROSS, len(counts)))
        if not counts[line.start : line.stop].any():
            left_out += len(line)
            continue
        cells = (owners(having.get(block, 0), int(counts[block])) for block in line)
        lines.append(f"block {first:>{digits}}  " + " ".join(f"{cell:<2}" for cell in cells).rstrip())
    return lines + [f"and {left_out} free blocks"] * bool(left_out)


def owners(n_rows: int, n_references: int) -> str:
    """Who has a block, in two or three signs.

    >>> owners(2, 3), owners(1, 1), owners(0, 1), owners(0, 0)
    ('2+', '1', '+', '.')
    """
    return (str(n_rows) if n_rows else "") + "+" * (n_references > n_rows) if n_references else "."
