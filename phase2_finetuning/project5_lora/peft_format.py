"""
PEFT's format

This file implements reading and writing adapters as Hugging Face's `peft` does, following:
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - A and B of each layer
- "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al., 2024) - and a magnitude (use_dora)
- "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (Kalajdzievski, 2023) - another scale (use_rslora)

Each component is explained with paper references for educational purposes.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.checkpoint import atomic_path, atomic_write
from phase1_foundation.project3_pretrain.hub import choose_family, resolve_folder
from phase2_finetuning.project5_lora.layers import Part, linear_layers, weight_of

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"  # the name says delta; the values are whole rows

# Options of an adapter that say nothing about what is computed; all others, but those read below, must be off.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "rank_pattern",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


class Adapter(NamedTuple):
    """An adapter apart from its model, in our names."""

    parts: dict[str, Part]  # by layer
    dropout: float = 0.0
    rank_stabilized: bool = False
    tokens: Sequence[int] = ()  # whose rows are trained
    rows: Sequence[Tensor] = ()  # (n, C): those of the embedding and, unless it is tied, of the head


class Names(NamedTuple):
    """How Hugging Face spells a model's modules; one of theirs may be several of ours (GPT-2's c_attn)."""

    layers: dict[str, tuple[str, ...]]  # theirs -> ours, linear layers
    tables: dict[str, str]  # theirs -> ours, embedding and head
    transposed: bool  # GPT-2's layers are stored (in, out)


def names_of(model: nn.Module) -> Names:
    """The spelling of the family that expresses the model; our own where none does."""
    ours, tables = linear_layers(model), ["embed.tokens"] + ["head"] * (not model.config.tie_head)
    try:
        rules = list(choose_family(model.config).tensor_rules(model.config.n_layer))
    except ValueError:  # peft can wrap our own model, too, and would then use our names
        return Names({name: (name,) for name in ours}, {name: name for name in tables}, False)
    first = {}  # a layer that stands in several places has one name in `ours`
    alias = {name: first.setdefault(id(m), name) for name, m in model.named_modules(remove_duplicate=False)}
    modules = {}
    for rule in rules:
        if rule.theirs.endswith(".weight"):
            names = (name.removesuffix(".weight") for name in rule.ours)
            modules[rule.theirs.removesuffix(".weight")] = tuple(alias.get(name, name) for name in names)
    return Names(
        {theirs: names for theirs, names in modules.items() if all(name in ours for name in names)},
        {theirs: names[0] for theirs, names in modules.items() if names[0] in tables},
        any(rule.transpose for rule in rules),
    )


def endings(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest endings of dotted names that pick `chosen` out of `everything`, as `target_modules` does.

    >>> endings(["0.attn.c_proj", "1.attn.c_proj"], ["0.attn.c_proj", "0.mlp.c_proj", "1.attn.c_proj"])
    ['attn.c_proj']
    """
    chosen, everything, found = set(chosen), list(everything), set()
    for name in chosen:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if all(other in chosen for other in everything if f".{other}".endswith(f".{ending}")):
                break
        found.add(ending)
    return sorted(found)


# --- one layer of theirs, several of ours ---


def join(parts: Sequence[Part | None], layers: Sequence[nn.Module]) -> Part:
    """
    The update of a fused layer, from those of the layers it is made of

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1, equation 3.
    PAPER CONTEXT: an update of rank r; nothing is said of layers that share one matrix, as GPT-2's q, k and v do.
    INTUITION: three short strips of slips on one long page: each stays on its own third.
    IMPLEMENTATION: the A stand below each other, the B on a block diagonal, so the rank is the sum. Where all share one
        A (as after `split`), it is written once. A layer without an update has zeros, and its own length for DoRA.
    WHY: exact, while separate updates of q, k and v have no common A.

    Args:
        parts: one for each of `layers`, or None; at least one is there.
    """
    if len(parts) == 1:
        return parts[0]
    present = [part for part in parts if part is not None]
    A, scale = present[0].A, present[0].scale
    shared = all(torch.equal(part.A, A) for part in present)
    blocks = [
        A.new_zeros(layer.out_features, len(A) * shared) if part is None else part.B * (part.scale / scale)
        for part, layer in zip(parts, layers, strict=True)
    ]
    lengths = [
        part.magnitude if part is not None else weight_of(layer).detach().float().norm(dim=1)
        for part, layer in zip(parts, layers, strict=True)
        if present[0].magnitude is not None
    ]
    return Part(
        A if shared else torch.cat([part.A for part in present]),
        torch.cat(blocks) if shared else torch.block_diag(*blocks),
        scale,
        torch.cat(lengths) if lengths else None,
    )


