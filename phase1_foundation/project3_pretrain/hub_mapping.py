"""Tables between our names and those of Hugging Face's `transformers`, read in both directions by hub.py.

A family says how its config.json and its tensors are spelled. Nothing here looks at a model: adding a family is adding
a table. What a family cannot express shows when a config is written and read back: the two differ (`inexpressible`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.model_config import ModelConfig

_KINDS = get_type_hints(ModelConfig)  # ours -> the type of its values


def _typed(name: str, value, kind):
    """`value`, if it is of the type `kind`; raises ValueError naming it otherwise."""
    right = isinstance(value, int | float if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):  # Python takes True for an int
        raise ValueError(f"{name}={value!r} is not supported, only {getattr(kind, '__name__', kind)}")
    return value


class Field(NamedTuple):
    """One of our settings in config.json: its name there, its value where it is absent, and a translation of values."""

    theirs: str
    default: Any = None
    values: dict | None = None  # theirs -> ours


class Aspect(NamedTuple):
    """Settings that no single name holds: read(their config, n_layer) -> ours; write(our config) -> theirs."""

    read: Callable[[dict, int], dict]
    write: Callable[[ModelConfig], dict]


class Rule(NamedTuple):
    """One of their tensors: ours, joined along the output; `transpose` where they store (in, out) as GPT-2's Conv1D."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Our tensors -> theirs."""
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined.T if self.transpose and joined.dim() == 2 else joined

    def split(self, tensor: Tensor, like: list[Tensor]) -> list[Tensor]:
        """Their tensor -> ours, cut into the rows that `like` has."""
        tensor = tensor.T if self.transpose and tensor.dim() == 2 else tensor
        return list(tensor.split([part.shape[0] for part in like]))

    def at(self, layer: int) -> "Rule":
        """The rule of one layer."""
        return Rule(self.theirs.format(i=layer), tuple(name.format(i=layer) for name in self.ours), self.transpose)


