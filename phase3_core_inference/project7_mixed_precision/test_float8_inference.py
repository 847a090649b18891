"""Tests of weights stored in float8: exactness, bytes, checkpoints, casts, exports, bad input."""

import importlib
import math

import pytest
import torch
from torch import nn

from common import catalog, checkpoint
from common.kernels import relative_error
from phase1_foundation.project3_pretrain.hub_mapping import plain_state
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.running import write_plain
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase2_finetuning.project5_lora.lora import add_lora, load_adapter, merge_lora, save_adapter, without_adapters
from phase3_core_inference.project7_mixed_precision.float8 import E4M3
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear, store_float8
from phase3_core_inference.project7_mixed_precision.formats import round_to

merge = importlib.import_module("phase2_finetuning.project5_lora.merge")

TOKENS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))


def model_of(**changes):
    torch.manual_seed(0)
    return Transformer(PRESETS["cpu-tiny"](**{"qkv_bias": True} | changes)).eval()


def bytes_of(layer):
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))


def saved(model, path):
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": math.nan,
        "val_loss": math.nan, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "recipe": model.recipe,
    })  # fmt: skip
    return path


def test_the_weight_is_rounded_row_by_row_under_powers_of_two():
    linear = nn.Linear(32, 64)
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = 0, linear.weight[1] * 1e-6
        linear.weight[2] = 448 * 2.0**-5  # fits exactly: no larger scale than needed
    layer = StoredFloat8Linear(linear)
    weight, scale = linear.weight.detach().double(), layer.scale.double()
    assert torch.equal(scale.log2(), scale.log2().round()) and scale[2] == 2.0**-5
    amax = weight.abs().amax(dim=1, keepdim=True)
    assert (amax / scale <= 448).all() and (amax[1:] / scale[1:] > 223).all()
    stored = layer.to_linear().weight.detach()
    assert torch.equal(stored.double(), round_to(weight / scale, "e4m3") * scale)
    assert torch.equal(stored.bfloat16().float(), stored)  # three bits of mantissa fit anywhere
    assert torch.equal(layer.to_linear().bias, linear.bias)


def test_the_layer_computes_what_its_parts_say():
    linear, x = nn.Linear(32, 64), torch.randn(3, 5, 32)
    layer = StoredFloat8Linear(linear)
    amax = x.abs().amax(dim=-1, keepdim=True)
    x8 = (x * (448 / amax)).to(E4M3).double() * (amax.double() / 448)
    exact = x8 @ layer.to_linear().weight.double().T + linear.bias.double()
    assert relative_error(layer(x), exact) < 1e-5
    assert 0 < relative_error(layer(x), linear(x)) < 0.06
    assert layer(x[0, 0]).shape == (64,) and layer(x.bfloat16()).dtype == torch.bfloat16
    assert not (layer(x * 0) - linear.bias).any()
    x[1, 2, 3] = math.inf
    assert layer(x)[1, 2].isnan().all() and layer(x)[0].isfinite().all()


def test_half_the_bytes_of_bfloat16():
    linear = nn.Linear(256, 256, bias=False)
    assert bytes_of(StoredFloat8Linear(linear)) == 256 * 256 + 4 * 256
    model = store_float8(model_of(qkv_bias=False))
    plain = sum(bytes_of(m) for m in model_of(qkv_bias=False).bfloat16().modules() if type(m) is nn.Linear)
    ours = [m for m in model.modules() if isinstance(m, StoredFloat8Linear)]
    assert len(ours) == 14 and sum(map(bytes_of, ours)) == plain / 2 + 4 * sum(m.out_features for m in ours)


def test_a_checkpoint_remembers_it(tmp_path):
    model = catalog.apply(model_of(), ["fp8_weights"])
    assert model.recipe == [["fp8_weights", {}]]
    again, _ = load(saved(model, tmp_path / "model.pt"))
    assert torch.equal(again(TOKENS), model(TOKENS))
    layer = again.blocks[0].mlp.up_proj
    assert isinstance(layer, StoredFloat8Linear) and layer.codes.dtype == torch.uint8
    assert [p.requires_grad for p in again.blocks[0].attention.q_proj.parameters()] == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_leaves_the_codes_alone(tmp_path, dtype):
    model = catalog.apply(model_of(), ["fp8_weights"])
    cast, _ = load(saved(model, tmp_path / "model.pt"), dtype=dtype)
    ours, theirs = cast.blocks[0].mlp.up_proj, model.blocks[0].mlp.up_proj
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale.float(), theirs.scale)
    assert cast(TOKENS).dtype == dtype and relative_error(cast(TOKENS), model(TOKENS)) < 0.05


def test_the_model_is_nearly_what_it_was():
    model, plain = store_float8(model_of()), model_of()
    assert 0 < relative_error(model(TOKENS), plain(TOKENS)) < 0.1
    ours, theirs = (one(TOKENS, targets=TOKENS).mean().item() for one in (model, plain))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_exports_see_the_layers_it_stands_for():
    model = store_float8(model_of(), skip=["blocks.0"])
    state, plain = plain_state(model), model_of().state_dict()
    assert state.keys() == plain.keys()
    name = "blocks.1.mlp.up_proj.weight"
    assert 0 < relative_error(state[name], plain[name]) < 0.04
    assert torch.equal(state["blocks.0.mlp.up_proj.weight"], plain["blocks.0.mlp.up_proj.weight"])


