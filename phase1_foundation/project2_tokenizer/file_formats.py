"""
File Formats

This file implements the files of a tokenizer (our `.pkl`, GPT-2's two, Hugging Face's `tokenizer.json`), following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - `encoder.json` and `vocab.bpe`
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - the second rule

Readers return the arguments of `BPETokenizer`; nothing here knows how to encode.

Each component is explained with paper references for educational purposes.
"""

import json
import pickle
from pathlib import Path

from phase1_foundation.project2_tokenizer.bytes_alphabet import CHAR_TO_BYTE
from phase1_foundation.project2_tokenizer.patterns import GPT2, GPT2_DIGITS

_FIELDS = {"vocab": dict, "merges": list, "special_tokens": dict, "pattern": str, "rule": str}
_LONGEST_WORD = 1_000_000_000  # WordPiece gives up on longer pieces; ours never does


def checked_fields(fields: object) -> dict:
    """The arguments of `BPETokenizer` out of a dict that came from a file; ValueError where it is something else."""
    if not isinstance(fields, dict):
        raise ValueError(f"it holds a {type(fields).__name__}, not a dict")
    for name, kind in _FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{name} is {type(fields.get(name)).__name__}, expected {kind.__name__}")
    for name in ("vocab", "special_tokens"):
        if not all(type(k) is str and type(v) is int for k, v in fields[name].items()):
            raise ValueError(f"{name} must map str to int")
    if not all(type(m) in (tuple, list) and len(m) == 2 and all(type(t) is str for t in m) for m in fields["merges"]):
        raise ValueError("merges must be pairs of str")
    arguments = {name: fields[name] for name in _FIELDS}
    arguments["normalization"] = fields.get("normalization", "")
    arguments["whole_pieces"] = bool(fields.get("whole_pieces", 0))
    return arguments


def write_pickle(path: str | Path, fields: dict) -> None:
    """Write plain data as a pickle, whole or not at all."""
    from common.checkpoint import atomic_write

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, pickle.dumps(fields, protocol=4))


def _read_json(path: Path) -> dict:
    """A JSON object from a file that may be compressed."""
    from common.download import open_text

    try:
        with open_text(path) as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path} is not JSON ({error}): is it complete?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_gpt2_files(encoder_json: str | Path, vocab_bpe: str | Path) -> dict:
    """
    Read the two files that GPT-2 was published with.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2 (vocabulary of 50,257).
    PAPER CONTEXT: 256 bytes, 50,000 merges and one token for the end of a text.
    INTUITION: `vocab.bpe` is the algorithm, one merge a line; `encoder.json` numbers the results.
    IMPLEMENTATION: An entry of `encoder.json` that is neither a byte nor the result of a merge is a special token.
    WHY: With the same files every implementation must give the same ids; tests compare with tiktoken.
    """
    from common.download import open_text

    vocab = _read_json(Path(encoder_json))
    with open_text(Path(vocab_bpe)) as file:
        lines = file.read().split("\n")
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    merges = [tuple(line.split(" ")) for line in lines if line.strip()]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{vocab_bpe}: a line does not hold two tokens; is it GPT-2's vocab.bpe?")
    made = {left + right for left, right in merges} | set(CHAR_TO_BYTE)
    return {"vocab": vocab, "merges": merges, "special_tokens": {t: i for t, i in vocab.items() if t not in made}}


