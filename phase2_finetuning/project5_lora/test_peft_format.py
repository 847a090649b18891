"""Tests of PEFT's format: peft computes our adapters' logits and gradients, we compute those of peft's."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import catalog
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project5_lora.layers import LoRALinear, TrainedRows
from phase2_finetuning.project5_lora.lora import add_lora, load_adapter, save_adapter
from phase2_finetuning.project5_lora.peft_format import endings

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
SHAPE = {"vocab_size": 96, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
GROUPED = SHAPE | {"n_kv_head": 2, "n_ff": 48, "head_size": 8}
FAMILIES = {
    "gpt2": PRESETS["gpt2"](**SHAPE),
    "llama": PRESETS["llama-3-8b"](**GROUPED),
    "mistral": PRESETS["mistral-7b"](**GROUPED | {"windows": (8, 8)}),
    "qwen2": PRESETS["qwen2-0.5b"](**GROUPED),
    "qwen3": PRESETS["qwen3-0.6b"](**GROUPED),
}
VARIANTS = {
    "lora": {},
    "rslora": {"rank_stabilized": True},
    "dora": {"dora": True},
    "dora and rslora": {"dora": True, "rank_stabilized": True},
    "some layers": {"targets": ["q_proj", "v_proj", "blocks.1.mlp"]},
    "ranks": {"ranks": {"v_proj": 2, "blocks.1.mlp": 7}, "alphas": {"k_proj": 5.0}},
    "tokens": {"tokens": [90, 3, 95]},
}
TOKENS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base of each family, as transformers reads it."""
    found = {}
    for name in FAMILIES:
        folder = to_huggingface(ours(name), None, tmp_path_factory.mktemp(name), family=name)
        found[name] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return found


def larger(model):
    """Weights of a size at which a wrong layer shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(family):
    torch.manual_seed(1)
    return larger(Transformer(FAMILIES[family]))


def theirs(bases, family):
    return copy.deepcopy(bases[family])


def trained(model):
    """The adapter's values as after a training: nothing is zero any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def gap(a, b):
    return float((a - b).detach().abs().max())


def same_direction(a, b):
    """The difference of two gradients is small beside them."""
    return float((a - b).norm()) < 1e-3 * float(b.norm())


