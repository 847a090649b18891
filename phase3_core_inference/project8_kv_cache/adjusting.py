"""
Adjusting

This file implements penalties and biases, which move logits before a token is drawn, following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - why texts must be kept from repetition

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens that occurred less likely: logits (R, V), seen (R, V) bool, penalty (R, 1).

    >>> penalize(torch.tensor([[3.0, -3.0, 3.0]]), torch.tensor([[True, True, False]]), torch.tensor([[1.5]])).tolist()
    [[2.0, -4.5, 3.0]]
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Adjustments:
    """Penalties and biases of a batch of requests, each with its own.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 4.3; the penalties are practice.
    PAPER CONTEXT: likely texts repeat themselves, and each repetition makes the next one likelier.
    INTUITION: an editor's list: words that were used already, how often, and words that the customer wants or bans.
    IMPLEMENTATION: counts of written tokens, (rows, V) on the device, and which ones the prompt had; both are made when
        somebody asks for a penalty. Repetition counts the prompt as well; presence and frequency, as in OpenAI's
        interface, what was written alone.
    WHY: nothing here waits for the device, so that a step may be launched before the last one is over.

    Args:
        n_rows: requests at a time; vocab_size: of the tokenizer.
    """

    def __init__(self, n_rows: int, vocab_size: int, device):
        self.n_rows, self.vocab_size, self.device = n_rows, vocab_size, torch.device(device)
        self.written: Tensor | None = None  # (rows, V): how often each token was drawn
        self.prompted: Tensor | None = None  # (rows, V): whether the prompt has it
        self.bias: Tensor | None = None  # (rows, V)
        self._asking: set[int] = set()  # rows whose requests want something of it
        self.penalties = torch.tensor([[1.0, 0.0, 0.0]] * n_rows, device=device)  # repetition, presence, frequency

    @property
    def idle(self) -> bool:
        """Whether nobody who has a row asks for anything."""
        return not self._asking

    def put(self, row: int, params: SamplingParams, prompt: Sequence[int], written: Sequence[int] = ()) -> None:
        """Give a row to a request, of whose text so much was asked, and so much was written."""
        (self._asking.add if params.penalized or params.logit_bias else self._asking.discard)(row)
        if params.penalized and self.written is None:
            self.written = torch.zeros(self.n_rows, self.vocab_size, dtype=torch.int32, device=self.device)
            self.prompted = torch.zeros_like(self.written, dtype=torch.bool)
        if self.written is not None:
            self.penalties[row] = on_device(params.penalties, self.device, np.float32)
            self.written[row], self.prompted[row] = 0, False
        if params.penalized:
            self.prompted[row].index_fill_(0, on_device(prompt, self.device), True)
            tokens = on_device(written, self.device)
            self.written[row].index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        if params.logit_bias and self.bias is None:
            self.bias = torch.zeros(self.n_rows, self.vocab_size, device=self.device)
        if self.bias is not None:
            self.bias[row] = 0.0
        if params.logit_bias:
            values = on_device(list(params.logit_bias.values()), self.device, np.float32)
            self.bias[row].index_copy_(0, on_device(list(params.logit_bias), self.device), values)

    def apply(self, logits: Tensor, index: slice | Tensor, drafted: Tensor | None = None) -> Tensor:
        """Logits (R, V) of the rows that `index` picks, adjusted.

        drafted: (R, j), tokens that a draft puts behind each text, which count as written; V stands for none.
        """
        if self.written is not None:
            counts = self.written[index]
            if drafted is not None and drafted.shape[-1]:
                one = torch.ones_like(drafted, dtype=torch.int32)
                counts = F.pad(counts, (0, 1)).scatter_add(-1, drafted, one)[:, :-1]
            repetition, presence, frequency = self.penalties[index].split(1, dim=-1)
            logits = penalize(logits, self.prompted[index] | (counts > 0), repetition)
            logits = logits - presence * (counts > 0) - frequency * counts
        return logits if self.bias is None else logits + self.bias[index]

    def remember(self, rows: Tensor, tokens: Tensor) -> None:
        """Count tokens (R,) that became part of these texts; -1 is none."""
        if self.written is not None:
            known = (tokens >= 0).to(torch.int32)
            self.written.index_put_((rows, tokens.clamp(min=0)), known, accumulate=True)


def bytes_of_adjustments(n_rows: int, vocab_size: int) -> int:
    """What the tables of all rows take once penalties and biases are asked for."""
    return n_rows * vocab_size * (4 + 1 + 4)
