"""
Paged attention

This file implements attention over a cache of blocks, for single tokens, drafts and chunks of prompts, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - the keys of a
  row lie in blocks anywhere in memory, in the order of its table
- "Flash-Decoding for long-context inference" (Dao et al., 2023) - few queries a row: parallel over keys
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - many: over queries
- "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills" (Agrawal et al., 2023) - both in one
  batch

Each component is explained with paper references for educational purposes.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common import kernels
from phase3_core_inference.project9_flash_attention import decoding, tiles
from phase3_core_inference.project9_flash_attention.flash_attention import WIDEST
from phase3_core_inference.project9_flash_attention.tiles import Tile, width_of

PROGRAMS = 4  # for each multiprocessor: half of project 9's, as following a table already costs registers
FEW = 16  # queries a row that are taken as rows of one product ...
FEW_ROWS = 128  # ... if with all heads of their group they are no more than this
PIECE = 256  # queries that the reference takes at once
GATHERED = 1 << 19  # numbers that the reference gathers at once: what stays in a CPU's cache

# For project 9's `launch_best`. The m of one width is the same for all its candidates, since the list of tiles is made
# before one of them is chosen; the kernel for few queries has as many rows as there are queries and heads.
tiles.CANDIDATES |= {
    "paged_few": {  # up to 32 rows
        32: [Tile(16, 64, 4, 3)],
        64: [Tile(16, 64, 4, 3), Tile(16, 32, 4, 2)],
        128: [Tile(16, 64, 4, 3), Tile(16, 32, 4, 2)],
        256: [Tile(16, 32, 4, 3), Tile(16, 32, 4, 1)],
    },
    "paged_some": {  # up to 128 rows
        32: [Tile(128, 64, 4, 3)],
        64: [Tile(128, 64, 4, 3), Tile(128, 32, 4, 2)],
        128: [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 1)],
        256: [Tile(128, 32, 8, 2), Tile(128, 16, 8, 1)],
    },
    "paged_ragged": {
        32: [Tile(128, 64, 4, 2)],
        64: [Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(128, 32, 4, 2)],
        128: [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 1)],
        256: [Tile(64, 32, 8, 2), Tile(64, 16, 8, 1)],
    },
}


def depth(tile: Tile) -> int:
    """Triton's stages for so many tiles in flight: where the address of a load is loaded, each takes two of them."""
    return 2 * tile.stages - 1


@functools.cache
def gpu_code():
    """The modules with the kernels: Triton is not there on every machine."""
    from phase3_core_inference.project9_flash_attention import decode_kernels
    from phase4_advanced_inference.project13_paged_attention import paged_kernels

    return paged_kernels, decode_kernels


# == Reference ==


def cut_up(counts: list[int], firsts: list[int], ends: list[int]) -> list[tuple[int, int, int, int]]:
    """The work of a batch, (queries, end of their keys, first token, row), sorted, long chunks in pieces."""
    work = []
    for row, (count, first, end) in enumerate(zip(counts, firsts, ends)):
        for at in range(0, count if end > 0 else 0, PIECE):
            n = min(PIECE, count - at)
            work.append((n, end - (count - at - n), first + at, row))
    return sorted(piece for piece in work if piece[1] > 0)


def in_batches(work: list, limit: int) -> list[list]:
    """Neighbours with as many queries each, and so few keys together (rows x the longest) that `limit` holds them."""
    batches = []
    for piece in work:  # sorted: within a batch the last has the most keys
        if batches and batches[-1][0][0] == piece[0] and (len(batches[-1]) + 1) * piece[1] <= limit:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


def gather_keys(x: Tensor, blocks: Tensor, lows: Tensor, ends: Tensor, begin: int, end: int) -> Tensor:
    """Keys or values [begin, end) of some rows, (B, Hkv, S, D), with zeros for those outside a row's [low, end).

    Those may be anything, even NaN, which no mask of scores keeps out of a product. `blocks` (B, n) are valid numbers,
    and `begin` is the first position in the first of them.
    """
    found = x.index_select(0, blocks.flatten()).view(blocks.shape[0], -1, *x.shape[2:])[:, : end - begin]
    at = torch.arange(begin, end, device=x.device)
    for part in (slice(0, int(lows.max()) - begin), slice(int(ends.min()) - begin, None)):  # mostly short, or empty
        hidden = (at[part] < lows[:, None]) | (at[part] >= ends[:, None])
        found[:, part].masked_fill_(hidden[:, :, None, None], 0.0)
    return found.transpose(1, 2)


