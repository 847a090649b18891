"""
Growing a vocabulary

This file implements adding tokens to a tokenizer and rows to a model, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - chat on a base model
- "Using the Output Embedding to Improve Language Models" (Press & Wolf, 2016) - one matrix may be both tables

Each component is explained with paper references for educational purposes.
"""

import dataclasses

import torch
from torch import nn

from phase1_foundation.project2_tokenizer.bytes_alphabet import to_printable
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.token_file import END_OF_TEXT
from phase2_finetuning.project4_sft.template import CHAT_TOKENS


def byte_tokenizer() -> BPETokenizer:
    """A tokenizer without merges, one token a byte, for examples and tests."""
    return BPETokenizer({to_printable(bytes([i])): i for i in range(256)}, [], {END_OF_TEXT: 256}, rule="merges")


def with_chat_tokens(tokenizer: BPETokenizer) -> BPETokenizer:
    """The tokenizer with the special tokens of chats behind its own; itself where it has them already.

    Raises ValueError for a tokenizer that cannot be extended (a character or foreign one).
    """
    known = getattr(tokenizer, "special_tokens", {})  # a tokenizer of characters has none
    missing = [name for name in CHAT_TOKENS if name not in known]
    if getattr(tokenizer, "eot_id", None) is None and END_OF_TEXT not in known:
        missing.insert(0, END_OF_TEXT)
    if not missing:
        return tokenizer
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} lacks {', '.join(missing)} and cannot be extended: take a model with a "
            f"byte-level BPE tokenizer"
        )
    fields, first = tokenizer.to_dict(), tokenizer.vocab_size
    fields["special_tokens"] = fields["special_tokens"] | {name: first + i for i, name in enumerate(missing)}
    return BPETokenizer.from_dict(fields)


def without_chat_tokens(tokenizer):
    """The tokenizer as it was before `with_chat_tokens`; one that is not ours as it is.

    >>> without_chat_tokens(with_chat_tokens(byte_tokenizer())).special_tokens
    {'<|endoftext|>': 256}
    """
    if not isinstance(tokenizer, BPETokenizer):
        return tokenizer
    fields = tokenizer.to_dict()
    for table in ("vocab", "special_tokens"):
        fields[table] = {name: i for name, i in fields[table].items() if name not in CHAT_TOKENS}
    return BPETokenizer.from_dict(fields)


@torch.no_grad()
def grow_vocabulary(model: nn.Module, old: int, new: int, multiple: int = 64) -> None:
    """Make `model` ready for token ids from `old` to below `new`, in place.

    PAPER: "Using the Output Embedding to Improve Language Models", arXiv:1608.05859, section 3 (the tied table).
    PAPER CONTEXT: rows of the embedding are what a token means going in, rows of the head what it means coming out.
    INTUITION: a newcomer is taken for an average member of the club until it has made a name for itself.
    IMPLEMENTATION: new rows are the mean of the `old` ones plus noise of a hundredth of their spread. Padding rows are
        used first; a table that is too small is replaced by one with a multiple of `multiple` rows, padded with means,
        too: a row of zeros has the logit 0, which can lie far above all others.
    WHY: rows that pre-training padded with have been pushed far away: the first steps would be spent on fetching them.

    Call it before the optimizer is built, which holds the old tables.
    """
    if new <= old:
        return
    rows = max(model.config.vocab_size, -(-new // multiple) * multiple)
    model.embed.tokens.weight = _grown(model.embed.tokens.weight, old, new, rows)
    model.embed.tokens.num_embeddings = rows
    if not model.config.tie_head:
        model.head.weight = _grown(model.head.weight, old, new, rows)
    model.config = dataclasses.replace(model.config, vocab_size=rows)


def _grown(table: nn.Parameter, old: int, new: int, rows: int) -> nn.Parameter:
    """A table of `rows` rows: the first `old` and all other padding as they were, the rest like the mean of `old`."""
    known = table[:old].float()
    noise = torch.randn(rows - old, table.shape[1], generator=torch.Generator().manual_seed(old)).to(table.device)
    grown = torch.cat([table[:old], (known.mean(0) + 0.01 * known.std() * noise).to(table.dtype)])
    grown[new : len(table)] = table[new:]
    return nn.Parameter(grown, requires_grad=table.requires_grad)
