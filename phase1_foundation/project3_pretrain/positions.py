"""
Positions

This file implements how a token knows where it stands following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2: a learned vector per position
- "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021) - RoPE: rotate queries and keys

Each component is explained with paper references for educational purposes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # GPT-1's and GPT-2's standard deviation


def draw(weight: Tensor, std: float = INIT_STD) -> None:
    """Fill with normal noise; on `meta` there is nothing to fill (and trying would import half of PyTorch)."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class LearnedPositions(nn.Module):
    """One trained vector per position, added to the token embedding.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3, after GPT-1, section 3.1 (W_p).
    PAPER CONTEXT: h_0 = U W_e + W_p; GPT-2 widens the context from 512 to 1024 positions.
    INTUITION: every seat in the hall has a number, and the model learns what sitting there means.
    IMPLEMENTATION: a table (block_size, C), gathered by position, added to x (..., C).
    WHY: attention alone sees a bag of tokens; but position 1025 has no vector, so the context cannot grow.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))
        draw(self.weight)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the vectors of `positions` (...) to x (..., C)."""
        return x + F.embedding(positions, self.weight)


class _NoPositions(nn.Module):
    """Adds nothing to the embedding: the model's positions enter elsewhere."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x as it is."""
        return x


class _NoRotation(nn.Module):
    """Leaves queries and keys as they are: the model's positions enter elsewhere."""

    def __init__(self, config):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k as they are."""
        return q, k


class Rotation(nn.Module):
    """Rotary position embedding: turns queries and keys by angles that grow with their position.

    PAPER: "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864, section 3.2.2, equation
        15; computed as in section 3.4.2, equation 34.
    PAPER CONTEXT: pair i of the head's channels is turned by m * theta_i at position m, theta_i = base^(-2i/D).
    INTUITION: two clock hands turned by m and n: their product sees only the difference m - n, never the time of day.
    IMPLEMENTATION: a float32 table [cos | sin] (block_size, D), gathered by position. Channel i is paired with i + D/2
        (as the Llama family stores its weights), where the paper pairs neighbours: a fixed permutation of channels.
    WHY: attention depends on relative distance, nothing is learned, and contexts can be stretched (`ROPE_SCALINGS`).

    The table is no state: it is not saved, stays float32 when the model is cast, and is built anew when a model leaves
    `meta`. One module is shared by all layers.
    """

    def __init__(self, config):
        super().__init__()
        self.block_size, self.head_size = config.block_size, config.head_size
        self.theta, self.scaling = config.rope_theta, config.rope_scaling
        table = torch.empty(self.block_size, self.head_size, dtype=torch.float32)
        self.register_buffer("table", table if table.is_meta else self._build(table.device), persistent=False)

    def _build(self, device) -> Tensor:
        frequencies = rope_frequencies(self.head_size, self.theta, self.scaling, device)  # (D/2,)
        positions = torch.arange(self.block_size, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)  # m * theta_i: (block_size, D/2)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)  # (block_size, D)

    def _apply(self, fn, recurse=True):
        # `to`, `cuda`, `bfloat16`, `to_empty` end here. The table follows to the device but never changes its dtype;
        # from `meta`, where it holds nothing, it is computed.
        device = fn(torch.empty(0, device=self.table.device)).device
        if device != self.table.device:
            self.table = self._build(device) if self.table.is_meta else self.table.to(device)
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q (..., H, D) and k (..., Hkv, D) by the angles of `positions` (...)."""
        cos, sin = self.table[positions].unsqueeze(-2).chunk(2, dim=-1)  # (..., 1, D/2): the same for every head
        return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its angle, in float32.

    >>> quarter = torch.tensor([0.0]), torch.tensor([1.0])                     # cos and sin of 90 degrees
    >>> rotate(torch.tensor([1.0, 0.0]), *quarter).tolist()
    [0.0, 1.0]
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_frequencies(head_size: int, theta: float, scaling: dict | None = None, device=None) -> Tensor:
    """Radians per position of each pair of channels.

    PAPER: "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864, section 3.2.2.
    PAPER CONTEXT: theta_i = 10000^(-2(i-1)/D), i = 1 ... D/2.
    INTUITION: the hands of a clock: the first pair turns fast and tells neighbours apart, the last barely moves.
    IMPLEMENTATION: float32 (D/2,), then stretched by the rule that `scaling` names.
    WHY: a range of speeds marks near and far at once; a larger base (1e6 in Qwen) reaches further.

    >>> rope_frequencies(4, 10000.0).tolist()
    [1.0, 0.009999999776482582]
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    arguments = dict(scaling)
    return ROPE_SCALINGS[arguments.pop("kind")](frequencies, **arguments)


def linear_scaling(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation: all hands turn `factor` times slower, so that a longer text fits on the same dial."""
    return frequencies / factor


def llama3_scaling(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_block_size: int
) -> Tensor:
    """Llama 3.1's rule: slow hands are slowed by `factor`, fast ones stay, those between are blended.

    A hand is slow if it turns fewer than `low_freq_factor` times within `original_block_size`, fast if more than
    `high_freq_factor` times.
    """
    turns = original_block_size * frequencies / (2 * math.pi)
    stays = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return stays * frequencies + (1 - stays) * frequencies / factor


# The name in config.rope_scaling["kind"] -> the rule; the other keys are its arguments.
ROPE_SCALINGS: dict[str, Callable[..., Tensor]] = {"linear": linear_scaling, "llama3": llama3_scaling}


class PositionScheme(NamedTuple):
    """Where positions enter: a module at the embedding, and one in every attention."""

    embedding: type[nn.Module]
    rotation: type[nn.Module]


POSITIONS = {
    "learned": PositionScheme(LearnedPositions, _NoRotation),
    "rope": PositionScheme(_NoPositions, Rotation),
}
