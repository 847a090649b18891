"""Tests of adapters on layers that are no `nn.Linear`: quantized ones, or whatever can be called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.modules import is_linear, swap_modules
from phase1_foundation.project3_pretrain.hub import from_huggingface, to_huggingface
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase2_finetuning.project5_lora.layers import LoRALinear
from phase2_finetuning.project5_lora.lora import add_lora, merge_lora, without_adapters
from phase2_finetuning.project5_lora.test_lora import TOKENS, model_of


class Int8Linear(nn.Module):
    """A toy of what quantization will make: no float weight, no parameters, but `to_linear`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("scale", scale)
        self.register_buffer("codes", torch.empty_like(weight, dtype=torch.int8) if weight.is_meta else
                             (weight / scale).round().to(torch.int8))  # fmt: skip

    def forward(self, x):
        return F.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)

    def to_linear(self):
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(self.codes * self.scale)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_stand_on_quantized_layers(dora):
    model = model_of()
    swap_modules(model, lambda name, old: Int8Linear(old), is_linear)
    expected = model(TOKENS)
    assert (expected - model_of()(TOKENS)).abs().max() > 1e-3
    add_lora(model, rank=4, targets=["attention", "up_proj"], dora=dora)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.blocks[0].mlp.up_proj.base, Int8Linear)
    assert isinstance(model.blocks[0].mlp.down_proj, Int8Linear)
    step = Step(model, NextToken(), build_optimizer(model, "adamw", 1e-2, 0.0))
    losses = []
    for _ in range(6):
        losses.append(float(step.backward([(TOKENS, TOKENS)], TOKENS.numel())))
        step.update(1.0)
    assert losses[-1] < losses[0] - 0.05
    with without_adapters(model):
        assert torch.equal(model.eval()(TOKENS), expected)
    adapted = model(TOKENS)
    merge_lora(model)
    assert type(model.blocks[0].mlp.up_proj) is nn.Linear and type(model.blocks[0].mlp.down_proj) is Int8Linear
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_quantized_layers_is_exported_as_the_linear_layers_it_stands_for(tmp_path):
    model = model_of(qkv_bias=False)
    swap_modules(model, lambda name, old: Int8Linear(old), is_linear)
    add_lora(model, rank=2, targets=["attention"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    again, _ = from_huggingface(to_huggingface(model, None, tmp_path))
    torch.testing.assert_close(again(TOKENS), model.eval()(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_base_is_only_called():
    """LoRA needs no weight to read: a layer that has none is as good."""

    class Opaque(nn.Module):
        in_features, out_features = 6, 4

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(4, 6))

        def forward(self, x):
            return x @ self.table.T

    layer, x = LoRALinear(Opaque(), 2, 1.0), torch.randn(3, 6)
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), x @ (layer.base.table + layer.B @ layer.A).T)


if __name__ == "__main__":
    demonstration = LoRALinear(Int8Linear(nn.Linear(6, 4)), 2, 1.0)
    print(demonstration, [name for name, _ in demonstration.named_parameters()])
    raise SystemExit(pytest.main([__file__]))
