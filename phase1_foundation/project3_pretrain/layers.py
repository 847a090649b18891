"""
Layers

This file implements the parts of a decoder block following:
- "Attention Is All You Need" (Vaswani et al., 2017) - the feed-forward layer
- "Layer Normalization" (Ba et al., 2016) - LayerNorm
- "Root Mean Square Layer Normalization" (Zhang & Sennrich, 2019) - RMSNorm
- "Gaussian Error Linear Units (GELUs)" (Hendrycks & Gimpel, 2016) - the activation of GPT-2
- "GLU Variants Improve Transformer" (Shazeer, 2020) - SwiGLU
- "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023) -
  fewer key and value heads than query heads
- "Scaling Vision Transformers to 22 Billion Parameters" (Dehghani et al., 2023) - normalised queries and keys
- "On Layer Normalization in the Transformer Architecture" (Xiong et al., 2020) - pre-norm residual blocks

Each component is explained with paper references for educational purposes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.plans import LayerSpec, Plan


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 for each token by itself, then a learned gain (and bias).

    PAPER: "Layer Normalization", arXiv:1607.06450, section 3, equation 3.
    PAPER CONTEXT: mu and sigma are taken over the hidden units of one layer, for each training case alone.
    INTUITION: every token is shown at the same brightness and contrast, whatever happened to it before.
    IMPLEMENTATION: in the dtype of the weights (float32 in mixed precision), result in the dtype of x.
    WHY: independent of the batch, so training and generation compute the same.
    """

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square, then a learned gain.

    PAPER: "Root Mean Square Layer Normalization", arXiv:1910.07467, section 4, equation 4.
    PAPER CONTEXT: LayerNorm's success comes from re-scaling; re-centring (the mean) is dispensable.
    INTUITION: keep the direction of the vector, fix its length.
    IMPLEMENTATION: x / sqrt(mean(x^2) + eps) * weight, in the dtype of the weights, result in the dtype of x.
    WHY: one statistic instead of two, no bias; the norm of the whole Llama family.

    >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
    [1.0, 1.0]
    """

    def __init__(self, size: int, eps: float = 1e-5, bias: bool = False):
        super().__init__()
        if bias:
            raise ValueError("norm_bias=True: RMSNorm has no bias; set norm_bias=False or norm='layernorm'")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class GELU(nn.Module):
    """The feed-forward layer of GPT-2: up, GELU, down.

    PAPER: "Gaussian Error Linear Units (GELUs)", arXiv:1606.08415, section 2 (the tanh form); GPT-2 uses it 4C wide.
    PAPER CONTEXT: GELU(x) = x Phi(x): the input weighted by the chance that a standard normal lies below it.
    INTUITION: many small detectors; each fires on a pattern and writes its answer back into the stream.
    IMPLEMENTATION: subclasses change the activation only. x (..., C) -> (..., C).
    WHY: attention moves information between tokens; this is where each token computes.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=config.mlp_bias)

    @staticmethod
    def default_n_ff(n_embd: int) -> int:
        """Width inside when the config does not say: 4 C."""
        return 4 * n_embd

    def activation(self, x: Tensor) -> Tensor:
        """GPT-2's tanh approximation of x Phi(x)."""
        return F.gelu(x, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself."""
        return self.down_proj(self.activation(self.up_proj(x)))


class ExactGELU(GELU):
    """The same feed-forward layer with GELU by its definition.

    PAPER: "Gaussian Error Linear Units (GELUs)", arXiv:1606.08415, section 2.
    PAPER CONTEXT: GELU(x) = x Phi(x); the tanh form approximates it where the error function is slow.
    INTUITION: ask for the probability itself, not for a curve that looks like it.
    IMPLEMENTATION: x Phi(x) by the error function.
    WHY: several times as fast as the tanh form on CPUs; some published models use it.
    """

    def activation(self, x: Tensor) -> Tensor:
        """x Phi(x)."""
        return F.gelu(x)


class SquaredReLU(GELU):
    """The same feed-forward layer with the square of a ReLU.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.3, equation 2; the square is a later addition.
    PAPER CONTEXT: FFN(x) = max(0, x W1 + b1) W2 + b2.
    INTUITION: a detector that is silent below its threshold, and speaks up faster than linearly above it.
    IMPLEMENTATION: max(0, x)^2 in place of the GELU.
    WHY: cheap, and exactly zero for about half of the inputs, which sparse kernels can use.
    """

    def activation(self, x: Tensor) -> Tensor:
        """max(0, x) squared."""
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """The gated feed-forward layer of the Llama family.

    PAPER: "GLU Variants Improve Transformer", arXiv:2002.05202, section 2, equation 6.
    PAPER CONTEXT: FFN_SwiGLU(x) = (Swish(x W) * x V) W2, no biases; hidden width times 2/3 keeps the parameters equal.
    INTUITION: one projection proposes values, the other decides how far each gate opens.
    IMPLEMENTATION: silu(gate_proj(x)) * up_proj(x), then down_proj. x (..., C) -> (..., C).
    WHY: lower perplexity than the plain layer at the same parameters and work (table 1 of the paper).
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=config.mlp_bias)

    @staticmethod
    def default_n_ff(n_embd: int) -> int:
        """Width inside when the config does not say: 2/3 of 4 C, rounded up to a multiple of 64 (kernels like it).

        >>> SwiGLU.default_n_ff(768)
        2048
        """
        return -(-8 * n_embd // 3 // 64) * 64

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
MLPS = {"gelu": GELU, "gelu_exact": ExactGELU, "relu2": SquaredReLU, "swiglu": SwiGLU}


class Attention(nn.Module):
    """Grouped-query self-attention that leaves to the plan who sees whom.

    PAPER: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", arXiv:2305.13245,
        section 2.2; QK-norm: "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442, section 2.
    PAPER CONTEXT: G groups of query heads share one key and value head each; G = H is multi-head, G = 1 multi-query.
        Normalised queries and keys bound the attention logits, which otherwise grow until training diverges.
    INTUITION: several readers share one index of the library: they ask different questions of the same cards.
    IMPLEMENTATION: project, split into heads by the head size (so a tensor-parallel slice needs no change),
        normalise, rotate, `plan.attend`, project back. x (..., C) -> (..., C).
    WHY: the keys and values that decoding must keep and read shrink by H / Hkv.
    """

    def __init__(self, config, layer: int, rotation: nn.Module):
        super().__init__()
        D = config.head_size
        self.spec = LayerSpec(
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            head_size=D,
            value_size=D,
            window=config.windows[layer] if config.windows else None,
            scale=D**-0.5 if config.attention_scale is None else config.attention_scale,
            block_size=config.block_size,
        )
        self.q_proj = nn.Linear(config.n_embd, config.n_head * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * D, config.n_embd, bias=config.out_bias)
        norm = NORMS[config.norm]
        self.q_norm = norm(D, config.norm_eps, config.norm_bias) if config.qk_norm else nn.Identity()
        self.k_norm = norm(D, config.norm_eps, config.norm_bias) if config.qk_norm else nn.Identity()
        self.rotation = rotation

    def forward(self, x: Tensor, plan: Plan, layer: int) -> Tensor:
        """Mix the tokens of x; `layer` counts the places in the stack and tells the plan's caches apart."""
        spec = self.spec
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, spec.head_size)))  # (..., H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, spec.head_size)))  # (..., Hkv, D)
        v = self.v_proj(x).unflatten(-1, (-1, spec.value_size))  # (..., Hkv, Dv)
        q, k = self.rotation(q, k, plan.positions)
        return self.o_proj(plan.attend(layer, q, k, v).flatten(-2))


class Block(nn.Module):
    """One layer of the decoder: attention, then MLP, each added to the residual stream.

    PAPER: "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745, section 3 (pre-LN).
    PAPER CONTEXT: normalising the input of each sub-layer keeps gradients well behaved from the first step.
    INTUITION: the stream is a notebook; each sub-layer reads a tidied copy and adds a line.
    IMPLEMENTATION: x + attention(norm_1(x)), then x + mlp(norm_2(x)). x (..., C) -> (..., C).
    WHY: deep stacks train without a fragile warm-up, as gradients pass through the additions untouched.
    """

    def __init__(self, config, layer: int, rotation: nn.Module, attention: type, mlp: type):
        super().__init__()
        norm = NORMS[config.norm]
        self.norm_1 = norm(config.n_embd, config.norm_eps, config.norm_bias)
        self.attention = attention(config, layer, rotation)
        self.norm_2 = norm(config.n_embd, config.norm_eps, config.norm_bias)
        self.mlp = mlp(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, plan: Plan, layer: int) -> Tensor:
        """Add what attention and MLP have to say to x."""
        x = x + self.dropout(self.attention(self.norm_1(x), plan, layer))
        return x + self.dropout(self.mlp(self.norm_2(x)))
