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
import unicodedata
from pathlib import Path

from phase1_foundation.project2_tokenizer.bytes_alphabet import CHAR_TO_BYTE
from phase1_foundation.project2_tokenizer.patterns import GPT2, GPT2_DIGITS

_FIELDS = {"vocab": dict, "merges": list, "special_tokens": dict, "pattern": str, "rule": str}
_OTHER_ENTRIES = ("truncation", "padding", "post_processor")  # of tokenizer.json: written back, not followed
_LONGEST_WORD = 1_000_000_000  # WordPiece gives up on longer pieces; ours never does


def checked_fields(fields: object) -> dict:
    """The arguments of `BPETokenizer` out of a dict that came from a file; ValueError where it is something else."""
    if not isinstance(fields, dict):
        raise ValueError(f"it holds a {type(fields).__name__}, not a dict")
    if fields.get("kind", "bpe") != "bpe":
        raise ValueError(f"kind={fields['kind']!r}: it is another kind of tokenizer, not bpe")
    for name, kind in _FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{name} is {type(fields.get(name)).__name__}, expected {kind.__name__}")
    for name in ("vocab", "special_tokens"):
        if not all(type(k) is str and type(v) is int for k, v in fields[name].items()):
            raise ValueError(f"{name} must map str to int")
    if not all(type(m) in (tuple, list) and len(m) == 2 and all(type(t) is str for t in m) for m in fields["merges"]):
        raise ValueError("merges must be pairs of str")
    arguments = {name: fields[name] for name in _FIELDS}
    arguments["whole_pieces"] = bool(fields.get("whole_pieces", 0))
    for name in ("normalization", "other_entries"):  # files of earlier versions have none of what follows
        arguments[name] = fields.get(name, "")
        if type(arguments[name]) is not str:
            raise ValueError(f"{name} is {type(arguments[name]).__name__}, expected str")
    for name in ("always_matched", "matched_late"):
        arguments[name] = fields.get(name, [])
        if type(arguments[name]) is not list or not all(type(token) is str for token in arguments[name]):
            raise ValueError(f"{name} must be a list of str")
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
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, RecursionError) as error:
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
    if not isinstance(model, dict):
        raise ValueError(f"{name}: model is a {type(model).__name__}, expected a JSON object")
    kind = model.get("type", "BPE" if "merges" in model else None)
    longest_match = kind == "WordPiece" and model.get("continuing_subword_prefix") == ""
    if kind != "BPE" and not longest_match:
        raise ValueError(f"{name}: its model is {kind}; BPE is supported (GPT-2, Llama 3, Qwen, SmolLM and their kin)")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"{name}: {option}={model[option]!r}, which changes the ids in ways we do not reproduce")
    normalization = _normalization_of(content.get("normalizer"), name)
    added = _added_tokens(content, normalization, name)
    vocab = {t: i for t, i in _entry(model, "vocab", dict, name).items() if t not in added["special_tokens"]}
    foreign = [token for token in vocab if not set(token) <= CHAR_TO_BYTE.keys()]
    if foreign:
        raise ValueError(f"{name}: token {foreign[0]!r} is not written in the byte alphabet (SentencePiece style?)")
    others = {key: content[key] for key in _OTHER_ENTRIES if content.get(key)}
    return {
        "vocab": vocab,
        "merges": [] if longest_match else _merges(_entry(model, "merges", list, name), name),
        **added,
        "pattern": _pattern_of(content.get("pre_tokenizer"), name),
        "rule": "longest_match" if longest_match else "merges",
        "normalization": normalization,
        "whole_pieces": bool(model.get("ignore_merges")),
        "other_entries": json.dumps(others) if others else "",
    }


def _entry(entries: dict, field: str, kind: type, name: str) -> object:
    """An entry that must be there, and of this type."""
    if type(entries.get(field)) is not kind:
        raise ValueError(f"{name}: {field} is {entries.get(field)!r:.50}, expected {kind.__name__}")
    return entries[field]


