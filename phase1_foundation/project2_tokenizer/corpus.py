"""
Corpus

This file implements reading text for training, and judging a tokenizer by text it was not trained on, following:
- "Pointer Sentinel Mixture Models" (Merity et al., 2016) - WikiText, the corpus split by articles
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - rules on one vocabulary

Each component is explained with paper references for educational purposes.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from phase1_foundation.project2_tokenizer.bytes_alphabet import encode_utf8
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

HOLD_OUT_EVERY = 20
MAX_HELD_OUT_BYTES = 20_000_000


class Corpus:
    """
    The documents of a file for training; every twentieth is kept aside in `held_out`.

    PAPER: arXiv:1609.07843, section 4.3 (WikiText is split by whole articles).
    PAPER CONTEXT: Training and test text must not share documents.
    INTUITION: A tokenizer praised for text it has seen proves nothing.
    IMPLEMENTATION: Iterate it once; `bytes` counts the text handed out. Stops after `max_bytes`.
    WHY: One pass over the file serves training and judging.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None):
        self.path, self.max_bytes = Path(path), max_bytes
        self.bytes, self.held_out, self._held_out_bytes = 0, [], 0

    @property
    def expected_bytes(self) -> int | None:
        """About how many bytes there will be; None for a compressed file, whose size says little."""
        size = self.path.stat().st_size if self.path.suffix in (".txt", ".jsonl") else self.max_bytes
        return min(size, self.max_bytes or size) if size else None

    def __iter__(self) -> Iterator[str]:
        from common.download import read_documents

        for number, text in enumerate(read_documents(self.path), 1):
            size = len(encode_utf8(text))
            if number % HOLD_OUT_EVERY == 0 and self._held_out_bytes < MAX_HELD_OUT_BYTES:
                self.held_out.append(text)
                self._held_out_bytes += size
                continue
            self.bytes += size
            yield text
            if self.max_bytes and self.bytes >= self.max_bytes:
                return


def compare_rules(tokenizer: BPETokenizer, texts: list[str]) -> dict[str, dict[str, float]]:
    """
    Both encoding rules on the same vocabulary and the same texts.

    PAPER: arXiv:2403.01289, section 4.
    PAPER CONTEXT: Inference methods are compared with the vocabulary fixed.
    INTUITION: Fewer tokens for the same text means longer context and less work for the model.
    IMPLEMENTATION: For each rule: `bytes_per_token`, `tokens_per_byte`, `megabytes_per_second` (one thread, cold cache)
        and `round_trips`, the share of documents that decode to themselves.
    WHY: The rule is a choice, so it should be made by looking.
    """
    total = sum(len(encode_utf8(text)) for text in texts)
    figures = {}
    for rule in RULES:
        candidate = tokenizer.with_rule(rule)
        candidate.encode("x")  # compile, build the tables
        began = time.perf_counter()
        encoded = candidate.encode_batch(texts, num_threads=1)
        seconds = time.perf_counter() - began
        tokens = max(1, sum(len(ids) for ids in encoded))
        same = sum(candidate.decode(ids) == text for ids, text in zip(encoded, texts))
        figures[rule] = {
            "bytes_per_token": total / tokens,
            "tokens_per_byte": tokens / max(1, total),
            "megabytes_per_second": total / seconds / 1e6,
            "round_trips": same / max(1, len(texts)),
        }
    return figures
