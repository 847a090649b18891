"""The phone book: short names for what other floors provide.

A lower project may use what a higher one made (``--use flash``) without importing it: it asks the catalog by name,
and the catalog imports lazily. A checkpoint stores names and arguments from here, never import paths.
"""

import importlib
import inspect
import json
import re
import types
import typing

# group -> short name -> "module:function". A transform is `f(model, **json_args) -> model`.
GROUPS = {
    # change what the model computes or stores: recorded in the checkpoint's recipe and replayed by `load`
    "transforms": {
        "lora": "phase2_finetuning.project5_lora.lora:add_lora",
        "fp8_weights": "phase3_core_inference.project7_mixed_precision.float8_inference:store_float8",
    },
    # change how it is computed, not what: never recorded
    "runtime": {
        "checkpointing": "phase1_foundation.project3_pretrain.checkpointing:checkpoint_activations",
        "chunked_loss": "phase1_foundation.project3_pretrain.head:use_chunked_loss",
        "fused_loss": "phase1_foundation.project3_pretrain.fused_loss:use_fused_loss",
        "cudnn": "phase1_foundation.project3_pretrain.plans:use_cudnn_attention",
        "fp8": "phase3_core_inference.project7_mixed_precision.float8:convert_to_float8",
        "flash": "phase3_core_inference.project9_flash_attention.flash_attention:use_flash_attention",
    },
    # optimizer steps (trainer.Step and what stands in for it) by the precision that DTYPE names
    "steps": {
        "float32": "phase1_foundation.project3_pretrain.trainer:Step",
        "bfloat16": "phase1_foundation.project3_pretrain.trainer:Step",
        "float16": "phase3_core_inference.project7_mixed_precision.loss_scaling:ScaledStep",
        "master_bfloat16": "phase3_core_inference.project7_mixed_precision.master_weights:MasterStep",
        "master_float16": "phase3_core_inference.project7_mixed_precision.master_weights:ScaledMasterStep",
    },
    "architectures": {
        "transformer": "phase1_foundation.project3_pretrain.loading:build_transformer",
        "minimal_gpt": "phase1_foundation.project3_pretrain.loading:build_minimal_gpt",
    },
    # where keys and values of what was read are kept: f(specs, n_rows, capacity, dtype=, device=, ...) -> KVCache; for
    # compiled or recorded decoding also with padded=True and round_keys=: see project 8's KVCache
    "caches": {
        "contiguous": "phase3_core_inference.project8_kv_cache.kv_cache:ContiguousCache",
        "sliding": "phase3_core_inference.project8_kv_cache.sliding_cache:SlidingCache",
        "flash": "phase3_core_inference.project9_flash_attention.cached_attention:flash_cache",
        "paged": "phase4_advanced_inference.project13_paged_attention.paged_cache:PagedCache",
    },
    # who guesses tokens for speculation: f(...) -> Draft; "model" needs one, see project 11's draft_of
    "drafts": {
        "model": "phase4_advanced_inference.project11_speculative_decoding.drafts:ModelDraft",
        "ngram": "phase4_advanced_inference.project11_speculative_decoding.drafts:NGramDraft",
    },
    # how prompts are continued: f(model, tokenizer, prompts, params, ...) -> Generation, or a list of them
    "generators": {
        "cached": "phase3_core_inference.project8_kv_cache.generation:generate",
        "speculative": "phase4_advanced_inference.project11_speculative_decoding.speculative:speculative_generate",
    },
}


_PYTHON = {"True": True, "False": False, "None": None}  # beside JSON's true, false and null


def resolve(group, name):
    """Import and return what `name` stands for in `group`.

    Raises:
        ValueError: the group or the name is unknown; the message lists the known ones.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown catalog group {group!r}: the groups are {', '.join(GROUPS)}")
    if name not in GROUPS[group]:
        known = ", ".join(sorted(GROUPS[group])) or "none yet"
        raise ValueError(f"unknown name {name!r} in the catalog group {group!r}: known are {known}")
    module, function = GROUPS[group][name].split(":")
    return getattr(importlib.import_module(module), function)


def parse(text):
    """Split ``"int4:group_size=64,method=gptq"`` into ``("int4", {"group_size": 64, "method": "gptq"})``."""
    name, _, arguments = text.partition(":")
    options = {}
    for part in filter(None, re.split(r",(?=\w+=|$)", arguments)):  # a comma inside a value, as in [1,2], stays
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r}: write options as name:key=value,key=value, not {part!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = _PYTHON.get(value, value)  # a bare word is text
    return name, options


def _check_options(name, transform, options):
    """Raise ValueError for options that a transform does not take, by name or by the type of their value."""
    signature = inspect.signature(transform)
    try:
        signature.bind(None, **options)
    except TypeError as error:
        raise ValueError(f"{name} does not take the options {options} ({error}): it has {signature}") from error
    for key, value in options.items():
        parameter = signature.parameters.get(key)  # None for one of **options
        if parameter and not _fits(value, parameter.annotation):
            raise ValueError(f"{name} does not take {key}={value!r}: it has {signature}")


def _fits(value, kind):
    """Whether a JSON value is of an annotated type; one that JSON does not know, or no annotation, fits all."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    kind = typing.get_origin(kind) or kind  # list[str] -> list
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or kind not in (bool, int, str, list, dict, types.NoneType)


def apply(model, uses):
    """Apply transforms by name, in order, and record the persistent ones in ``model.recipe``.

    Args:
        model: the model; a transform may change it in place or return another one.
        uses: texts as `parse` reads them, or (name, arguments) pairs as a recipe holds them.

    Raises:
        ValueError: an unknown name, or arguments that the transform does not take, by name or by type.
    """
    for use in uses:
        name, options = parse(use) if isinstance(use, str) else use
        persistent = name in GROUPS["transforms"]
        if not persistent and name not in GROUPS["runtime"]:
            known = ", ".join(sorted({*GROUPS["transforms"], *GROUPS["runtime"]}))
            raise ValueError(f"unknown transform {name!r}: known are {known}")
        transform = resolve("transforms" if persistent else "runtime", name)
        recipe = list(getattr(model, "recipe", []))
        _check_options(name, transform, options)
        model = transform(model, **options)
        model.recipe = [*recipe, [name, options]] if persistent else recipe
    return model
