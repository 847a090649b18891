"""Tests of the Hugging Face folders and GGUF files: `transformers` must compute the same logits, both ways."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain import gguf_export, hub
from phase1_foundation.project3_pretrain.hub import from_huggingface, to_gguf, to_huggingface
from phase1_foundation.project3_pretrain.hub_mapping import FAMILIES
from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase1_foundation.project3_pretrain.model import PRESETS, ModelConfig, Transformer

SMALL = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = dict(vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=64)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}

# name -> (family, settings of transformers)
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-wide": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=100, activation_function="gelu")),
    "llama": ("Llama", SMALL),
    "smollm-tied": ("Llama", SMALL | dict(tie_word_embeddings=True)),
    "llama3-rope-biases-head_dim": (
        "Llama",
        SMALL | dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=16),
    ),
    "llama-linear-rope": ("Llama", SMALL | dict(rope_parameters=LINEAR)),
    "mistral-window": ("Mistral", SMALL | dict(sliding_window=5)),
    "mistral-no-window": ("Mistral", SMALL | dict(sliding_window=None, head_dim=8)),
    "qwen2": ("Qwen2", SMALL),
    "qwen2-some-windows": ("Qwen2", SMALL | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3-tied-head_dim": ("Qwen3", SMALL | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-chosen-windows": (
        "Qwen3",
        SMALL
        | dict(
            head_dim=16,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}


def theirs(case, seed=0):
    """A random model of transformers, far from its initialisation."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**settings, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    model_class = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(**fields):
    """A small model of ours."""
    torch.manual_seed(0)
    return Transformer(PRESETS["cpu-tiny"](**fields)).eval()


def tokens():
    return torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