def read_huggingface(path: str | Path) -> dict:
    """
    Read a `tokenizer.json` of a byte-level tokenizer.

    PAPER: arXiv:1508.07909, section 3.2 (model BPE); arXiv:2403.01289, section 2 (model WordPiece without a prefix).
    PAPER CONTEXT: The file names a model, a pre-tokenizer, a normalizer and added tokens.
    INTUITION: Most published models are GPT-2's design with another pattern and other merges.
    IMPLEMENTATION: Whatever we cannot reproduce exactly raises ValueError: other models, prefixes, unknown steps.
    WHY: Ids that are nearly right are worse than an error: the model answers, and badly.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    content = _read_json(path)
    model, name = content.get("model") or {}, f"{path} cannot be read as byte-level BPE"
    kind = model.get("type", "BPE" if "merges" in model else None)
    longest_match = kind == "WordPiece" and model.get("continuing_subword_prefix") == ""
    if kind != "BPE" and not longest_match:
        raise ValueError(f"{name}: its model is {kind}; BPE is supported (GPT-2, Llama 3, Qwen, SmolLM and their kin)")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{name}: {option}={model[option]!r}, which changes the ids in ways we do not reproduce")
    added = _added_tokens(content, name)
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    foreign = [token for token in vocab if not set(token) <= CHAR_TO_BYTE.keys()]
    if foreign:
        raise ValueError(f"{name}: token {foreign[0]!r} is not written in the byte alphabet (SentencePiece style?)")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    return {
        "vocab": vocab,
        "merges": merges,
        "special_tokens": added,
        "pattern": _pattern_of(content.get("pre_tokenizer"), name),
        "rule": "longest_match" if longest_match else "merges",
        "normalization": _normalization_of(content.get("normalizer"), name),
        "whole_pieces": bool(model.get("ignore_merges")),
    }


def _added_tokens(content: dict, name: str) -> dict[str, int]:
    """The added tokens; ours match exactly, so flags that eat blanks around them are refused."""
    for token in content.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"{name}: added token {token['content']!r} has {flag}=true, which is not supported")
    return {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _normalization_of(normalizer: dict | None, name: str) -> str:
    """None or one Unicode normal form."""
    steps = [normalizer] if normalizer else []
    if steps and normalizer.get("type") == "Sequence":
        steps = normalizer["normalizers"]
    kinds = [step.get("type") for step in steps]
    if len(kinds) > 1 or not set(kinds) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise ValueError(f"{name}: normalizer {kinds}; none or one of NFC, NFD, NFKC, NFKD is supported")
    return kinds[0] if kinds else ""


def _pattern_of(pre_tokenizer: dict | None, name: str) -> str:
    """The expression that a pre-tokenizer amounts to."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if steps and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise ValueError(f"{name}: pre-tokenizer {kinds}; it must end with ByteLevel without a prefix space")
    own_pattern = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and own_pattern:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0].get("individual_digits"):
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not own_pattern and "Regex" in steps[0]["pattern"]:
        behaviour = steps[0]["behavior"].lower(), bool(steps[0].get("invert"))
        if behaviour in (("isolated", False), ("removed", True)):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"{name}: pre-tokenizer {kinds}; supported are ByteLevel, Digits + ByteLevel, Split + ByteLevel")


def _pre_tokenizer(pattern: str) -> dict:
    """The inverse of `_pattern_of`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pattern == GPT2:
        return byte_level
    if pattern == GPT2_DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def _model(fields: dict) -> dict:
    """The `model` entry: BPE, or for longest match WordPiece, which without its "##" is exactly that rule."""
    if fields["rule"] == "longest_match":
        unknown = next(iter(fields["vocab"]))  # must be a token; never used, since every byte is one
        limits = {"unk_token": unknown, "continuing_subword_prefix": "", "max_input_chars_per_word": _LONGEST_WORD}
        return {"type": "WordPiece", **limits, "vocab": fields["vocab"]}
    switches = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    switches |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": bool(fields["whole_pieces"])}
    merges = [f"{left} {right}" for left, right in fields["merges"]]  # the spelling that all versions read
    return {"type": "BPE", **switches, "vocab": fields["vocab"], "merges": merges}


def write_huggingface(path: str | Path, fields: dict) -> Path:
    """
    Write a `tokenizer.json` that Hugging Face's `tokenizers` reads and that gives the same ids.

    PAPER: arXiv:1508.07909, section 3.2; arXiv:2403.01289, section 2.
    PAPER CONTEXT: Both inference methods exist in other libraries, under other names.
    INTUITION: Translate words, not behaviour: every entry has a counterpart there.
    IMPLEMENTATION: `merges` becomes the model BPE. `longest_match` becomes WordPiece with an empty prefix, whose
        algorithm is the same; its merges are not part of the file, and tokenizers needs quadratic time on long pieces.
    WHY: A model is of use elsewhere only if its tokenizer comes along and agrees.
    """
    path = Path(path)
    path = path if path.suffix == ".json" else path / "tokenizer.json"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted(fields["special_tokens"].items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in specials],
        "normalizer": {"type": fields["normalization"]} if fields["normalization"] else None,
        "pre_tokenizer": _pre_tokenizer(fields["pattern"]),
        "post_processor": None,
        "decoder": byte_level,
        "model": _model(fields),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