def split(part: Part, layers: Sequence[nn.Module]) -> list[Part | None]:
    """The inverse of `join`: each layer's rows of B; columns that are zero there go, unless all of B is (untrained)."""
    if len(layers) == 1:
        return [part]
    heights, found = [layer.out_features for layer in layers], []
    lengths = [None] * len(layers) if part.magnitude is None else part.magnitude.split(heights)
    for B, length in zip(part.B.split(heights), lengths, strict=True):
        used = (B != 0).any(dim=0) if part.B.any() else torch.ones(len(part.A), dtype=torch.bool)
        if not used.any() and length is None:
            found.append(None)  # nothing is added to this layer
            continue
        used |= not used.any()
        found.append(Part(part.A[used], B[:, used], part.scale, length))
    return found


# --- writing ---


def write_adapter(model: nn.Module, adapter: Adapter, folder: str | Path, base: str | None = None) -> Path:
    """Write an adapter of `model` as a PEFT folder; `base` is where peft will say that its model lies."""
    names, layers = names_of(model), linear_layers(model)
    fused = {
        theirs: join([adapter.parts.get(name) for name in ours], [layers[name] for name in ours])
        for theirs, ours in names.layers.items()
        if any(name in adapter.parts for name in ours)
    }
    tensors = {}
    for theirs, part in fused.items():
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = part.A
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = part.B
        if part.magnitude is not None:
            tensors[f"{PREFIX}{theirs}.lora_magnitude_vector"] = part.magnitude
    tensors |= {f"{PREFIX}{theirs}.{ROWS}": rows for theirs, rows in zip(names.tables, adapter.rows)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # from here to the new one nobody takes the folder for an adapter
    tensors = {name: tensor.float().cpu().clone().contiguous() for name, tensor in tensors.items()}  # none is shared
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    atomic_write(folder / CONFIG, json.dumps(_config(fused, adapter, names, base), indent=2) + "\n")
    return folder


def _config(fused: dict[str, Part], adapter: Adapter, names: Names, base: str | None) -> dict:
    """The contents of adapter_config.json."""
    ranks = {name: len(part.A) for name, part in fused.items()}
    power = 0.5 if adapter.rank_stabilized else 1.0
    alphas = {name: round(part.scale * ranks[name] ** power, 9) for name, part in fused.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    tokens = list(adapter.tokens)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": endings(fused, names.layers),
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": adapter.rank_stabilized,
        "use_dora": any(part.magnitude is not None for part in fused.values()),
        "trainable_token_indices": _spell_tokens(tokens, names) if tokens else None,
        "bias": "none",
        "fan_in_fan_out": names.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _pattern(values: dict[str, float], usual: float) -> dict[str, float]:
    """The values that are not the usual one, by the shortest endings of names."""
    exceptions = sorted(set(values.values()) - {usual})
    return {e: v for v in exceptions for e in endings([n for n, value in values.items() if value == v], values)}


def _spell_tokens(tokens: list[int], names: Names) -> list[int] | dict[str, list[int]]:
    """A plain list concerns the embedding, and a head that is tied to it; a head of its own must be named."""
    return tokens if len(names.tables) == 1 else {theirs.split(".")[-1]: tokens for theirs in names.tables}


# --- reading ---


def read_adapter(model: nn.Module, path: str | Path) -> Adapter:
    """
    The adapter in a PEFT folder, as it fits `model`

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1; "A Rank Stabilization
        Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, theorem 3.2 (use_rslora).
    PAPER CONTEXT: the scale is alpha / r or alpha / sqrt(r); A and B alone do not say which.
    INTUITION: open the envelope, and check the label before the slips go into the book.
    IMPLEMENTATION: which layers have an update, and of what rank, is read from the tensors, not from the patterns of
        the configuration, which are peft's own way to choose layers.
    WHY: an option that is silently ignored gives wrong logits; so what is not known must be off.

    Raises FileNotFoundError or ValueError naming the file for what is no adapter, or does not fit.
    """
    folder = resolve_folder(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    names, layers = names_of(model), linear_layers(model)
    parts = {}
    for theirs, ours in names.layers.items():
        modules = [layers[name] for name in ours]
        part = _take_part(folder, config, tensors, theirs, modules)
        if part is not None:
            found = split(part, modules)
            parts |= {name: one for name, one in zip(ours, found, strict=True) if one is not None}
    tokens, rows = _take_rows(folder, config, tensors, names, model)
    if tensors:
        raise ValueError(
            f"{folder}: {len(tensors)} tensors have no place in this model ({', '.join(sorted(tensors)[:3])}): is the "
            f"adapter one for another model? This one has {', '.join(endings(names.layers, names.layers))}"
        )
    if not parts:
        raise ValueError(f"{folder} holds no update of a linear layer: it is no LoRA adapter")
    return Adapter(parts, float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora")), tokens, rows)


def _read_config(folder: Path) -> dict:
    """adapter_config.json, refused if it asks for what is not computed here."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: is it the folder of an adapter?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no adapter's ({error}): fetch it again") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r} is not supported, only LORA")
    wrong = {name: value for name, value in config.items() if value and name not in _HARMLESS | _READ}
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    if (start := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        wrong["init_lora_weights"] = start  # PiSSA and its relatives change the base's weights, too
    if wrong:
        raise ValueError(
            f"{path}: {', '.join(f'{name}={value!r}' for name, value in wrong.items())} is not computed here, only "
            f"LoRA, rsLoRA and DoRA of linear layers and trainable_token_indices: merge the adapter with peft "
            f"(merge_and_unload) and load the model"
        )
    dropout = config.get("lora_dropout") or 0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout={dropout!r} must be a number of at least 0 and below 1")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names without peft's prefix."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [f.name for f in folder.glob("adapter_model.bin")]
        hint = f"it holds {pickles[0]}, a pickle that could run code: save it anew with peft" if pickles else (
            "it is incomplete, or there is only adapter_model.bin, a pickle that could run code, which is not fetched: "
            "save it anew with peft"
        )  # fmt: skip
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: {hint}")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error


def _take_part(folder: Path, config: dict, tensors: dict, theirs: str, layers: list[nn.Module]) -> Part | None:
    """Take one layer's tensors out of `tensors`; None where it has none."""
    wanted = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * bool(config.get("use_dora"))
    found = [tensors.pop(f"{theirs}.{ending}", None) for ending in wanted]
    if all(tensor is None for tensor in found):
        return None
    lost = [f"{theirs}.{ending}" for ending, tensor in zip(wanted, found, strict=True) if tensor is None]
    if lost:
        raise ValueError(f"{folder} lacks {', '.join(lost)}: it is incomplete, fetch it again")
    r, n_in, n_out = found[0].shape[:1].numel(), layers[0].in_features, sum(layer.out_features for layer in layers)
    if found[0].dim() != 2 or r < 1:
        raise ValueError(f"{folder}: {theirs}.lora_A.weight is {tuple(found[0].shape)}, not (rank, {n_in})")
    for ending, tensor, shape in zip(wanted, found, ((r, n_in), (n_out, r), (n_out,))):
        _check_shape(folder, f"{theirs}.{ending}", tensor, shape)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, theirs, config.get("lora_alpha"))
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    return Part(found[0], found[1], scale, found[2] if len(found) > 2 else None)


def _check_shape(folder: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError that names the tensor and both shapes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{folder}: {name} is {tuple(tensor.shape)}, this model's layer takes {shape}: the adapter was made for a "
            f"model of another shape"
        )


def _by_pattern(pattern: dict, name: str, usual: float) -> float:
    """The value of the first regular expression that matches the end of a name, as peft reads its patterns."""
    try:
        value = next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), usual)
    except (AttributeError, re.error) as error:
        raise ValueError(f"alpha_pattern={pattern!r} maps no names to numbers ({error})") from None
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"alpha={value!r} of {name} must be a positive number")
    return value


