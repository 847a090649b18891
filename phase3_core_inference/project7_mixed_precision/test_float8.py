"""Tests of linear layers in float8: against the formula in float64, gradients, bad input, adapters, the compiler."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from common import catalog
from common.kernels import relative_error
from phase1_foundation.project3_pretrain.hub_mapping import plain_state
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase2_finetuning.project5_lora.lora import add_lora, merge_lora
from phase3_core_inference.project7_mixed_precision.float8 import (
    E4M3,
    E5M2,
    Float8Linear,
    convert_to_float8,
    emulated_product,
    hardware_product,
    product_for,
    to_float8,
)
from phase3_core_inference.project7_mixed_precision.formats import FORMATS, round_to

TOKENS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
SCALINGS = ["tensor", "row"]


def model_of(**changes):
    torch.manual_seed(0)
    return Transformer(PRESETS["cpu-tiny"](**changes))


def rounded(x, name, dim):
    """x as float8 represents it, by the definition: largest value onto the format's largest, rounded by hand."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    scale = (FORMATS[name].largest / amax.float()).double()
    return round_to((x.float() * scale.float()).double(), name) / scale


def by_formula(x, weight, grad, scaling):
    """y, dx and dW in float64, from operands that were rounded one by one."""
    row = scaling == "row"
    along = (lambda d: d) if row else (lambda d: None)
    backward = "e4m3" if row else "e5m2"
    y = rounded(x, "e4m3", along(1)) @ rounded(weight, "e4m3", along(1)).T
    grad_x = rounded(grad, backward, along(1)) @ rounded(weight, "e4m3", along(0))
    grad_w = rounded(grad, backward, along(0)).T @ rounded(x, "e4m3", along(0))
    return y, grad_x, grad_w


def inputs(n=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 32, generator=generator)
    x[3] *= 50  # a loud token
    weight, grad = (torch.randn(*shape, generator=generator) for shape in ((64, 32), (n, 64)))
    return x, weight * 0.1, grad * 1e-4


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad


def layer_of(weight, scaling, bias=None):
    layer = Float8Linear(weight.shape[1], weight.shape[0], bias is not None, scaling=scaling)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("scaling", SCALINGS)
