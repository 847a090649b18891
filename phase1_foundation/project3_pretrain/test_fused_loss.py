"""Tests of the fused loss: values and gradients of the plain one, the kernel itself in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from common.kernels import relative_error
from phase1_foundation.project3_pretrain.fused_loss import fused_nll, nll_and_gradient, reference
from phase1_foundation.project3_pretrain.head import chunked_nll, plain_nll


def _inputs(dtype=torch.float32, device="cpu", rows=13, vocab=37):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, 8, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::4] = -100
    return x, weight, targets.to(device), torch.randn(rows, generator=generator).to(device)


def test_values_and_gradients_of_the_plain_loss():
    results = []
    for loss in (plain_nll, fused_nll):
        x, weight, targets, upstream = _inputs()
        nll = loss(x, weight, targets)
        (nll * upstream).sum().backward()  # a different weight for every token
        results.append((nll.detach(), x.grad, weight.grad))
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", [fused_nll, chunked_nll])
def test_a_frozen_head_has_no_gradient(loss, compiled):
    x, weight, targets, upstream = _inputs()
    expected = torch.autograd.grad((plain_nll(x, weight, targets) * upstream).sum(), x)[0]
    weight.requires_grad_(False)
    loss = torch.compile(loss, backend="aot_eager") if compiled else loss
    (loss(x, weight, targets) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


KERNEL_TEST = """
import torch
from phase1_foundation.project3_pretrain.fused_loss import nll_and_gradient, reference
generator = torch.Generator().manual_seed(0)
for rows, vocab in ((3, 5), (2, 4096), (4, 5001)):
    logits = torch.randn(rows, vocab, generator=generator) * 5
    logits[0, :2] += 60  # far from the rest: a naive softmax overflows
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[1] = -100
    expected, ours = logits.clone(), logits.clone()
    nll = reference(expected, targets)
    torch.testing.assert_close(nll_and_gradient(ours, targets), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [fused_nll, chunked_nll])
def test_compiled_gradients_are_the_eager_ones(loss, dtype):
    results = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, weight, targets, upstream = _inputs(dtype)
        results.append(torch.autograd.grad((call(x, weight, targets) * upstream).sum(), (x, weight)))
    for eager, compiled in zip(*results):
        assert eager.norm() > 0
        torch.testing.assert_close(compiled, eager)


def test_the_loss_compiles_in_one_graph():
    results = []
    for loss in (plain_nll, torch.compile(fused_nll, fullgraph=True, backend="aot_eager")):
        x, weight, targets, upstream = _inputs()
        (loss(x, weight, targets) * upstream).sum().backward()
        results.append((x.grad, weight.grad))
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", KERNEL_TEST], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"})  # fmt: skip
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(256, 50304, generator=generator) * 4).cuda().bfloat16()
    targets = torch.randint(0, 50304, (256,), generator=generator).cuda()
    exact = logits.double().clone()
    nll = reference(exact, targets)
    ours = logits.clone()
    assert relative_error(nll_and_gradient(ours, targets), nll) < 1e-4
    assert relative_error(ours, exact) < 1e-2


if __name__ == "__main__":
    x, weight, targets, _ = _inputs()
    print("plain:", [round(v, 3) for v in plain_nll(x, weight, targets).tolist()][:5])
    print("fused:", [round(v, 3) for v in fused_nll(x, weight, targets).tolist()][:5])
    raise SystemExit(pytest.main([__file__]))