def _take_rows(folder: Path, config: dict, tensors: dict, names: Names, model: nn.Module):
    """(tokens, rows of each table) of what `trainable_token_indices` trained; ([], []) where nothing was."""
    given = config.get("trainable_token_indices") or {}
    by_table = given if isinstance(given, dict) else {next(iter(names.tables)).split(".")[-1]: given}
    if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in by_table.values()):
        raise ValueError(f"{folder}: trainable_token_indices={given!r} must hold ids of tokens")
    tokens = list(dict.fromkeys(token for ids in by_table.values() for token in ids))
    n_tokens, tables = len(model.embed.tokens.weight), {}
    if not tokens:
        return [], []
    if max(tokens) >= n_tokens:
        raise ValueError(
            f"{folder}: it trained token {max(tokens)}, and this model has {n_tokens}: add the tokens first"
        )
    for theirs, ours in names.tables.items():
        # a table that the adapter does not name keeps its rows
        rows = model.get_submodule(ours).weight.detach()[tokens].float().clone()
        ids = next((ids for key, ids in by_table.items() if f".{theirs}".endswith(f".{key}")), [])
        tensor = tensors.pop(f"{theirs}.{ROWS}", None)
        if ids and tensor is None:
            raise ValueError(f"{folder} lacks {theirs}.{ROWS}: it is incomplete, fetch it again")
        if tensor is not None:
            _check_shape(folder, f"{theirs}.{ROWS}", tensor, (len(ids), rows.shape[1]))
            rows[[tokens.index(token) for token in ids]] = tensor.to(rows)
        tables[ours] = rows
    return tokens, list(tables.values())
