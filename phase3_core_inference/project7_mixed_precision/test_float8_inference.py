"""Tests of weights stored in float8: exactness, bytes, checkpoints, casts, exports, bad input."""

import math

import pytest
import torch
from torch import nn

from common import catalog, checkpoint
from common.kernels import relative_error
from phase1_foundation.project3_pretrain.hub_mapping import plain_state
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project5_lora.lora import add_lora, merge_lora
from phase3_core_inference.project7_mixed_precision.float8 import E4M3
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear, store_float8
from phase3_core_inference.project7_mixed_precision.formats import round_to

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
