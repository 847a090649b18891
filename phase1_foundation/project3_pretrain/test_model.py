"""Tests of the decoder: presets, the whole model, its layers against their formulas, compilation into one graph."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import ROOT
from phase1_foundation.project3_pretrain import layers, plans
from phase1_foundation.project3_pretrain.checkpointing import checkpoint_activations
from phase1_foundation.project3_pretrain.head import use_chunked_loss
from phase1_foundation.project3_pretrain.model import PRESETS, ModelConfig, Transformer
from phase1_foundation.project3_pretrain.plans import Causal, Packed, sdpa

TINY = PRESETS["cpu-tiny"]
TINY_GPT2 = dict(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=32)


def make(preset="cpu-tiny", seed=0, **fields):
    """A small model with weights that are far from their initialisation, so that every part matters."""
    torch.manual_seed(seed)
    fields = (TINY_GPT2 if preset == "gpt2" else {}) | fields
    model = Transformer(PRESETS[preset](**fields)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


# --- configuration and presets ---


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("mistral-7b", 7_241_732_096),
        ("qwen2-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("smollm-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, n_parameters):
    with torch.device("meta"):
        assert Transformer(PRESETS[name]()).n_parameters() == n_parameters


def test_llama_125m_is_as_large_as_gpt2():
    with torch.device("meta"):
        llama, gpt2 = Transformer(PRESETS["llama-125m"]()), Transformer(PRESETS["gpt2"](vocab_size=50304))
    assert abs(llama.n_parameters() / gpt2.n_parameters() - 1) < 0.01
    assert llama.n_parameters() - llama.n_parameters(embeddings=False) == 50304 * 768


def test_every_preset_can_be_overridden_and_survives_json():
    for name, preset in PRESETS.items():
        config = preset(vocab_size=512, block_size=128)
        assert (config.vocab_size, config.block_size) == (512, 128), name
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(n_embd=100, n_head=12), "n_embd=100 must be divisible by n_head=12: use 96 or 108"),
        (dict(n_head=12, n_kv_head=5), "n_head=12 must be divisible by n_kv_head=5: use 10 or 15"),
        (dict(norm="batchnorm"), "norm='batchnorm' is not known: use one of layernorm, rmsnorm"),
        (dict(mlp="maxout"), "mlp='maxout' is not known"),
        (dict(positions="alibi"), "positions='alibi' is not known: use one of learned, rope"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(dropout=1.0), "dropout=1.0 must be"),
        (dict(positions="rope", head_size=5), "head_size=5 must be even"),
        (dict(norm="rmsnorm", norm_bias=True), "RMSNorm has no bias"),
        (dict(windows=(4,)), "needs one entry for each of the n_layer=12 layers"),
        (dict(n_layer=2, windows=(4, 0)), "a positive number of tokens, or None"),
        (dict(rope_scaling={"kind": "ntk"}), "'kind' must be one of"),
        (dict(rope_scaling={"kind": "linear"}), "takes exactly"),
        (dict(n_kv_head=0), "n_kv_head=0 must be at least 1"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_with_a_remedy(fields, said):
    with pytest.raises(ValueError) as error:
        ModelConfig(**fields)
    assert said in str(error.value)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        ModelConfig.from_dict({"hidden_size": 3})


# --- the whole model ---


def test_shapes_and_first_loss():
    torch.manual_seed(0)
    model = Transformer(TINY())
    tokens = random_tokens(4, 64)
    logits, nll = model(tokens), model(tokens, targets=tokens)
    assert logits.shape == (4, 64, 256)
    assert nll.shape == (4, 64) and nll.dtype == torch.float32
    shuffled = random_tokens(4, 64, seed=2)
    assert abs(model(tokens, targets=shuffled).mean().item() - math.log(256)) < 0.05
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(nll.mean(), expected)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = Transformer(PRESETS["gpt2"](vocab_size=512, block_size=512, n_layer=8, n_head=2, n_embd=128))
    block = model.blocks[0]
    for weight in (model.embed.tokens.weight, model.embed.positions.weight, block.attention.q_proj.weight):
        assert abs(weight.std().item() / 0.02 - 1) < 0.05
    for layer in (block.attention.o_proj, block.mlp.down_proj):
        assert abs(layer.weight.std().item() / (0.02 / math.sqrt(16)) - 1) < 0.05
        assert not layer.bias.any()


@pytest.mark.parametrize("preset", ["cpu-tiny", "gpt2"])
def test_the_future_is_invisible(preset):
    model, tokens = make(preset), random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="65 tokens exceed block_size=64"):
        make()(random_tokens(1, 65))


def test_flat_tokens_are_one_row():
    model, tokens = make(n_kv_head=1), random_tokens(1, 16)
    torch.testing.assert_close(model(tokens[0]), model(tokens)[0])


def test_a_tied_head_owns_nothing_and_follows_the_embedding():
    model, tokens = make(), random_tokens(1, 8)
    assert list(model.head.parameters()) == [] and "head.weight" not in model.state_dict()
    twin = copy.deepcopy(model)
    twin.embed.tokens.weight.data.zero_()
    assert not twin(tokens).any() and model(tokens).any()
    model.embed.tokens = copy.deepcopy(twin.embed.tokens)  # a replaced module is found too
    assert not model(tokens).any()
    assert "head.weight" in make(tie_head=False).state_dict()


class Doubled(nn.Module):
    """An MLP that is not one of ours and reports a loss."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.down_proj = layer, nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        self.reported = x.square().mean() * 0 + self.layer + 1
        return 2 * self.down_proj(x)

    def auxiliary_losses(self):
        return self.reported


