"""Tests of Hugging Face folders: `transformers` computes the same logits, both ways; export, tokenizers, download."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain import hub
from phase1_foundation.project3_pretrain.hub import from_huggingface, to_huggingface
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


if __name__ == "__main__":
    for name, family in FAMILIES.items():
        print(f"{name:8s} {family.architecture}")
        for rule in list(family.tensor_rules(1))[:6]:
            print(f"    {rule.theirs:48s} {' + '.join(rule.ours)}")
    raise SystemExit(pytest.main([__file__, "-q"]))
