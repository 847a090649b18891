"""
GGUF export

This file implements writing the file format of llama.cpp; the architectures follow:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2
- "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023) - Llama, and what followed its shape
- "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021) - which channels RoPE pairs

Each component is explained with paper references for educational purposes.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import atomic_path
from phase1_foundation.project2_tokenizer.patterns import GPT2, GPT2_DIGITS, GPT4, GPT4_DIGITS
from phase1_foundation.project3_pretrain.hub_mapping import FAMILIES, plain_state
from phase1_foundation.project3_pretrain.model import ModelConfig
from phase1_foundation.project3_pretrain.positions import rope_frequencies

# torch's dtype -> llama.cpp's "file type"; vectors are float32 in both.
FILE_TYPES = {torch.float32: 0, torch.float16: 1}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
PRE_TOKENIZERS = {GPT2: "gpt-2", GPT2_DIGITS: "smollm", GPT4: "llama-bpe", GPT4_DIGITS: "qwen2"}

# ours -> theirs; {i} is the layer. Endings (.weight, .bias) are the same.
TENSORS = {
    "embed.tokens": "token_embd",
    "embed.positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "blocks.{i}.norm_1": "blk.{i}.attn_norm",
    "blocks.{i}.attention.q_proj": "blk.{i}.attn_q",
    "blocks.{i}.attention.k_proj": "blk.{i}.attn_k",
    "blocks.{i}.attention.v_proj": "blk.{i}.attn_v",
    "blocks.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attention.o_proj": "blk.{i}.attn_output",
    "blocks.{i}.norm_2": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "blocks.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "blocks.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}
# our family -> llama.cpp's architecture
ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def to_gguf(
    model: nn.Module,
    tokenizer,
    path,
    dtype: torch.dtype = torch.float16,
    chat_template: str | None = None,
    end_of_turn: int | None = None,
) -> Path:
    """Write `model` and its tokenizer as one GGUF file, which llama.cpp and what is built on it run.

    PAPER: "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971, section 2.2; RoPE:
        arXiv:2104.09864, section 3.2.2.
    PAPER CONTEXT: RoPE turns neighbouring channels; Hugging Face and this project pair channel i with i + D/2 instead.
    INTUITION: one suitcase with everything: the shape, the weights, the vocabulary and its merges.
    IMPLEMENTATION: names by table; for "llama" the rows of queries and keys return to the paper's order (`interleave`),
        for "gpt2" queries, keys and values become one tensor. Matrices as `dtype`, vectors in float32.
    WHY: runs on laptops and phones without Python.

    Args:
        model: a `Transformer`; layers that were swapped are exported as their `to_linear()`.
        tokenizer: a byte-level BPE tokenizer with the rule "merges", or None for a file without a vocabulary.
        path: the .gguf file; dtype: torch.float16 or torch.float32.
        chat_template, end_of_turn: of a model that chats, its template in Jinja and the token that ends an answer.

    Raises ValueError for what llama.cpp cannot express, ImportError without the library `gguf`.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ImportError("writing GGUF needs the library `gguf`: uv sync --group bench") from error
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype={dtype} is not written: use torch.float16 or torch.float32")
    architecture = choose_architecture(model.config)
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_name(Path(path).stem)
        writer.add_file_type(FILE_TYPES[dtype])
        add_shape(writer, architecture, model.config)
        add_tokenizer(writer, tokenizer, model.config.vocab_size)
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        if end_of_turn is not None:
            writer.add_eot_token_id(end_of_turn)
        for name, tensor in gguf_tensors(architecture, model):
            kept = dtype if tensor.dim() > 1 else torch.float32
            writer.add_tensor(name, tensor.to("cpu", kept).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


def choose_architecture(config: ModelConfig) -> str:
    """The llama.cpp architecture that computes this shape; raises ValueError if none does."""
    fits = [theirs for ours, theirs in ARCHITECTURES.items() if not FAMILIES[ours].inexpressible(config)]
    if not fits:
        losses = {theirs: FAMILIES[ours].inexpressible(config) for ours, theirs in ARCHITECTURES.items()}
        reasons = "; ".join(
            f"{kind} lacks {', '.join(f'{k}={v}' for k, v in loss.items())}" for kind, loss in losses.items()
        )
        raise ValueError(f"llama.cpp has no architecture for this model: {reasons}")
    limits = {
        "a sliding window": config.windows is not None,
        f"mlp={config.mlp!r} with gpt2": fits[0] == "gpt2" and config.mlp != "gelu",
        f"rope_scaling 'llama3' with {fits[0]}": fits[0] != "llama" and _scaling_kind(config) == "llama3",
    }
    broken = [limit for limit, applies in limits.items() if applies]
    if broken:
        raise ValueError(
            f"llama.cpp's {fits[0]} cannot express {', '.join(broken)}: export to Hugging Face's format instead"
        )
    return fits[0]


def add_shape(writer, architecture: str, config: ModelConfig) -> None:
    """Write the numbers of the configuration."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    if _scaling_kind(config) == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])


def add_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Write vocabulary, merges and special tokens; a vocabulary smaller than the model's is filled up."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if getattr(tokenizer, "rule", None) != "merges" or tokenizer.pattern not in PRE_TOKENIZERS:
        raise ValueError(
            "llama.cpp encodes byte-level BPE by merge order, cut by the pattern of GPT-2 or GPT-4: this tokenizer "
            "does not; train one with the rule 'merges', or pass tokenizer=None"
        )
    names = {i: name for name, i in tokenizer.vocab.items()} | {i: name for name, i in tokenizer.special_tokens.items()}
    kinds = [NORMAL if i in names else UNUSED for i in range(vocab_size)]
    for name, i in tokenizer.special_tokens.items():
        kinds[i] = USER_DEFINED if name in tokenizer.always_matched else CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[tokenizer.pattern])
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_add_bos_token(False)
    if tokenizer.eot_id is not None:
        writer.add_bos_token_id(tokenizer.eot_id)
        writer.add_eos_token_id(tokenizer.eot_id)


def gguf_tensors(architecture: str, model: nn.Module):
    """Yield (name, tensor) in llama.cpp's names and layout."""
    config, state = model.config, plain_state(model)
    if architecture == "gpt2":  # one tensor for queries, keys and values
        for i in range(config.n_layer):
            for end in ("weight", "bias"):
                parts = [state.pop(f"blocks.{i}.attention.{letter}_proj.{end}") for letter in "qkv"]
                yield f"blk.{i}.attn_qkv.{end}", torch.cat(parts)
    for name, tensor in state.items():
        module, end = name.rsplit(".", 1)
        layer = module.split(".")[1] if module.startswith("blocks.") else ""
        key = module.replace(f"blocks.{layer}.", "blocks.{i}.")
        if key not in TENSORS:
            raise ValueError(
                f"the tensor {name} has no place in a GGUF file: merge or undo what changed the model first"
            )
        if architecture == "llama" and module.endswith((".q_proj", ".k_proj")):
            tensor = interleave(tensor, config.head_size)
        yield f"{TENSORS[key].format(i=layer)}.{end}", tensor
    if _scaling_kind(config) == "llama3":  # llama.cpp divides the plain frequencies by these
        plain = rope_frequencies(config.head_size, config.rope_theta)
        yield "rope_freqs.weight", plain / rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)


def interleave(tensor: Tensor, head_size: int) -> Tensor:
    """Rows of each head from (0, D/2, 1, D/2 + 1, ...) as we pair them to neighbours, as the paper pairs them.

    >>> interleave(torch.arange(4), head_size=4).tolist()          # pairs (0, 2) and (1, 3) become neighbours
    [0, 2, 1, 3]
    """
    heads = tensor.unflatten(0, (-1, 2, head_size // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def _scaling_kind(config: ModelConfig) -> str | None:
    return config.rope_scaling["kind"] if config.rope_scaling else None
