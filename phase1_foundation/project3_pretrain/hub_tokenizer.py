"""Tokenizers in Hugging Face folders: ours where tokenizer.json is byte-level BPE, else the `tokenizers` library's."""

import json
import re
from pathlib import Path

from common.checkpoint import atomic_write
from phase1_foundation.project2_tokenizer.bytes_alphabet import CHAR_TO_BYTE
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer

# What a tokenizer may consist of in a folder: an export leaves none of an earlier one.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")  # how published models spell the end of a text


class ForeignTokenizer:
    """A tokenizer.json that project 2 does not compute (SentencePiece style), run by the `tokenizers` library.

    >>> ForeignTokenizer.from_dict({"kind": "foreign", "json": "{}"})       # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...
    """

    def __init__(self, text: str):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError("this tokenizer is read by the library `tokenizers`: uv sync --group bench") from error
        self.text = text
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"tokenizer.json cannot be read by the library `tokenizers`: {error}") from error
        content = json.loads(text)
        added = content.get("added_tokens", [])
        self.special_tokens = {token["content"]: token["id"] for token in added if token.get("special")}
        self._plain = {token["content"] for token in added}  # spelled as they are
        self._byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
        self.vocab_size = self._tokenizer.get_vocab_size()

    @property
    def eot_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        return next((self.special_tokens[name] for name in END_NAMES if name in self.special_tokens), None)

    def encode(self, text: str, allowed_special="none") -> list[int]:
        """Text -> ids, without the markers that the library would put around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens) -> str:
        """Ids -> text."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def token_sizes(self) -> list[int]:
        """How many bytes of text each id stands for; the space that SentencePiece puts before a text counts as one."""
        special = set(self.special_tokens.values())
        return [0 if i in special else self._size(self._tokenizer.id_to_token(i) or "") for i in range(self.vocab_size)]

    def _size(self, token: str) -> int:
        """Bytes of one token. Decoding it alone would strip its space, and cannot show a part of a character."""
        if token not in self._plain and self._byte_level and set(token) <= CHAR_TO_BYTE.keys():
            return len(token)  # GPT-2's alphabet: one letter a byte
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return 1  # a byte that no token spells
        return len(token.replace("\u2581", " ").encode())  # SentencePiece's sign for a space

    def to_dict(self) -> dict:
        """For a checkpoint."""
        return {"kind": "foreign", "json": self.text}

    @classmethod
    def from_dict(cls, values: dict) -> "ForeignTokenizer":
        """The inverse of `to_dict`."""
        return cls(values["json"])

    def to_huggingface(self, path) -> None:
        """Write tokenizer.json as it was read."""
        atomic_write(path, self.text)


def read_tokenizer(folder: Path):
    """The tokenizer of a folder: tokenizer.json, or GPT-2's two files, or None if there is neither."""
    if (folder / "tokenizer.json").is_file():
        try:
            return BPETokenizer.from_huggingface(folder / "tokenizer.json")
        except ValueError:  # not byte-level BPE
            return ForeignTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return BPETokenizer.from_gpt2_files(folder / "vocab.json", folder / "merges.txt")
    return None


def check_writable(tokenizer) -> None:
    """Raise ValueError for a tokenizer that has no form in a folder."""
    if tokenizer is not None and not hasattr(tokenizer, "to_huggingface"):
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json: train a BPE tokenizer "
            f"(project 2), or pass tokenizer=None to write the weights alone"
        )


def write_tokenizer(tokenizer, folder: Path, block_size: int) -> dict:
    """Write tokenizer.json and tokenizer_config.json in place of all earlier ones; returns config.json's part of it."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer.to_huggingface(folder / "tokenizer.json")
    end = next((name for name, i in tokenizer.special_tokens.items() if i == tokenizer.eot_id), None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **({"bos_token": end, "eos_token": end} if end else {}),
    }
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
