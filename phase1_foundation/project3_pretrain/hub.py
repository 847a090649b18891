"""
Hugging Face folders

This file implements reading and writing models in Hugging Face's format; the architectures follow:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2
- "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023) - Llama, and what followed its shape

Each component is explained with paper references for educational purposes.
"""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoint import atomic_path, atomic_write
from common.device import check_device
from phase1_foundation.project3_pretrain.gguf_export import to_gguf
from phase1_foundation.project3_pretrain.hub_mapping import FAMILIES, Family, Rule, plain_state
from phase1_foundation.project3_pretrain.hub_tokenizer import check_writable, read_tokenizer, write_tokenizer
from phase1_foundation.project3_pretrain.model import ModelConfig, Transformer

__all__ = ["from_huggingface", "to_gguf", "to_huggingface"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def from_huggingface(path_or_repo, device="cpu", dtype: torch.dtype | None = None):
    """Read a Hugging Face folder, or fetch ``org/name`` from the hub: (model in eval mode, tokenizer).

    PAPER: "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971, section 2.2; GPT-2, section 2.3.
    PAPER CONTEXT: published weights are worth what the architecture around them computes: every detail must agree.
    INTUITION: a dictionary between two dialects of one language; the tables are in hub_mapping.py.
    IMPLEMENTATION: the model is built on `meta`, names and shapes are compared, then each tensor is read into place.
    WHY: every later project works on published models, not only on those trained here.

    Args:
        path_or_repo: a folder with config.json and safetensors, or ``org/name``.
        device, dtype: where the weights go, and as what (None: as stored; in the widest of several types).

    The tokenizer is None for a folder that holds none.
    Raises ValueError for what is not supported or does not fit, FileNotFoundError for what is not there.
    """
    device = check_device(device)
    folder = resolve_folder(path_or_repo)
    family, config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    with ExitStack() as stack:
        stored = _open_weights(folder, family, stack)
        rules = _match(model, family, stored, folder)
        common_dtype = _common_dtype([stored[rule.theirs] for rule in rules], folder)
        model.to(dtype or common_dtype).to_empty(device=device)
        state = model.state_dict()
        with torch.no_grad():
            for rule in rules:
                source, targets = stored[rule.theirs], [state[name] for name in rule.ours]
                for target, part in zip(targets, rule.split(source.file.get_tensor(source.name), targets), strict=True):
                    target.copy_(part)
    return model.eval(), read_tokenizer(folder)


def to_huggingface(model: nn.Module, tokenizer, path, family: str | None = None, shard_bytes: int = 5 * 10**9) -> Path:
    """Write config.json, safetensors and tokenizer files that `transformers` and `from_huggingface` read.

    PAPER: the same as `from_huggingface`, read from right to left.
    PAPER CONTEXT: a model is shared as weights plus the few numbers that say how to use them.
    INTUITION: pack for a neighbour who uses other drawers: same clothes, other labels.
    IMPLEMENTATION: the first family whose config.json loses nothing; layers that were swapped (LoRA, quantized) are
        returned to plain ones by their `to_linear()`; config.json goes first and comes last, so half an export is none.
    WHY: what is trained here can be served, measured and fine-tuned anywhere.

    Args:
        model: a `Transformer`; tokenizer: one that can be written, or None for the weights alone.
        path: the folder; family: a model_type to insist on; shard_bytes: the most that one file holds.

    Raises ValueError if no family expresses the model.
    """
    chosen = choose_family(model.config, family)
    state = plain_state(model)
    rules = [rule for rule in chosen.tensor_rules(model.config.n_layer) if rule.ours[0] in state]
    strangers = sorted(set(state) - {name for rule in rules for name in rule.ours})
    if strangers:
        raise ValueError(
            f"{len(strangers)} tensors have no place in a {chosen.model_type} folder ({', '.join(strangers[:4])}): "
            f"merge or undo what changed the model first"
        )
    check_writable(tokenizer)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # from here to the new one nobody takes the folder for a model
    config = chosen.write_config(model.config)
    name = str(state[rules[0].ours[0]].dtype).removeprefix("torch.")
    ids = write_tokenizer(tokenizer, folder, model.config.block_size)
    config |= {"dtype": name, "torch_dtype": name, **ids}  # transformers 5, and those before
    _write_weights(folder, rules, state, shard_bytes)
    atomic_write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def resolve_folder(path_or_repo) -> Path:
    """The folder of a model: as given, or fetched from the hub (or its local cache)."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if not REPOSITORY.fullmatch(str(path_or_repo)):
        raise FileNotFoundError(f"{path_or_repo} is no folder, and no org/name of a model on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{path_or_repo} is no folder here, and to fetch it from the hub huggingface_hub is needed: "
            f"uv sync --group data"
        ) from error
    patterns = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{path_or_repo} is no folder here and could not be fetched from the Hugging Face hub ({reason}). Missing: "
            f"config.json and *.safetensors. Check the name and the connection, or give a folder that holds them."
        ) from error


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and shape that config.json describes."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: is it the folder of a model?")
    theirs = _read_json(path)
    kind = theirs.get("model_type")
    if kind not in list(FAMILIES):
        raise ValueError(
            f"{path}: model_type={kind!r} (architectures={theirs.get('architectures')}) is not supported; "
            f"supported are {', '.join(FAMILIES)} (SmolLM is a llama)"
        )
    if theirs.get("quantization_config"):
        raise ValueError(f"{path}: quantized weights are not read; use the folder of the unquantized model")
    try:
        return FAMILIES[kind], FAMILIES[kind].read_config(theirs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object with names: fetch it again")
    return content


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The first family (or the one named) that can express `config`."""
    if name is not None and name not in FAMILIES:
        raise ValueError(f"family={name!r} is not known: use one of {', '.join(FAMILIES)}")
    candidates = [FAMILIES[name]] if name else list(FAMILIES.values())
    losses = {family.model_type: family.inexpressible(config) for family in candidates}
    for family in candidates:
        if not losses[family.model_type]:
            return family
    reasons = "; ".join(
        f"{kind} cannot express {', '.join(f'{k}={v}' for k, v in loss.items())}" for kind, loss in losses.items()
    )
    raise ValueError(
        f"no Hugging Face architecture computes this model: {reasons}. Save it as a .pt checkpoint instead."
    )


class _Stored:
    """One tensor in a safetensors file that is open."""

    def __init__(self, file, name: str):
        self.file, self.name = file, name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self.file.get_slice(self.name)[:0].dtype  # reads nothing


def _common_dtype(tensors: list[_Stored], folder: Path) -> torch.dtype:
    """The narrowest type that holds the values of all tensors."""
    dtypes = {tensor.dtype for tensor in tensors}
    odd = [str(dtype) for dtype in dtypes if not dtype.is_floating_point]
    if odd:
        raise ValueError(f"{folder}: weights of type {', '.join(odd)} are not read, only floating-point ones")
    return functools.reduce(torch.promote_types, dtypes)


def _open_weights(folder: Path, family: Family, stack: ExitStack) -> dict[str, _Stored]:
    """Every tensor of the folder by its canonical name."""
    stored = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error
        stored |= {family.canonical(name): _Stored(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by the index if there is one."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX}: weight_map={weight_map!r:.60} must name a file for each tensor")
        names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle that could run code when read: only safetensors are. Convert it "
            f"with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: the download is incomplete, fetch it again")


def _match(model: Transformer, family: Family, stored: dict[str, _Stored], folder: Path) -> list[Rule]:
    """The rules that fill `model`; raises ValueError naming what is missing, unexpected or of a wrong shape."""
    state = model.state_dict()
    rules = [rule for rule in family.tensor_rules(model.config.n_layer) if rule.ours[0] in state]
    needed = {rule.theirs: tuple(rule.join([state[name] for name in rule.ours]).shape) for rule in rules}
    tied = ("lm_head.weight",) if model.config.tie_head else ()  # some files store the shared matrix twice
    missing = sorted(set(needed) - set(stored))
    unexpected = sorted(n for n in set(stored) - set(needed) if not n.endswith(family.ignored + tied))
    wrong = [
        f"{name} is {stored[name].shape}, not {shape}"
        for name, shape in needed.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}")
    return rules


def _shards(rules: list[Rule], state: dict[str, Tensor], shard_bytes: int) -> Iterator[list[Rule]]:
    """Rules in groups whose tensors fill at most `shard_bytes` (one tensor at least)."""
    group, size = [], 0
    for rule in rules:
        n_bytes = sum(state[name].nbytes for name in rule.ours)
        if group and size + n_bytes > shard_bytes:
            yield group
            group, size = [], 0
        group, size = [*group, rule], size + n_bytes
    yield group


def _write_weights(folder: Path, rules: list[Rule], state: dict[str, Tensor], shard_bytes: int) -> None:
    """One safetensors file, or several with an index; files of an earlier export go."""
    groups = list(_shards(rules, state, shard_bytes))
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, group in zip(names, groups, strict=True):
        tensors, seen = {}, set()
        for rule in group:
            tensor = rule.join([state[n] for n in rule.ours]).cpu().contiguous()
            again = tensor.data_ptr() in seen  # a block that stands in several places: safetensors wants copies
            tensors[rule.theirs] = tensor.clone() if again else tensor
            seen.add(tensor.data_ptr())
        with atomic_path(folder / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if count > 1:
        total = sum(state[name].nbytes for rule in rules for name in rule.ours)
        weight_map = {rule.theirs: name for name, group in zip(names, groups, strict=True) for rule in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()
