"""
Limits of a hit

This file implements what a known beginning can save at most, following:
- "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (Gim et al., 2023) - the time to the first token by
  how much of a prompt is known

Each component is explained with paper references for educational purposes.
"""


def reading_flops(model, start: int, stop: int) -> float:
    """Floating-point operations of reading tokens start to stop behind those before, and the logits of one token.

    PAPER: "Prompt Cache: Modular Attention Reuse for Low-Latency Inference", arXiv:2311.04934, section 5.
    PAPER CONTEXT: computing attention states grows faster than linearly with a prompt's length, copying them linearly.
    INTUITION: who has read the first chapters must still keep them in mind for each word of the last one.
    IMPLEMENTATION: two for each weight and token; two each for a key and a value of all that a token sees, 4 H D.
    WHY: with half of a long prompt known, more than half of the work is left: its tokens see the most keys.

    >>> from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
    >>> model = Transformer(PRESETS["cpu-tiny"]())
    >>> parts = reading_flops(model, 0, 8) + reading_flops(model, 8, 20)         # one token's logits are counted twice
    >>> parts - reading_flops(model, 0, 20) == 2 * model.config.n_embd * model.config.vocab_size
    True
    """
    body = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    attention = sum(2 * spec.n_head * (spec.head_size + spec.value_size) for spec in model.specs)
    keys = (stop * (stop + 1) - start * (start + 1)) / 2  # that all of these tokens see together
    return 2 * body * (stop - start) + attention * keys + 2 * model.config.n_embd * model.config.vocab_size