def _objects(value: object, field: str, name: str) -> list[dict]:
    """A list of JSON objects, or nothing."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{name}: {field} is {value!r:.50}, expected JSON objects")
    return value


def _steps(step: object, field: str, parts: str, name: str) -> list[dict]:
    """A normalizer or pre-tokenizer as a list: itself, or the parts of a Sequence."""
    steps = _objects(None if step is None else [step], field, name)
    return _objects(steps[0].get(parts), parts, name) if steps and steps[0].get("type") == "Sequence" else steps


def _merges(entries: list, name: str) -> list[tuple[str, str]]:
    """Merges, each one string with a blank inside or a list of two."""
    merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in entries]
    for merge, entry in zip(merges, entries):
        if not isinstance(merge, (tuple, list)) or len(merge) != 2 or not all(isinstance(t, str) for t in merge):
            raise ValueError(f"{name}: merges holds {entry!r:.50}, expected two tokens")
    return [tuple(merge) for merge in merges]


def _added_tokens(content: dict, normalization: str, name: str) -> dict:
    """
    The added tokens. Those that are not `special` are found in any text; those that are `normalized` after the others.

    Ours match exactly, so flags that eat blanks around them are refused.
    """
    added = _objects(content.get("added_tokens"), "added_tokens", name)
    ids = {_entry(token, "content", str, name): _entry(token, "id", int, name) for token in added}
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"{name}: added token {token['content']!r} has {flag}=true, which is not supported")
    late = [token["content"] for token in added if token.get("normalized")]
    if not normalization and len(late) == len(added):
        late = []  # one kind of them, and nothing to normalise: there is no before and after
    for token in late:
        if normalization and unicodedata.normalize(normalization, token) != token:
            raise ValueError(f"{name}: added token {token!r} has normalized=true and is not in {normalization}")
    always = [token["content"] for token in added if not token.get("special", True)]
    return {"special_tokens": ids, "always_matched": always, "matched_late": late}


def _normalization_of(normalizer: object, name: str) -> str:
    """None or one Unicode normal form."""
    kinds = [str(step.get("type")) for step in _steps(normalizer, "normalizer", "normalizers", name)]
    if len(kinds) > 1 or not set(kinds) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        raise ValueError(f"{name}: normalizer {kinds}; none or one of NFC, NFD, NFKC, NFKD is supported")
    return kinds[0] if kinds else ""


def _pattern_of(pre_tokenizer: object, name: str) -> str:
    """The expression that a pre-tokenizer amounts to."""
    steps = _steps(pre_tokenizer, "pre_tokenizer", "pretokenizers", name)
    kinds = [str(step.get("type")) for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise ValueError(f"{name}: pre-tokenizer {kinds}; it must end with ByteLevel without a prefix space")
    own_pattern = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and own_pattern:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0].get("individual_digits"):
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not own_pattern and "Regex" in (steps[0].get("pattern") or ()):
        behaviour = str(steps[0].get("behavior")).lower(), bool(steps[0].get("invert"))
        if behaviour in (("isolated", False), ("removed", True)):
            return _entry(_entry(steps[0], "pattern", dict, name), "Regex", str, name)
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

    What an imported file said of truncation, padding and tokens to add (`post_processor`) is written back as it was.
    """
    from common.checkpoint import atomic_write

    path = Path(path)
    path = path if path.suffix == ".json" else path / "tokenizer.json"
    for text in [*fields["special_tokens"], fields["pattern"]]:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{text!r} holds a lone surrogate, which tokenizer.json cannot: rename the special token")
    specials = sorted(fields["special_tokens"].items(), key=lambda item: item[1])
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, i, fields) for token, i in specials],
        "normalizer": {"type": fields["normalization"]} if fields["normalization"] else None,
        "pre_tokenizer": _pre_tokenizer(fields["pattern"]),
        "post_processor": None,
        "decoder": byte_level,
        "model": _model(fields),
    }
    content |= _other_entries(fields["other_entries"])
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1))
    return path


def _added_token(token: str, i: int, fields: dict) -> dict:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    flags |= {"normalized": token in fields["matched_late"], "special": token not in fields["always_matched"]}
    return {"id": i, "content": token, **flags}


def _other_entries(text: str) -> dict:
    """The entries that `read_huggingface` kept as JSON text."""
    try:
        entries = json.loads(text or "{}")
        return {key: entries[key] for key in _OTHER_ENTRIES if key in entries}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"other_entries is {text!r:.50}, expected a JSON object: {error}") from None
