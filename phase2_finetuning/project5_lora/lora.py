"""
LoRA

This file implements adding adapters to a model, taking them off, merging, saving and loading them, following:
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - which weights are adapted, merging
- "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (Kalajdzievski, 2023) - alpha / sqrt(r)
- "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024) - a variant of the layer
- "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023) - all linear layers, also quantized ones

Each component is explained with paper references for educational purposes.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from common.modules import swap_modules
from phase2_finetuning.project5_lora.layers import (
    Adapted,
    DoRALinear,
    LoRALinear,
    TrainedRows,
    covers,
    linear_layers,
)
from phase2_finetuning.project5_lora.peft_format import Adapter, read_adapter, write_adapter
from phase2_finetuning.project5_lora.stacking import StackedLoRA, choice_of, merge_stack

__all__ = [
    "add_lora", "load_adapter", "merge_lora", "remove_lora", "save_adapter", "trainable", "without_adapters",
]  # fmt: skip


def scale_of(alpha: float, rank: int, rank_stabilized: bool = False) -> float:
    """What B A x is multiplied by.

    PAPER: "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, theorem 3.2.
    PAPER CONTEXT: LoRA's alpha / r makes updates collapse as r grows; alpha / sqrt(r) keeps their size.
    INTUITION: r independent voices together are as loud as sqrt(r) of one: dividing by r silences a large choir.
    IMPLEMENTATION: alpha / r as in LoRA's section 4.1, or alpha / sqrt(r).
    WHY: with alpha / r a larger rank costs more and learns little more.

    >>> scale_of(16, 64), scale_of(16, 64, rank_stabilized=True)
    (0.25, 2.0)
    """
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    rank_stabilized: bool = False,
    dora: bool = False,
    tokens: list[int] | None = None,
    ranks: dict | None = None,
    alphas: dict | None = None,
) -> nn.Module:
    """Freeze a model and give its linear layers trained low-rank updates, in place.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2; which layers: "QLoRA:
        Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 4.
    PAPER CONTEXT: LoRA adapts attention weights alone; QLoRA finds that all linear layers are needed to match full
        fine-tuning, and that the rank matters little.
    INTUITION: the library is closed for rebuilding, but notes may be laid into the books.
    IMPLEMENTATION: everything is frozen first; each layer that a target names is then wrapped by `swap_modules`.
    WHY: by name, not by class: it works on grouped-query projections, MLPs, shared blocks and quantized layers.

    Args:
        rank, alpha: r, and the constant in the scale alpha / r; `ranks` and `alphas` map targets to exceptions.
        dropout: on what goes into A.
        targets: whole parts of dotted names: "q_proj", "attention", "mlp", "blocks.0" or "blocks.0.mlp.up_proj"; None:
            every linear layer.
        rank_stabilized: scale by alpha / sqrt(r). dora: `DoRALinear`.
        tokens: ids whose rows of embedding and head are trained, too (tokens that were just added).

    It notes itself in ``model.recipe``, so that `load` can rebuild a checkpoint. Returns the model.
    Raises ValueError for a value that cannot work, a target that names nothing, or a model that has adapters already.
    """
    given = {name: value for name, value in locals().items() if name != "model"}
    layers = linear_layers(model)
    _check(model, layers, **given)
    model.requires_grad_(False)
    kind = DoRALinear if dora else LoRALinear

    def make(name, old):
        r, a = _of(ranks, name, rank), _of(alphas, name, alpha)
        return kind(old, r, scale_of(a, r, rank_stabilized), dropout)

    # by identity: a layer that stands in two places has one name here, and is wrapped once for both
    chosen = {id(layer) for name, layer in layers.items() if targets is None or any(covers(t, name) for t in targets)}
    swap_modules(model, make, lambda name, module: id(module) in chosen)
    if tokens:
        for table in _tables(model):
            parametrize.register_parametrization(table, "weight", TrainedRows(table.weight, tokens))
    options = {name: value for name, value in given.items() if value is not None}
    model.recipe = [*getattr(model, "recipe", []), ["lora", options]]
    return model


def _of(exceptions: dict | None, name: str, usual):
    """The value of the first exception that covers a layer's name, or the usual one."""
    return next((value for target, value in (exceptions or {}).items() if covers(target, name)), usual)