def test_adapters_stand_on_stored_layers():
    model = store_float8(model_of())
    expected = model(TOKENS)
    add_lora(model)
    assert torch.equal(model(TOKENS), expected)
    merge_lora(model)
    assert relative_error(model(TOKENS), expected) < 0.06  # activations are no longer cast


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_flow_through_stored_weights(dtype, compiled):
    layer = StoredFloat8Linear(nn.Linear(32, 64)).to(dtype)
    x, upstream = torch.randn(3, 16, 32, dtype=dtype, requires_grad=True), torch.randn(3, 16, 64, dtype=dtype) / 1000
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    (grad,) = torch.autograd.grad(call(x), x, upstream)
    exact = upstream.double() @ (layer.codes.view(E4M3).double() * layer.scale.double())
    assert grad.dtype == dtype and relative_error(grad, exact) < 2 * torch.finfo(dtype).eps


def test_gradients_under_autocast_have_the_type_of_what_came_in():
    layer, x = StoredFloat8Linear(nn.Linear(32, 64)), torch.randn(5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        (grad,) = torch.autograd.grad(y.float().sum(), x)
    exact = layer.to_linear().weight.double().sum(dim=0).expand(5, 32)
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32 and relative_error(grad, exact) < 0.01


def test_adapters_learn_on_stored_layers_as_on_plain_ones():
    losses, gradients = {}, {}
    for name in ("stored", "plain"):
        model = model_of()
        with torch.no_grad():  # weights that have learned something: their gradients are large
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model = store_float8(model) if name == "stored" else model
        expected = model(TOKENS)
        torch.manual_seed(1)
        add_lora(model, rank=4)
        step = Step(model, NextToken(), build_optimizer(model, "adamw", 1e-2, 0.0))
        losses[name] = []
        for _ in range(8):
            losses[name].append(float(step.backward([(TOKENS, TOKENS)], TOKENS.numel())))
            gradients.setdefault(name, {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith(".B")})
            step.update(1.0)
        with without_adapters(model):
            assert torch.equal(model.eval()(TOKENS), expected)
    assert losses["stored"][-1] < losses["stored"][0] - 1
    assert losses["stored"] == pytest.approx(losses["plain"], rel=0.05)
    for name, gradient in gradients["stored"].items():
        plain = gradients["plain"][name]
        assert nn.functional.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) > 0.95, name


def test_a_merged_checkpoint_that_could_not_be_loaded_is_not_written(tmp_path, capsys):
    write_plain(catalog.apply(model_of(), ["fp8_weights", "lora"]), None, tmp_path / "adapted.pt")
    flags = ["--merged", f"{tmp_path}/merged.pt"]
    with pytest.raises(SystemExit) as stopped:
        merge.main(["--checkpoint", f"{tmp_path}/adapted.pt", *flags])
    assert stopped.value.code == 2 and "is a model after fp8_weights, which no longer holds" in capsys.readouterr().err
    assert not (tmp_path / "merged.pt").exists()
    write_plain(catalog.apply(model_of(), ["fp8_weights"]), None, tmp_path / "stored.pt")
    save_adapter(add_lora(model_of(), targets=["attention"]), tmp_path / "adapter")
    with pytest.raises(SystemExit):
        merge.main(["--checkpoint", f"{tmp_path}/stored.pt", "--adapter", f"{tmp_path}/adapter", *flags])
    assert not (tmp_path / "merged.pt").exists()
    # what lies below adapters and is still there after merging may stay in the recipe
    skipping = {"skip": ["attention"]}
    model = load_adapter(catalog.apply(model_of(), [("fp8_weights", skipping)]), tmp_path / "adapter")
    write_plain(model, None, tmp_path / "adapted.pt")
    merge.main(["--checkpoint", f"{tmp_path}/adapted.pt", *flags])
    merged, _ = load(tmp_path / "merged.pt")
    assert merged.recipe == [["fp8_weights", skipping]]
    torch.testing.assert_close(merged(TOKENS), model.eval()(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["store", "cast"])
def test_merged_layers_have_the_type_of_the_model(dtype, first):
    model = store_float8(model_of()).to(dtype) if first == "store" else store_float8(model_of().to(dtype))
    merge_lora(add_lora(model))
    assert {p.dtype for p in model.parameters()} == {dtype} and model(TOKENS).dtype == dtype


def test_a_float16_row_of_tiny_values_is_stored_as_it_is():
    linear = nn.Linear(16, 16, bias=False).half()
    with torch.no_grad():
        linear.weight.copy_((torch.arange(256) % 15).view(16, 16) * 2.0**-24)
    layer = StoredFloat8Linear(linear)
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.to_linear().weight, linear.weight)


def test_layers_say_which_dimension_is_which():
    layer = StoredFloat8Linear(nn.Linear(32, 64))
    for name, (output, source) in layer.DIMENSIONS.items():
        tensor = getattr(layer, name)
        assert tensor.shape[output] == 64 and (source is None or tensor.shape[source] == 32)


def test_what_cannot_be_stored_is_refused_or_left():
    linear = nn.Linear(32, 64)
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        StoredFloat8Linear(linear)
    with pytest.raises(ValueError, match="no module of Transformer matched"):
        store_float8(model_of(n_embd=20, n_head=1, head_size=20, n_ff=40))
    model = store_float8(model_of(n_ff=40))
    assert type(model.blocks[0].mlp.up_proj) is nn.Linear


if __name__ == "__main__":
    example = nn.Linear(256, 256)
    print(f"{bytes_of(example):,} bytes in float32, {bytes_of(StoredFloat8Linear(example)):,} in float8")
    raise SystemExit(pytest.main([__file__]))
