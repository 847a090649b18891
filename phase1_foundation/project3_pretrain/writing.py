"""
Writing text

This file implements samples of a model as text following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - continuing a prompt, top-k sampling

Each component is explained with paper references for educational purposes.
"""

import torch
from torch import nn

from phase1_foundation.project1_minimal_gpt.sampling import generate


class KnownTokens(nn.Module):
    """
    A model whose logits end where the tokenizer's vocabulary does

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.3 (50,257 tokens).
    PAPER CONTEXT: the vocabulary's size is what the tokenizer needs, not what hardware likes.
    INTUITION: seats that were only built to fill the row are not for sale.
    IMPLEMENTATION: tokens (B, T) -> logits (B, T, vocab_size), for `generate` and `stream`.
    WHY: vocabularies are padded to a multiple of 64 for fast products; the padding must never be drawn.
    """

    def __init__(self, model, vocab_size):
        super().__init__()
        self.model, self.config, self.vocab_size = model, model.config, vocab_size

    def forward(self, tokens):
        """Tokens (B, T) -> logits (B, T, vocab_size)."""
        return self.model(tokens)[..., : self.vocab_size]


def write(model, tokenizer, prompt, max_new_tokens, temperature=0.8, top_k=50, seed=0):
    """
    Continue a prompt

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 3.6: top-k sampling.
    PAPER CONTEXT: drawing from the k most likely tokens avoids both the rambling tail and the loops of greedy search.
    INTUITION: let it talk, and see what it has learned.
    IMPLEMENTATION: project 1's `generate`, uncached, by an uncompiled model, since every length would be compiled anew.
        An empty prompt begins a document, at <|endoftext|>.
    WHY: a glance at a sample finds what no loss shows: broken words, wrong tokenizers, loops.

    Returns:
        The prompt and its continuation, as text.
    """
    device = next(model.parameters()).device
    start = tokenizer.encode(prompt) or [getattr(tokenizer, "eot_id", None) or 0]
    tokens = torch.tensor([start], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        known = KnownTokens(model, tokenizer.vocab_size)
        out = generate(known, tokens, max_new_tokens, temperature=temperature, top_k=top_k, generator=generator)
    model.train(training)
    return tokenizer.decode(out[0, len(start) :].tolist() if not prompt else out[0].tolist())