# -- ours in peft


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_logits_of_our_adapter(family, variant, bases, tmp_path):
    model = trained(add_lora(ours(family), 4, 8.0, **VARIANTS[variant]))
    save_adapter(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs(bases, family), tmp_path).eval()
    expected = model(TOKENS)
    assert gap(expected, ours(family)(TOKENS)) > 1e-2
    assert gap(wrapped(TOKENS).logits, expected) < 1e-4
    back = load_adapter(ours(family), tmp_path)
    assert gap(back(TOKENS), expected) < 1e-5
    save_adapter(back, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(theirs(bases, family), tmp_path / "again").eval()
    assert gap(again(TOKENS).logits, expected) < 1e-4


def test_the_adapter_of_a_shared_block_is_written_for_each_of_its_places(tmp_path):
    model = ours("llama")
    model.blocks[1] = model.blocks[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(
        to_huggingface(model, None, tmp_path / "base", family="llama"), dtype=torch.float32
    ).eval()
    add_lora(model, rank=3, targets=["attention"])
    trained(model)
    folder = save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(base, folder).eval()
    assert gap(wrapped(TOKENS).logits, model.eval()(TOKENS)) < 1e-4
    again = ours("llama")
    again.blocks[1] = again.blocks[0]
    assert gap(load_adapter(again, folder)(TOKENS), model(TOKENS)) < 1e-4


def test_what_is_saved_is_read_back_bit_by_bit(tmp_path):
    for family in ("gpt2", "qwen3"):
        model = trained(add_lora(ours(family), 4, 8.0, rank_stabilized=True, targets=["q_proj", "v_proj", "mlp"]))
        back = load_adapter(ours(family), save_adapter(model, tmp_path / family))
        assert back.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name
        assert [m.scale for m in back.modules() if isinstance(m, LoRALinear)] == pytest.approx(
            [m.scale for m in model.modules() if isinstance(m, LoRALinear)]
        )


def test_the_configuration_is_as_short_as_peft_writes_it(tmp_path):
    config = json.loads((save_adapter(add_lora(ours("llama"), 4, 8.0), tmp_path) / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    model = add_lora(ours("gpt2"), 4, 8.0, targets=["attention"])
    config = json.loads((save_adapter(model, tmp_path) / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_proj", "c_attn"] and config["fan_in_fan_out"]
    # q, k and v in one matrix: three updates of rank 4 are one of rank 12 with the same scale
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) in [
        (12, {"c_proj": 4}, {"c_proj": 8}), (4, {"c_attn": 12}, {"c_attn": 24}),
    ]  # fmt: skip


def test_the_shortest_ending_that_means_no_other_layer():
    everything = [f"{i}.{part}" for i in (0, 1, 10) for part in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    assert endings([name for name in everything if "c_fc" in name], everything) == ["c_fc"]
    assert endings([name for name in everything if "mlp" in name], everything) == ["c_fc", "mlp.c_proj"]
    assert endings(["0.mlp.c_fc"], everything) == ["0.mlp.c_fc"]
    assert endings(everything, everything) == ["c_fc", "c_proj"]


# -- peft's in ours

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"0.self_attn.q_proj": 3, "c_attn": 5}, "alpha_pattern": {"up_proj|c_fc": 3}},
    "tokens": {"trainable_token_indices": [5, 90]},
}


def made_by_peft(bases, family, tmp_path, change=trained, **options):
    """An adapter of peft: (its model, its folder)."""
    torch.manual_seed(2)
    base, tied = theirs(bases, family), FAMILIES[family].tie_head
    if options.get("trainable_token_indices") and not tied:
        options["trainable_token_indices"] = {"embed_tokens": [5, 90], "lm_head": [90, 7]}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS.get(family, "all-linear"), **options)
    wrapped = change(peft.get_peft_model(base, config)).eval()
    wrapped.save_pretrained(tmp_path)
    return wrapped, tmp_path


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_compute_the_logits_of_pefts_adapter(family, options, bases, tmp_path):
    wrapped, folder = made_by_peft(bases, family, tmp_path, **OPTIONS[options])
    model = load_adapter(ours(family), folder)
    expected = wrapped(TOKENS).logits
    assert gap(expected, ours(family)(TOKENS)) > 1e-2
    assert gap(model(TOKENS), expected) < 1e-4
    save_adapter(model, tmp_path / "ours")  # and back
    again = peft.PeftModel.from_pretrained(theirs(bases, family), tmp_path / "ours").eval()
    assert gap(again(TOKENS).logits, expected) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("options", ["lora", "rslora", "dora", "tokens"])
def test_gradients_are_those_of_peft(family, options, bases, tmp_path):
    wrapped, folder = made_by_peft(bases, family, tmp_path, **OPTIONS[options])
    model = load_adapter(ours(family), folder)
    torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    torch.nn.functional.cross_entropy(wrapped(TOKENS).logits.flatten(0, 1), TOKENS.flatten()).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for i in range(2):
        block, mlp, attention = model.blocks[i], model.blocks[i].mlp, model.blocks[i].attention
        if family == "gpt2":
            at = f"transformer.h.{i}."
            joint = [attention.q_proj, attention.k_proj, attention.v_proj]
            pairs = {f"{at}mlp.c_fc": [mlp.up_proj], f"{at}attn.c_attn": joint}
        else:
            at = f"model.layers.{i}."
            pairs = {f"{at}self_attn.k_proj": [block.attention.k_proj], f"{at}mlp.down_proj": [mlp.down_proj]}
        for name, layers in pairs.items():  # q, k and v share peft's A: its gradient is the sum of ours
            assert same_direction(sum(layer.A.grad for layer in layers), expected[f"{name}.lora_A.weight"])
            assert same_direction(torch.cat([layer.B.grad for layer in layers]), expected[f"{name}.lora_B.weight"])
            if options == "dora":
                lengths = torch.cat([layer.magnitude.grad for layer in layers])
                assert same_direction(lengths, expected[f"{name}.lora_magnitude_vector.weight"])
            compared += 1
    assert compared == 4
    for module in (m for m in model.modules() if isinstance(m, TrainedRows) and FAMILIES[family].tie_head):
        rows = next(grad for name, grad in expected.items() if "trainable_tokens_delta" in name)
        assert same_direction(module.rows.grad, rows)


def test_an_untrained_adapter_of_peft_changes_nothing_and_can_be_trained(bases, tmp_path):
    for family in ("gpt2", "llama"):
        _, folder = made_by_peft(bases, family, tmp_path / family, change=lambda wrapped: wrapped)
        model = load_adapter(ours(family), folder)
        assert torch.equal(model(TOKENS), ours(family)(TOKENS))
        model(TOKENS).sum().backward()
        assert all(m.B.grad.abs().max() > 0 for m in model.modules() if isinstance(m, LoRALinear))


def test_peft_around_our_own_model_uses_our_names(tmp_path):
    torch.manual_seed(0)
    config = PRESETS["gpt2"](**SHAPE, qk_norm=True)  # no family of transformers has that
    base = larger(Transformer(config))
    expected = trained(add_lora(larger_copy(base), 4, 8.0, tokens=[7]))
    model = load_adapter(larger_copy(base), save_adapter(expected, tmp_path / "own"))
    assert torch.equal(model(TOKENS), expected(TOKENS))
    wrapped = trained(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["k_proj", "up_proj"]))).eval()
    wrapped.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    torch.manual_seed(0)
    model = load_adapter(larger(Transformer(config)), tmp_path / "peft")
    assert gap(model(TOKENS), wrapped(TOKENS)) < 1e-5


