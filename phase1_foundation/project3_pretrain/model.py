"""
Transformer

This file implements the decoder of every later project following:
- "Attention Is All You Need" (Vaswani et al., 2017) - the Transformer
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2: pre-norm decoder, initialisation
- "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023) - RMSNorm, SwiGLU, RoPE together
- "Using the Output Embedding to Improve Language Models" (Press & Wolf, 2016) - the tied head

Each component is explained with paper references for educational purposes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.head import HEADS, Loss, autocast_dtype
from phase1_foundation.project3_pretrain.layers import MLPS, NORMS, Attention, Block
from phase1_foundation.project3_pretrain.model_config import ModelConfig
from phase1_foundation.project3_pretrain.plans import Causal, Kernel, LayerSpec, Plan, sdpa
from phase1_foundation.project3_pretrain.positions import INIT_STD, POSITIONS, draw
from phase1_foundation.project3_pretrain.presets import PRESETS

__all__ = ["PRESETS", "Auxiliary", "Embedding", "ModelConfig", "Transformer"]


class Auxiliary(Protocol):
    """A module that adds a term of its own to the loss (a router's balance, say)."""

    def auxiliary_losses(self) -> Tensor:
        """The term of the last forward, already weighted."""
        ...


class Embedding(nn.Module):
    """From tokens and positions to the residual stream.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3; GPT-1, section 3.1, equation 2.
    PAPER CONTEXT: h_0 = U W_e + W_p.
    INTUITION: look the word up in a dictionary of vectors, and stamp the seat number on it (unless RoPE does, later).
    IMPLEMENTATION: table (V, C), the position scheme, dropout; then the dtype that `stream` chooses for the stream.
    WHY: under autocast a float32 lookup would keep the stream in float32, twice the bytes of every addition and norm.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        weight = torch.empty(config.vocab_size, config.n_embd)  # drawn by Transformer.initialise
        self.tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.positions = POSITIONS[config.positions].embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.stream: Callable[[Tensor], torch.dtype] = autocast_dtype

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (...), positions (...) -> x (..., C)."""
        x = self.dropout(self.positions(self.tokens(tokens), positions))
        return x.to(self.stream(x))


class Transformer(nn.Module):
    """The decoder: GPT-2, Llama, Mistral, Qwen2/3 and SmolLM by configuration.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3; decoder-only and pre-norm as GPT-2, section 2.3;
        RMSNorm, SwiGLU, RoPE: "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971, section 2.2.
    PAPER CONTEXT: embed, L blocks of attention and feed-forward, final norm, project onto the vocabulary.
    INTUITION: every token enters as a word and leaves as a guess at the next; the blocks let it look around on the way.
    IMPLEMENTATION: parts are chosen at construction; who sees whom is asked of a plan (plans.py). `embed`, `blocks`,
        `norm` and `head` are public: pipelines, early exit and distillation write their own walk over them.
    WHY: one model for thirty projects: what they change enters by construction, by a plan, or by swapping modules.

    Args:
        config: the shape.
        attention, mlp: classes to build instead of the configured ones, called with (config, layer, rotation) and
            (config, layer); an attention has a `spec`.

    >>> model = Transformer(PRESETS["cpu-tiny"]())
    >>> tokens = torch.zeros(2, 5, dtype=torch.long)
    >>> model(tokens).shape, model(tokens, targets=tokens).shape    # logits (B, T, V), loss per token (B, T)
    (torch.Size([2, 5, 256]), torch.Size([2, 5]))
    """

    def __init__(self, config: ModelConfig, attention: type = Attention, mlp: type | None = None):
        super().__init__()
        self.config = config
        self.recipe: list = []  # what common.catalog.apply did to this model
        self.kernel: Kernel = sdpa
        rotation = POSITIONS[config.positions].rotation(config)  # one table, shared by all layers
        mlp = mlp or MLPS[config.mlp]
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, i, rotation, attention, mlp) for i in range(config.n_layer))
        self.norm = NORMS[config.norm](config.n_embd, config.norm_eps, config.norm_bias)
        self.head = HEADS[config.tie_head](config, self.embed)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights of all linear layers and embeddings.

        PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3; GPT-1, 4.1 (N(0, 0.02)).
        PAPER CONTEXT: the weights of residual layers are scaled by 1 / sqrt(N) at initialisation, N their number.
        INTUITION: N independent additions grow the variance of the stream N-fold; 1 / sqrt(N) each keeps it level.
        IMPLEMENTATION: N = 2 L: what ends in `o_proj` or `down_proj` adds to the stream; biases 0. Modules that hold
            bare parameters have drawn them in their own constructor.
        WHY: the first logits are near 0, so the first loss is ln V: any other value means that something is broken.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                draw(module.weight, residual_std if residual else INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, plan: Plan | None = None, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V); with targets (B, T) -> nats per token (B, T), float32, 0 at target -100.

        Raises ValueError if, without a plan, T exceeds block_size.
        """
        if plan is None:
            plan = self.causal(tokens)
        x = self.embed(tokens, plan.positions)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, plan, i)
        x = plan.select(self.norm(x))
        return self.head(x) if targets is None else self.head.nll(x, targets)

    def causal(self, tokens: Tensor) -> Causal:
        """The plan for whole rows of tokens."""
        if tokens.shape[-1] > self.config.block_size:
            raise ValueError(
                f"{tokens.shape[-1]} tokens exceed block_size={self.config.block_size}: pass the last block_size tokens"
            )
        return Causal(tokens, self.specs, self.kernel)

    @property
    def specs(self) -> list[LayerSpec]:
        """What plans and caches must know of each place in the stack, local to this rank."""
        return [block.attention.spec for block in self.blocks]

    def use_attention(self, kernel: Kernel) -> "Transformer":
        """Set the kernel (plans.Kernel) that attention without a cache runs on."""
        self.kernel = kernel
        return self

    def use_loss(self, loss: Loss) -> "Transformer":
        """Set how the head measures the loss: loss(x, weight, targets) -> nats per token."""
        self.head.loss = loss
        return self

    def use_stream(self, dtype: Callable[[Tensor], torch.dtype]) -> "Transformer":
        """Set the dtype of the residual stream: dtype(x) -> torch.dtype, autocast's by default."""
        self.embed.stream = dtype
        return self

    def auxiliary_losses(self) -> Tensor:
        """The sum of what modules report beside the loss (0 if none does)."""
        zero = torch.zeros((), device=next(self.parameters()).device)
        return sum((module.auxiliary_losses() for module in self._reporting()), start=zero)

    def _reporting(self) -> Iterator[Auxiliary]:
        # By class and attribute: `isinstance` of a protocol takes ten times as long, in every step.
        reporting = (module for module in self.modules() if hasattr(type(module), "auxiliary_losses"))
        return (module for module in reporting if module is not self)

    def n_parameters(self, embeddings: bool = True) -> int:
        """Number of trained values, each counted once; without `embeddings`, those of blocks and norm alone."""
        parts = [self] if embeddings else [self.blocks, self.norm]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())
