"""
Rivals of generation

This file implements what models of random weights are measured with, and their peers in `transformers`, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - the time of a step depends on shapes, not on values

Only benchmarks and tests use it.

Each component is explained with paper references for educational purposes.
"""

import torch

from phase1_foundation.project3_pretrain.hub import choose_family


class NumberTokenizer:
    """
    A tokenizer for prompts that are numbers already

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: what a step costs follows from batch, length and model alone.
    INTUITION: to time a typist, any letters will do.
    IMPLEMENTATION: one character a token; no token ends a text.
    WHY: random weights write no language, and a `Writer` wants somebody who reads it.
    """

    eot_id = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        """One character a token."""
        return "." * len(ids)


def transformers_model(config, dtype: torch.dtype, device, report):
    """The shape of this ModelConfig in `transformers`, its weights random; None, said in the report, if that is not
    installed."""
    try:
        import transformers
    except ImportError:
        report.skip("against transformers", "transformers is not installed here")
        return None
    transformers.utils.logging.set_verbosity_error()
    theirs = transformers.AutoConfig.for_model(**choose_family(config).write_config(config))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype).eval()