def larger_copy(model):
    copy = Transformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


# -- what a user can get wrong


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(trained(add_lora(ours("llama"), 4, 8.0)), tmp_path / "adapter")


def refused(folder, match, model=None):
    model = model or ours("llama")
    before = model(TOKENS)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_adapter(model, folder)
    assert torch.equal(model(TOKENS), before) and not any(isinstance(m, LoRALinear) for m in model.modules())


def edit(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"bias": "all"}, "bias='all' is not computed here.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not computed"),
        ({"lora_bias": True}, "lora_bias=True is not"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not"),
        ({"some_option_of_2030": {"a": 1}}, "some_option_of_2030"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only LORA"),
        ({"lora_alpha": None}, "alpha=None of model.layers.0.self_attn.q_proj must be a positive number"),
        ({"lora_alpha": "8"}, "alpha='8' of"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern=.* maps no names to numbers"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=.* maps no names to numbers"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha=-1 of"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 must be"),
        ({"lora_dropout": ["x"]}, r"lora_dropout=\['x'\] must be"),
        ({"trainable_token_indices": ["a"]}, r"trainable_token_indices=\['a'\] must hold ids"),
        ({"trainable_token_indices": 7}, "trainable_token_indices=7 must hold ids"),
        ({"trainable_token_indices": {"lm_head": 7}}, "must hold ids"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"trainable_token_indices": [96]}, "trained token 96, and this model has 96"),
    ],
)
def test_options_that_are_not_computed_here(adapter, entries, match):
    edit(adapter, **entries)
    refused(adapter, match)


def test_an_adapter_for_another_model_names_tensor_and_shapes(adapter):
    torch.manual_seed(0)
    wider = Transformer(PRESETS["llama-3-8b"](**GROUPED | {"n_ff": 64}))
    refused(adapter, r"layers.0.mlp.gate_proj.lora_B.weight is \(48, 4\), this model's layer takes \(64, 4\)", wider)
    deeper = Transformer(PRESETS["llama-3-8b"](**GROUPED | {"n_layer": 1}))
    refused(adapter, r"14 tensors have no place in this model \(model.layers.1", deeper)
    refused(adapter, r"28 tensors have no place.*This one has c_attn, c_fc, c_proj", ours("gpt2"))


def test_rows_of_tokens_that_are_missing(tmp_path):
    folder = save_adapter(trained(add_lora(ours("llama"), rank=2, tokens=[3])), tmp_path)
    tensors = {name: t for name, t in load_file(folder / "adapter_model.safetensors").items() if "token" not in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, "lacks .*trainable_tokens_delta: it is incomplete")


def test_what_is_no_adapter(adapter, tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    refused(tmp_path, "has no adapter_config.json")
    tensors = load_file(adapter / "adapter_model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up_proj.lora_A" not in name}
    save_file(some, adapter / "adapter_model.safetensors")
    refused(adapter, r"lacks model.layers.0.mlp.up_proj.lora_A.weight")
    for odd in (torch.zeros(0, 32), torch.zeros(32), torch.tensor(1.0)):
        save_file(tensors | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": odd},
                  adapter / "adapter_model.safetensors")  # fmt: skip
        refused(adapter, r"up_proj.lora_A.weight is \(.*, not \(rank, 32\)")
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    refused(adapter, "1 tensors have no place")
    save_file({}, adapter / "adapter_model.safetensors")
    refused(adapter, "holds no update")
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    refused(adapter, "is damaged or no safetensors file")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, "a pickle that could run code")
    (adapter / "adapter_config.json").write_text("[")
    refused(adapter, "is damaged or no adapter's")


def test_a_model_without_an_adapter_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapter of its own to save"):
        save_adapter(ours("llama"), tmp_path)


def test_a_loaded_adapter_is_part_of_the_recipe(adapter):
    model = load_adapter(ours("llama"), adapter)
    with torch.device("meta"):
        again = catalog.apply(Transformer(model.config), json.loads(json.dumps(model.recipe)))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


if __name__ == "__main__":
    demonstration = add_lora(ours("gpt2"), 4, 8.0, targets=["q_proj", "v_proj"])
    print([name for name, module in demonstration.named_modules() if isinstance(module, LoRALinear)])
    raise SystemExit(pytest.main([__file__]))
