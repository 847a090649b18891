"""
Evaluation

This file implements measures of a language model on held-out text following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - perplexity, and bits per byte as the
  measure that does not depend on the tokenizer

Each component is explained with paper references for educational purposes.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.token_file import separator, token_bytes

MAX_TOKENS, MAX_LOGITS = 16384, 1 << 28  # at once; 2^28 logits are 1 GiB in float32


@dataclass(frozen=True)
class Score:
    """
    How surprised a model was by a text

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 3.1.
    PAPER CONTEXT: results are given per token (perplexity), per byte or per character, "bits per byte" among them.
    INTUITION: the model bets on every next token; a nat is what it pays for giving the truth 1/e of its belief.
    IMPLEMENTATION: three sums: `nats` over the `tokens` that were predicted, which spell `bytes` of text (a special
        token costs nats and spells none). loss = nats / tokens; perplexity = exp(loss);
        bits per byte = nats / ln 2 / bytes.
    WHY: sums add up over batches, documents and ranks (``a + b``), means do not. Loss and perplexity depend on how
        the tokenizer cuts; bits per byte compare any two models, and a model with ``xz``.

    >>> Score(nats=8 * math.log(2), tokens=2, bytes=4).bits_per_byte
    2.0
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def loss(self):
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self):
        """exp(loss): among how many equally likely tokens the model was torn."""
        return math.exp(min(self.loss, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self):
        """Bits that an ideal coder driven by the model would spend on a byte of text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other):
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


@contextlib.contextmanager
def evaluating(model, dtype=None):
    """Evaluation mode without gradients, autocast to `dtype` if given; yields the model's device."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield device
    finally:
        model.train(training)


def tokens_at_once(model):
    """How many tokens may have logits at a time, so that these stay within a gigabyte."""
    return max(1, min(MAX_TOKENS, MAX_LOGITS // getattr(model.config, "vocab_size", 50257)))


@functools.cache  # the same object every time: a model that was compiled with it is not compiled anew
def in_pieces(loss, size):
    """`loss` (see head.py) for `size` tokens at a time: the same values, without the logits of all of them."""

    def loss_in_pieces(x, weight, targets):
        pieces = zip(x.flatten(0, -2).split(size), targets.flatten().split(size))
        return torch.cat([loss(some, weight, wanted) for some, wanted in pieces]).view(targets.shape)

    return loss_in_pieces


@contextlib.contextmanager
def within_memory(model, n_tokens):
    """Within this block a forward of `n_tokens` never holds more logits than `tokens_at_once` allows."""
    head, size = getattr(model, "head", None), tokens_at_once(model)
    if head is None or n_tokens <= size:
        yield
        return
    loss = head.loss
    head.loss = in_pieces(loss, size)
    try:
        yield
    finally:
        head.loss = loss


def score_batches(model, batches, sizes=None, dtype=None, plan=None):
    """
    The `Score` of a model over batches

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2, equation 1.
    PAPER CONTEXT: the probability of a text is the product of the conditional probabilities of its tokens.
    INTUITION: logarithms turn the product into a bill that is added up, token by token.
    IMPLEMENTATION: ``model(tokens, targets=targets)`` gives nats per token (B, T), in pieces for a batch that exceeds
        `tokens_at_once` (one window of a long context does); summed in float64 on the device and fetched once at the
        end, so that a GPU never waits for the host.
    WHY: one pass serves loss, perplexity and bits per byte.

    Args:
        batches: yields (tokens, targets), int64 (B, T); targets of -100 do not count.
        sizes: bytes of text per token, by id (None: count no bytes).
        dtype: autocast's type, or None.
        plan: ``plan(model, tokens)`` says who attends to whom, as for `NextToken` (None: whole rows).
    """
    with evaluating(model, dtype) as device:
        nats = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        tokens_seen = bytes_seen = 0
        for tokens, targets in batches:
            tokens, wanted = tokens.to(device), targets.to(device)
            with within_memory(model, tokens.numel()):
                losses = model(tokens, targets=wanted) if plan is None else model(tokens, plan(model, tokens), wanted)
            nats += losses.to(nats.dtype).sum()
            counted = targets[targets != IGNORE].numpy()
            tokens_seen += counted.size
            bytes_seen += int(np.take(sizes, counted).sum()) if sizes is not None else 0
    return Score(float(nats), tokens_seen, bytes_seen)


def score(model, data, tokenizer=None, max_tokens=None, batch_size=None, dtype=None, plan=None):
    """The `Score` of a model on held-out tokens, in windows that do not overlap.

    Args:
        model: ``model(tokens, targets=targets)`` gives nats per token; has ``config.block_size``.
        data: a `TokenDataset` (or what has its ``windows``), or the tokens of one text (tensor, array or list).
        tokenizer: counts the bytes of plain tokens (a `TokenDataset` knows its own).
        max_tokens: look at no more, in windows spread evenly over the data.
        batch_size: windows of one forward; by default about `tokens_at_once` tokens.
        plan: who attends to whom, as for `score_batches`.
    """
    known = hasattr(data, "windows")
    block = data.block_size if known else model.config.block_size
    batch_size = batch_size or max(1, tokens_at_once(model) // block)
    if known:
        return score_batches(model, data.windows(batch_size, max_tokens), data.token_bytes, dtype, plan)
    batches = _windows(data, block, batch_size, max_tokens)
    return score_batches(model, batches, None if tokenizer is None else token_bytes(tokenizer), dtype, plan)


def _windows(tokens, block_size, batch_size, max_tokens):
    """Windows of a text's tokens that do not overlap; each target once, the last window filled up with -100."""
    if not isinstance(tokens, torch.Tensor):
        tokens = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    tokens = tokens.cpu().long().reshape(-1)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens have nothing to predict: give at least two")
    tokens = tokens if max_tokens is None else tokens[: max_tokens + 1]
    count = -(-(len(tokens) - 1) // block_size)
    width = min(block_size, len(tokens) - 1)
    x, y = torch.zeros(count * width, dtype=torch.int64), torch.full((count * width,), IGNORE)
    x[: len(tokens) - 1], y[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return zip(x.view(count, width).split(batch_size), y.view(count, width).split(batch_size))


def validation_loss(model, data, max_tokens=None, batch_size=None, dtype=None, plan=None):
    """Nats per token on held-out data; arguments as for `score`."""
    return score(model, data, None, max_tokens, batch_size, dtype, plan).loss


def perplexity(model, data, max_tokens=None, batch_size=None, dtype=None):
    """exp of the nats per token on held-out data; arguments as for `score`."""
    return score(model, data, None, max_tokens, batch_size, dtype).perplexity


def bits_per_byte(model, data, tokenizer=None, max_tokens=None, batch_size=None, dtype=None):
    """Total nats / ln 2 / bytes of the text that was predicted; arguments as for `score`.

    Raises:
        ValueError: plain tokens without a tokenizer, which alone knows their bytes.
    """
    if tokenizer is None and not hasattr(data, "windows"):
        raise ValueError("bits_per_byte of plain tokens needs the tokenizer: it knows how many bytes each stands for")
    return score(model, data, tokenizer, max_tokens, batch_size, dtype).bits_per_byte


def score_text(model, tokenizer, text, stride=None, batch_size=None, dtype=None):
    """
    The `Score` of a model on one text, with sliding windows

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 3.1.
    PAPER CONTEXT: a text longer than the context has to be cut, and how it is cut changes the score.
    INTUITION: a token at the start of a window is guessed nearly blind; let each window begin earlier than what it is
        judged on.
    IMPLEMENTATION: windows of block_size tokens, each `stride` further. The first is judged on all its targets, every
        other on its last `stride` ones: each token once, and so each byte once. The document's mark stands in front,
        so that the first token is predicted, too.
    WHY: ``stride = block_size`` is fastest and harshest; half of it (the default) gives every token at least half the
        context for twice the work.

    Raises:
        ValueError: an empty text, or a stride that is not between 1 and block_size.
    """
    block = model.config.block_size
    stride = max(1, block // 2) if stride is None else stride
    if not 1 <= stride <= block:
        raise ValueError(f"stride={stride} must be at least 1 and at most block_size={block}")
    if not text:
        raise ValueError("the text is empty: there is nothing to predict")
    mark = separator(tokenizer)[-1:]
    tokens = torch.tensor([*mark, *tokenizer.encode(text)], dtype=torch.int64)
    x, y = tokens[:-1], tokens[1:]
    rows_x, rows_y, judged = [], [], 0
    for first in range(0, max(len(x) - block, 0) + stride, stride):
        first = min(first, max(len(x) - block, 0))  # the last window ends with the text
        targets = y[first : first + block].clone()
        targets[: judged - first] = IGNORE  # judged already
        rows_x.append(x[first : first + block])
        rows_y.append(targets)
        judged = min(first + block, len(x))
    batch_size = batch_size or max(1, tokens_at_once(model) // block)
    batches = zip(torch.stack(rows_x).split(batch_size), torch.stack(rows_y).split(batch_size))
    total = score_batches(model, batches, token_bytes(tokenizer), dtype)
    return Score(total.nats, total.tokens, len(text.encode("utf-8", "surrogatepass")))


def bits_per_byte_of_text(model, tokenizer, text, stride=None, batch_size=None, dtype=None):
    """Bits per byte of a text, each byte counted once; see `score_text`."""
    return score_text(model, tokenizer, text, stride, batch_size, dtype).bits_per_byte
