"""
Layers with adapters

This file implements what stands in the place of a frozen layer following:
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - a low-rank update beside the frozen weight
- "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024) - the update's length apart from its direction
- "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023) - the frozen layer may be a quantized one

Each component is explained with paper references for educational purposes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.modules import is_linear


class Part(NamedTuple):
    """What an adapter holds for one layer: its update is scale * B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    magnitude: Tensor | None = None  # (out,), DoRA alone


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name; one that wraps another stands for it."""
    found = {}
    for name, module in model.named_modules():  # what wraps comes before what is inside
        if is_linear(name, module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def covers(target: str, name: str) -> bool:
    """Whether a target names a layer: whole parts of its dotted name, one or several in a row.

    >>> covers("mlp", "blocks.0.mlp.up_proj"), covers("blocks.0", "blocks.0.mlp.up_proj"), covers("up", "mlp.up_proj")
    (True, True, False)
    """
    return f".{target}." in f".{name}."


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer; a quantized one is asked for the plain layer that it stands for."""
    return layer.to_linear().weight if hasattr(layer, "to_linear") else layer.weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias (out,) of a linear layer, if it has one."""
    return getattr(layer, "bias", None)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's tensors are (a quantized layer may have no parameters)."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these weights, copied."""
    n_out, n_in = weight.shape
    linear = nn.Linear(n_in, n_out, bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def stretched(y: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain * (W0 x + update) + bias, for y = W0 x + bias: the length of a weight does not concern its bias."""
    if bias is None:
        return gain * (y + update)
    bias = bias.to(y.dtype)
    return gain * (y - bias + update) + bias


class Adapted(nn.Module):
    """What all modules with an adapter have in common: they can be told to compute what their base does.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2 (switching tasks).
    PAPER CONTEXT: the base stays in memory; what is added to it comes and goes.
    INTUITION: a lamp with a switch of its own; `without_adapters` turns all of a house at once.
    IMPLEMENTATION: `on`, a plain attribute: a compiled model compiles once for each of its two values.
    WHY: the base of an adapted model is always at hand, and needs no copy.
    """

    def __init__(self):
        super().__init__()
        self.on = True


class LoRALinear(Adapted):
    """A frozen linear layer with a trained low-rank update.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1, equation 3.
    PAPER CONTEXT: h = W0 x + B A x, with B (d, r), A (r, k) and r far below d and k; B A x is scaled by alpha / r. The
        paper draws A from a Gaussian; its published code, and PEFT, take the uniform rule that linear layers have.
    INTUITION: leave the book as it is and lay slips between its pages.
    IMPLEMENTATION: B begins at zero, so the first forward is the base's. Both stay float32 and are cast to what x is,
        as autocast would do it. The base is only called: it may be int4. x (..., in) -> (..., out).
    WHY: gradients and optimizer state for r (in + out) numbers instead of in * out, and nothing left to pay once the
        update is added into the weight (`to_linear`).
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        device = device_of(base)
        self.A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        if device.type != "meta":  # there the values come later
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def update(self, x: Tensor) -> Tensor:
        """The low-rank path: scale * B A x; dropout is on the input of A alone."""
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (..., r)
        return F.linear(low * self.scale, self.B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + scale * B A x."""
        y = self.base(x)
        return y + self.update(x) if self.on else y

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight (out, in) of one plain layer that computes the same, in float32: W0 + scale * B A."""
        return weight.float() + self.scale * (self.B.float() @ self.A.float())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The plain layer that computes the same (section 4.1: no additional inference latency)."""
        weight = weight_of(self.base)
        return plain_linear(self.merged_weight(weight).to(weight.dtype), bias_of(self.base))

    def part(self) -> Part:
        """What an adapter's file holds for this layer."""
        return Part(self.A.detach(), self.B.detach(), self.scale)

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Take over what an adapter's file holds for this layer."""
        self.A.copy_(part.A)
        self.B.copy_(part.B)

    def extra_repr(self) -> str:
        """What print(model) shows of it."""
        return f"rank={len(self.A)}, scale={self.scale:g}, dropout={self.dropout}"


class DoRALinear(LoRALinear):
    """A frozen linear layer whose weight gets a low-rank change of direction and a length of its own.

    PAPER: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1, equation 5; section 4.3.
    PAPER CONTEXT: W' = m (W0 + B A) / ||W0 + B A||, m trained and ||W0|| at first. LoRA changes the length of
        weights in proportion to their direction, full fine-tuning does not (section 3.2).
    INTUITION: one hand turns the arrow, the other one stretches it.
    IMPLEMENTATION: one length for each output, as the authors' code and PEFT have it (the paper's m is 1 x k); a
        constant norm in the backward pass (section 4.3); the bias is outside. PEFT also drops inputs of the base.
    WHY: closer to full fine-tuning at small ranks; the price is the norm of an (out, in) matrix in every forward.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        empty = torch.empty(self.out_features, device=self.A.device)
        self.magnitude = nn.Parameter(empty if empty.is_meta else weight_of(base).detach().float().norm(dim=1))

    @torch.no_grad()
    def direction_norm(self) -> Tensor:
        """||W0 + scale * B A|| of every output (out,); in float32 also under autocast."""
        with torch.autocast(self.A.device.type, enabled=False):
            return super().merged_weight(weight_of(self.base)).norm(dim=1).clamp(min=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """m / ||W0 + scale * B A|| * (W0 x + scale * B A x) + bias."""
        y = self.base(x)
        if not self.on:
            return y
        gain = (self.magnitude / self.direction_norm()).to(y.dtype)
        return stretched(y, self.update(x), gain, bias_of(self.base))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """m (W0 + scale * B A) / ||W0 + scale * B A||."""
        direction = super().merged_weight(weight)
        return (self.magnitude / direction.norm(dim=1).clamp(min=1e-12)).unsqueeze(1) * direction

    def part(self) -> Part:
        """What an adapter's file holds for this layer."""
        return super().part()._replace(magnitude=self.magnitude.detach())

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Take over what an adapter's file holds for this layer."""
        super().fill(part)
        self.magnitude.copy_(part.magnitude)


class TrainedRows(Adapted):
    """A table of which some rows are trained and all others frozen; registered as a parametrization of its weight.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2 (embeddings are frozen).
    PAPER CONTEXT: only attention weights are adapted there, and no vocabulary grows.
    INTUITION: a few new words are pencilled into a printed dictionary.
    IMPLEMENTATION: the weight that embedding and head see is the frozen table with `rows` written over the lines of
        `ids`; a tied head reads the embedding's weight. The gradient of the whole table is computed, only theirs kept.
    WHY: tokens that were just added mean nothing yet: frozen, they would never be learned. PEFT calls these
        `trainable_token_indices`.
    """

    def __init__(self, table: Tensor, ids: Sequence[int]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(list(ids), device=table.device))
        self.rows = nn.Parameter(table.detach()[self.ids].float())

    def forward(self, table: Tensor) -> Tensor:
        """The table (V, C) with its trained rows."""
        return table.index_copy(0, self.ids, self.rows.to(table.dtype)) if self.on else table
