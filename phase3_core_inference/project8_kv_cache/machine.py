"""
Machine

This file implements what every way of writing needs, a model with a cache and what runs their steps, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - prefill and decode over one cache

Each component is explained with paper references for educational purposes.
"""

import operator
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from common import catalog
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.drawing import RecordedDraws, draw_among
from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase3_core_inference.project8_kv_cache.work import octaves, quarter_octaves

Prompt = str | Sequence[int]


class Machine:
    """A model with a cache, ready to run.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: the same weights and one cache serve prefill and decode.
    INTUITION: the kitchen: stove, shelves and recipe book, before anybody decides who is served when.
    IMPLEMENTATION: the cache is built for the model's shape and type; steps are eager, compiled or recorded.
    WHY: `Writer` serves a batch from beginning to end, projects 12 and 13 let requests come and go: same machine.

    Args:
        model, tokenizer: as `load` gives them; n_rows: texts at a time; capacity: tokens of each (None: block_size).
        cache: a name in the catalog's group "caches", or what builds one from (specs, n_rows, capacity, dtype, device).
        compiled, graphs: see `FastDecoder`; replacing parameters afterwards needs a new machine.
    """

    def __init__(
        self,
        model,
        tokenizer,
        n_rows: int = 1,
        capacity: int | None = None,
        cache: str | Callable[..., KVCache] = "contiguous",
        compiled: bool = False,
        graphs: bool = False,
    ):
        if tokenizer is None:
            raise ValueError("this model came without a tokenizer, so there is no text to read or write: add its files")
        self.model, self.tokenizer = model, tokenizer
        # Once: a tokenizer counts its whole vocabulary for it.
        self._vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        build = catalog.resolve("caches", cache) if isinstance(cache, str) else cache
        weight, fast = next(model.parameters()), compiled or graphs
        options = {"padded": True, "round_keys": octaves if compiled else quarter_octaves} if fast else {}
        block_size = model.config.block_size
        self.room = min(capacity or block_size, block_size)  # tokens of a text; kernels like a multiple of 64
        capacity = min(quarter_octaves(self.room), block_size)
        self.cache = build(model.specs, n_rows, capacity, dtype=weight.dtype, device=weight.device, **options)
        self.decoder = FastDecoder(model, self.cache, compiled, graphs) if fast else Decoder(model, self.cache)
        self.among = RecordedDraws() if graphs else draw_among

    @property
    def device(self):
        """Where the weights are."""
        return next(self.model.parameters()).device

    def vocab_size(self) -> int:
        """Ids that both the model and its tokenizer know: either may have more."""
        return self._vocab_size

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; an empty one begins a document.

        Raises ValueError if there is no room to go on, or for ids that are no tokens.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else map(operator.index, plain(prompt))
        tokens = list(tokens) or [getattr(self.tokenizer, "eot_id", None) or 0]
        vocab_size = self.vocab_size()
        if not all_below(vocab_size, tokens):
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise ValueError(f"token id {wrong} is none of this vocabulary, whose ids go from 0 to {vocab_size - 1}")
        if len(tokens) >= self.room:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens leaves no room to go on: capacity={self.room} (at most "
                f"the model's block_size={self.model.config.block_size}): shorten it, or raise the capacity (and the "
                f"memory of the cache)"
            )
        return tokens


def plain(values):
    """Tensors, arrays and their numbers as lists and ints, anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def all_below(limit: int, tokens: Sequence[int]) -> bool:
    """Whether all of these, of which there is one at least, are from 0 to limit - 1.

    A third of the time of `min` and `max`: a prompt of thousands of tokens waits for this before anything else is done.

    >>> all_below(5, [0, 4]), all_below(5, [0, 5]), all_below(5, [-1, 4])
    (True, False, False)
    """
    try:
        return int(np.asarray(array("Q", tokens)).max()) < limit
    except OverflowError:  # below 0, or beyond 64 bits
        return False
