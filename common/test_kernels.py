"""Kernels: a tiny Triton operator runs everywhere, and `fuzz` catches what is wrong.

Without a GPU the operator computes its reference; the Triton kernel itself is interpreted (``TRITON_INTERPRET=1``),
which has to be set before anything imports Triton: those tests run in a process of their own.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common import ROOT, kernels

launches = []  # sizes for which the Triton kernel, not the reference, ran


def reference(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """What an operator of this page computes."""
    return x + scale * y


@functools.cache
def make_kernel():
    """Build the kernel when it is first launched: Triton is not there on every machine."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_pointer, y_pointer, out_pointer, scale, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        x = tl.load(x_pointer + offsets, mask=inside)
        y = tl.load(y_pointer + offsets, mask=inside)
        tl.store(out_pointer + offsets, x + scale * y, mask=inside)

    return kernel


@kernels.op("scaled_add", reference)
def scaled_add(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The smallest operator with a Triton kernel: one program per 128 elements."""
    out = torch.empty_like(x)
    launches.append(x.numel())
    kernels.launch(make_kernel())[((x.numel() + 127) // 128,)](x, y, out, scale, x.numel(), BLOCK=128)
    return out


def draw(generator):
    """Two tensors of one drawn size."""
    n = int(torch.randint(1, 700, (1,), generator=generator))
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator), 0.5


needs_plain = pytest.mark.skipif(kernels.interpreting(), reason="this process interprets Triton")


@needs_plain
def test_on_a_cpu_the_reference_runs():
    x, y = torch.randn(5), torch.randn(5)
    assert torch.equal(scaled_add(x, y, 2.0), x + 2 * y)
    assert scaled_add.reference(x, y, 2.0).shape == (5,)
    assert kernels.fuzz(scaled_add, reference, draw, cases=5, tolerance=1e-6) < 1e-6


def test_fake_tensors_get_their_shapes():
    with FakeTensorMode():
        out = scaled_add(torch.empty(3, 7, dtype=torch.bfloat16), torch.empty(3, 7, dtype=torch.bfloat16), 1.0)
    assert (out.shape, out.dtype) == ((3, 7), torch.bfloat16)
    assert scaled_add(torch.empty(4, device="meta"), torch.empty(4, device="meta"), 1.0).is_meta


@needs_plain
def test_the_compiler_sees_one_operator():
    targets = []

    def backend(graph, example_inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x, y = torch.randn(6), torch.randn(6)
    compiled = torch.compile(lambda x, y: scaled_add(x, y, 3.0).relu(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, y), (x + 3 * y).relu())
    assert any("scaled_add" in str(target) for target in targets)


INTERPRETED = """
from common import kernels
from common.test_kernels import draw, launches, reference, scaled_add
assert kernels.interpreting()
worst = kernels.fuzz(scaled_add, reference, draw, cases=6, tolerance=1e-6)
assert len(launches) == 6, launches  # the kernel itself ran, not the reference
print(f"worst relative error {worst:.1e}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux")
def test_the_kernel_is_interpreted_on_a_cpu():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "worst relative error" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_runs_on_a_gpu():
    on_gpu = lambda generator: tuple(a.cuda() if torch.is_tensor(a) else a for a in draw(generator))  # noqa: E731
    assert kernels.fuzz(scaled_add, reference, on_gpu, cases=5, tolerance=1e-6) < 1e-6
    compiled = torch.compile(lambda x, y: scaled_add(x, y, 3.0), fullgraph=True)
    x, y = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    torch.testing.assert_close(compiled(x, y), x + 3 * y)


def planted(kind):
    """The reference with one error in it."""

    def function(x, y, scale):
        out = reference(x, y, scale)
        if kind == "last element" and len(out) % 16:
            out[-1] += 1
        if kind == "nan":
            out[0] = float("nan")
        if kind == "shape":
            out = out[:, None]
        if kind == "sign":
            out = x - scale * y
        return out

    return function


@pytest.mark.parametrize("kind", ["last element", "nan", "shape", "sign"])
def test_fuzz_catches_a_planted_error(kind):
    with pytest.raises(AssertionError, match=r"case \d+ \(seed \d+, shapes \[\(\d+,\), \(\d+,\)\]\): relative error"):
        kernels.fuzz(planted(kind), reference, draw, tolerance=1e-3)
    assert kernels.fuzz(planted("none"), reference, draw, tolerance=1e-6) < 1e-6


def test_fuzz_holds_every_output_against_float64():
    def both(x, y, scale):
        return x + y, x * scale

    assert 0 < kernels.fuzz(lambda *a: tuple(t.bfloat16() for t in both(*a)), both, draw) < 1e-2
    with pytest.raises(AssertionError):
        kernels.fuzz(lambda x, y, scale: (x + y, y * scale), both, draw)
    with pytest.raises(ValueError):  # one output too few
        kernels.fuzz(lambda x, y, scale: (x + y,), both, draw)


def test_fuzz_hands_out_copies():
    drawn = []

    def draw_wide(generator):
        drawn.append(torch.randn(6, 5, generator=generator, dtype=torch.float64)[:, ::2])
        return drawn[-1], torch.arange(6)

    def in_place(x, shift):
        """Overwrites both of its arguments, and would compute something else from what it left."""
        out = x.sum(-1) + shift
        x.zero_()
        shift.fill_(7)
        strides.add(x.stride())
        return out

    strides = set()
    assert kernels.fuzz(in_place, in_place, draw_wide, cases=3, tolerance=1e-12) == 0
    assert all(x.abs().sum() > 0 for x in drawn) and strides == {drawn[0].stride()} == {(5, 2)}


if __name__ == "__main__":
    print(f"error of bfloat16: {kernels.fuzz(lambda *a: reference(*a).bfloat16(), reference, draw):.1e}")
    raise SystemExit(pytest.main([__file__]))
