"""Tests of the product of few rows; its kernels are interpreted by a process of its own (TRITON_INTERPRET=1)."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from common import ROOT, kernels
from common.kernels import relative_error
from phase3_core_inference.project7_mixed_precision import few_rows
from phase3_core_inference.project7_mixed_precision.few_rows import (
    few_rows_product,
    few_rows_reference,
    round_reference,
    round_rows,
)
from phase3_core_inference.project7_mixed_precision.float8 import E4M3
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear

interpreted = pytest.mark.skipif(not kernels.interpreting(), reason="runs in the process of the last test")


def draw(M, K, N, dtype=torch.float32):
    """Rows of very unequal size, and a stored weight."""
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=generator) * 10 ** torch.linspace(-3, 3, M).unsqueeze(1)
    linear = nn.Linear(K, N, bias=False)
    return x.to(dtype), StoredFloat8Linear(linear)


def multiply(x, layer, dtype=torch.float32, rounded=round_rows, product=few_rows_product):
    return product(*rounded(x), layer.codes, layer.scale, dtype)


@interpreted
@pytest.mark.parametrize("M", [1, 2, 3, 9])
@pytest.mark.parametrize(("K", "N", "dtype"), [(64, 48, torch.float32), (320, 16, torch.float16)])
def test_the_kernels_compute_what_is_emulated(M, K, N, dtype):
    x, layer = draw(M, K, N, dtype)
    for ours, theirs in zip(round_rows(x), round_reference(x), strict=True):
        assert torch.equal(ours, theirs)
    for result in (torch.float32, dtype):
        ours, theirs = multiply(x, layer, result), multiply(x, layer, result, round_reference, few_rows_reference)
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < 1e-6
    assert 0.01 < relative_error(ours[0], x[0].double() @ layer.to_linear().weight.double().T) < 0.06  # rounds at all


@interpreted
def test_long_rows_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(few_rows, "TILE", 64)
    x, layer = draw(2, 208, 48)
    assert relative_error(multiply(x, layer), multiply(x, layer, product=few_rows_reference)) < 1e-6


@interpreted
def test_weights_and_rows_may_lie_anyhow():
    x, layer = draw(3, 64, 32)
    x8, of_x = round_rows(x.t().contiguous().t())
    for codes in (layer.codes[:, 16:48], layer.codes.t().contiguous().t()[:, 16:48]):
        arguments = x8[:, 16:48], of_x, codes, layer.scale, torch.float32
        assert relative_error(few_rows_product(*arguments), few_rows_reference(*arguments)) < 1e-6
    for operator, arguments in ((round_rows, (x.t().contiguous().t(),)), (few_rows_product, (x8, of_x, layer.codes,
                                layer.scale, torch.float32))):  # fmt: skip
        torch.library.opcheck(operator, arguments)


@interpreted
def test_sizes_that_do_not_fit_are_refused():
    x, wide = draw(2, 32, 16)[0], draw(2, 64, 16)[1]
    with pytest.raises(ValueError, match=r"rows of 32 values .* weight of 64 inputs"):
        wide(x)


@interpreted
def test_every_code_is_read_and_every_value_rounded_as_by_pytorch():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(E4M3).float()
    numbers = codes[values.isfinite()]
    diagonal, ones = torch.diag(numbers), torch.full((1, len(numbers)), 56, dtype=torch.uint8)  # 56 is 1.0
    one = torch.ones(1, 1)
    read = few_rows_product(ones, one, diagonal, torch.ones(len(numbers), 1), torch.float32)
    assert torch.equal(read[0], values[values.isfinite()])
    grid = values[values.isfinite()].sort().values
    halves = (grid[1:] + grid[:-1]) / 2  # where two values are equally near
    x = torch.cat([grid, halves, halves.nextafter(torch.tensor(500.0)), torch.linspace(-0.05, 0.05, 999)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-8, -1e-8])])
    rounded, scale = round_rows(x[None])  # the largest is 448: nothing is scaled
    assert torch.equal(rounded[0], x.to(E4M3).view(torch.uint8)) and scale == 1


@interpreted
def test_nothing_hides_what_is_no_number():
    x, layer = draw(4, 64, 32)
    x[1, 3], x[2, 5], x[3] = float("nan"), -float("inf"), 0.0
    y = multiply(x, layer)
    for rounded in (round_rows, round_reference):
        assert multiply(x, layer, rounded=rounded).isfinite().all(1).tolist() == [True, False, False, True]
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(y[3], torch.zeros(32)) and y[0].isfinite().all()


@interpreted
def test_a_layer_gives_few_rows_to_the_kernel_and_many_to_the_hardware():
    x, layer = draw(few_rows.FEW + 1, 64, 32)
    asked = []
    layer.product = lambda *arguments: asked.append(arguments) or torch.zeros(len(arguments[0]), 32)
    few = layer(x[: few_rows.FEW])
    assert not asked and relative_error(few, multiply(x[:-1], layer, torch.float32, product=few_rows_reference)) < 1e-6
    layer(x)
    ((x8, w8, of_x, *_),) = asked
    assert x8.dtype == w8.dtype == E4M3 and w8.shape == (64, 32) and of_x.shape == (len(x), 1)
    x = x[:3].requires_grad_()
    layer(x).sum().backward()
    assert relative_error(x.grad, layer.to_linear().weight.sum(0).expand(3, -1)) < 1e-6
    assert layer(x[:0]).shape == (0, 32)


@pytest.mark.skipif(kernels.interpreting(), reason="there the kernels run")
def test_without_a_gpu_the_operators_are_their_references():
    x, layer = draw(3, 64, 32)
    exact = few_rows_reference(*round_reference(x), layer.codes, layer.scale, torch.bfloat16)
    for call in (multiply, torch.compile(multiply, fullgraph=True)):
        assert torch.equal(call(x, layer, torch.bfloat16), exact)


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "not interpreter and not without",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


if __name__ == "__main__":
    x, layer = draw(2, 64, 16)
    print("two rows, relative difference to the plain layer:", relative_error(layer(x), layer.to_linear()(x)))
    raise SystemExit(pytest.main([__file__]))