def _tables(model: nn.Module) -> list[nn.Module]:
    """The modules whose weight has a row for each token: the embedding, and the head unless it is tied to it."""
    return [model.embed.tokens] if model.config.tie_head else [model.embed.tokens, model.head]


def _check(model, names, rank, alpha, dropout, targets, tokens, ranks, alphas, **_):
    """Raise ValueError for what add_lora cannot do."""
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(
            "this model has adapters already: merge them first (merge_lora, merge.py), or put several trained ones on "
            "a plain model (stack_adapters)"
        )
    for r in (rank, *(ranks or {}).values()):
        if type(r) is not int or r < 1:
            raise ValueError(f"rank={r} must be an integer of at least 1: use 4, 8 or 16")
    for a in (alpha, *(alphas or {}).values()):
        if not 0 < a < math.inf:
            raise ValueError(f"alpha={a} must be positive and finite: once or twice the rank is usual")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1: use 0.0 or 0.05")
    for target in [*(targets or []), *(ranks or {}), *(alphas or {})]:
        if not any(covers(target, name) for name in names):
            parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            raise ValueError(f"target {target!r} names no linear layer of this model: use some of {', '.join(parts)}")
    if targets is not None and not targets:
        raise ValueError("targets=[] leaves nothing to adapt: name some layers, or None for all")
    size = len(model.embed.tokens.weight) if tokens else 0
    if tokens and (len(set(tokens)) < len(tokens) or min(tokens) < 0 or max(tokens) >= size):
        raise ValueError(f"tokens={tokens} must be different ids below the vocabulary's {size}")


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """
    Within this block the model computes what its frozen base does

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2 (switching tasks).
    PAPER CONTEXT: the base stays in memory, and what is added to it is swapped.
    INTUITION: hold the slips back and read the book as it was printed.
    IMPLEMENTATION: a switch in every layer, trained rows of tokens included; blocks may be nested. A compiled model
        compiles once for each of the two states.
    WHY: whoever compares a model with the one that it came from (DPO's reference, for adapters that began with the
        run) needs no second copy of it.

    Raises ValueError for a model without adapters, which would be compared with itself.
    """
    layers = [module for module in model.modules() if isinstance(module, Adapted)]
    if not layers:
        raise ValueError("this model has no adapters to leave out: give it some with add_lora or load_adapter")
    before = [layer.on for layer in layers]
    try:
        for layer in layers:
            layer.on = False
        yield model
    finally:
        for layer, on in zip(layers, before, strict=True):
            layer.on = on


def merge_lora(model: nn.Module, weights: dict[str, float] | None = None) -> nn.Module:
    """Add the updates into the weights: the plain model that computes the same, in place.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    PAPER CONTEXT: W = W0 + B A is computed and stored once, so inference is as fast as without adapters.
    INTUITION: the notes are worked into the next edition.
    IMPLEMENTATION: every adapted layer is swapped for its `to_linear`; trained rows are written into their table. The
        sum is taken in float32 and rounded to what the base is stored in.
    WHY: a merged model needs nothing of this project: it is loaded, exported, quantized and served as any other.

    Args:
        weights: of the adapters of a stack (`stack_adapters`), by name; what is left out weighs 0.

    Everything is trainable again, and the recipe no longer names the adapters. Over quantized layers the merged ones
    are plain: such a model is exported, or quantized anew; as a checkpoint its recipe would not fit it, and
    merge.py refuses it.
    Raises ValueError where there is nothing to merge.
    """
    if choice_of(model) is not None:
        merge_stack(model, weights)
    elif weights is not None:
        raise ValueError(f"weights={weights} are for several adapters (stack_adapters); this model has one")
    else:
        _replace(model, lambda name, layer: layer.to_linear(), keep_rows=True)
    return _as_plain(model)


def remove_lora(model: nn.Module) -> nn.Module:
    """Take the adapters off, also a stack of them, in place: the model is its base, and all of it can be trained."""
    _replace(model, lambda name, layer: layer.base, keep_rows=False)
    return _as_plain(model)


