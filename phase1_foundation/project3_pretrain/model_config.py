"""
Model configuration

This file implements the shape of a `Transformer`, as plain values that are checked, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2: one architecture, four sizes
- "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023) - which parts later models replace

Each component is explained with paper references for educational purposes.
"""

import dataclasses
import inspect
from dataclasses import dataclass

from phase1_foundation.project3_pretrain.layers import MLPS, NORMS
from phase1_foundation.project3_pretrain.positions import POSITIONS, ROPE_SCALINGS

CHOICES = {"norm": NORMS, "mlp": MLPS, "positions": POSITIONS}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that must be known to build a `Transformer`; None means: derived from the rest, and filled in.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), table 2; "LLaMA: Open and Efficient Foundation
        Language Models", arXiv:2302.13971, section 2.2.
    PAPER CONTEXT: one architecture, scaled by a few integers; LLaMA swaps in RMSNorm, SwiGLU and RoPE.
    INTUITION: the model zoo is one animal with different measurements.
    IMPLEMENTATION: frozen; validated on construction; `to_dict` and `from_dict` speak plain JSON values.
    WHY: a checkpoint stores it, a converter fills it, and no one has to guess a shape from the weights.

    Raises ValueError for values that cannot be built, naming the remedy.

    >>> ModelConfig(n_embd=128, n_head=4, n_kv_head=2).head_size
    32
    """

    vocab_size: int = 50257  # V
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12  # L
    n_head: int = 12  # H
    n_embd: int = 768  # C
    n_kv_head: int | None = None  # Hkv; None: n_head (multi-head)
    head_size: int | None = None  # D; None: n_embd / n_head
    n_ff: int | None = None  # width inside the MLP; None: 4 C, or 8/3 C for a gated one
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"kind": "linear", "factor": 2.0}, see positions.ROPE_SCALINGS
    qk_norm: bool = False  # normalise queries and keys per head
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    tie_head: bool = True  # the head multiplies by the token embedding
    windows: tuple[int | None, ...] | None = None  # per layer: tokens a query sees; None: all before it
    dropout: float = 0.0  # on embeddings and on what attention and MLP add
    attention_scale: float | None = None  # None: 1 / sqrt(head_size)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name}={value!r} is not known: use one of {', '.join(choices)}")
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.head_size is None:
            self._require_divisible("n_embd", "n_head")
            object.__setattr__(self, "head_size", self.n_embd // self.n_head)
        if self.n_ff is None:
            object.__setattr__(self, "n_ff", MLPS[self.mlp].default_n_ff(self.n_embd))
        if self.windows is not None:
            windows = tuple(self.windows)
            object.__setattr__(self, "windows", windows if any(w is not None for w in windows) else None)
        self._validate()

    def _validate(self):
        for name in ("n_kv_head", "head_size", "n_ff"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        self._require_divisible("n_head", "n_kv_head")
        _require(0.0 <= self.dropout < 1.0, f"dropout={self.dropout} must be at least 0 and below 1")
        _require(
            self.positions != "rope" or self.head_size % 2 == 0,
            f"head_size={self.head_size} must be even, as RoPE turns pairs of channels: use {self.head_size + 1}",
        )
        _require(
            not (self.norm == "rmsnorm" and self.norm_bias),
            "norm_bias=True: RMSNorm has no bias; set norm_bias=False or norm='layernorm'",
        )
        if self.windows is not None:
            _require(
                len(self.windows) == self.n_layer and all(w is None or w >= 1 for w in self.windows),
                f"windows={self.windows} needs one entry for each of the n_layer={self.n_layer} layers: "
                f"a positive number of tokens, or None for all",
            )
        if self.rope_scaling is not None:
            self._validate_scaling()

    def _validate_scaling(self):
        kind = self.rope_scaling.get("kind")
        _require(
            kind in ROPE_SCALINGS, f"rope_scaling={self.rope_scaling}: 'kind' must be one of {list(ROPE_SCALINGS)}"
        )
        needed = set(inspect.signature(ROPE_SCALINGS[kind]).parameters) - {"frequencies"}
        given = set(self.rope_scaling) - {"kind"}
        _require(needed == given, f"rope_scaling={self.rope_scaling}: {kind!r} takes exactly {sorted(needed)}")

    def _require_divisible(self, name, by):
        whole, part = getattr(self, name), getattr(self, by)
        if whole % part:
            good = max(whole // part, 1) * part
            raise ValueError(f"{name}={whole} must be divisible by {by}={part}: use {good} or {good + part}")

    def to_dict(self) -> dict:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return values | {"windows": None if self.windows is None else list(self.windows)}

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """The inverse of `to_dict`; raises ValueError for a name that is no field."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        _require(not unknown, f"unknown model settings {unknown}: the fields are {', '.join(known)}")
        return cls(**values)


def _require(condition, message):
    if not condition:
        raise ValueError(message)