def test_forward_and_backward_are_the_formulas(scaling):
    x, weight, grad = inputs()
    found = run(layer_of(weight, scaling), x, grad)
    for ours, exact in zip(found, by_formula(x.double(), weight.double(), grad.double(), scaling), strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.slow  # torchao takes seconds to import
@pytest.mark.parametrize("scaling", SCALINGS)
def test_torchao_computes_the_same(scaling):
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    x, weight, grad = inputs()
    theirs = nn.Sequential(nn.Linear(32, 64, bias=False))
    theirs[0].weight = nn.Parameter(weight.clone())
    recipe = {"tensor": "tensorwise", "row": "rowwise"}[scaling]
    options = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe), emulate=True, round_scales_to_power_of_2=False
    )
    theirs = convert_to_float8_training(theirs, config=options)
    ours = run(layer_of(weight, scaling), x, grad)
    leaf = x.clone().requires_grad_()
    y = theirs(leaf)
    y.backward(grad)
    for a, b in zip(ours, (y, leaf.grad, theirs[0].weight.grad), strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize(("scaling", "bound"), [("tensor", 0.08), ("row", 0.045)])
def test_the_error_is_that_of_the_format(scaling, bound):
    """Each factor is off by half an epsilon at most, 2.6% in the mean for e4m3, twice that for e5m2."""
    x, weight, grad = inputs()
    plain = nn.Linear(32, 64, bias=False)
    plain.weight = nn.Parameter(weight.clone())
    errors = [relative_error(a, b) for a, b in zip(run(layer_of(weight, scaling), x, grad), run(plain, x, grad))]
    assert all(0.01 < error < bound for error in errors)


def test_rows_of_their_own_scale_are_not_drowned_by_a_loud_one():
    x, weight, _ = inputs()
    x[0], x[1] = x[0] * 1e-3, x[1] * 1e4
    exact = x[0] @ weight.T
    tensor, row = (relative_error(layer_of(weight, scaling)(x)[0], exact) for scaling in SCALINGS)
    assert row < 0.06 and tensor > 0.5


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("n", [1, 15, 16, 17])
def test_any_number_of_tokens(scaling, n):
    x, weight, grad = inputs(n + 4)
    found = run(layer_of(weight, scaling), x[4:], grad[4:])
    for ours, exact in zip(found, by_formula(x[4:].double(), weight.double(), grad[4:].double(), scaling)):
        assert ours.shape == exact.shape and relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_shapes_biases_and_dtypes(scaling):
    x, weight, _ = inputs()
    bias = torch.randn(64)
    layer = layer_of(weight, scaling, bias)
    flat = layer(x)
    torch.testing.assert_close(flat - bias, layer_of(weight, scaling)(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x.view(3, 16, 32)), flat.view(3, 16, 64))
    assert layer(x[0]).shape == (64,)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.weight.dtype == torch.float32


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_give_zeros_and_what_is_no_number_is_not_hidden(scaling):
    x, weight, grad = inputs()
    y, grad_x, grad_w = run(layer_of(weight, scaling), x * 0, grad * 0)
    assert not y.any() and not grad_x.any() and not grad_w.any()
    assert not layer_of(weight * 0, scaling)(x).any()
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = x.clone()
        spoilt[5, 7] = bad
        assert layer_of(weight, scaling)(spoilt)[5].isnan().all()
        spoilt = grad.clone()
        spoilt[5, 7] = bad
        assert run(layer_of(weight, scaling), x, spoilt)[2][7].isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_codes_times_scale_are_what_was_cast(dtype, dim):
    x = inputs()[0]
    codes, unscale = to_float8(x, dtype, dim)
    assert codes.dtype == dtype and codes.float().abs().max() == torch.finfo(dtype).max
    assert unscale.shape == {None: (), 0: (1, 32), 1: (48, 1)}[dim]
    assert relative_error(codes.double() * unscale.double(), x.double()) < torch.finfo(dtype).eps / 3
    tiny, of_tiny = to_float8(x * 1e-30, dtype, dim)
    assert relative_error(tiny.double() * of_tiny.double(), x.double() * 1e-30) < torch.finfo(dtype).eps / 3


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38, 0.0])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_tiny_values_stay_finite(size, dim):
    x = inputs()[0].clamp(-1, 1) * size
    x[::2, ::2] = 0  # which an infinite scale would make NaN
    for dtype in (E4M3, E5M2):
        codes, unscale = to_float8(x, dtype, dim)
        assert codes.float().isfinite().all() and unscale.isfinite().all()
        assert (codes.double() * unscale.double() - x.double()).abs().max() <= max(size / 8, 2.0**-110)
        x_bad = x.clone()
        x_bad[0, 0] = math.nan
        assert to_float8(x_bad, dtype, dim)[0].float()[0, 0].isnan()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_no_tokens_give_no_values(scaling):
    layer, x = Float8Linear(32, 64, scaling=scaling), torch.randn(2, 0, 32, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 0, 64)
    y.sum().backward()
    assert x.grad.shape == x.shape and not layer.weight.grad.any()


