"""Tests of the operators on a CPU: what they fall back to and refuse, what a compiler and a model see of them."""

import pytest
import torch

from common import catalog
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.plans import Packed, sdpa
from phase3_core_inference.project9_flash_attention import flash_attention as module
from phase3_core_inference.project9_flash_attention.flash_attention import (
    flash_attention,
    flash_forward,
    heads_first,
    readable,
    upper_bounds,
)
from phase3_core_inference.project9_flash_attention.gluon_attention import (
    SCHEDULES,
    gluon_attention,
    gluon_forward,
    require_hopper,
)
from phase3_core_inference.project9_flash_attention.memory import plain_attention
from phase3_core_inference.project9_flash_attention.reference import lower_bounds

STARTS = torch.tensor([[0] * 5 + [5] * 6, [0] * 11])
KERNELS = {"flash": flash_attention, "gluon": gluon_attention}


def draw(T=11, heads=4, kv_heads=2, D=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, h, D, generator=generator).requires_grad_() for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"starts": STARTS}, {"causal": False}], ids=str)
def test_without_a_gpu_it_is_sdpa(name, options):
    inputs = draw()
    assert torch.equal(KERNELS[name](*inputs, scale=0.3, **options), sdpa(*inputs, scale=0.3, **options))


@pytest.mark.parametrize("lower", [None, lower_bounds(11, 4, STARTS, "cpu")], ids=["whole", "bounded"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_gives_values_and_gradients(lower, compiled):
    inputs = draw()
    options = {"window": 4, "starts": STARTS} if lower is not None else {}
    call = lambda q, k, v: flash_forward(q, k, v, lower, 0.3, True)[0]  # noqa: E731
    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    outs = [call(*inputs), plain_attention(*inputs, scale=0.3, **options)]
    torch.testing.assert_close(*outs)
    for ours, exact in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs)):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("D", SCHEDULES)
def test_the_gluon_operator_shares_the_backward(D):
    inputs = draw(D=D)
    outs = [gluon_forward(*inputs, 0.3, True)[0], plain_attention(*inputs, scale=0.3)]
    torch.testing.assert_close(*outs)
    for ours, exact in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs)):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_what_the_operators_say_of_themselves_is_true():
    inputs = draw(T=5, D=8)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash_forward, (*inputs, lower_bounds(5, 2, None, "cpu"), 0.3, True), test_utils=tests)
    torch.library.opcheck(flash_forward, (*inputs, None, 0.3, False), test_utils=tests)
    torch.library.opcheck(gluon_forward, (*inputs, 0.3, True), test_utils=tests)


def test_upper_bounds_are_the_other_side_of_lower_bounds():
    lower = lower_bounds(11, 4, STARTS, "cpu")
    upper = upper_bounds(lower)
    i, j = torch.arange(11).unsqueeze(-1), torch.arange(11)
    for low, high in zip(lower, upper):
        assert torch.equal((j >= low.unsqueeze(-1)) & (j <= i), (i < high) & (j <= i))


def test_autocast_sets_the_type():
    inputs = draw()
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(*inputs, scale=0.3).dtype == torch.bfloat16
        assert gluon_attention(*inputs, scale=0.3).dtype == torch.bfloat16


def test_tiles_are_read_where_they_lie_unless_a_descriptor_cannot():
    x = torch.randn(2, 5, 3, 4, 8).half()
    assert readable(x[:, :, 1]) is not None and readable(x[:, :, 1]).data_ptr() == x[:, :, 1].data_ptr()
    shape, strides = heads_first(x[:, :, 1])
    assert shape == [2, 4, 5, 8] and strides == [480, 8, 96, 1]
    for bad in (x[..., ::2], x[:, :, 1].transpose(-1, -2), torch.randn(2, 5, 4, 9).half()[..., 1:]):
        assert readable(bad).is_contiguous() and torch.equal(readable(bad), bad)
    alone = torch.randn(1, 5, 1, 8).half()
    assert heads_first(alone)[1] == [16, 16, 8, 1]  # a dimension of one may have any stride


def test_a_model_takes_it_from_the_catalog():
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"]())
    tokens = torch.randint(0, 256, (1, 20))
    plan = Packed([[8, 12]], model.specs, sdpa)
    expected = model(tokens, plan)
    model = catalog.apply(model, ["flash"])
    assert model.kernel is flash_attention and model.recipe == []  # how it is computed, not what
    torch.testing.assert_close(model(tokens, Packed([[8, 12]], model.specs, model.kernel)), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a Hopper GPU")
def test_gluon_is_refused_where_it_cannot_run():
    for call in (require_hopper, lambda: catalog.apply(Transformer(PRESETS["cpu-tiny"]()), ["flash:gluon=true"])):
        with pytest.raises(ValueError, match=r"gluon=true needs a Hopper GPU .* no GPU .* leave the option out"):
            call()


def test_what_the_kernels_do_not_take_is_refused(monkeypatch):
    monkeypatch.setattr(module, "runs_on_kernels", lambda x: True)
    q = torch.randn(1, 4, 2, 12)
    with pytest.raises(ValueError, match="multiples of 8"):
        flash_attention(q, q, q, scale=0.3)
    q = torch.randn(1, 4, 2, 512)
    with pytest.raises(ValueError, match="up to 256"):
        flash_attention(q, q, q, scale=0.3)
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"scale=-1.0 must be above 0: pass .* 0\.25"):
        flash_attention(q, q, q, scale=-1.0)
    with pytest.raises(ValueError, match="of equal T"):
        flash_attention(q, q[:, :3], q[:, :3], scale=1.0)


if __name__ == "__main__":
    print("bounds:", lower_bounds(6, 3, None, "cpu").tolist(), upper_bounds(lower_bounds(6, 3, None, "cpu")).tolist())
    raise SystemExit(pytest.main([__file__]))
