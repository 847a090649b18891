"""
Choosing a draft

This file implements drafts by name following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - the choice of a draft
- "Prompt Lookup Decoding" (Saxena, 2023) - no model at all

Each component is explained with paper references for educational purposes.
"""

import torch

from common import catalog
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase4_advanced_inference.project11_speculative_decoding.drafts import Draft


def draft_of(name: str, tokenizer, device="cpu", dtype: torch.dtype | None = None, graphs: bool = False) -> Draft:
    """A draft from what a user calls it.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, sections 3.5 and 3.6.
    PAPER CONTEXT: any model can be the draft, from a smaller Transformer down to an n-gram that costs nothing.
    INTUITION: whoever can guess may guess.
    IMPLEMENTATION: a name in the catalog's group "drafts" with its options, or what `load` takes for a model, whose
        tokenizer must be the target's.
    WHY: tokens of another tokenizer would be other words.

    Raises ValueError for options that a draft does not take, and for a model with other tokens.
    """
    short, options = catalog.parse(name) if ":" in name and not name.startswith(("/", ".")) else (name, {})
    if short in catalog.GROUPS["drafts"] and short != "model":
        try:
            return catalog.resolve("drafts", short)(**options)
        except TypeError as error:
            raise ValueError(f"draft {name!r}: {error}") from error
    model, own = load(name, device, dtype)
    if own is None or fingerprint_of(own) != fingerprint_of(tokenizer):
        raise ValueError(f"the draft {name} has another tokenizer than its target: train one on the same tokens")
    return catalog.resolve("drafts", "model")(model, graphs=graphs)
