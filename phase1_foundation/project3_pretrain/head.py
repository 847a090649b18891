"""
Head

This file implements the output layer and its loss following:
- "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018) - the language-model objective
- "Using the Output Embedding to Improve Language Models" (Press & Wolf, 2016) - the tied head
- "Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016) - recomputing instead of storing
- "Liger Kernel: Efficient Triton Kernels for LLM Training" (Hsu et al., 2024) - projection and cross-entropy in chunks

Each component is explained with paper references for educational purposes.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.positions import draw

IGNORE = -100  # a target that costs nothing and does not count; whoever masks targets imports it from here

# loss(x (..., C), weight (V, C), targets (...)) -> nats per token (...), float32
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The surprise at each target, in nats: -log softmax(x W^T)[target].

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 3.1, equations 1 and 2.
    PAPER CONTEXT: maximise sum_i log P(u_i | u_1 ... u_{i-1}), P = softmax(h W_e^T).
    INTUITION: how many nats the model would have paid to be told the true next token.
    IMPLEMENTATION: all logits at once, softmax in float32. A target of -100 gives 0.
    WHY: per token, not averaged, so that the objective may weigh (masks, several devices) as it must.

    x (..., C), weight (V, C), targets (...) -> (...) float32

    >>> plain_nll(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100])).tolist()   # ln 4, ignored
    [1.3862943649291992, 0.0]
    """
    logits = F.linear(x, weight).float()  # (..., V)
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(targets.shape)


class _ChunkedNLL(torch.autograd.Function):
    """Forward and backward of `chunked_nll`, by hand."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, chunk):
        """x (N, C), weight (V, C), targets (N,) -> nll (N,)."""
        w, log_z, picked = weight.to(dtype), [], []
        for x_c, target_c in zip(x.split(chunk), targets.split(chunk), strict=True):
            logits = (x_c.to(dtype) @ w.T).float()  # (chunk, V): the only logits alive
            log_z.append(logits.logsumexp(dim=-1))
            picked.append(logits.gather(-1, target_c.clamp(min=0).unsqueeze(-1)).squeeze(-1))
        log_z = torch.cat(log_z)
        ctx.save_for_backward(x, weight, targets, log_z)
        ctx.dtype, ctx.chunk = dtype, chunk
        return torch.where(targets == IGNORE, 0.0, log_z - torch.cat(picked))

    @staticmethod
    def backward(ctx, grad):
        """d nll / d logits = softmax - one_hot(target), row by row times the incoming gradient."""
        x, weight, targets, log_z = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]  # else it is frozen, under adapters
        w, grad_weight, grad_x = weight.to(ctx.dtype), weight.new_zeros(weight.shape if trained else 0).float(), []
        grad = torch.where(targets == IGNORE, 0.0, grad)
        parts = (tensor.split(ctx.chunk) for tensor in (x, targets, log_z, grad))
        for x_c, target_c, log_z_c, grad_c in zip(*parts, strict=True):
            x_c = x_c.to(ctx.dtype)
            p = ((x_c @ w.T).float() - log_z_c.unsqueeze(-1)).exp()  # recomputed softmax (chunk, V)
            p = p.scatter_add(-1, target_c.clamp(min=0).unsqueeze(-1), torch.full_like(p[:, :1], -1.0))
            d_logits = (p * grad_c.unsqueeze(-1)).to(ctx.dtype)
            grad_x.append((d_logits @ w).to(x.dtype))
            if trained:
                grad_weight += d_logits.T @ x_c
        return torch.cat(grad_x), grad_weight.to(weight.dtype) if trained else None, None, None, None


def chunked_nll(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096) -> Tensor:
    """`plain_nll` without ever holding all logits.

    PAPER: "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 3; chunks as in "Liger Kernel:
        Efficient Triton Kernels for LLM Training", arXiv:2410.10989, section 3.2 (fused linear cross entropy).
    PAPER CONTEXT: drop results that are cheap to recompute, and compute them again in the backward pass.
    INTUITION: 64k tokens times 50k words is a huge sheet of numbers of which one per row matters: use a strip, wipe it.
    IMPLEMENTATION: `chunk` tokens at a time; forward keeps log-sum-exp per token, backward recomputes the strip's
        softmax. The weight's gradient is summed in float32.
    WHY: memory chunk x V instead of N x V, for one more matrix product.

    Same shapes and values as `plain_nll`; under autocast the products run in autocast's dtype.
    """
    flat = x.flatten(0, -2)
    nll = _ChunkedNLL.apply(flat, weight, targets.flatten(), autocast_dtype(x), chunk)
    return nll.view(targets.shape)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x runs here: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def use_chunked_loss(model, chunk: int = 4096):
    """Give `model` the chunked loss; raises ValueError if `chunk` is below 1."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: so many tokens have logits at a time, such as 4096")
    return model.use_loss(functools.partial(chunked_nll, chunk=chunk))


class Head(nn.Module):
    """Scores every token of the vocabulary, or measures the surprise at given ones.

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 3.1, equation 2.
    PAPER CONTEXT: P(u) = softmax(h_n W^T).
    INTUITION: a dot product with each word's own direction: the word that points the same way wins.
    IMPLEMENTATION: one matrix (V, C) without bias; `loss` is chosen once (`Transformer.use_loss`).
    WHY: whoever needs only the loss need not see the logits, so the loss may be chunked, fused or sharded.
    """

    def __init__(self, config, embed: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        draw(self.weight)
        self.loss: Loss = plain_nll

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V)."""
        return F.linear(x, self.weight)

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (..., C), targets (...) -> nats per token (...), float32; 0 where the target is -100."""
        return self.loss(x, self.weight, targets)


class TiedHead(Head):
    """The head that owns no parameter: it multiplies by the token embedding.

    PAPER: "Using the Output Embedding to Improve Language Models", arXiv:1608.05859, section 3.
    PAPER CONTEXT: input embedding and output projection are both V x C; one matrix serves both as well.
    INTUITION: words that mean the same going in should be equally likely coming out.
    IMPLEMENTATION: a reference outside the module tree, so that the state dict names the weight once.
    WHY: saves V C parameters: a third of GPT-2 124M.
    """

    def __init__(self, config, embed: nn.Module):
        nn.Module.__init__(self)
        self._tied = (embed,)  # in a tuple: not registered as a child
        self.loss: Loss = plain_nll

    @property
    def weight(self) -> Tensor:
        """The token embedding's matrix, wherever it is by now."""
        return self._tied[0].tokens.weight


HEADS = {True: TiedHead, False: Head}  # by config.tie_head
