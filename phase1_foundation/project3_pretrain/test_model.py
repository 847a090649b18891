"""Tests of the decoder: layers, plans, positions, head, presets, activation checkpointing."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import ROOT
from common.modules import swap_modules
from phase1_foundation.project3_pretrain import layers, plans, positions
from phase1_foundation.project3_pretrain.checkpointing import checkpoint_activations
from phase1_foundation.project3_pretrain.head import IGNORE, chunked_nll, plain_nll, use_chunked_loss
from phase1_foundation.project3_pretrain.model import PRESETS, ModelConfig, Transformer
from phase1_foundation.project3_pretrain.plans import Causal, Packed, sdpa, visible

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


# --- who sees whom ---


def test_masks_written_out():
    assert visible(4).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert visible(4, window=2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    documents = torch.tensor([0, 0, 2, 2, 2])  # lengths 2 and 3
    assert visible(5, starts=documents).int().tolist() == [
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1],
        ]
    ]
    assert visible(5, window=2, starts=documents)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert visible(3, window=2, causal=False).int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


def attention_by_the_formula(q, k, v, scale, mask):
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel", [sdpa, plans.prefer("math"), plans.prefer("cudnn", "flash", "math")])
def test_kernels_compute_the_formula(window, n_kv_head, documents, kernel):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 6, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 9, n_kv_head, 6, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 9, n_kv_head, 5, generator=generator, dtype=torch.float64)
    starts = torch.tensor([[0] * 4 + [4] * 5, [0] * 9]) if documents else None
    mask = visible(9, window, starts)
    expected = attention_by_the_formula(q, k, v, 0.3, mask)
    torch.testing.assert_close(kernel(q, k, v, scale=0.3, window=window, starts=starts), expected)


def test_unknown_back_end():
    with pytest.raises(ValueError, match="cudnn, flash, efficient, math"):
        plans.prefer("cuda")


@pytest.mark.parametrize("fields", [{}, dict(windows=(3, None))])
@pytest.mark.parametrize("preset", ["cpu-tiny", "gpt2"])
def test_packed_documents_get_the_logits_they_get_alone(preset, fields):
    model = make(preset, **fields)
    texts = [random_tokens(n, seed=n) for n in (5, 1, 10, 16)]
    alone = [model(text.unsqueeze(0))[0] for text in texts]
    flat = model(torch.cat(texts), Packed([5, 1, 10, 16], model.specs, model.kernel))
    torch.testing.assert_close(flat, torch.cat(alone))
    rows = torch.stack([torch.cat(texts[:3]), texts[3]])
    nested = model(rows, Packed([[5, 1, 10], [16]], model.specs, model.kernel))
    torch.testing.assert_close(nested.flatten(0, 1), torch.cat(alone))


def test_documents_are_found_by_the_mark_before_them():
    tokens = torch.tensor([[7, 0, 5, 5, 5, 0, 1, 2], [0, 0, 3, 3, 3, 3, 3, 0]])
    marks = Packed.at_marks(tokens, 0, [], sdpa)
    lengths = Packed([[1, 4, 3], [1, 6, 1]], [], sdpa)
    assert torch.equal(marks.positions, lengths.positions) and torch.equal(marks.starts, lengths.starts)


def test_a_packed_document_longer_than_the_context_is_refused():
    model = make(block_size=8)
    Packed([8, 4], model.specs, model.kernel)
    with pytest.raises(ValueError, match="12 tokens exceeds block_size=8"):
        Packed([12], model.specs, model.kernel)


@pytest.mark.parametrize("lengths", [[], [3, 0], [[3, 5], [7]], [-1, 4]])
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(ValueError, match="must be positive and add up"):
        Packed(lengths, [], sdpa)


def test_windows_limit_what_a_stack_can_see():
    model, tokens = make(windows=(3, 3)), random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]  # two layers of window 3 reach 4 tokens back


# --- positions ---


def test_rope_turns_pairs_by_the_papers_angles():
    config = TINY(head_size=8, block_size=16)
    x = torch.randn(1, 16, 3, 8, generator=torch.Generator().manual_seed(0))
    turned, _ = positions.Rotation(config)(x, x, torch.arange(16).expand(1, 16))
    angles = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(4.0) * 2 / 8))
    spun = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((spun.real, spun.imag), -1))


def test_rope_sees_distances_only():
    rotation = positions.Rotation(TINY(head_size=8))
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        return (rotation(q, q, torch.tensor([at_q]))[0] * rotation(k, k, torch.tensor([at_k]))[0]).sum()

    torch.testing.assert_close(score(5, 2), score(43, 40))
    assert not torch.allclose(score(5, 2), score(5, 3))


def test_the_rope_table_is_no_state_and_stays_float32():
    model, tokens = make(), random_tokens(1, 8)
    table = model.blocks[0].attention.rotation.table.clone()
    assert not [name for name in model.state_dict() if "rotation" in name]
    with torch.device("meta"):
        empty = Transformer(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(tokens), model(tokens))
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.blocks[0].attention.rotation.table, table)
    assert len([name for name, _ in model.named_buffers()]) == 1  # one table for all layers


# --- the loss ---


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunked_loss_is_the_plain_one(chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    targets[1, :3] = IGNORE
    upstream = torch.rand(3, 5, generator=generator)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    for loss in (plain_nll, lambda *args: chunked_nll(*args, chunk=chunk)):
        nll = loss(x, weight, targets)
        assert nll.dtype == torch.float32 and not nll[1, :3].any()
        torch.testing.assert_close(nll, expected.float())
        ours = torch.autograd.grad((nll * upstream).sum(), (x, weight), retain_graph=True)
        theirs = torch.autograd.grad((expected * upstream).sum(), (x, weight), retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_chunked_loss_never_holds_all_logits():
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(0, 500, (64,))
    largest = {}
    for name, loss in {"plain": plain_nll, "chunked": lambda *args: chunked_nll(*args, chunk=8)}.items():
        with LargestTensor() as mode:
            loss(x, weight, targets).sum().backward()
        largest[name] = mode.largest
    assert largest["plain"] == 64 * 500
    assert largest["chunked"] == 8 * 500


def test_the_loss_is_chosen_once():
    model, tokens = make(), random_tokens(2, 16)
    plain = model(tokens, targets=tokens)
    torch.testing.assert_close(use_chunked_loss(model, chunk=5)(tokens, targets=tokens), plain)
    assert model.use_loss(lambda x, weight, targets: targets.float())(tokens, targets=tokens).equal(tokens.float())


@pytest.mark.parametrize("loss", [plain_nll, chunked_nll])
def test_autocast_runs_the_stream_in_its_dtype_and_the_loss_in_float32(loss):
    model, tokens = make().use_loss(loss), random_tokens(2, 16)
    reference = model(tokens, targets=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(tokens, torch.arange(16)).dtype == torch.bfloat16
        nll, logits = model(tokens, targets=tokens), model(tokens)
        wide = model.use_stream(lambda x: x.dtype).embed(tokens, torch.arange(16))
    assert nll.dtype == torch.float32 and logits.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert (nll - reference).abs().max() < 0.1
    nll.sum().backward()
    assert model.blocks[0].mlp.up_proj.weight.grad.dtype == torch.float32


# --- activation checkpointing ---


def saved_bytes(model, tokens):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, targets=tokens).sum()
    loss.backward()
    return total, loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_memory_alone(every):
    tokens, names = random_tokens(2, 32), list(make().state_dict())
    plain_total, plain_loss, plain_grads = saved_bytes(make(), tokens)
    model = checkpoint_activations(make(), every=every)
    total, loss, grads = saved_bytes(model, tokens)
    assert loss == plain_loss and list(model.state_dict()) == names
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)
    share = total / plain_total
    assert share < 0.4 if every == 1 else 0.4 < share < 0.8


def test_layers_can_be_swapped_inside_checkpointed_blocks():
    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    model, reference, tokens = checkpoint_activations(make()), make(), random_tokens(1, 8)
    for changed in (model, reference):
        swap_modules(changed, lambda name, old: Zero(), lambda name, module: name.endswith("mlp"))
    assert torch.equal(model(tokens), reference(tokens))


def test_a_checkpointed_block_keeps_a_forward_of_its_own():
    class Doubling(layers.Block):
        def forward(self, x, plan, layer):
            return 2 * super().forward(x, plan, layer)

    model, reference, tokens = make(), make(), random_tokens(1, 8)
    for changed in (model, reference):
        changed.blocks[1].__class__ = Doubling
    checkpoint_activations(checkpoint_activations(model))  # asked for twice, done once
    assert torch.equal(model(tokens), reference(tokens))
    assert not torch.equal(model(tokens), make()(tokens))
    assert isinstance(model.blocks[1], Doubling)


def test_checkpointing_refuses_nonsense():
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        checkpoint_activations(make(), every=0)
    with pytest.raises(ValueError):
        checkpoint_activations(nn.Linear(2, 2))


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
    print("who sees whom, two documents of 2 and 3 tokens, window 2:")
    for row in visible(5, window=2, starts=torch.tensor([0, 0, 2, 2, 2]))[0].int().tolist():
        print("  " + " ".join(".x"[value] for value in row))
    raise SystemExit(pytest.main([__file__, "-q"]))
