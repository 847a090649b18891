"""
Prompt cache

This file implements a writer's memory of what it has read and written, following:
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - reuse across requests
- "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (Gim et al., 2023) - states that are stored

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase4_advanced_inference.project10_prompt_caching.prefix_cache import RadixCache
from phase4_advanced_inference.project10_prompt_caching.segments import (
    Segment,
    fingerprint,
    read_segment,
    write_segment,
)


class PromptCache:
    """
    Keys and values of past texts, for a `Writer`: `Writer(..., prefixes=PromptCache(2**30))`

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: prompts share system prompts, examples and past turns; their keys and values are reused.
    INTUITION: who has read the book already only reads the new question.
    IMPLEMENTATION: before a prompt is read, what is known of its beginning is copied into its row, all but the last
        token, which has to be computed for its logits. When a text ends, what is new of it is copied out.
    WHY: the next turn of a chat then costs what was added to it. One copy each way is cheap beside a forward.

    Args:
        budget: bytes for keys and values (beside the cache itself); None: no limit.

    One for each model: what another model computed would be wrong, and nothing here could tell.
    """

    def __init__(self, budget: int | None = None):
        self.tree = RadixCache(budget)

    @property
    def statistics(self):
        """Exact counts of tokens asked for, found, inserted and evicted."""
        return self.tree.statistics

    def restore(self, cache: KVCache, row: int, tokens: Sequence[int]) -> int:
        """Append what is known of a text to an empty row; returns how many tokens, at most all but the last."""
        with self.tree.match(tokens[:-1]) as match:
            for segment, n in match.parts:
                cache.append_tokens(row, segment.first(n))
            return match.length

    def keep(self, cache: KVCache, row: int, tokens: Sequence[int]) -> None:
        """Remember a text whose keys and values are in this row."""
        self.tree.insert(tokens, lambda start, stop: Segment(cache.read_tokens(row, start, stop)))

    def save(self, folder: str | Path, model: nn.Module) -> int:
        """Write what is remembered to a folder, a file for each segment; returns how many files there are."""
        owner = fingerprint(model)
        return len([write_segment(Path(folder), text, segment, owner) for text, segment in self.tree.spans()])

    def load(self, folder: str | Path, model: nn.Module) -> int:
        """Remember what a folder holds, as far as the budget allows; returns how many tokens are new.

        Raises ValueError for a damaged file, or one of another model; then nothing of the folder is used.
        """
        owner, device = fingerprint(model), next(model.parameters()).device
        found = [read_segment(path, owner, device) for path in sorted(Path(folder).glob("*.safetensors"))]
        new = 0
        for text, segment in sorted(found, key=lambda pair: len(pair[0])):
            start = len(text) - len(segment)
            if self.tree.known(text) == start:  # what it continues is there, and it is not
                new += self.tree.insert(text, lambda *_, segment=segment: segment)
        return new


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