class Uniform(layers.Attention):
    """An attention that is not one of ours: every token gets the mean of those before it."""

    def forward(self, x, plan, layer):
        return x.cumsum(-2) / (plan.positions + 1).unsqueeze(-1)


def test_parts_are_classes_given_at_construction():
    model = Transformer(TINY(), attention=Uniform, mlp=Doubled)
    assert model(random_tokens(2, 5)).shape == (2, 5, 256)
    assert isinstance(model.blocks[1].attention, Uniform) and isinstance(model.blocks[1].mlp, Doubled)
    assert model.auxiliary_losses().item() == 1 + 2
    assert make().auxiliary_losses().item() == 0


def test_a_block_may_stand_in_the_list_twice():
    model, tokens = make(), random_tokens(1, 8)
    model.blocks[1] = model.blocks[0]
    x = model.embed(tokens, torch.arange(8).expand(1, 8))
    plan = Causal(tokens, model.specs, sdpa)
    expected = model.head(model.norm(model.blocks[0](model.blocks[0](x, plan, 0), plan, 1)))
    torch.testing.assert_close(model(tokens), expected)
    assert len(model.specs) == 2


def test_a_plan_chooses_the_rows_that_need_logits():
    class Last(Causal):
        def select(self, x):
            return x[:, -1]

    model, tokens = make(), random_tokens(3, 8)
    plan = Last(tokens, model.specs, model.kernel)
    torch.testing.assert_close(model(tokens, plan), model(tokens)[:, -1])
    torch.testing.assert_close(model(tokens, plan, tokens[:, 0]), plain_nll_of(model(tokens)[:, -1], tokens[:, 0]))


def plain_nll_of(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_specs_say_what_a_cache_must_know():
    spec = make(n_head=4, n_kv_head=2, head_size=6, windows=(3, None), attention_scale=0.5).specs[0]
    assert spec == plans.LayerSpec(n_head=4, n_kv_head=2, head_size=6, value_size=6, window=3, scale=0.5, block_size=64)


def test_building_on_meta_is_cheap():
    # Random numbers and powers on `meta` import sympy and torch._dynamo: seconds that every `load` would pay.
    program = (
        "import sys, torch; from phase1_foundation.project3_pretrain.model import *\n"
        "with torch.device('meta'): [Transformer(preset()) for preset in PRESETS.values()]\n"
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# --- layers against their formulas ---


def test_norms():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours, theirs = layers.LayerNorm(8), nn.LayerNorm(8)
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = torch.arange(8.0), torch.arange(8.0) - 3
    torch.testing.assert_close(ours(x), theirs(x))
    rms = layers.RMSNorm(8, eps=1e-3)
    rms.weight.data = torch.arange(8.0)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * torch.arange(8.0))
    # A float32 gain is not rounded to bfloat16, and the stream keeps its dtype.
    rms.weight.data = torch.full((8,), 1.001)
    half = torch.ones(8, dtype=torch.bfloat16) * 256
    assert rms(half).dtype == torch.bfloat16


def test_mlps():
    config = ModelConfig(n_embd=8, n_head=2, n_ff=12, mlp_bias=True)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    formulas = {
        "gelu": lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "gelu_exact": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
        "relu2": lambda h: torch.where(h > 0, h * h, 0.0),
    }
    for name, formula in formulas.items():
        mlp = layers.MLPS[name](config, 0)
        torch.testing.assert_close(mlp(x), mlp.down_proj(formula(mlp.up_proj(x))))
    gated = layers.MLPS["swiglu"](config, 0)
    gate = gated.gate_proj(x)
    torch.testing.assert_close(gated(x), gated.down_proj(gate * torch.sigmoid(gate) * gated.up_proj(x)))


# --- torch.compile: one graph, no breaks ---


@pytest.mark.parametrize(
    "build",
    [
        lambda: make("gpt2"),
        lambda: use_chunked_loss(make(n_kv_head=1, windows=(5, None)), chunk=8),
        lambda: checkpoint_activations(plans.use_cudnn_attention(make())),
    ],
    ids=["gpt2", "window-chunked", "checkpointed-cudnn"],
)
def test_training_compiles_into_one_graph(build):
    model, tokens = build(), random_tokens(2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = model(tokens, targets=tokens), compiled(tokens, targets=tokens)
    torch.testing.assert_close(ours, expected)
    theirs = torch.autograd.grad(expected.sum(), list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), list(model.parameters())), theirs)


def test_packed_lengths_do_not_recompile():
    model, tokens = make(), random_tokens(2, 16)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for lengths in ([[4, 12], [16]], [[16], [1, 15]], [[8, 8], [3, 3, 10]]):
        plan = Packed(lengths, model.specs, model.kernel)
        torch.testing.assert_close(compiled(tokens, plan), model(tokens, plan))
    assert len(graphs) == 1


if __name__ == "__main__":
    print("presets, by parameters:")
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            print(f"  {name:14s} {Transformer(preset()).n_parameters() / 1e6:9.1f} M")
    raise SystemExit(pytest.main([__file__, "-q"]))
