"""
Answering through a cache

This file implements the answers of a chat following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a model that answers
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - each token costs a step, not a forward of the whole

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Generator, Sequence

import torch

from phase2_finetuning.project4_sft.answering import Template, prompt_within
from phase2_finetuning.project4_sft.conversations import Message
from phase3_core_inference.project8_kv_cache.generation import Prefixes, SamplingParams, Writer
from phase3_core_inference.project8_kv_cache.work import octaves


class KeptWriter:
    """One `Writer` for all turns of a conversation; one with more room when a turn needs it.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: a decode step adds one token to each sequence; its memory is the cache, which grows with the context.
    INTUITION: a notebook that lasts for many talks; when it is full, one twice as thick is bought.
    IMPLEMENTATION: room for a power of two of tokens. Step by step on a CPU; on a GPU decode steps are recorded.
    WHY: a recording pays only if later turns replay it; room for all of a long context would take gigabytes.

    Args:
        prefixes: what remembers earlier turns (project 10's PromptCache), also when a bigger writer takes over.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, prefixes: Prefixes | None = None):
        self.model, self.tokenizer, self.prefixes, self._writer = model, tokenizer, prefixes, None

    def with_room(self, n_tokens: int) -> Writer:
        """A writer for a text of so many tokens."""
        if self._writer is None or self._writer.room < min(n_tokens, self.model.config.block_size):
            self._writer = None  # its memory first
            graphs = next(self.model.parameters()).is_cuda
            self._writer = Writer(self.model, self.tokenizer, capacity=octaves(n_tokens), graphs=graphs,
                                  prefixes=self.prefixes)  # fmt: skip
        return self._writer


def answer(
    model: torch.nn.Module,
    template: Template,
    messages: Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
    writer: KeptWriter | None = None,
) -> Generator[str, None, bool]:
    """What the assistant says next, piece by piece: project 4's `answer` with a cache.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.1.
    PAPER CONTEXT: after supervised fine-tuning the model continues a prompt with an answer to it.
    INTUITION: the same play, but the actor no longer reads the script from page one before every word.
    IMPLEMENTATION: a stream up to the template's end tokens or end text; up to half of the context is kept free for the
        answer. The conversation is prefilled anew each turn, unless the writer remembers it (project 10). What writes
        it may be kept: pass the same `writer` each turn.
    WHY: an answer of T tokens costs T steps, not T forwards of everything said so far.

    The generator returns whether the answer is whole (the model ended it itself).
    """
    block_size = model.config.block_size
    prompt = prompt_within(template, messages, block_size - min(max_new_tokens, block_size // 2))
    n_new = max(1, min(max_new_tokens, block_size - len(prompt)))
    params = SamplingParams(
        n_new, temperature, top_k, top_p, seed=seed,
        stop=(template.stop_text,) if template.stop_text else (), stop_ids=template.stop_ids,
    )  # fmt: skip
    writer, reason = writer or KeptWriter(model, template.tokenizer), None
    for piece in writer.with_room(len(prompt) + n_new).stream([prompt], [params]):
        reason = piece.finish_reason
        if piece.text:
            yield piece.text
    return reason == "stop"
