"""Tests of GGUF files: `transformers` and llama.cpp compute the same, the vocabulary is there, the rest is refused."""

import pytest
import torch

from phase1_foundation.project3_pretrain import gguf_export
from phase1_foundation.project3_pretrain.hub import to_gguf
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.test_hub import ours, small_tokenizer, tokens

GGUF_CASES = {
    "gpt2": PRESETS["gpt2"](n_layer=2, n_head=4, n_embd=16),  # transformers reads neither vocabulary nor context size
    "llama": PRESETS["llama-7b"](vocab_size=280, block_size=64, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, n_ff=48),
    "qwen2": PRESETS["qwen2-0.5b"](vocab_size=280, block_size=64, n_layer=2, n_head=4, n_embd=32, n_ff=48),
    "qwen3": PRESETS["qwen3-0.6b"](vocab_size=280, block_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_ff=48),
}

OUR_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 32}


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
    print("our names of tensors and llama.cpp's:")
    for mine, its in gguf_export.TENSORS.items():
        print(f"    {mine:32s} {its}")
    raise SystemExit(pytest.main([__file__, "-q"]))