def _replace(model: nn.Module, make, keep_rows: bool) -> None:
    """Swap adapted layers for others, and write trained rows into their tables or forget them."""
    kinds = (LoRALinear, StackedLoRA)
    if not any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError("this model has no adapters to merge or remove: give it some with add_lora or load_adapter")
    swap_modules(model, make, lambda name, module: isinstance(module, kinds))
    for table in [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]:
        parametrize.remove_parametrizations(table, "weight", leave_parametrized=keep_rows)


def _as_plain(model: nn.Module) -> nn.Module:
    """Everything can be trained, and the recipe knows of no adapter."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.recipe = [entry for entry in getattr(model, "recipe", []) if entry[0] != "lora"]
    return model


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write the adapter of a model in PEFT's format: adapter_config.json and adapter_model.safetensors.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2.
    PAPER CONTEXT: a checkpoint shrinks from the size of the model to that of A and B.
    INTUITION: the slips travel in an envelope, with a label that says for which book.
    IMPLEMENTATION: each layer tells its part; peft_format.py spells it. `base`: what the label says.
    WHY: `peft`, and every server that takes its adapters, reads what is trained here.

    Returns the folder. Raises ValueError for a model that has no adapter, or several.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("this model has no adapter of its own to save: give it one with add_lora")
    found = [module for module in model.modules() if isinstance(module, TrainedRows)]
    adapter = Adapter(
        parts={name: layer.part() for name, layer in layers.items()},
        dropout=next(iter(layers.values())).dropout,
        rank_stabilized=any(options.get("rank_stabilized") for name, options in model.recipe if name == "lora"),
        tokens=found[0].ids.tolist() if found else [],
        rows=[module.rows.detach() for module in found],
    )
    return write_adapter(model, adapter, folder, base)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a model the adapter that `save_adapter` or `peft` wrote, in place; it can be trained on.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2.
    PAPER CONTEXT: tasks are switched by swapping the LoRA weights alone, the base stays where it is.
    INTUITION: lay the slips of a colleague into your own copy of the book.
    IMPLEMENTATION: what the file holds for each layer decides what `add_lora` builds; then the values are copied. An
        adapter that the model has already is taken off.
    WHY: adapters are shared without their base, which everybody has.

    Args:
        folder: an adapter's folder, or ``org/name`` on the hub.

    Returns the model. Raises ValueError or FileNotFoundError for what is no adapter, does not fit the model, or asks
    for something that is not computed here; a plain model is then as it was.
    """
    adapted = any(isinstance(module, LoRALinear) for module in model.modules())
    with without_adapters(model) if adapted else contextlib.nullcontext():
        adapter = read_adapter(model, folder)  # rows that it does not name are the base's
    if adapted:
        remove_lora(model)
    ranks = {name: len(part.A) for name, part in adapter.parts.items()}
    power = 0.5 if adapter.rank_stabilized else 1.0
    alphas = {name: _neat(part.scale * ranks[name] ** power) for name, part in adapter.parts.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    add_lora(
        model, rank, alpha, adapter.dropout,
        None if len(ranks) == len(linear_layers(model)) else list(ranks),
        adapter.rank_stabilized,
        any(part.magnitude is not None for part in adapter.parts.values()),
        adapter.tokens or None,
        {name: r for name, r in ranks.items() if r != rank} or None,
        {name: a for name, a in alphas.items() if a != alpha} or None,
    )  # fmt: skip
    modules = dict(model.named_modules())
    for name, part in adapter.parts.items():
        modules[name].fill(part)
    with torch.no_grad():
        found = (module for module in model.modules() if isinstance(module, TrainedRows))
        for module, rows in zip(found, adapter.rows):
            module.rows.copy_(rows)
    return model


def _neat(number: float) -> float:
    """The number without the dust of floating-point division: 16.0 for 15.999999999999998."""
    return float(round(number)) if math.isclose(number, round(number), rel_tol=1e-9) else number


def trainable(model: nn.Module) -> tuple[int, int]:
    """(values that are trained, all values) of a model."""
    sizes = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return tuple(map(sum, zip(*sizes, strict=True)))
