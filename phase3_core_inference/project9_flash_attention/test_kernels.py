"""Tests of the Triton kernels: interpreted on the CPU, which a process of its own does (TRITON_INTERPRET=1)."""

import math
import os
import subprocess
import sys

import pytest
import torch

from common import ROOT, kernels
from common.kernels import relative_error
from phase3_core_inference.project9_flash_attention import tiles
from phase3_core_inference.project9_flash_attention.decoding import flash_decode
from phase3_core_inference.project9_flash_attention.decoding import reference as decode_reference
from phase3_core_inference.project9_flash_attention.flash_attention import flash_attention, flash_forward
from phase3_core_inference.project9_flash_attention.memory import plain_attention
from phase3_core_inference.project9_flash_attention.reference import tiled_forward

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not kernels.interpreting(), reason="runs in the process of the last test")

# rows, T, heads, key heads, D, Dv, window, documents, causal, type
CASES = [
    (1, 70, 2, 2, 64, 64, None, False, True, torch.float32),
    (2, 130, 4, 2, 16, 16, None, False, True, torch.float32),
    (1, 97, 4, 1, 32, 32, None, False, False, torch.float32),
    (1, 150, 2, 1, 32, 32, 40, False, True, torch.float32),
    (2, 140, 2, 2, 32, 32, None, True, True, torch.float32),
    (1, 140, 2, 1, 40, 24, 33, True, True, torch.float32),
    (1, 90, 2, 2, 16, 16, 20, True, False, torch.float32),
    (1, 1, 2, 2, 32, 32, None, False, True, torch.float32),
    (1, 66, 1, 1, 128, 128, 1, False, True, torch.float16),
    (1, 40, 1, 1, 256, 256, None, True, True, torch.float16),
]


def draw(case):
    """Queries, keys, values and the options of a kernel."""
    rows, T, heads, kv_heads, D, V, window, documents, causal, dtype = case
    generator = torch.Generator().manual_seed(T)
    shapes = (rows, T, heads, D), (rows, T, kv_heads, D), (rows, T, kv_heads, V)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    marks = torch.rand(rows, T, generator=generator) < 4 / T
    starts = (marks * torch.arange(T)).cummax(-1).values if documents else None
    return inputs, {"scale": D**-0.5, "window": window, "starts": starts, "causal": causal}


