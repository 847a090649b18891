"""Tests of paged attention: against attention over contiguous keys, row by row, in float64.

The kernels run interpreted on the CPU, which a process of its own does (TRITON_INTERPRET=1), and on a GPU where one is.
"""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import ROOT, graphs, kernels
from common.kernels import relative_error
from phase3_core_inference.project9_flash_attention import tiles
from phase4_advanced_inference.project13_paged_attention import paged_attention as product
from phase4_advanced_inference.project13_paged_attention.paged_attention import (
    paged_attention,
    paged_few,
    paged_ragged,
    queries_of_a_tile,
    tile_list,
)
from phase4_advanced_inference.project13_paged_attention.paged_plan import write_tiles

interpreted = pytest.mark.skipif(not kernels.interpreting(), reason="runs in the process of its own")
outside = pytest.mark.skipif(kernels.interpreting(), reason="this is the process of the interpreter")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ANYTHING = 2**31 - 1  # a table entry that must not be followed


def plain(q, k, v, scale, window):
    """One row: the last len(q) of len(k) tokens, explicit softmax in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q.double(), k) * scale
    places, at = torch.arange(len(k))[len(k) - len(q) :, None], torch.arange(len(k))
    seen = (at <= places) & (at > places - (window or len(k) + 1))
    return torch.einsum("hns,shv->nhv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def batch(counts, ends, heads=4, kv_heads=2, D=32, V=32, page=4, window=None, shared=0, padding=0, seed=0):
    """A batch in blocks, all unused slots NaN, its scale and window, and the exact result of its real tokens.

    The rows' first `shared` tokens (whole blocks) are the same and lie in the same blocks.
    """
    g = torch.Generator().manual_seed(seed)
    R, M = len(counts), max([1, *(-(-end // page) for end in ends)]) + 2
    blocks = torch.randperm(R * M, generator=g).to(torch.int32)
    tables = torch.full((R, M), ANYTHING, dtype=torch.int32)
    k, v = (torch.full((R * M, page, kv_heads, size), torch.nan) for size in (D, V))
    q = torch.randn(sum(counts) + padding, heads, D, generator=g)
    first_k, first_v = (torch.randn(shared, kv_heads, size, generator=g) for size in (D, V))
    exact, at = [], 0
    for row, (count, end) in enumerate(zip(counts, ends)):
        keys, values = (torch.randn(end, kv_heads, size, generator=g) for size in (D, V))
        keys[:shared], values[:shared] = first_k[:end], first_v[:end]
        low = 0 if window is None else max(0, end - count + 1 - window)  # what lies before is not there any more
        for p in range(low, end):
            source = 0 if p < shared else row
            tables[row, p // page] = block = int(blocks[source * M + p // page])
            k[block, p % page], v[block, p % page] = keys[p], values[p]
        exact.append(plain(q[at : at + count], keys, values, D**-0.5, window))
        at += count
    begins, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, *counts], ends))
    return (q, k, v, tables, begins.cumsum(0, dtype=torch.int32), ends, D**-0.5, window), torch.cat(exact)


def drawn(seed):
    """Arguments of `batch` for a ragged batch of any kind."""
    r = random.Random(seed)
    page, kv_heads = r.choice([1, 4, 16]), r.choice([1, 2, 3])
    shared = page * r.choice([0, 0, 2])
    counts = [r.choice([0, 1, 1, 2, r.randint(3, 40)]) for _ in range(r.randint(1, 6))]
    ends = [count + shared + r.choice([0, r.randint(0, 70)]) for count in counts]
    D = r.choice([16, 24, 64, 128])
    V = r.choice([D, D, 32])
    window = r.choice([None, None, 1, 7, 30])
    return {
        "counts": counts, "ends": ends, "heads": kv_heads * r.choice([1, 2, 4, 8]), "kv_heads": kv_heads, "D": D,
        "V": V, "page": page, "window": window, "shared": 0 if window else shared, "padding": r.choice([0, 5]),
        "seed": seed,
    }  # fmt: skip


# n_each, ends, other arguments of `batch`
FEW_CASES = [
    (1, [150, 1, 17, 64], {"page": 16, "heads": 8, "kv_heads": 2, "D": 64, "V": 64}),
    (1, [90, 33], {"page": 1, "heads": 3, "kv_heads": 3, "D": 24, "V": 40, "window": 20}),
    (5, [140, 5], {"page": 4, "heads": 8, "kv_heads": 1, "shared": 4}),
    (4, [100, 7], {"page": 16, "heads": 6, "kv_heads": 2, "window": 3}),
    (16, [70], {"page": 16, "heads": 8, "kv_heads": 1, "D": 16, "V": 16}),  # 128 rows of one product
]


def few(case, dtype=torch.float32, device="cpu"):
    n_each, ends, options = case
    (q, k, v, *indices, scale, window), exact = batch([n_each] * len(ends), ends, **options)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return (q, k, v, *(x.to(device) for x in indices), scale, window, n_each), exact


def ragged(options, dtype=torch.float32, device="cpu"):
    arguments, exact = batch(**options)
    tensors = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in arguments[:6]]
    return (*tensors, *arguments[6:]), exact


# == The reference ==


@outside
@pytest.mark.parametrize("seed", range(40))
def test_ragged_batches_against_contiguous_rows(seed):
    arguments, exact = ragged(drawn(seed))
    if exact.numel():
        assert relative_error(paged_attention(*arguments)[: len(exact)], exact) < 1e-6


@outside
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_few_queries_against_contiguous_rows(case):
    arguments, exact = few(case)
    assert relative_error(paged_attention(*arguments), exact) < 1e-6
    ragged_too = paged_attention(*arguments[:-1])
    assert relative_error(ragged_too, exact) < 1e-6


@outside
def test_long_chunks_go_in_pieces_and_many_keys_in_batches(monkeypatch):
    options = {"counts": [600, 1, 300, 1, 1], "ends": [700, 500, 300, 400, 600], "page": 16}
    for gathered in (product.GATHERED, 1 << 10):
        monkeypatch.setattr(product, "GATHERED", gathered)
        arguments, exact = ragged(options)
        assert relative_error(paged_attention(*arguments), exact) < 1e-6


@outside
def test_a_row_does_not_depend_on_its_neighbours():
    (q, k, v, tables, begins, ends, scale, window), _ = ragged({"counts": [1, 9, 1, 1], "ends": [40, 90, 3, 333]})
    together = paged_attention(q, k, v, tables, begins, ends, scale, window)
    for row, (first, last) in enumerate(zip(begins.tolist(), begins.tolist()[1:])):
        alone = paged_attention(
            q[first:last], k, v, tables[row : row + 1], None, ends[row : row + 1], scale, window, n_each=last - first
        )
        torch.testing.assert_close(together[first:last], alone, rtol=1e-6, atol=1e-6)


@outside
def test_keys_and_values_may_be_slices_of_anything():
    (q, k, v, *others), exact = ragged({"counts": [1, 5], "ends": [30, 20], "page": 4})
    side_by_side = torch.cat([k, v], 2)  # (blocks, page, 2 Hkv, D)
    one_by_one = torch.stack([k, v], 1)  # (blocks, 2, page, Hkv, D)
    for keys, values in ((side_by_side[:, :, :2], side_by_side[:, :, 2:]), (one_by_one[:, 0], one_by_one[:, 1])):
        assert relative_error(paged_attention(q, keys, values, *others), exact) < 1e-6


@outside
def test_rows_without_keys_give_zeros_and_empty_batches_nothing():
    (q, k, v, tables, begins, ends, scale, window), exact = ragged({"counts": [1, 1], "ends": [5, 5]})
    found = paged_attention(q, k, v, tables, begins, torch.tensor([5, 0], dtype=torch.int32), scale, window, 1)
    assert relative_error(found[:1], exact[:1]) < 1e-6 and not found[1].any()
    nothing = paged_attention(q[:0], k, v, tables[:0], begins[:1], ends[:0], scale)
    assert nothing.shape == (0, 4, 32)


@outside
def test_the_reference_against_itself_in_float64():
    def draw(generator):
        counts = torch.randint(0, 9, (3,), generator=generator).tolist()
        arguments, _ = batch(counts, [c + 12 for c in counts], padding=1, seed=sum(counts))
        return (*(x.nan_to_num() for x in arguments[:3]), *arguments[3:6], None, None, *arguments[6:])

    kernels.fuzz(paged_ragged, paged_ragged.reference, draw, cases=5, tolerance=1e-6)


@outside
def test_the_operators_say_true_things_of_themselves():
    (q, k, v, tables, begins, ends, scale, window), _ = ragged({"counts": [2, 2], "ends": [5, 7], "V": 16})
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(paged_few, (q, k, v, tables, ends, scale, window, 2, 3), **checks)
    torch.library.opcheck(paged_ragged, (q, k, v, tables, begins, ends, None, None, scale, window), **checks)


# == The list of tiles ==


@outside
def test_every_query_is_in_exactly_one_tile():
    for seed in range(50):
        r = random.Random(seed)
        counts = [r.choice([0, 1, r.randint(2, 50)]) for _ in range(r.randint(1, 8))]
        begins = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
        block_q, N = r.choice([1, 5, 16]), sum(counts) + r.choice([0, 0, 20])
        rows, firsts = tile_list(begins, N, block_q)
        assert rows.dtype == firsts.dtype == torch.int32 and len(rows) == len(firsts) == N // block_q + len(counts)
        owners = [[] for _ in range(N)]
        for row, first in zip(rows.tolist(), firsts.tolist()):
            for token in range(first, min(first + block_q, begins[row + 1])) if row >= 0 else ():
                owners[token].append(row)
        assert owners == [[row] for row, count in enumerate(counts) for _ in range(count)] + [[]] * (N - sum(counts))
        seats = np.full((2, len(rows)), 7)  # whatever the last step left there
        write_tiles(begins.numpy().astype(np.int64), block_q, *seats)
        assert seats[0].tolist() == rows.tolist()
        assert seats[1][seats[0] >= 0].tolist() == firsts[rows >= 0].tolist()


def test_all_candidates_of_a_width_have_tiles_of_the_same_queries():
    for kind in ("paged_few", "paged_some", "paged_ragged"):
        assert all(len({tile.m for tile in candidates}) == 1 for candidates in tiles.CANDIDATES[kind].values())
    assert queries_of_a_tile(32, 8, 64) == 32 and queries_of_a_tile(8, 8, 256) == 64
    assert queries_of_a_tile(256, 1, 64) == 1


# == The kernels ==


@interpreted
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_few_queries_in_the_interpreter(case):
    arguments, exact = few(case)
    for splits in (1, 5):  # of 5 some parts hold no key
        assert relative_error(paged_attention(*arguments, splits=splits), exact) < 1e-6, splits


@interpreted
def test_no_keys_and_half_precision_in_the_interpreter():
    q, k, v, tables, begins, ends, scale, window, n_each = few(FEW_CASES[0], torch.float16)[0]
    ends[1] = 0
    expected = paged_few.reference(q.float(), k.float(), v.float(), tables, ends, scale, window, n_each, 1)
    for splits in (1, 3):
        found = paged_attention(q, k, v, tables, begins, ends, scale, window, n_each, splits)
        assert relative_error(found, expected) < 2e-3 and not found[1].any()


RAGGED_CASES = [
    {"counts": [1, 70, 0, 5], "ends": [40, 150, 9, 5], "page": 16, "D": 64, "V": 64, "padding": 9},
    {"counts": [45, 1, 20], "ends": [60, 1, 120], "page": 4, "heads": 8, "kv_heads": 1, "window": 11},
    {"counts": [66, 3], "ends": [200, 80], "page": 1, "heads": 3, "kv_heads": 1, "D": 24, "V": 40, "window": 90},
    {"counts": [17, 2], "ends": [90, 31], "page": 16, "heads": 32, "kv_heads": 1, "D": 16, "V": 16, "shared": 16},
    {"counts": [140], "ends": [140], "page": 16, "heads": 2, "kv_heads": 2, "D": 128, "V": 128},
]


@interpreted
@pytest.mark.parametrize("options", RAGGED_CASES, ids=str)
def test_ragged_batches_in_the_interpreter(options):
    arguments, exact = ragged(options)
    assert relative_error(paged_attention(*arguments)[: len(exact)], exact) < 1e-6


@interpreted
@pytest.mark.parametrize("seed", range(100, 106))
def test_drawn_batches_in_the_interpreter(seed):
    arguments, exact = ragged(drawn(seed))
    if exact.numel():
        assert relative_error(paged_attention(*arguments)[: len(exact)], exact) < 1e-6


@interpreted
def test_many_queries_each_and_a_list_made_before_in_the_interpreter():
    (q, *others), exact = ragged({"counts": [20, 20], "ends": [30, 20]})
    assert relative_error(paged_attention(q, *others, n_each=20), exact) < 1e-6
    listed = tile_list(others[3], len(q), queries_of_a_tile(4, 2, 32))
    assert relative_error(paged_attention(q, *others, tiles=listed), exact) < 1e-6
    empty = torch.full_like(listed[0], -1), listed[1]
    paged_attention(q, *others, tiles=empty)  # nothing to do is nothing to fail at


@outside
def test_all_of_this_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


# == On a GPU ==


@outside
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_few_queries_on_a_gpu(case, dtype):
    arguments, exact = few(case, dtype, "cuda")
    for splits in (None, 1, 5):
        assert relative_error(paged_attention(*arguments, splits=splits), exact) < 1e-2, splits


@outside
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", RAGGED_CASES, ids=str)
def test_ragged_batches_on_a_gpu(options, dtype):
    arguments, exact = ragged(options, dtype, "cuda")
    assert relative_error(paged_attention(*arguments)[: len(exact)], exact) < 1e-2


@outside
@on_gpu
def test_full_precision_on_a_gpu():
    arguments, exact = few(FEW_CASES[0], torch.float32, "cuda")
    assert relative_error(paged_attention(*arguments), exact) < 1e-5
    arguments, exact = ragged(RAGGED_CASES[0], torch.float32, "cuda")
    assert relative_error(paged_attention(*arguments)[: len(exact)], exact) < 1e-5


@outside
@on_gpu
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_long_rows_on_a_gpu(D, window):
    options = {"page": 16, "heads": 8, "D": D, "V": D, "window": window}
    arguments, exact = ragged(
        {"counts": [1, 700, 1, 64], "ends": [2000, 900, 700, 1500], **options}, torch.bfloat16, "cuda"
    )
    assert relative_error(paged_attention(*arguments), exact) < 1e-2
    arguments, exact = few((5, [3000, 40, 700], options), torch.bfloat16, "cuda")
    assert relative_error(paged_attention(*arguments), exact) < 1e-2


@outside
@on_gpu
def test_other_lengths_and_tables_in_a_recorded_graph():
    q, k, v = (torch.randn(s, device="cuda").bfloat16() for s in ((64, 8, 64), (99, 16, 2, 64), (99, 16, 2, 64)))
    draw = torch.Generator().manual_seed(0)

    def indices():
        tables = torch.randperm(99, generator=draw)[:96].view(4, 24)
        counts = torch.randint(1, 16, (4,), generator=draw)
        ends = counts + torch.randint(0, 300, (4,), generator=draw)
        begins = torch.cat([torch.zeros(1), counts]).cumsum(0)
        return [x.to("cuda", torch.int32) for x in (tables, begins, ends)]

    for n_each in (None, 1, 16):
        rows = q[: 4 * n_each] if n_each else q

        def attend(q, tables, begins, ends, n_each=n_each):
            return paged_attention(q, k, v, tables, begins, ends, 0.125, n_each=n_each)

        replay = graphs.capture(attend, rows, *indices())
        for _ in range(3):
            tables, begins, ends = indices()
            ends = ends.clamp_min(n_each or 1)
            real = int(begins[-1]) if n_each is None else len(rows)
            found = replay(rows, tables, begins, ends)[:real].cpu()
            cpu = [x.cpu() for x in (tables, begins, ends)]
            exact = paged_attention(*(x.double().cpu() for x in (rows, k, v)), *cpu, 0.125, n_each=n_each)[:real]
            assert relative_error(found, exact) < 1e-2


# == What is refused ==


@outside
def test_what_does_not_fit_is_refused():
    (q, k, v, tables, begins, ends, scale, _), _ = ragged({"counts": [2, 2], "ends": [5, 7]})

    def refused(match, **changes):
        good = {"q": q, "k": k, "v": v, "tables": tables, "begins": begins, "ends": ends, "scale": scale}
        with pytest.raises(ValueError, match=match):
            paged_attention(**{**good, **changes})

    for changes in ({"q": q[0]}, {"q": q[:, :3]}, {"q": q[:, :, :8]}, {"k": k[0]}, {"v": v[:3]}):
        refused(r"pass \(N, H, D\)", **changes)
    refused("use one type", q=q.double())
    refused("last stride 1", k=k.transpose(2, 3).contiguous().transpose(2, 3))
    refused("blocks of 3 tokens.* power of two", k=k[:, :3], v=v[:, :3])
    refused("at most 256", q=torch.ones(4, 4, 512), k=torch.ones(2, 4, 2, 512), v=torch.ones(2, 4, 2, 512))
    refused(r"pass \(R, M\) and \(R,\)", tables=tables[:1])
    refused("pass .3,., or n_each", begins=begins[:2])
    refused("begins None for 2 rows", begins=None)
    refused("n_each=3 for 2 rows and 4 queries", n_each=3)
    refused("n_each=0", n_each=0)
    refused("ends .torch.int64.*pass int32", ends=ends.long())
    refused("tables .*stride 1", tables=tables.t().contiguous().t())
    refused("scale=0 must be above 0", scale=0)
    refused("splits=0 must be from 1", n_each=2, splits=0)
    refused(r"tiles \(7,\) must be \(2,\)", tiles=(torch.zeros(7), torch.zeros(7)))


if __name__ == "__main__":
    begins = torch.tensor([0, 1, 2, 102], dtype=torch.int32)
    print("a row's keys before the window and behind its end are NaN, and table entries for them", ANYTHING)
    print("tiles of 1, 1 and 100 queries (row, first token):")
    print(list(zip(*(x.tolist() for x in tile_list(begins, 102, queries_of_a_tile(32, 8, 64))))))
    arguments, exact = ragged(RAGGED_CASES[1])
    print(f"error of a drawn batch: {relative_error(paged_attention(*arguments)[: len(exact)], exact):.1e}")
    raise SystemExit(pytest.main([__file__]))