def attend_together(out, q, k, v, tables, work, scale, window) -> None:
    """Write the results of some pieces of work with as many queries each into `out`: one product for all of them."""
    (n, longest, _, _), page, (H, Hkv) = work[-1], k.shape[1], (q.shape[1], k.shape[2])
    _, ends, firsts, rows = torch.tensor(work, device=q.device).unbind(1)
    each = torch.arange(n, device=q.device)
    tokens, places = firsts[:, None] + each, (ends - n)[:, None] + each  # (B, n)
    lows = torch.zeros_like(ends) if window is None else (places[:, 0] + 1 - window).clamp_min(0)
    numbers = torch.arange(int(lows.min()) // page, -(-longest // page), device=q.device)
    looked_at = (numbers >= lows[:, None] // page) & (numbers <= (ends[:, None] - 1) // page)
    last = tables[rows, (ends - 1) // page][:, None]  # stands in for entries that may be anything
    blocks = torch.where(looked_at, tables[rows[:, None], numbers], last)
    begin = int(numbers[0]) * page
    keys, values = (gather_keys(x, blocks, lows, ends, begin, longest) for x in (k, v))
    at = torch.arange(begin, longest, device=q.device)
    seen = at <= places[:, :, None]  # (B, n, S)
    if window is not None:
        seen = seen & (at > places[:, :, None] - window)
    queries = q[tokens].unflatten(2, (Hkv, H // Hkv)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, Hkv, n * group, D)
    mask = seen.repeat_interleave(H // Hkv, 1)[:, None]
    found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    found = found.unflatten(2, (n, H // Hkv)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    out[tokens] = found.masked_fill((places < 0)[:, :, None, None], 0.0)  # a query without keys


def reference_ragged(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, begins: Tensor, ends: Tensor, tile_rows: Tensor | None,
    tile_firsts: Tensor | None, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """What the kernels compute, and how a CPU does it: blocks are gathered, rows with as many queries go together.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, eq. 4.
    PAPER CONTEXT: attention block by block: a_ij = exp(q_i K_j / sqrt(d)) / sum, o_i = sum over j of V_j a_ij.
    INTUITION: whoever cannot read a scattered book copies its pages first, a few at a time.
    IMPLEMENTATION: rows sorted by queries and length share a product; long chunks go in pieces, each up to its own
        last key. Grouped heads are more queries of the same keys, so that no key is repeated.
    WHY: the oracle of the kernels, which may wait for the device; no row depends on what its neighbours hold.
    """
    counts = (begins[1:] - begins[:-1]).tolist()
    return attend_all(q, k, v, tables, cut_up(counts, begins.tolist(), ends.tolist()), scale, window)


def reference_few(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, ends: Tensor, scale: float, window: int | None, n_each: int,
    splits: int,
) -> Tensor:  # fmt: skip
    """The same for rows with `n_each` queries each."""
    rows = len(ends)
    work = cut_up([n_each] * rows, list(range(0, rows * n_each, n_each)), ends.tolist())
    return attend_all(q, k, v, tables, work, scale, window)


def attend_all(q, k, v, tables, work, scale, window) -> Tensor:
    """Attention of all pieces of work; tokens that are in none of them get zeros."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    for batch in in_batches(work, GATHERED // (k.shape[2] * max(k.shape[3], v.shape[3]))):
        attend_together(out, q, k, v, tables, batch, scale, window)
    return out


# == Kernels ==


def _few_shapes(q, k, v, tables, ends, scale, window, n_each, splits):
    """An empty result of `paged_few`."""
    return q.new_empty(*q.shape[:2], v.shape[-1])


@kernels.op("paged_few", reference_few, fake=_few_shapes, opaque=True)
def paged_few(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, ends: Tensor, scale: float, window: int | None, n_each: int,
    splits: int,
) -> Tensor:  # fmt: skip
    """Launch the kernel for `n_each` queries a row and, where the keys are in several parts, their merger."""
    (N, H, D), (_, page, Hkv, V) = q.shape, v.shape
    o, group, d, w = q.new_empty(N, H, V), H // Hkv, width_of(D), width_of(V)
    top = total = parts = o  # not touched where there is one part
    if splits > 1:
        top, total = torch.empty(2, N, H, splits, dtype=torch.float32, device=q.device)
        parts = torch.empty(N, H, splits, V, dtype=torch.float32, device=q.device)
    rows = width_of(n_each * group)
    code, merger = gpu_code()

    def launch(tile):
        code.few_kernel[(splits, Hkv, len(ends))](
            q, k, v, tables, ends, o, top, total, parts, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
            tables.stride(0), tables.shape[1] * page, window or 0, scale, N_EACH=n_each, GROUP=group, D=D, V=V,
            PAGE=page, BLOCK_M=rows, BLOCK_N=tile.n, BLOCK_D=d, BLOCK_V=w, WINDOW=window is not None,
            WHOLE=splits == 1, STAGES=depth(tile), num_warps=tile.warps,
        )  # fmt: skip

    tiles.launch_best("paged_few" if rows <= 32 else "paged_some", max(d, w), q.itemsize, launch)
    if splits > 1:
        block = 1 << (splits - 1).bit_length()
        merger.merge_kernel[(N * H,)](top, total, parts, o, splits, V, BLOCK_S=block, BLOCK_V=w, num_warps=4)
    return o


def _ragged_shapes(q, k, v, tables, begins, ends, tile_rows, tile_firsts, scale, window):
    """An empty result of `paged_ragged`."""
    return q.new_empty(*q.shape[:2], v.shape[-1])


@kernels.op("paged_ragged", reference_ragged, fake=_ragged_shapes, opaque=True)
def paged_ragged(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, begins: Tensor, ends: Tensor, tile_rows: Tensor | None,
    tile_firsts: Tensor | None, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Launch the kernel for rows with any number of queries: a program for each tile of them and each key head."""
    (N, H, D), (_, page, Hkv, V) = q.shape, v.shape
    o, group, d, w = q.new_empty(N, H, V), H // Hkv, width_of(D), width_of(V)
    block_q = queries_of_a_tile(H, Hkv, D, V)
    if tile_rows is None or tile_firsts is None:
        tile_rows, tile_firsts = tile_list(begins, N, block_q)
    n_tiles, small = len(tile_rows), width_of(group)

    def launch(tile):
        gpu_code()[0].ragged_kernel[(n_tiles * Hkv,)](
            q, k, v, tables, begins, ends, tile_rows, tile_firsts, o, q.stride(0), q.stride(1), *k.stride()[:3],
            *v.stride()[:3], tables.stride(0), tables.shape[1] * page, n_tiles, window or 0, scale, Hkv, GROUP=group,
            D=D, V=V, PAGE=page, BLOCK_Q=block_q, BLOCK_M=max(tile.m, small), SMALL=small, BLOCK_N=tile.n, BLOCK_D=d,
            BLOCK_V=w, WINDOW=window is not None, STAGES=depth(tile), num_warps=tile.warps,
        )  # fmt: skip

    tiles.launch_best("paged_ragged", max(d, w), q.itemsize, launch)
    return o


def queries_of_a_tile(heads: int, kv_heads: int, D: int, V: int | None = None) -> int:
    """How many queries of a row one program of the ragged kernel takes: with its group's heads they fill a tile.

    >>> queries_of_a_tile(heads=32, kv_heads=8, D=64)
    32
    """
    width = max(width_of(D, V or D), 32)
    return max(1, tiles.CANDIDATES["paged_ragged"][width][0].m // (heads // kv_heads))


def tile_list(begins: Tensor, n_tokens: int, block_q: int) -> tuple[Tensor, Tensor]:
    """The tiles of a ragged batch, (n_tokens // block_q + R,) int32 each: their rows, and their first tokens.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691, 3.2.
    PAPER CONTEXT: parallel over tiles of queries; there all rows are equally long, and a tile is an index.
    INTUITION: seats for all who may come are set before anyone is counted; some stay empty.
    IMPLEMENTATION: row r gets the seats from begins[r] // block_q + r on, which always suffice; a seat behind its row's
        end gets row -1. Made on the device; its size depends on shapes alone. A plan knows the lengths, and
        writes the same list on the host, once a step for all layers (`write_tiles`).
    WHY: the host need not know the lengths, so that nothing waits, and a graph can be captured.

    >>> rows, firsts = tile_list(torch.tensor([0, 1, 6], dtype=torch.int32), n_tokens=6, block_q=4)
    >>> rows.tolist(), firsts.tolist()      # row 0: token 0; row 1: tokens 1 to 4, and 5
    ([0, 1, 1], [0, 1, 5])
    """
    R = len(begins) - 1
    seats = torch.arange(n_tokens // block_q + R, dtype=torch.int32, device=begins.device)
    starts = begins // block_q + torch.arange(R + 1, dtype=torch.int32, device=begins.device)
    rows = torch.searchsorted(starts[1:], seats, right=True, out_int32=True).clamp_max_(R - 1)
    firsts = begins[rows] + (seats - starts[rows]) * block_q
    return torch.where(firsts < begins[rows + 1], rows, -1), firsts


# == The function ==


def check_shapes(q, k, v, tables, begins, ends, scale, n_each, splits) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: with the values and the remedy.
    """
    if q.ndim != 3 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[2] != k.shape[3] or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: pass (N, H, D), (blocks, page, Hkv, D) and "
            f"(blocks, page, Hkv, Dv), H a multiple of Hkv"
        )
    if not q.dtype == k.dtype == v.dtype or k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype} of strides {k.stride()}, {v.stride()}: use one type, last stride 1"
        )
    if k.shape[1] & (k.shape[1] - 1) or max(k.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(
            f"blocks of {k.shape[1]} tokens, heads of {k.shape[3]} and {v.shape[3]}: use a power of two, and at "
            f"most {WIDEST}"
        )
    if tables.ndim != 2 or len(tables) != len(ends) or ends.ndim != 1:
        raise ValueError(f"tables {tuple(tables.shape)}, ends {tuple(ends.shape)}: pass (R, M) and (R,), a row each")
    if n_each is None and (begins is None or begins.shape != (len(ends) + 1,)):
        shape = None if begins is None else tuple(begins.shape)
        raise ValueError(
            f"begins {shape} for {len(ends)} rows: pass ({len(ends) + 1},), or n_each where all have as many"
        )
    if n_each is not None and (n_each < 1 or len(ends) * n_each != len(q)):
        raise ValueError(f"n_each={n_each} for {len(ends)} rows and {len(q)} queries: pass None where rows differ")
    for name, x in {"tables": tables, "ends": ends, **({"begins": begins} if n_each is None else {})}.items():
        if x.dtype != torch.int32 or x.device != q.device or x.stride(-1) != 1:
            raise ValueError(
                f"{name} ({x.dtype}, {x.device}, strides {x.stride()}): pass int32 on {q.device}, stride 1"
            )
    if not scale > 0:
        raise ValueError(f"scale={scale} must be above 0: pass 1 / sqrt(head size) = {q.shape[2] ** -0.5:.4f}")
    if splits is not None and not 1 <= splits <= 128:
        raise ValueError(f"splits={splits} must be from 1 to 128: leave it out to have it chosen")


def splits_of(rows: int, kv_heads: int, longest: int, device) -> int:
    """Parts that the keys of each row are cut into, where it has few queries."""
    return decoding.choose_splits(rows * kv_heads, longest, device, PROGRAMS)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, begins: Tensor | None, ends: Tensor, scale: float,
    window: int | None = None, n_each: int | None = None, splits: int | None = None,
    tiles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of the new tokens of R rows over keys in blocks: q (N, H, D) -> (N, H, Dv).

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.1.
    PAPER CONTEXT: logical blocks of a sequence are mapped to physical ones, as an operating system maps its pages.
    INTUITION: memory is lent by the page, as a row grows; a row need not lie in one piece, and two may share a page.
    IMPLEMENTATION: rows with as many queries each, up to 16, split their keys (Flash-Decoding); others split their
        queries (FlashAttention-2). Sizes come from shapes: nothing waits for the device, graphs can be captured.
    WHY: a cache with room for the longest row in every row is mostly empty: in the paper 20.4% to 38.2% are in use.

    Args:
        q: the queries of all rows one after another; row r owns q[begins[r] : begins[r + 1]], the last of which stands
            at position ends[r] - 1. What lies behind begins[R] is padding, and its results are of no use.
        k, v: (blocks, page, Hkv, D) and (blocks, page, Hkv, Dv), any strides but the last, which is 1.
        tables: (R, M) int32; position p of row r lies in block tables[r, p // page], slot p % page. Entries that no
            query of the row can see may be anything.
        begins, ends: (R + 1,) and (R,), int32, on q's device.
        window: a query sees itself and the window - 1 keys before it.
        n_each: how many queries each row has, where all have as many; begins is not read then.
        splits: parts of the keys of each row, with few queries.
        tiles: `tile_list(begins, N, queries_of_a_tile(...))`, made once for all layers.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    check_shapes(q, k, v, tables, begins, ends, scale, n_each, splits)
    (N, H, D), Hkv, R = q.shape, k.shape[2], len(ends)
    if not N or not R:
        return q.new_zeros(N, H, v.shape[3])
    if q.stride(2) != 1:
        q = q.contiguous()
    if n_each is not None and n_each <= FEW and width_of(n_each * (H // Hkv)) <= FEW_ROWS:
        if splits is None:
            splits = splits_of(R, Hkv, tables.shape[1] * k.shape[1], q.device)
        few = reference_few if kernels.plain(q) else torch.ops.roadmap.paged_few
        return few(q, k, v, tables, ends, scale, window, n_each, splits)
    if n_each is not None:
        begins = torch.arange(0, N + 1, n_each, dtype=torch.int32, device=q.device)
    rows, firsts = tiles or (None, None)
    expected = N // queries_of_a_tile(H, Hkv, D, v.shape[3]) + R
    if rows is not None and rows.shape != (expected,):
        raise ValueError(f"tiles {tuple(rows.shape)} must be ({expected},): make them with queries_of_a_tile's number")
    ragged = reference_ragged if kernels.plain(q) else torch.ops.roadmap.paged_ragged
    return ragged(q, k, v, tables, begins, ends, rows, firsts, scale, window)
