"""
Minimal GPT

This file implements a GPT-2 style decoder following:
- "Attention Is All You Need" (Vaswani et al., 2017) - the Transformer: multi-head scaled dot-product attention
- "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018) - the decoder-only language model
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2: pre-LN, scaled initialisation
- "Layer Normalization" (Ba et al., 2016) - normalising every position by itself
- "Gaussian Error Linear Units (GELUs)" (Hendrycks & Gimpel, 2016) - the activation of the feed-forward layer
- "Using the Output Embedding to Improve Language Models" (Press & Wolf, 2016) - one matrix for embedding and head
- "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (Srivastava et al., 2014) - regularisation

Each component is explained with paper references for educational purposes.

Names in the state dict (project 3 converts them; i counts the blocks from 0):

    token_embedding.weight (V, C)              position_embedding.weight (block_size, C)
    blocks.i.norm_1.{weight,bias} (C)          blocks.i.norm_2.{weight,bias} (C)
    blocks.i.attention.qkv_proj.weight (3C, C), .bias (3C)      rows: all of q, all of k, all of v
    blocks.i.attention.o_proj.weight (C, C), .bias (C)
    blocks.i.mlp.up_proj.weight (4C, C), .bias (4C)             blocks.i.mlp.down_proj.weight (C, 4C), .bias (C)
    norm.{weight,bias} (C)                     head.weight (V, C), only when the head is not tied
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), table 2 and section 2.3.
    PAPER CONTEXT: GPT-2 scales one architecture by depth and width alone (12 layers of 768 up to 48 of 1600).
    INTUITION: a few integers say everything about the network; the weights fill in the rest.
    IMPLEMENTATION: a frozen dataclass of plain values, so that a checkpoint can store it and `GPT(config)` rebuild it.
    WHY: training, generation and later projects must agree on the shape without sharing a settings file.

    Raises ValueError for shapes that cannot be built.

    >>> GPTConfig(vocab_size=65, n_embd=128, n_head=4).head_size
    32
    """

    vocab_size: int  # V
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 6  # L
    n_head: int = 6  # H
    n_embd: int = 384  # C
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and LayerNorms, as in GPT-2
    tie_head: bool = True  # the head multiplies by the token embedding
    attention: str = "fast"  # "fast": PyTorch's fused kernel; "explicit": the formula, step by step
    gelu: str = "tanh"  # "tanh": GPT-2's approximation; "exact": the definition, 2.6 times as fast on a CPU
    init_std: float = 0.02  # GPT-1's and GPT-2's standard deviation

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            good = max(self.n_embd // self.n_head, 1) * self.n_head
            raise ValueError(
                f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}: use {good} or {good + self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is not known: use one of {sorted(ATTENTION)}")
        if self.gelu not in GELU:
            raise ValueError(f"gelu={self.gelu!r} is not known: use one of {sorted(GELU)}")

    @property
    def head_size(self) -> int:
        """Width of one attention head (D)."""
        return self.n_embd // self.n_head


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal scaled dot-product attention, written as the paper writes it.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, equation 1; the mask: section 3.2.3.
    PAPER CONTEXT: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V; illegal connections are set to -inf.
    INTUITION: each position asks (q), those before it offer a label (k) and content (v); what matches is mixed in.
    IMPLEMENTATION: scores (B, H, T, T), mask, softmax over the keys, weighted sum. Shapes in and out: (B, H, T, D).
    WHY: the reference that `fast_attention` is tested against; it holds T x T scores per head in memory.

    >>> q = k = torch.zeros(1, 1, 3, 1)                              # equal scores: position t averages v[0..t]
    >>> explicit_attention(q, k, torch.tensor([3.0, 5.0, 10.0]).view(1, 1, 3, 1)).flatten().tolist()
    [3.0, 4.0, 6.0]
    """
    T = q.size(-2)
    # Divided by sqrt(D): a dot product of D unit-variance terms has variance D, which would saturate the softmax.
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    # Row t may look at columns 0..t: the model must not see what it is to predict.
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.softmax(scores, dim=-1)
    weights = F.dropout(weights, dropout)
    return weights @ v  # (B, H, T, D)


def fast_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute the same function in one fused kernel that never stores the T x T scores (project 9 builds one)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


ATTENTION: dict[str, Callable[..., Tensor]] = {"explicit": explicit_attention, "fast": fast_attention}
GELU = {"tanh": "tanh", "exact": "none"}  # our names: PyTorch's


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: where positions exchange information.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.2; decoder-only in GPT-1, section 3.1.
    PAPER CONTEXT: MultiHead(x) = Concat(head_1, ..., head_H) W^O with head_i = Attention(x W_i^Q, x W_i^K, x W_i^V).
    INTUITION: one head looks for the speaker's name, another for the last vowel; each works in its own D-wide subspace.
    IMPLEMENTATION: one matrix makes q, k and v of all heads; `config.attention` picks the kernel at construction.
    WHY: H heads of size C/H cost as much as one head of size C, and can attend to H places at once.

    x (B, T, C) -> (B, T, C)
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attend = ATTENTION[config.attention]
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x (B, T, C)."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three times (B, H, T, D)
        heads = self.attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        heads = heads.transpose(1, 2).flatten(-2)  # Concat(head_1, ..., head_H): (B, T, C)
        return self.residual_dropout(self.o_proj(heads))


class FeedForward(nn.Module):
    """The position-wise feed-forward network: where each position thinks for itself.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.3; "Gaussian Error Linear Units (GELUs)",
        arXiv:1606.08415, section 2 (the tanh form, as in GPT-1 and GPT-2).
    PAPER CONTEXT: FFN(x) = max(0, x W1 + b1) W2 + b2, four times as wide inside; GPT replaces the ReLU by a GELU.
    INTUITION: attention gathered the facts; now 4C small detectors fire on patterns, and each writes its answer back.
    IMPLEMENTATION: Linear C -> 4C, GELU, Linear 4C -> C, dropout.
    WHY: the only non-linearity per position, and two thirds of a block's parameters.

    x (B, T, C) -> (B, T, C)
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = nn.GELU(approximate=GELU[config.gelu])
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (B, T, C) alone."""
        return self.residual_dropout(self.down_proj(self.activation(self.up_proj(x))))


class TransformerBlock(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    PAPER: GPT-2, section 2.3 (pre-LN); "Layer Normalization", arXiv:1607.06450, section 3.
    PAPER CONTEXT: the Transformer computes LayerNorm(x + f(x)); GPT-2 moves the norm to the input: x + f(LayerNorm(x)).
    INTUITION: the stream x is a notebook; each sub-layer reads a tidied copy and adds a line, nothing is ever erased.
    IMPLEMENTATION: two residual additions; LayerNorm gives each position mean 0 and variance 1, then gain and bias.
    WHY: gradients reach every layer through the plain additions, so deep stacks train stably from the first step.

    x (B, T, C) -> (B, T, C)
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention and feed-forward have to say to x (B, T, C)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class TiedHead(nn.Module):
    """The output layer that owns no weight: it multiplies by the token embedding.

    PAPER: "Using the Output Embedding to Improve Language Models", arXiv:1608.05859, section 3.
    PAPER CONTEXT: the input embedding and the output projection are both V x C; one matrix for both works as well.
    INTUITION: if two characters mean the same going in, they should be equally likely coming out.
    IMPLEMENTATION: keeps a reference to the embedding outside the module tree, so that no weight is counted twice.
    WHY: saves V*C parameters: a third of GPT-2 small, next to nothing at a vocabulary of 65.

    x (B, T, C) -> logits (B, T, V)
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._embedding = [embedding]  # in a list: not registered, so the state dict names the weight once

    def forward(self, x: Tensor) -> Tensor:
        """Score every token of the vocabulary for each position."""
        return F.linear(x, self._embedding[0].weight)


class GPT(nn.Module):
    """A language model: from tokens to the probability of each next token.

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 3.1; GPT-2, section 2.3.
    PAPER CONTEXT: h_0 = U W_e + W_p; h_l = block(h_{l-1}); P(u) = softmax(h_n W_e^T); GPT-2 adds a final norm.
    INTUITION: every position predicts its successor, so one text of T tokens is T training examples at once.
    IMPLEMENTATION: learned token and position embeddings, L blocks, final norm, head; weights drawn as in GPT-2.
    WHY: predicting the next token needs no labels, and everything in the text helps to do it better.

    >>> model = GPT(GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=2, n_embd=16))
    >>> model(torch.zeros(2, 8, dtype=torch.long)).shape             # logits (B, T, V)
    torch.Size([2, 8, 65])
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = (
            TiedHead(self.token_embedding)
            if config.tie_head
            else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights.

        PAPER: GPT-1, section 4.1 (N(0, 0.02)); GPT-2, section 2.3 (residual layers scaled by 1/sqrt(N)).
        PAPER CONTEXT: GPT-2 scales the weights of residual layers by 1/sqrt(N), N the number of residual layers.
        INTUITION: N independent additions grow the variance of the stream N-fold; 1/sqrt(N) each keeps it level.
        IMPLEMENTATION: N = 2 L, as each block adds twice (`o_proj`, `down_proj`); biases 0; LayerNorm gains 1.
        WHY: at std 0.02 the first logits are near 0, so the first loss must be ln V; more means sure of nonsense.
        """
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # gains of LayerNorm, all biases
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=self.config.init_std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Score the next token at each position, or measure how wrong the scores are.

        PAPER: GPT-1, section 3.1, equation 1.
        PAPER CONTEXT: maximise sum_i log P(u_i | u_{i-k}, ..., u_{i-1}).
        INTUITION: the loss is the surprise per token in nats; exp(loss) is among how many tokens the model wavers.
        IMPLEMENTATION: tokens (B, T) -> logits (B, T, V); with targets (B, T), one token ahead, the mean loss.
        WHY: one forward serves training (loss) and sampling (logits).

        Raises ValueError if T exceeds block_size.
        """
        n_tokens = tokens.size(1)
        if n_tokens > self.config.block_size:
            raise ValueError(
                f"{n_tokens} tokens exceed block_size={self.config.block_size}: pass the last block_size tokens"
            )
        positions = torch.arange(n_tokens, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, C)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits
        # The log-softmax in float32: in bfloat16 it would keep only about 3 digits.
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def n_parameters(self) -> int:
        """Number of trainable values; a tied head adds none."""
        return sum(parameter.numel() for parameter in self.parameters())