# --- both ways, for every family ---


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_same_logits_and_exact_round_trip(case, tmp_path):
    reference = theirs(case)
    expected = reference(tokens()).logits
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()

    model, tokenizer = from_huggingface(tmp_path / "theirs")
    assert tokenizer is None and not model.training
    assert (model(tokens()) - expected).abs().max() < 1e-4

    to_huggingface(model, None, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 5
    again, _ = from_huggingface(tmp_path / "ours")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    reloaded, report = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name
    assert (reloaded.eval()(tokens()).logits - expected).abs().max() < 1e-4


def test_the_family_survives(tmp_path):
    for case, expected in {"qwen3-tied-head_dim": "qwen3", "qwen2": "qwen2", "gpt2": "gpt2", "llama": "llama"}.items():
        theirs(case).save_pretrained(tmp_path / case)
        model, _ = from_huggingface(tmp_path / case)
        to_huggingface(model, None, tmp_path / "ours")
        assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == expected


def test_one_shard_replaces_many(tmp_path):
    model = ours()
    to_huggingface(model, None, tmp_path, shard_bytes=10_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    to_huggingface(model, None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_keep_their_dtype_or_take_the_one_asked_for(tmp_path):
    to_huggingface(ours().to(torch.bfloat16), None, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert from_huggingface(tmp_path)[0].embed.tokens.weight.dtype == torch.bfloat16
    model, _ = from_huggingface(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.blocks[0].attention.rotation.table.dtype == torch.float32


def test_weights_of_several_types_are_read_in_the_widest(tmp_path):
    model = ours()
    for part, dtype in ((model.embed, torch.bfloat16), (model.norm, torch.float32), (model.blocks, torch.float16)):
        part.to(dtype)  # the embedding, which is stored first, is the narrowest
    to_huggingface(model, None, tmp_path, shard_bytes=10_000)
    again, _ = from_huggingface(tmp_path)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.float().state_dict().items())
    to_huggingface(ours(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights of type torch\.int8 are not read"):
        from_huggingface(tmp_path)


def test_an_interrupted_export_is_no_model(tmp_path, monkeypatch):
    to_huggingface(ours(), None, tmp_path)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_write_weights", interrupted)
    with pytest.raises(ValueError, match="cannot be written as tokenizer"):  # refused before anything is touched
        to_huggingface(ours(), object(), tmp_path)
    assert from_huggingface(tmp_path)[0].config == ours().config
    with pytest.raises(KeyboardInterrupt):
        to_huggingface(ours(rope_theta=1.0), None, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_huggingface(tmp_path)


# --- what is published: config.json of old and new versions of transformers ---

PUBLISHED = {
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024, "n_embd": 768, "n_head": 12}
    | {"n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "layer_norm_epsilon": 1e-05},
    "mistral-7b": {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336}
    | {"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8}
    | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False}
    | {"torch_dtype": "bfloat16", "vocab_size": 32000},
    "qwen2-0.5b": {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864}
    | {"max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24}
    | {"num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768}
    | {"tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
    "qwen3-0.6b": {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu"}
    | {"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28}
    | {"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06}
    | {"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True}
    | {"use_sliding_window": False, "vocab_size": 151936},
    "smollm-135m": {"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576}
    | {"intermediate_size": 1536, "max_position_embeddings": 2048, "num_attention_heads": 9, "num_hidden_layers": 30}
    | {"num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True}
    | {"vocab_size": 49152},
    "llama-3.2-1b": {"model_type": "llama", "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048}
    | {"intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32, "vocab_size": 128256}
    | {"num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": True}
    | {"rope_theta": 500000.0}
    | {
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
        | {"original_max_position_embeddings": 8192}
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_our_presets(name):
    config = PUBLISHED[name]
    assert FAMILIES[config["model_type"]].read_config(config) == PRESETS[name]()


@pytest.mark.parametrize("case", ["llama-linear-rope", "llama3-rope-biases-head_dim"])
@torch.no_grad()
def test_old_spellings_of_rope_are_read(case, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path)
    rope = dict(reference.config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for spelling in ("type", "rope_type"):
        edit_config(tmp_path, rope_parameters="absent", rope_theta=theta, rope_scaling={spelling: kind, **rope})
        model, _ = from_huggingface(tmp_path)
        assert (model(tokens()) - reference(tokens()).logits).abs().max() < 1e-4


@torch.no_grad()
def test_gpt2_as_it_was_published(tmp_path):
    # Names without `transformer.`, the causal mask stored beside the weights, a second copy of the tied matrix.
    reference = theirs("gpt2")
    reference.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, tmp_path / "model.safetensors")
    model, _ = from_huggingface(tmp_path)
    assert (model(tokens()) - reference(tokens()).logits).abs().max() < 1e-4


# --- what does not fit is named ---


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ValueError) as error:
        from_huggingface(tmp_path)
    assert "mamba" in str(error.value) and "gpt2, llama, mistral, qwen2, qwen3 (SmolLM is a llama)" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}, rope_scaling=None), "rope_type='yarn'"),
        (dict(rope_parameters={"rope_theta": 1.0, "partial_rotary_factor": 0.5}), "one whole rotation"),
        (dict(quantization_config={"bits": 4}), "quantized weights are not read"),
        (dict(num_attention_heads=7, head_dim=None), "must be divisible"),
        (dict(model_type=[]), r"model_type=\[\]"),
        (dict(model_type=None, architectures=3), "model_type=None"),
        (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1.0}), "factor=None"),
        (dict(rope_parameters={"rope_type": "linear", "factor": "two"}), "factor='two'"),
        (dict(rope_parameters={"rope_type": ["linear"]}), "rope_type="),
        (dict(rope_parameters="linear"), "rope_parameters='linear'"),
        (dict(rope_parameters=None, rope_scaling=2.0), "rope_scaling=2.0"),
        (dict(rope_parameters="absent", rope_theta=None), "rope_theta=None"),
        (dict(hidden_size="32"), "hidden_size='32'"),
        (dict(vocab_size=None), "vocab_size=None"),
        (dict(num_hidden_layers=True), "num_hidden_layers=True"),
        (dict(hidden_act=["silu"]), "hidden_act="),
        (dict(use_sliding_window=True, sliding_window="4"), "sliding_window='4'"),
        (dict(layer_types=["chunked_attention", "full_attention"]), "layer_types=.*'chunked_attention'"),
        (dict(layer_types=["full_attention"]), "layer_types=.* only 2 of full_attention, sliding_attention"),
        (dict(layer_types="full_attention"), "layer_types="),
        (dict(layer_types=None, max_window_layers=None), "max_window_layers=None"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(changes, said, tmp_path):
    to_huggingface(ours(), None, tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{said}"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("null", "holds a NoneType"),
        ("[]", "holds a list"),
        ('"text"', "holds a str"),
        ("{", "is no JSON"),
        ("{}", "model_type=None|weight_map=None"),
        ('{"weight_map": {"norm": 3}, "model_type": 3}', "model_type=3|weight_map={'norm': 3}"),
    ],
)
def test_damaged_json_is_named(name, content, said, tmp_path):
    to_huggingface(ours(), None, tmp_path, shard_bytes=10_000)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*({said})"):
        from_huggingface(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    to_huggingface(ours(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        from_huggingface(tmp_path)
    for part in (
        "missing: model.layers.0.mlp.up_proj.weight",
        "unexpected: model.layers.9.mlp.up_proj.weight",
        "wrong shape: model.norm.weight is (3,), not (32,)",
    ):
        assert part in str(error.value)


def test_incomplete_and_foreign_folders(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        from_huggingface(tmp_path)
    to_huggingface(ours(), None, tmp_path, shard_bytes=10_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        from_huggingface(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
        from_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle that could run code"):
        from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        from_huggingface(tmp_path)


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        asked.append(repo)
        return str(to_huggingface(ours(), None, tmp_path))

    stub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    assert from_huggingface("org/name")[0].config == ours().config
    assert asked == ["org/name"]

    def offline(*args, **kwargs):
        raise OSError("Connection refused")

    stub.snapshot_download = offline
    with pytest.raises(FileNotFoundError) as error:
        from_huggingface("org/name")
    assert "org/name" in str(error.value) and "Connection refused" in str(error.value)
    assert "Missing: config.json and *.safetensors" in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="uv sync --group data"):
        from_huggingface("org/name")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        from_huggingface(tmp_path / "nowhere/at/all")


# --- export ---


def test_what_no_family_expresses_is_explained(tmp_path):
    with pytest.raises(ValueError) as error:
        to_huggingface(ours(mlp="relu2"), None, tmp_path)
    assert "qwen3 cannot express mlp=relu2" in str(error.value)
    with pytest.raises(ValueError, match="llama cannot express qk_norm=True"):
        to_huggingface(ours(), None, tmp_path, family="llama")
    with pytest.raises(ValueError, match="family='bert' is not known"):
        to_huggingface(ours(), None, tmp_path, family="bert")
    for fields in (dict(windows=(4, 8)), dict(attention_scale=0.3), dict(qkv_bias=True)):
        with pytest.raises(ValueError, match=next(iter(fields))):
            to_huggingface(ours(**fields), None, tmp_path)
    assert hub.choose_family(ModelConfig.from_dict(ours(dropout=0.1).config.to_dict())).model_type == "qwen3"


class Halves(nn.Module):
    """A swapped layer, as LoRA or quantization leave behind."""

    def __init__(self, linear):
        super().__init__()
        self.first, self.second = nn.Parameter(linear.weight / 2), nn.Parameter(linear.weight / 2)
        self.linear = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def to_linear(self):
        self.linear.weight.data = (self.first + self.second).data
        return self.linear


def test_swapped_layers_are_written_as_the_linear_layers_they_stand_for(tmp_path):
    model, reference = ours(), ours()
    model.blocks[1].mlp.up_proj = Halves(model.blocks[1].mlp.up_proj)
    to_huggingface(model, None, tmp_path)
    again, _ = from_huggingface(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in reference.state_dict().items())
    model.blocks[0].register_buffer("mystery", torch.zeros(2))
    with pytest.raises(ValueError, match=r"1 tensors have no place in a qwen3 folder \(blocks\.0\.mystery\)"):
        to_huggingface(model, None, tmp_path)


# --- tokenizers ---


def small_tokenizer():
    text = "the cat sat on the mat, the dog sat on the log; " * 20
    return BPETokenizer.train([text], vocab_size=280, special_tokens=["<|endoftext|>"], rule="merges")


def test_the_tokenizer_travels_along(tmp_path):
    tokenizer = small_tokenizer()
    to_huggingface(ours(vocab_size=280), tokenizer, tmp_path)
    _, again = from_huggingface(tmp_path)
    text = "the cat's log — naïve 123"
    assert again.encode(text) == tokenizer.encode(text) and again.eot_id == tokenizer.eot_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eot_id
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.encode(text) == tokenizer.encode(text) and auto.eos_token_id == tokenizer.eot_id
    assert auto.decode(auto.encode(text)) == text


def test_no_tokenizer_of_an_earlier_export_stays(tmp_path):
    to_huggingface(ours(vocab_size=280), small_tokenizer(), tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    to_huggingface(ours(), None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert from_huggingface(tmp_path)[1] is None


def test_foreign_tokenizers_are_run_by_their_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3}
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    foreign.decoder = tokenizers.decoders.Metaspace()
    foreign.add_special_tokens(["</s>"])
    to_huggingface(ours(), None, tmp_path)
    foreign.save(str(tmp_path / "tokenizer.json"))
    _, tokenizer = from_huggingface(tmp_path)
    assert isinstance(tokenizer, ForeignTokenizer)
    assert tokenizer.encode("the cat") == [2, 3] and tokenizer.decode([2, 3]) == "the cat"
    assert tokenizer.eot_id == 1 and tokenizer.vocab_size == 4
    again = ForeignTokenizer.from_dict(tokenizer.to_dict())
    assert again.encode("the dog") == [2, 0]
    to_huggingface(ours(), again, tmp_path / "copy")
    assert from_huggingface(tmp_path / "copy")[1].encode("the cat") == [2, 3]


def test_a_tokenizer_without_such_a_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer object cannot be written as tokenizer"):
        to_huggingface(ours(), object(), tmp_path)


# --- GGUF ---

GGUF_CASES = {
    "gpt2": PRESETS["gpt2"](n_layer=2, n_head=4, n_embd=16),  # transformers reads neither vocabulary nor context size
    "llama": PRESETS["llama-7b"](vocab_size=280, block_size=64, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, n_ff=48),
    "qwen2": PRESETS["qwen2-0.5b"](vocab_size=280, block_size=64, n_layer=2, n_head=4, n_embd=32, n_ff=48),
    "qwen3": PRESETS["qwen3-0.6b"](vocab_size=280, block_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48),
}


@pytest.mark.parametrize("name", GGUF_CASES)
@torch.no_grad()
def test_gguf_is_read_with_the_same_logits(name, tmp_path):
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Transformer(GGUF_CASES[name]).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    to_gguf(model, None, tmp_path / "model.gguf", torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert loaded.config.model_type == name
    assert (loaded.eval()(tokens()).logits - model(tokens())).abs().max() < 1e-4


def test_gguf_holds_the_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf")
    tokenizer = small_tokenizer()
    to_gguf(ours(vocab_size=288), tokenizer, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    words = fields["tokenizer.ggml.tokens"].contents()
    assert len(words) == 288 and words[tokenizer.eot_id] == "<|endoftext|>" and words[287] == "[PAD287]"
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[tokenizer.eot_id] == gguf_export.CONTROL and kinds[287] == gguf_export.UNUSED
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in tokenizer.merges]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eot_id
    tokenizer.always_matched = frozenset(["<|endoftext|>"])
    to_gguf(ours(vocab_size=288), tokenizer, tmp_path / "matched.gguf")
    kinds = gguf.GGUFReader(tmp_path / "matched.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[tokenizer.eot_id] == gguf_export.USER_DEFINED


def test_gguf_refuses_what_llama_cpp_does_not_compute(tmp_path):
    pytest.importorskip("gguf")
    for fields, said in (
        (dict(windows=(4, 4)), "sliding window"),
        (dict(mlp="relu2"), "no architecture"),
        (dict(rope_scaling={"kind": "llama3", **{k: v for k, v in OUR_LLAMA3.items()}}), "'llama3' with qwen3"),
    ):
        with pytest.raises(ValueError, match=said):
            to_gguf(ours(**fields), None, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"torch\.float16 or torch\.float32"):
        to_gguf(ours(), None, tmp_path / "model.gguf", torch.bfloat16)
    assert not list(tmp_path.iterdir())


OUR_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("rope", [None, {"kind": "linear", "factor": 2.0}, {"kind": "llama3", **OUR_LLAMA3}])
@torch.no_grad()
def test_llama_cpp_computes_the_same(rope, tmp_path):
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("xllamacpp")
    torch.manual_seed(0)
    model = Transformer(PRESETS["llama-7b"](**(GGUF_CASES["llama"].to_dict() | dict(rope_scaling=rope)))).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    to_gguf(model, small_tokenizer(), tmp_path / "model.gguf", torch.float32)
    settings = llama_cpp.CommonParams()
    settings.model.path = str(tmp_path / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 64, 1, 1, False
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    prompt = tokens()[0].tolist()
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 280, "temperature": 1.0}
    request |= {"logit_bias": [[0, 1000.0]]}  # half of a UTF-8 character would not be answered; this is a "!"
    answer = llama_cpp.Server(settings).handle_completions(request)
    expected = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert abs(entry["logprob"] - expected[entry["id"]].item()) < 1e-4


if __name__ == "__main__":
    for name, family in FAMILIES.items():
        print(f"{name:8s} {family.architecture}")
        for rule in list(family.tensor_rules(1))[:6]:
            print(f"    {rule.theirs:48s} {' + '.join(rule.ours)}")
    raise SystemExit(pytest.main([__file__, "-q"]))