# -- a model


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_keeps_its_parameters_and_learns(scaling):
    model, plain = model_of(), model_of()
    weight = model.blocks[0].mlp.up_proj.weight
    assert catalog.apply(model, [f"fp8:scaling={scaling}"]) is model
    assert model.blocks[0].mlp.up_proj.weight is weight and model.recipe == []
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 14
    assert 0 < relative_error(model(TOKENS), plain(TOKENS)) < 0.1
    losses = {}
    for name, one in (("float8", model), ("float32", plain)):
        step = Step(one, NextToken(), build_optimizer(one, "muon", 1e-2, 0.1))
        losses[name] = []
        for _ in range(12):
            losses[name].append(float(step.backward([(TOKENS[:, :-1], TOKENS[:, 1:])], 24)))
            step.update(1.0)
    assert losses["float8"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["float32"][-1] < 0.8 * losses["float32"][0]


def test_a_converted_model_is_exported_and_turned_back_as_plain():
    model, plain = convert_to_float8(model_of(), skip=["blocks.0", "down_proj"]), model_of()
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 6
    state = plain_state(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    layer = model.blocks[1].mlp.up_proj
    assert type(layer.to_linear()) is nn.Linear and layer.to_linear().weight is layer.weight
    convert_to_float8(model, "row")  # converted anew
    assert "scaling=row" in repr(model.blocks[1].mlp.up_proj)


def test_layers_of_odd_sizes_stay_and_are_named():
    model = model_of(n_ff=40)
    with pytest.warns(UserWarning, match=r"6 of 14 linear layers stay .* blocks.0.mlp.gate_proj \(32 -> 40\)"):
        convert_to_float8(model)
    assert type(model.blocks[0].mlp.up_proj) is nn.Linear
    assert relative_error(model(TOKENS), model_of(n_ff=40)(TOKENS)) < 0.1


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="scaling='column' is unknown: use one of tensor, row"):
        convert_to_float8(model_of(), "column")
    with pytest.raises(ValueError, match=r"none of 14 .* multiples of 16"):
        convert_to_float8(model_of(n_embd=20, n_head=1, head_size=20, n_ff=40))
    with pytest.raises(ValueError, match=r"none of 14 linear layers .* all are skipped"):
        convert_to_float8(model_of(), skip=["blocks"])
    with pytest.raises(ValueError, match="no module of Sequential matched"):
        convert_to_float8(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("order", ["lora first", "float8 first"])
def test_adapters_stand_on_float8_layers(order):
    model, expected = model_of(), model_of()(TOKENS)
    for transform in (add_lora, convert_to_float8) if order == "lora first" else (convert_to_float8, add_lora):
        transform(model)
    assert isinstance(model.blocks[0].mlp.up_proj.base, Float8Linear)
    assert relative_error(model(TOKENS), expected) < 0.1
    model(TOKENS, targets=TOKENS).sum().backward()
    adapter = model.blocks[0].mlp.up_proj
    assert adapter.B.grad.any() and adapter.base.weight.grad is None
    merge_lora(model)
    assert type(model.blocks[0].mlp.up_proj) is nn.Linear


def test_a_model_is_converted_on_meta_and_moved_later():
    with torch.device("meta"):
        model = convert_to_float8(Transformer(PRESETS["cpu-tiny"]()))
    assert model.blocks[0].mlp.up_proj.weight.is_meta
    model.to_empty(device="cpu").load_state_dict(model_of().state_dict())
    expected = convert_to_float8(model_of())(TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)
    assert product_for(torch.device("cpu")) is emulated_product


# -- the compiler


def compiled_and_not(backend, scaling):
    torch.manual_seed(0)
    ours = nn.Sequential(Float8Linear(32, 64, scaling=scaling), nn.ReLU(), Float8Linear(64, 32, scaling=scaling))
    twin = copy.deepcopy(ours)
    x = torch.randn(24, 32)
    results = []
    for layers in (ours, torch.compile(twin, fullgraph=True, backend=backend)):
        with torch.autocast("cpu", torch.bfloat16):
            y = layers(x)
        y.float().square().sum().backward()
        results.append(y)
    grads = [[p.grad for p in layers.parameters()] for layers in (ours, twin)]
    return [(results[0], results[1]), *zip(*grads, strict=True)]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_compiler_sees_one_graph(scaling):
    for eager, compiled in compiled_and_not("aot_eager", scaling):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_code_computes_the_same(scaling):
    for eager, compiled in compiled_and_not("inductor", scaling):
        assert relative_error(compiled, eager) < 0.05


@pytest.mark.parametrize("product", [emulated_product, hardware_product])  # a CPU has the latter for one scale, too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(product, dtype):
    layer = Float8Linear.of(nn.Linear(32, 48, bias=False))
    layer.product = product
    x, upstream = torch.randn(16, 32, dtype=dtype, requires_grad=True), torch.randn(16, 48, dtype=dtype)
    gradients = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        gradients.append(torch.autograd.grad(call(x), [x, layer.weight], upstream))
    for eager, compiled in zip(*gradients):
        assert eager.norm() > 0
        torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8"
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_hardware_computes_what_is_emulated(scaling):
    x, weight, grad = (tensor.cuda() for tensor in inputs(64))
    layer = layer_of(weight, scaling).cuda()
    assert layer.product is not emulated_product
    found = run(layer, x.bfloat16(), grad.bfloat16())
    exact = by_formula(x.bfloat16().double(), weight.double(), grad.bfloat16().double(), scaling)
    for ours, theirs in zip(found, exact, strict=True):
        assert relative_error(ours, theirs) < 5e-3


if __name__ == "__main__":
    for kind in SCALINGS:
        example = inputs()
        pairs = zip(run(layer_of(example[1], kind), example[0], example[2]), ("y", "dx", "dW"))
        exacts = (example[0] @ example[1].T, example[2] @ example[1], example[2].T @ example[0])
        print(kind, ", ".join(f"{n} is off by {relative_error(a, b):.1%}" for (a, n), b in zip(pairs, exacts)))
    raise SystemExit(pytest.main([__file__]))
