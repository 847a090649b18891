"""
Many adapters on one model

This file implements several adapters in one batch, each row with its own, following:
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - one base for many tasks
- "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024) - adapters that also stretch

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.modules import swap_modules
from phase2_finetuning.project5_lora.layers import (
    Adapted,
    Part,
    bias_of,
    device_of,
    linear_layers,
    plain_linear,
    stretched,
    weight_of,
)
from phase2_finetuning.project5_lora.peft_format import Adapter, read_adapter


class Choice(nn.Module):
    """Which adapter each row of a batch takes; one for all layers of a model.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2 (switching tasks).
    PAPER CONTEXT: the paper names what it cannot do: inputs of different tasks in one forward, once A and B are merged.
    INTUITION: every guest's place card says which of the cook's spices go on the plate.
    IMPLEMENTATION: indices into the list of adapters, -1 for the base alone. Their shape is that of the batch's rows:
        (B,) for x (B, T, C), (N,) for the tokens (N, C) of a ragged batch; (1,) holds for all. A new choice of the same
        shape is written into the same tensor, which a compiled or captured forward goes on reading.
    WHY: a server answers users of many adapters in one batch.
    """

    def __init__(self, names: Sequence[str] = (), device=None):
        super().__init__()
        self.names = list(names)
        self.register_buffer("rows", torch.full((1,), -1, device=device), persistent=False)

    def choose(self, rows: str | Sequence[str | None] | Tensor | None) -> None:
        """Set the adapters of the next forwards: a name for all rows, a list of names (None: the base), or indices."""
        if not isinstance(rows, Tensor):
            names = [rows] if rows is None or isinstance(rows, str) else rows
            unknown = [name for name in names if name is not None and name not in self.names]
            if unknown:
                raise ValueError(f"there is no adapter {unknown[0]!r} here: there are {', '.join(self.names)}, or None")
            rows = torch.tensor([-1 if name is None else self.names.index(name) for name in names])
        if rows.shape == self.rows.shape:
            self.rows.copy_(rows)
        else:
            self.rows = rows.to(self.rows.device)


class StackedLoRA(Adapted):
    """A frozen linear layer with several adapters, of which every row of the batch takes its own.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1, equation 3, K times.
    PAPER CONTEXT: h = W0 x + B_k A_k x, with k another one for each input.
    INTUITION: ask all advisers at once, since each is brief, and cross out what the others said.
    IMPLEMENTATION: all A stand below each other in one (R, in), all B beside each other in one (out, R), R the sum of
        ranks. The R numbers in the middle are multiplied by a line of `scales` (K + 1, R): an adapter's scale at its
        own places, 0 elsewhere. Index -1 is the last line: zeros, the base alone.
    WHY: two products and no loop, gather or sorting, for any mix of ranks; what the other adapters' places cost is
        little beside the base while R stays below its width.
    """

    def __init__(self, base: nn.Module, parts: Sequence[Part | None], choice: Choice, dtype=torch.float32):
        super().__init__()
        self.base, self.choice, self.parts = base, choice, list(parts)
        self.in_features, self.out_features = base.in_features, base.out_features
        device, present = device_of(base), [part for part in parts if part is not None]
        scales, at = torch.zeros(len(parts) + 1, sum(len(part.A) for part in present)), 0
        for k, part in enumerate(parts):
            if part is not None:
                scales[k, at : at + len(part.A)] = part.scale
                at += len(part.A)
        self.register_buffer("A", torch.cat([part.A for part in present]).to(device, dtype), persistent=False)
        self.register_buffer("B", torch.cat([part.B for part in present], dim=1).to(device, dtype), persistent=False)
        self.register_buffer("scales", scales.to(device), persistent=False)

    def chosen(self, table: Tensor, x: Tensor) -> Tensor:
        """The lines of a table (K + 1, n) that the rows of x (rows, ..., in) have chosen: (rows, 1..., n).

        Raises ValueError where another number of rows was chosen.
        """
        lines = table[self.choice.rows].to(x.dtype)
        if lines.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"choose() was given {lines.shape[0]} rows, the batch has {x.shape[0]}: choose for each")
        return lines.view(*lines.shape[:-1], *[1] * (x.dim() - lines.dim()), lines.shape[-1])

    def update(self, x: Tensor) -> Tensor:
        """The low-rank path of each row's own adapter."""
        low = F.linear(x, self.A.to(x.dtype)) * self.chosen(self.scales, x)  # (..., R)
        return F.linear(low, self.B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """W0 x + the update that each row has chosen."""
        y = self.base(x)
        return y + self.update(x) if self.on else y

    @torch.no_grad()
    def merged(self, weights: Sequence[float]) -> nn.Linear:
        """The plain layer with a weighted sum of the updates: W0 + sum_k w_k scale_k B_k A_k."""
        weight = weight_of(self.base)
        total = weight.float()
        for amount, part in zip(weights, self.parts, strict=True):
            if amount and part is not None:  # A and B as they were read: the stack's are rounded to the base's type
                A, B = (tensor.to(total.device, torch.float32) for tensor in (part.A, part.B))
                total = total + amount * part.scale * (B @ A)
        return plain_linear(total.to(weight.dtype), bias_of(self.base))


class StackedDoRA(StackedLoRA):
    """The same where some of the adapters are DoRA's.

    PAPER: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1, equation 5.
    PAPER CONTEXT: W' = m (W0 + B A) / ||W0 + B A||.
    INTUITION: each adviser also brings a magnifying glass.
    IMPLEMENTATION: nothing is trained here, so m / ||W0 + scale * B A|| is computed once: a table of `gains`
        (K + 1, out), 1 for the base and for adapters without a magnitude.
    WHY: at inference DoRA then costs one more product by element, and no norm.
    """

    def __init__(self, base: nn.Module, parts: Sequence[Part | None], choice: Choice, dtype=torch.float32):
        super().__init__(base, parts, choice, dtype)
        weight = weight_of(base).detach().float()
        gains = torch.ones(len(parts) + 1, self.out_features, device=weight.device)
        for k, part in enumerate(parts):
            if part is not None and part.magnitude is not None:
                A, B, m = (tensor.to(weight.device, torch.float32) for tensor in (part.A, part.B, part.magnitude))
                gains[k] = m / (weight + part.scale * (B @ A)).norm(dim=1).clamp(min=1e-12)
        self.register_buffer("gains", gains, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The update that each row has chosen, and its gain."""
        y = self.base(x)
        return stretched(y, self.update(x), self.chosen(self.gains, x), bias_of(self.base)) if self.on else y


def choice_of(model: nn.Module) -> Choice | None:
    """The choice that the stacked layers of a model share, or None if it has none."""
    return next((module for module in model.modules() if isinstance(module, Choice)), None)


def stack_adapters(model: nn.Module, adapters: Mapping[str, str | Path | Adapter]) -> Choice:
    """Put trained adapters on a plain model, side by side, in place; further calls add more.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 1 (one base, many tasks).
    PAPER CONTEXT: a pre-trained model can be shared and used to build many small LoRA modules for different tasks.
    INTUITION: one cook, many cookbooks' margins, one pot for every guest.
    IMPLEMENTATION: each layer that any adapter touches becomes a `StackedLoRA` with a place for every adapter. Nothing
        is trained, the recipe does not name them: this is for serving. Before saving, merge the stack or `remove_lora`.
    WHY: a batch with rows of many users is one forward, in place of one for each adapter.

    Args:
        adapters: name -> a PEFT folder, or what `read_adapter` returned.

    Returns the `Choice`: ``choice.choose(["french", None, "code"])`` before a forward of three rows. Until then no row
    takes an adapter. Raises ValueError for a name that is taken, an adapter that does not fit or trains tokens, or a
    model that is being trained.
    """
    choice = choice_of(model)
    if choice is None and any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(
            "this model has an adapter that can be trained: save_adapter it, and stack it on a plain model"
        )
    taken = [name for name in adapters if choice and name in choice.names]
    if taken:
        raise ValueError(f"there is an adapter {taken[0]!r} already: choose another name")
    found = {}
    for name, source in adapters.items():  # all are read before anything is changed
        found[name] = source if isinstance(source, Adapter) else read_adapter(model, source)
        if found[name].tokens:
            raise ValueError(
                f"adapter {name!r} also trained rows of tokens, which all rows of a batch would share: load it alone "
                f"(load_adapter), or train it on a model that knows its tokens"
            )
    table = model.embed.tokens.weight
    choice = choice or Choice(device=table.device)
    before = len(choice.names)
    choice.names += found

    def make(layer_name, old):
        stacked = isinstance(old, StackedLoRA)
        parts = [*(old.parts if stacked else [None] * before), *(a.parts.get(layer_name) for a in found.values())]
        kind = StackedDoRA if any(part and part.magnitude is not None for part in parts) else StackedLoRA
        return kind(old.base if stacked else old, parts, choice, table.dtype)

    named = {name for adapter in found.values() for name in adapter.parts}
    touched = {id(m) for name, m in linear_layers(model).items() if name in named or isinstance(m, StackedLoRA)}
    swap_modules(model, make, lambda name, module: id(module) in touched)
    return choice


def merge_stack(model: nn.Module, weights: Mapping[str, float] | None) -> None:
    """Swap stacked layers for plain ones that hold a weighted sum of the updates."""
    names = choice_of(model).names
    if not weights or not set(weights) <= set(names):
        raise ValueError(f"weights={weights} must name adapters of the stack and their weights: {', '.join(names)}")
    amounts = [float(weights.get(name, 0.0)) for name in names]
    for layer in (module for module in model.modules() if isinstance(module, StackedLoRA)):
        for name, amount, part in zip(names, amounts, layer.parts, strict=True):
            if amount and part is not None and part.magnitude is not None:
                raise ValueError(
                    f"{name!r} is a DoRA adapter, whose lengths of weights cannot be added up with others: load it "
                    f"alone (load_adapter) and merge that"
                )
    swap_modules(model, lambda name, layer: layer.merged(amounts), StackedLoRA)
