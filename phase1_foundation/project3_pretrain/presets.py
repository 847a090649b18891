"""Published shapes by name: ``PRESETS["gpt2"](block_size=512)`` gives a `ModelConfig`; any field may be overridden."""

import functools
from collections.abc import Callable

from phase1_foundation.project3_pretrain.model_config import ModelConfig


def family(**shared) -> Callable[..., Callable[..., ModelConfig]]:
    """A maker of presets that share settings: ``family(norm=...)(n_layer=...)(vocab_size=...)`` is a ModelConfig."""

    def preset(**fields):
        return functools.partial(ModelConfig, **(shared | fields))

    return preset


# "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), table 2
gpt2 = family(
    vocab_size=50257, block_size=1024, norm="layernorm", mlp="gelu", positions="learned",
    qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True, tie_head=True,
)  # fmt: skip
# "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023), section 2.2
llama = family(norm="rmsnorm", mlp="swiglu", positions="rope", tie_head=False)
# Llama 3's rule for contexts beyond 8,192 tokens
llama_3_scaling = {
    "kind": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 8192
}  # fmt: skip

PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "gpt2": gpt2(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": gpt2(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": gpt2(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": gpt2(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    # As many parameters as GPT-2 124M, with the parts of later models; the vocabulary padded to a multiple of 128.
    "llama-125m": llama(
        vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768, qk_norm=True, tie_head=True
    ),
    "llama-7b": llama(
        vocab_size=32000, block_size=2048, n_layer=32, n_head=32, n_embd=4096, n_ff=11008, norm_eps=1e-6
    ),
    "llama-2-7b": llama(vocab_size=32000, block_size=4096, n_layer=32, n_head=32, n_embd=4096, n_ff=11008),
    "llama-3-8b": llama(
        vocab_size=128256, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_ff=14336,
        rope_theta=500000.0,
    ),
    "llama-3.2-1b": llama(
        vocab_size=128256, block_size=131072, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_ff=8192,
        head_size=64, rope_theta=500000.0, rope_scaling=llama_3_scaling, tie_head=True,
    ),
    "mistral-7b": llama(
        vocab_size=32000, block_size=32768, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_ff=14336,
        windows=(4096,) * 32,
    ),
    "qwen2-0.5b": llama(
        vocab_size=151936, block_size=32768, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_ff=4864,
        rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, tie_head=True,
    ),
    "qwen3-0.6b": llama(
        vocab_size=151936, block_size=40960, n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, n_ff=3072,
        head_size=128, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tie_head=True,
    ),
    "smollm-135m": llama(
        vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_ff=1536, tie_head=True
    ),
    # For two CPU cores: a few million parameters that learn in minutes, and a size for tests.
    "cpu-small": llama(
        vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=256, qk_norm=True, tie_head=True
    ),
    "cpu-tiny": llama(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=32, qk_norm=True, tie_head=True),
}  # fmt: skip