def with_gradients(kernel, inputs, options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = kernel(*leaves, **options)
    upstream = torch.arange(out.numel()).reshape(out.shape).sin().to(out.dtype)
    return (out, *torch.autograd.grad(out, leaves, upstream))


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    inputs, options = draw(case)
    exact = with_gradients(plain_attention, [x.double() for x in inputs], options)
    for name, ours, expected in zip(("o", "dq", "dk", "dv"), with_gradients(flash_attention, inputs, options), exact):
        if expected.norm() > 1e-6:  # a query that sees one key has no gradient
            assert relative_error(ours, expected) < (2e-6 if case[-1] == torch.float32 else 2e-3), name
        else:
            assert ours.norm() < 1e-2, name


@interpreted
@pytest.mark.parametrize("kind", ["forward", "keys", "queries"])
def test_every_tile_of_the_table_gives_the_same(kind, monkeypatch):
    inputs, options = draw((1, 110, 1, 1, 32, 32, None, True, True, torch.float32))
    exact = with_gradients(plain_attention, [x.double() for x in inputs], options)
    for tile in {tile for candidates in tiles.CANDIDATES[kind].values() for tile in candidates}:
        monkeypatch.setitem(tiles.CANDIDATES[kind], 32, [tile])
        monkeypatch.setattr(tiles, "_chosen", {})
        got = with_gradients(flash_attention, inputs, options)
        assert max(relative_error(a, b) for a, b in zip(got, exact)) < 2e-6, tile


@interpreted
def test_a_row_whose_first_tiles_are_hidden():
    """The last rows of a tile of queries begin far to the right of its first: whole tiles are hidden from them."""
    T = 192
    q, k, v = (torch.randn(1, T, 1, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    lower = torch.zeros(1, T, dtype=torch.int32)
    lower[0, 126:] = 126
    for scale in (0.1, 32**-0.5, 64**-0.5):  # no powers of two once they are counted in bits
        ours = flash_forward(q, k, v, lower, scale, True)
        exact = tiled_forward(q.double(), k.double(), v.double(), lower, scale, True, T, T)
        assert max(relative_error(a, b) for a, b in zip(ours, exact)) < 1e-6


@interpreted
def test_slices_of_one_projection_are_read_where_they_lie():
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3, 4, 32, requires_grad=True)

    def gradient(kernel):
        out = kernel(x[:, :, 0], x[:, :, 1, ::2], x[:, :, 2, 1:3], scale=0.2)
        return torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(gradient(flash_attention), gradient(plain_attention), rtol=1e-4, atol=5e-5)


@interpreted
def test_the_same_bits_every_time():
    inputs, options = draw(CASES[4])
    first, second = (with_gradients(flash_attention, inputs, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads", "D", "window"), [(4, 2, 32, None), (3, 3, 40, 50), (20, 1, 16, 64)])
def test_decoding(heads, kv_heads, D, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, D, generator=generator)
    k, v = torch.randn(2, 3, 140, kv_heads, D, generator=generator)
    lengths = torch.tensor([140, 17, 0], dtype=torch.int32)
    k[1, 17:] = v[1, 17:] = float("nan")  # what lies behind the end of a row may be anything
    clean = (x.nan_to_num().double() for x in (k, v))
    exact = decode_reference(q.double(), *clean, lengths, 0.3, window, 1)
    for splits in (None, 7):  # of 7 most parts hold no key
        ours = flash_decode(q, k, v, lengths, 0.3, window, splits)
        assert relative_error(ours, exact) < 1e-6 and not ours[2].any()


def fused(score, scale, higher):
    """float32 `score * scale - higher` in one rounding, as a GPU computes it: float64 holds the product exactly."""
    score, scale, higher = (torch.tensor(x, dtype=torch.float32).double() for x in (score, scale, higher))
    return float((score * scale - higher).float())


@pytest.mark.parametrize("D", [16, 32, 40, 64, 80, 96, 128, 256])
def test_hidden_scores_weigh_nothing_under_a_fused_multiply_add(D):
    """The interpreter rounds the product, a GPU does not: the constants are held against the GPU's arithmetic."""
    from phase3_core_inference.project9_flash_attention import forward_kernel as code

    scale = float(torch.tensor(D**-0.5 * math.log2(math.e), dtype=torch.float32))
    hidden, lowest = (float(torch.tensor(x.value, dtype=torch.float32)) for x in (code.HIDDEN, code.LOWEST))
    higher = float(torch.maximum(torch.tensor(lowest), torch.tensor(hidden) * scale))
    assert torch.tensor(fused(hidden, scale, higher)).exp2() == 0.0
    assert math.isfinite(lowest) and torch.tensor(lowest).exp2() == 0.0  # a hidden tile leaves nothing behind


def test_why_hidden_scores_are_not_finite():
    def weight(D):
        scale = float(torch.tensor(D**-0.5 * math.log2(math.e), dtype=torch.float32))
        return fused(-1e30, scale, float(torch.tensor(-1e30) * scale))

    assert max(weight(D) for D in (64, 128)) > 1e20  # exp2 of that is infinite


@pytest.mark.skipif(kernels.interpreting(), reason="this is that process")
def test_all_of_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [case for case in CASES if case[1] > 1], ids=str)
def test_on_a_gpu(case):
    inputs, options = draw(case)
    inputs = [x.cuda().bfloat16() for x in inputs]
    options["starts"] = None if options["starts"] is None else options["starts"].cuda()
    exact = with_gradients(plain_attention, [x.double() for x in inputs], options)
    for ours, expected in zip(with_gradients(flash_attention, inputs, options), exact):
        assert expected.norm() < 1e-6 or relative_error(ours, expected) < 1e-2


if __name__ == "__main__":
    print(f"-1e30 as a hidden score, head size 64: exp2 of {fused(-1e30, 0.18033688, -1.8033688e29):.2e}")
    raise SystemExit(pytest.main([__file__]))