@dataclass(frozen=True)
class Family:
    """How one `model_type` spells its configuration and its tensors."""

    model_type: str
    architecture: str  # the class that transformers builds
    prefix: str  # of all names but the head's; a checkpoint of the bare decoder omits it
    fields: dict[str, Field]  # ours -> theirs
    fixed: dict[str, Any]  # ours, the same in every model of the family
    demands: dict[str, tuple]  # theirs -> the values that we compute; the first is what absence means and what we write
    aspects: tuple[Aspect, ...]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()  # endings of tensors that old files hold and nobody needs
    extra: dict[str, Any] = field(default_factory=dict)  # written, never read

    def read_config(self, theirs: dict) -> ModelConfig:
        """config.json -> ModelConfig; raises ValueError for what this project does not compute."""
        for name, allowed in self.demands.items():
            if (value := theirs.get(name, allowed[0])) not in allowed:
                raise ValueError(f"{name}={value!r} is not supported for {self.model_type}, only {allowed}")
        values = dict(self.fixed)
        for ours, (name, default, translation) in self.fields.items():
            value = theirs.get(name, default)
            if translation is not None:
                if value not in list(translation):
                    raise ValueError(f"{name}={value!r} is not supported, only {', '.join(translation)}")
                value = translation[value]
            values[ours] = _typed(name, value, _KINDS[ours])
        for aspect in self.aspects:
            values |= aspect.read(theirs, values["n_layer"])
        return ModelConfig(**values)

    def write_config(self, config: ModelConfig) -> dict:
        """ModelConfig -> config.json."""
        theirs = {name: allowed[0] for name, allowed in self.demands.items()} | self.extra
        for ours, (name, _, translation) in self.fields.items():
            value = getattr(config, ours)
            if translation is not None:
                value = next((theirs for theirs, mine in translation.items() if mine == value), next(iter(translation)))
            theirs[name] = value
        for aspect in self.aspects:
            theirs |= aspect.write(config)
        return {"model_type": self.model_type, "architectures": [self.architecture], **theirs}

    def inexpressible(self, config: ModelConfig) -> dict[str, Any]:
        """Our settings that config.json of this family would lose: {name: value}."""
        back = self.read_config(self.write_config(config))
        default_scale = config.head_size**-0.5
        same = {"dropout": config.dropout, "attention_scale": config.attention_scale}  # dropout is no part of the model
        if config.attention_scale in (None, default_scale):
            back = dataclasses.replace(back, **same)
        names = [f.name for f in dataclasses.fields(config) if f.name != "dropout"]
        return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(back, name)}

    def tensor_rules(self, n_layer: int) -> Iterator[Rule]:
        """The rules, those of a layer once for each layer."""
        for rule in self.rules:
            layers = range(n_layer) if "{i}" in rule.theirs else range(1)
            yield from (rule.at(layer) for layer in layers)

    def canonical(self, name: str) -> str:
        """A tensor's full name, for a checkpoint that holds the bare decoder too."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with swapped layers (whatever has `to_linear`) as the plain linear layers they stand for."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    swapped = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in swapped)  # the quantized layer under an adapter
        if hasattr(module, "to_linear") and not inside:
            swapped.append(name)
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": tensor.detach() for key, tensor in module.to_linear().state_dict().items()}
    return state


# --- rotary positions: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before ---

# their rope_type -> our kind, and {our argument: theirs}
ROPE_TYPES = {
    "linear": ("linear", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_block_size": "original_max_position_embeddings",
        },
    ),
}


def _read_rope(theirs: dict, n_layer: int) -> dict:
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = _typed(name, theirs.get(name) or {}, dict)
    theta = float(_typed("rope_theta", rope.get("rope_theta", theirs.get("rope_theta", 10000.0)), float))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    if partial != 1.0 or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope parameters {rope} are not supported: one whole rotation for all layers is")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in list(ROPE_TYPES):
        raise ValueError(f"rope_type={kind!r} is not supported, only default, {', '.join(ROPE_TYPES)}")
    mine, names = ROPE_TYPES[kind]
    values = {"original_max_position_embeddings": theirs.get("max_position_embeddings")} | rope
    scaling = {ours: _typed(f"{name}: {key}", values.get(key), float) for ours, key in names.items()}
    return {"rope_theta": theta, "rope_scaling": {"kind": mine, **scaling}}


def _write_rope(config: ModelConfig) -> dict:
    scaling = None
    if config.rope_scaling is not None:
        kind, names = next((kind, n) for kind, (ours, n) in ROPE_TYPES.items() if ours == config.rope_scaling["kind"])
        scaling = {"rope_type": kind, **{theirs: config.rope_scaling[ours] for ours, theirs in names.items()}}
    new = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    return {"rope_parameters": new, "rope_theta": config.rope_theta, "rope_scaling": scaling}


ROPE = Aspect(_read_rope, _write_rope)


# --- sliding windows: none, one for all layers (Mistral), or some layers only (Qwen) ---


def _read_window(theirs: dict) -> int | None:
    return _typed("sliding_window", theirs.get("sliding_window", 4096), int | None)


def _read_uniform(theirs: dict, n_layer: int) -> dict:
    window = _read_window(theirs)
    return {"windows": None if window is None else (window,) * n_layer}


def _write_uniform(config: ModelConfig) -> dict:
    return {"sliding_window": config.windows[0] if config.windows else None}


def _read_layered(theirs: dict, n_layer: int) -> dict:
    sizes = {"full_attention": None, "sliding_attention": None}
    if theirs.get("use_sliding_window", False):
        sizes["sliding_attention"] = _read_window(theirs)
    kinds = _typed("layer_types", theirs.get("layer_types"), list | None)
    if not kinds:
        first = _typed("max_window_layers", theirs.get("max_window_layers", 28), int)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layer)]
    if len(kinds) != n_layer or any(kind not in list(sizes) for kind in kinds):
        raise ValueError(f"layer_types={kinds} is not supported, only {n_layer} of {', '.join(sizes)}")
    windows = tuple(sizes[kind] for kind in kinds)
    return {"windows": windows if any(windows) else None}


def _write_layered(config: ModelConfig) -> dict:
    windows = config.windows or (None,) * config.n_layer
    sizes = [window for window in windows if window is not None]
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": next((i for i, window in enumerate(windows) if window), config.n_layer),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


UNIFORM_WINDOW = Aspect(_read_uniform, _write_uniform)
LAYERED_WINDOWS = Aspect(_read_layered, _write_layered)

# --- the Llama line ---

_LLAMA_FIELDS = {
    "vocab_size": Field("vocab_size", 32000),
    "block_size": Field("max_position_embeddings", 2048),
    "n_layer": Field("num_hidden_layers", 32),
    "n_head": Field("num_attention_heads", 32),
    "n_kv_head": Field("num_key_value_heads"),
    "head_size": Field("head_dim"),
    "n_embd": Field("hidden_size", 4096),
    "n_ff": Field("intermediate_size", 11008),
    "norm_eps": Field("rms_norm_eps", 1e-6),
    "tie_head": Field("tie_word_embeddings", False),
}
_LLAMA_FIXED = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope"}
_LLAMA_DEMANDS = {"hidden_act": ("silu", "swish")}


def _linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"{ours}.weight",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))


_LLAMA_RULES = (
    Rule("model.embed_tokens.weight", ("embed.tokens.weight",)),
    Rule("model.layers.{i}.input_layernorm.weight", ("blocks.{i}.norm_1.weight",)),
    *_linear("model.layers.{i}.self_attn.q_proj", "blocks.{i}.attention.q_proj"),
    *_linear("model.layers.{i}.self_attn.k_proj", "blocks.{i}.attention.k_proj"),
    *_linear("model.layers.{i}.self_attn.v_proj", "blocks.{i}.attention.v_proj"),
    *_linear("model.layers.{i}.self_attn.o_proj", "blocks.{i}.attention.o_proj"),
    Rule("model.layers.{i}.self_attn.q_norm.weight", ("blocks.{i}.attention.q_norm.weight",)),
    Rule("model.layers.{i}.self_attn.k_norm.weight", ("blocks.{i}.attention.k_norm.weight",)),
    Rule("model.layers.{i}.post_attention_layernorm.weight", ("blocks.{i}.norm_2.weight",)),
    *_linear("model.layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate_proj"),
    *_linear("model.layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up_proj"),
    *_linear("model.layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down_proj"),
    Rule("model.norm.weight", ("norm.weight",)),
    Rule("lm_head.weight", ("head.weight",)),
)
_OLD_LLAMA_BUFFERS = ("rotary_emb.inv_freq",)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fields=_LLAMA_FIELDS
    | {
        "qkv_bias": Field("attention_bias", False),
        "out_bias": Field("attention_bias", False),
        "mlp_bias": Field("mlp_bias", False),
    },
    fixed=_LLAMA_FIXED,
    demands=_LLAMA_DEMANDS,
    aspects=(ROPE,),
    rules=_LLAMA_RULES,
    ignored=_OLD_LLAMA_BUFFERS,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    fields=_LLAMA_FIELDS
    | {
        "block_size": Field("max_position_embeddings", 131072),
        "n_kv_head": Field("num_key_value_heads", 8),
        "n_ff": Field("intermediate_size", 14336),
    },
    fixed=_LLAMA_FIXED,
    demands=_LLAMA_DEMANDS,
    aspects=(ROPE, UNIFORM_WINDOW),
    rules=_LLAMA_RULES,
    ignored=_OLD_LLAMA_BUFFERS,
)
_QWEN_FIELDS = _LLAMA_FIELDS | {
    "vocab_size": Field("vocab_size", 151936),
    "block_size": Field("max_position_embeddings", 32768),
    "n_kv_head": Field("num_key_value_heads", 32),
    "n_ff": Field("intermediate_size", 22016),
}
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    fields=_QWEN_FIELDS,
    fixed=_LLAMA_FIXED | {"qkv_bias": True},
    demands=_LLAMA_DEMANDS,
    aspects=(ROPE, LAYERED_WINDOWS),
    rules=_LLAMA_RULES,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    fields=_QWEN_FIELDS
    | {
        "head_size": Field("head_dim", 128),
        "qkv_bias": Field("attention_bias", False),
        "out_bias": Field("attention_bias", False),
    },
    fixed=_LLAMA_FIXED | {"qk_norm": True},
    demands=_LLAMA_DEMANDS,
    aspects=(ROPE, LAYERED_WINDOWS),
    rules=_LLAMA_RULES,
)

# --- GPT-2: linear layers stored (in, out), queries, keys and values in one ---


def _conv1d(theirs: str, *ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transpose=True),
        Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours)),
    )


_H = "transformer.h.{i}"
_QKV = tuple(f"blocks.{{i}}.attention.{name}_proj" for name in "qkv")

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields={
        "vocab_size": Field("vocab_size", 50257),
        "block_size": Field("n_positions", 1024),
        "n_layer": Field("n_layer", 12),
        "n_head": Field("n_head", 12),
        "n_embd": Field("n_embd", 768),
        "n_ff": Field("n_inner"),
        "norm_eps": Field("layer_norm_epsilon", 1e-5),
        "mlp": Field(
            "activation_function",
            "gelu_new",
            {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu2": "relu2"},
        ),
        "tie_head": Field("tie_word_embeddings", True),
    },
    fixed={
        "norm": "layernorm",
        "positions": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
    },
    demands={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    aspects=(),
    rules=(
        Rule("transformer.wte.weight", ("embed.tokens.weight",)),
        Rule("transformer.wpe.weight", ("embed.positions.weight",)),
        *_linear(f"{_H}.ln_1", "blocks.{i}.norm_1"),
        *_conv1d(f"{_H}.attn.c_attn", *_QKV),
        *_conv1d(f"{_H}.attn.c_proj", "blocks.{i}.attention.o_proj"),
        *_linear(f"{_H}.ln_2", "blocks.{i}.norm_2"),
        *_conv1d(f"{_H}.mlp.c_fc", "blocks.{i}.mlp.up_proj"),
        *_conv1d(f"{_H}.mlp.c_proj", "blocks.{i}.mlp.down_proj"),
        *_linear("transformer.ln_f", "norm"),
        Rule("lm_head.weight", ("head.weight",)),
    ),
    ignored=(".attn.bias", ".attn.masked_bias"),
    extra={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
)

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}
