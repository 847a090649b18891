"""Tests of what stands in Hugging Face folders: published configs are our presets, what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from phase1_foundation.project3_pretrain.hub import from_huggingface, to_huggingface
from phase1_foundation.project3_pretrain.hub_mapping import FAMILIES
from phase1_foundation.project3_pretrain.model import PRESETS
from phase1_foundation.project3_pretrain.test_hub import ours, theirs, tokens


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


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


if __name__ == "__main__":
    for name, published in PUBLISHED.items():
        shape = FAMILIES[published["model_type"]].read_config(published)
        print(f"{name:12s} {published['model_type']:8s} {shape.n_layer:3d} layers of {shape.n_embd}, {shape.positions}")
    raise SystemExit(pytest.main([__file__, "-q"]))
