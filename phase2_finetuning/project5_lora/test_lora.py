"""Tests of LoRA: the update, what is frozen, merging, the switch, recipes, bad input."""

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from common import catalog, checkpoint
from phase1_foundation.project3_pretrain.hooks import ExponentialAverage
from phase1_foundation.project3_pretrain.hub import from_huggingface, to_huggingface
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step, TrainState
from phase2_finetuning.project5_lora.layers import DoRALinear, LoRALinear, TrainedRows, linear_layers
from phase2_finetuning.project5_lora.lora import (
    add_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    scale_of,
    trainable,
    without_adapters,
)

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
VARIANTS = {"lora": {}, "rslora": {"rank_stabilized": True}, "dora": {"dora": True}, "tokens": {"tokens": [7, 200]}}


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    config = PRESETS["cpu-tiny"](**{"n_head": 4, "n_kv_head": 2, "qkv_bias": True} | changes)
    model = Transformer(config).eval()
    with torch.no_grad():  # weights at which a wrong one shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def trained(model, size=0.2):
    """The adapter's values as after a training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


# -- the layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_first_the_model_computes_what_it_did(variant):
    model, expected = model_of(), model_of()(TOKENS)
    assert add_lora(model, rank=4, **VARIANTS[variant]) is model
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0 if variant != "dora" else 1e-5)
    assert (trained(model)(TOKENS) - expected).abs().max() > 0.1


def test_the_update_is_the_papers():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    layer = LoRALinear(base, rank=2, scale=1.5)
    assert torch.equal(layer.B, torch.zeros(4, 2)) and layer.A.abs().max() <= 6**-0.5 and layer.A.std() > 0.1
    nn.init.normal_(layer.B)
    expected = x @ base.weight.T + base.bias + 1.5 * (x @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_linear()(x), expected)


def test_the_update_of_dora_is_the_papers():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    layer = DoRALinear(base, rank=2, scale=1.5)
    torch.testing.assert_close(layer(x), base(x))
    nn.init.normal_(layer.B)
    nn.init.uniform_(layer.magnitude, 0.5, 2)
    changed = base.weight + 1.5 * layer.B @ layer.A
    weight = layer.magnitude[:, None] * changed / (changed**2).sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


def test_a_stabilized_scale_keeps_the_update_as_large_at_every_rank():
    assert scale_of(16, 8) == 2 and scale_of(16, 64, rank_stabilized=True) == 2
    sizes = {}
    for rank in (4, 256):
        for stabilized in (False, True):
            torch.manual_seed(0)
            layer = LoRALinear(nn.Linear(512, 512), rank, scale_of(16, rank, stabilized))
            nn.init.normal_(layer.B)
            sizes[rank, stabilized] = float(layer.update(torch.randn(8, 512)).detach().std())
    assert 0.8 < sizes[256, True] / sizes[4, True] < 1.25
    assert sizes[256, False] / sizes[4, False] < 0.2


def test_dropout_is_on_the_way_into_the_update_and_in_training_alone():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(6, 4), 2, 1.0, dropout=0.9), torch.ones(4, 6)
    assert torch.equal(layer(x), layer.base(x))  # B is zero: what is dropped cannot show
    nn.init.ones_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# -- which layers, and what is trained


def test_all_is_frozen_but_the_adapters():
    model = add_lora(model_of(), rank=4, targets=["q_proj", "mlp"], tokens=[3])
    trainables = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {"embed.tokens.parametrizations.weight.0.rows"}
    for i in range(2):
        for layer in ("attention.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            expected |= {f"blocks.{i}.{layer}.A", f"blocks.{i}.{layer}.B"}
    assert trainables == expected
    n, total = trainable(model)
    # rank 4 beside 32 x 32, and three times 32 x 128, in two blocks; one row of 32
    assert n == 2 * 4 * ((32 + 32) + 3 * (32 + 128)) + 32
    assert total == sum(p.numel() for p in model_of().parameters()) + n


def test_targets_are_parts_of_names_and_grouped_keys_are_narrower():
    model = add_lora(model_of(), rank=4, alpha=4, targets=["k_proj", "blocks.1.mlp.up_proj"], ranks={"blocks.1": 2},
                     alphas={"up_proj": 6.0})  # fmt: skip
    found = {n: (tuple(m.A.shape), tuple(m.B.shape), m.scale) for n, m in model.named_modules()
             if isinstance(m, LoRALinear)}  # fmt: skip
    assert found == {
        "blocks.0.attention.k_proj": ((4, 32), (16, 4), 1.0),
        "blocks.1.attention.k_proj": ((2, 32), (16, 2), 2.0),
        "blocks.1.mlp.up_proj": ((2, 32), (128, 2), 3.0),
    }


def test_a_block_that_stands_twice_gets_one_update():
    model = model_of()
    model.blocks[1] = model.blocks[0]
    add_lora(model, rank=4)
    assert model.blocks[1].mlp.up_proj is model.blocks[0].mlp.up_proj
    assert len([m for m in model.modules() if isinstance(m, LoRALinear)]) == 7
    expected = trained(model)(TOKENS)
    torch.testing.assert_close(merge_lora(model)(TOKENS), expected)
    assert model.blocks[1] is model.blocks[0] and type(model.blocks[0].mlp.up_proj) is nn.Linear


def test_a_layer_that_two_blocks_share_gets_one_update():
    model = model_of()
    model.blocks[1].mlp.up_proj = model.blocks[0].mlp.up_proj
    add_lora(model, rank=4, targets=["up_proj"])
    assert isinstance(model.blocks[1].mlp.up_proj, LoRALinear)
    assert model.blocks[1].mlp.up_proj is model.blocks[0].mlp.up_proj


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_learned_and_no_others(tied):
    model = model_of(tie_head=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, rank=2, targets=["q_proj"], tokens=[7, 200])
    step = Step(model, NextToken(), build_optimizer(model, "adamw", 0.1, 0.0))
    batch = torch.cat([TOKENS, torch.full((1, 12), 7), torch.full((1, 12), 200)])
    step.backward([(batch, batch)], batch.numel())
    step.update(1.0)
    merge_lora(model)
    for name, p in model.named_parameters():
        changed = (p != before[name]).any(dim=-1).nonzero().flatten().tolist() if p.dim() == 2 else []
        expected = [7, 200] if name in ("embed.tokens.weight", "head.weight") else []
        assert changed == expected or name.endswith("q_proj.weight"), name
    assert ("head.weight" in before) == (not tied)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_keep_state_for_the_adapters_alone(name):
    model = add_lora(model_of(), rank=4, dora=True)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    step = Step(model, NextToken(), build_optimizer(model, name, 1e-2, 0.1))
    average = ExponentialAverage(model, 0.5)
    losses = []
    for _ in range(8):
        losses.append(float(step.backward([(TOKENS, TOKENS)], TOKENS.numel())))
        step.update(1.0)
        average(TrainState(step, 8))
    assert losses[-1] < losses[0] - 0.05
    kept = sum(t.numel() for o in step.optimizer.optimizers for state in o.state.values() for t in state.values()
               if isinstance(t, torch.Tensor))  # fmt: skip
    assert trainable(model)[0] <= kept <= 2 * trainable(model)[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    with average.applied():
        assert torch.isfinite(model(TOKENS)).all()


def test_adapters_stay_float32_whatever_the_base_computes_in():
    expected = trained(add_lora(model_of(), rank=4))(TOKENS)
    for half_base in (False, True):
        model = model_of()
        model = add_lora(model.bfloat16() if half_base else model, rank=4)
        torch.manual_seed(0)
        trained(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=not half_base):
            out = model(TOKENS, targets=TOKENS)
        out.sum().backward()
        for module in (m for m in model.modules() if isinstance(m, LoRALinear)):
            assert module.A.dtype == module.B.dtype == module.A.grad.dtype == torch.float32
        assert out.isfinite().all() and model(TOKENS).shape == expected.shape


# -- merging


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_is_unmerged(variant, tied):
    plain = model_of(tie_head=tied)
    model = trained(add_lora(copy.deepcopy(plain), rank=4, **VARIANTS[variant]))
    expected = model(TOKENS)
    assert (expected - plain(TOKENS)).abs().max() > 0.1
    assert merge_lora(model) is model
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys() and model.recipe == []
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    assert all(p.requires_grad for p in model.parameters())
    add_lora(merge_lora(add_lora(model)))  # and so on
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(plain)


def test_an_export_is_merged(tmp_path):
    model = trained(add_lora(model_of(qkv_bias=False), rank=4))
    exported, _ = from_huggingface(to_huggingface(model, None, tmp_path))
    torch.testing.assert_close(exported(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_taken_off_leaves_the_base_and_a_loaded_one_takes_its_place(variant, tmp_path):
    plain = model_of()
    model = trained(add_lora(copy.deepcopy(plain), rank=4, **VARIANTS[variant]))
    expected, folder = model(TOKENS), save_adapter(model, tmp_path)
    remove_lora(model)
    assert torch.equal(model(TOKENS), plain(TOKENS)) and model.recipe == []
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    load_adapter(trained(add_lora(model, rank=2, dora=True)), folder)
    torch.testing.assert_close(model(TOKENS), expected)
    with pytest.raises(ValueError, match="no adapters to merge or remove"):
        remove_lora(plain)


# -- the switch


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_adapters_it_is_the_base(variant):
    plain = model_of()
    model = trained(add_lora(copy.deepcopy(plain), rank=4, **VARIANTS[variant]))
    expected, adapted = plain(TOKENS), model(TOKENS)
    with without_adapters(model) as same:
        assert same is model and torch.equal(model(TOKENS), expected)
        with without_adapters(model):
            assert torch.equal(model(TOKENS), expected)
        assert torch.equal(model(TOKENS), expected)
    assert torch.equal(model(TOKENS), adapted)
    with pytest.raises(KeyError), without_adapters(model):
        raise KeyError
    assert torch.equal(model(TOKENS), adapted)
    with pytest.raises(ValueError, match="no adapters to leave out"), without_adapters(plain):
        pass


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_compiled_model_compiles_once_for_each_state(variant):
    plain = model_of()
    model = trained(add_lora(copy.deepcopy(plain), rank=4, tokens=[7], **VARIANTS[variant]))
    expected = model(TOKENS)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(model(TOKENS), expected)
        with without_adapters(model), torch.no_grad():
            torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    assert counter.frame_count == 2


# -- recipes and checkpoints


def write(path, model):
    """A checkpoint of a model."""
    checkpoint.save(path, {
        "iter": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 1.0,
        "val_loss": 1.0, "config": {"kind": "transformer", "model": model.config.to_dict()}, "tokenizer": None,
        "recipe": model.recipe,
    })  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_rebuilds_its_adapters_and_a_merged_one_has_none(variant, tmp_path):
    model = trained(add_lora(model_of(tie_head=False), rank=4, alpha=4, targets=["mlp", "k_proj"], **VARIANTS[variant]))
    write(tmp_path / "lora.pt", model)
    again, _ = load(tmp_path / "lora.pt")
    assert torch.equal(again(TOKENS), model(TOKENS)) and trainable(again) == trainable(model)
    write(tmp_path / "merged.pt", merge_lora(again))
    merged, _ = load(tmp_path / "merged.pt")
    assert merged.recipe == [] and set(linear_layers(merged)) == set(linear_layers(model_of()))
    assert not any(isinstance(m, LoRALinear | TrainedRows) for m in merged.modules())
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_catalog_knows_it_and_notes_it_once():
    model = catalog.apply(model_of(), ['lora:rank=2,alpha=4,targets=["q_proj"],dora=true', "checkpointing"])
    assert model.recipe == [["lora", {"rank": 2, "alpha": 4, "targets": ["q_proj"], "dora": True}]]
    assert isinstance(model.blocks[0].attention.q_proj, DoRALinear)
    model(TOKENS).sum().backward()
    assert model.blocks[0].attention.q_proj.A.grad is not None
    called = add_lora(model_of(), rank=2, alpha=4, targets=["q_proj"], dora=True)
    with torch.device("meta"):
        again = catalog.apply(Transformer(called.config), json.loads(json.dumps(called.recipe)))
    assert again.blocks[0].attention.q_proj.A.is_meta and again.recipe == called.recipe
    with pytest.raises(ValueError, match="lora does not take rank='many'"):
        catalog.apply(model_of(), ["lora:rank=many"])


# -- what a user can get wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"rank": 2.5}, "rank=2.5 must be"),
        ({"ranks": {"q_proj": -1}}, "rank=-1 must be"),
        ({"alpha": 0}, "alpha=0 must be positive"),
        ({"alpha": float("nan")}, "alpha=nan must be"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"targets": ["q_proj", "query"]}, "target 'query' names no linear layer .* attention, q_proj, k_proj,"),
        ({"targets": []}, r"targets=\[\] leaves nothing"),
        ({"alphas": {"up": 1.0}}, "target 'up' names no"),
        ({"tokens": [256]}, r"tokens=\[256\] must be different ids below the vocabulary's 256"),
        ({"tokens": [1, 1]}, r"tokens=\[1, 1\] must be"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(options, said):
    model = model_of()
    with pytest.raises(ValueError, match=said):
        add_lora(model, **options)
    assert all(p.requires_grad for p in model.parameters()) and model.recipe == []


def test_a_second_adapter_is_refused():
    model = add_lora(model_of())
    with pytest.raises(
        ValueError, match=r"has adapters already: merge them first \(merge_lora, merge.py\), or .*stack_adapters"
    ):
        add_lora(model)
    with pytest.raises(ValueError, match=r"weights=\{'a': 1.0\} are for several adapters"):
        merge_lora(model, {"a": 1.0})


if __name__ == "__main__":
    demonstration = add_lora(model_of(), rank=4, targets=["q_proj", "v_proj"])
    print(demonstration.blocks[0].attention)
    print("{} of {} values are trained".format(*trainable(demonstration)))
    raise SystemExit(pytest.main([__file__]))
