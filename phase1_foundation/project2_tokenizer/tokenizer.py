"""
BPE Tokenizer

This file implements the tokenizer that all later projects use, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - byte-pair encoding
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - on bytes, after a pattern
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - longest match as a rule

The algorithms live elsewhere: `reference.py` to read, `fast_training.py` and `fast_encoding.py` to run. This class
holds a vocabulary and its rule, and moves it in and out of files (`file_formats.py`).

Each component is explained with paper references for educational purposes.
"""

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import regex

from phase1_foundation.project2_tokenizer import file_formats, reference, safe_pickle
from phase1_foundation.project2_tokenizer.bytes_alphabet import (
    byte_order,
    decode_utf8,
    encode_utf8,
    from_printable,
    to_printable,
)
from phase1_foundation.project2_tokenizer.patterns import resolve_pattern, split

RULES = ("longest_match", "merges")
MAX_ID = 2**31 - 1  # ids are int32 in arrays
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # ours and GPT-2's, Llama 3's


class BPETokenizer:
    r"""
    Text to token ids and back.

    PAPER: arXiv:1508.07909, section 3.2; GPT-2 report, section 2.2; arXiv:2403.01289, section 2.
    PAPER CONTEXT: BPE interpolates between characters and words; over bytes it needs no unknown token.
    INTUITION: Frequent sequences of bytes get a number of their own, rare ones are spelled.
    IMPLEMENTATION: `vocab` maps tokens, written in GPT-2's printable alphabet (special tokens as they are), to ids;
        `merges` are pairs of tokens in the order learned. The encoding rule belongs to the tokenizer: a model trained
        with one rule must not be fed by the other.
    WHY: The model sees short sequences, and yet there is nothing that it cannot read or write.

    Any str comes back, NUL and lone surrogates included (unless an imported tokenizer normalises): text is UTF-8 with
    `surrogatepass`, and bytes that are no text decode to U+FFFD.

    >>> tokenizer = BPETokenizer.train(["low low low lowest newest"], vocab_size=262)
    >>> tokenizer.pieces("lower"), tokenizer.decode(tokenizer.encode("a\0b \ud800"))
    (['low', 'e', 'r'], 'a\x00b \ud800')
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special_tokens: dict[str, int] | None = None,
        pattern: str = "gpt2",
        rule: str = "longest_match",
        normalization: str = "",
        whole_pieces: bool = False,
        always_matched: Iterable[str] = (),
        matched_late: Iterable[str] = (),
        other_entries: str = "",
    ):
        """
        What comes with imported files alone: `normalization` "NFC"; `whole_pieces`: a piece that is a token is not
        merged; `always_matched`: names of special tokens that need not be allowed (`<think>`); `matched_late`: those
        looked for after normalising; `other_entries`: what `to_huggingface` writes back (`file_formats.py`).
        """
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is unknown: use one of {', '.join(RULES)}")
        if normalization not in ("", "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError(f"normalization={normalization!r} is unknown: use NFC, NFD, NFKC, NFKD or leave it empty")
        self.special_tokens = dict(special_tokens or {})
        self.vocab = dict(vocab) | self.special_tokens
        self.merges = [(left, right) for left, right in merges]
        self.pattern, self.rule = resolve_pattern(pattern), rule
        self.normalization, self.whole_pieces = normalization, bool(whole_pieces)
        self.always_matched, self.matched_late = frozenset(always_matched), frozenset(matched_late)
        self.other_entries = other_entries
        self._check()

    def _check(self) -> None:
        """Refuse what could not encode every text, or not decode what it encoded."""
        ids = list(self.vocab.values())
        wrong = next((i for i in ids if type(i) is not int or not 0 <= i <= MAX_ID), None)
        if wrong is not None:
            raise ValueError(f"vocab holds the id {wrong!r}: ids are ints from 0 up to {MAX_ID:,}")
        if len(set(ids)) != len(ids):
            raise ValueError("vocab must give each token an id of its own: two tokens share one, or more")
        if unknown := (self.always_matched | self.matched_late) - self.special_tokens.keys():
            raise ValueError(f"always_matched or matched_late holds {min(unknown)!r}, which is no special token")
        if "" in self.special_tokens:
            raise ValueError('special_tokens holds "": a special token needs at least one character')
        regular = {token: i for token, i in self.vocab.items() if token not in self.special_tokens}
        self.token_bytes = {i: from_printable(token) for token, i in regular.items()}
        missing = [b for b in range(256) if to_printable(bytes([b])) not in regular]
        if missing:
            raise ValueError(
                f"vocab lacks {len(missing)} of the 256 bytes (the first: {missing[0]:#04x}): such a tokenizer cannot "
                "encode every text; byte-level BPE is supported, vocabularies with an unknown token are not"
            )
        for left, right in self.merges:
            for token in (left, right, left + right):
                if token not in regular:
                    raise ValueError(f"merge {left!r} {right!r}: {token!r} is not in vocab; the files do not match")
        if len(set(self.merges)) != len(self.merges):
            raise ValueError("merges holds a pair twice: the order of merges would be ambiguous")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = ("<|endoftext|>",),
        *,
        pattern: str = "gpt2",
        rule: str = "longest_match",
        min_frequency: int = 1,
        engine: str = "fast",
        num_threads: int | None = None,
        max_unique_words: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "BPETokenizer":
        """
        Learn a vocabulary from texts (an iterable of documents, read once).

        PAPER: arXiv:1508.07909, section 3.2, algorithm 1.
        PAPER CONTEXT: The most frequent pair of symbols is merged, until the vocabulary is as large as wanted.
        INTUITION: Compression: the words that cost most get the shortest code.
        IMPLEMENTATION: 256 bytes, then merges, then `special_tokens`, in this order of ids. Ties: the smallest pair of
            ids. `engine="reference"` runs the plain algorithm. Beyond `max_unique_words` distinct pieces, or 16 bytes
            for each, the rarest are forgotten. `progress(stage, done, total)`: of "count" (bytes), of "merge" (merges).
        WHY: `vocab_size` is an upper bound: a small corpus has no more pairs that occur `min_frequency` times.

        Raises:
            ValueError: vocab_size has no room for 256 bytes and the special tokens.
        """
        _check_threads(num_threads)
        specials = list(dict.fromkeys([special_tokens] if isinstance(special_tokens, str) else special_tokens))
        n_merges = vocab_size - len(specials) - 256
        if n_merges < 0:
            raise ValueError(
                f"vocab_size={vocab_size} minus {len(specials)} special tokens leaves {vocab_size - len(specials)}: "
                f"byte-level BPE needs at least 256, use vocab_size={256 + len(specials)} or more"
            )
        texts, pattern = [texts] if isinstance(texts, str) else texts, resolve_pattern(pattern)
        if engine == "reference":
            merges = reference.learn_merges(reference.count_words(texts, pattern), n_merges, min_frequency)
        elif engine == "fast":
            from phase1_foundation.project2_tokenizer.fast_training import train_merges

            merges = train_merges(texts, pattern, n_merges, min_frequency, num_threads, max_unique_words, progress)
        else:
            raise ValueError(f'engine={engine!r} is unknown: use "fast" or "reference"')
        tokens = [to_printable(bytes([b])) for b in byte_order()]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        vocab = {token: i for i, token in enumerate(tokens)}
        clash = [token for token in specials if token in vocab]
        if clash:
            raise ValueError(f"special token {clash[0]!r} is also an ordinary token: give it a name that no text has")
        special_ids = {token: len(tokens) + i for i, token in enumerate(specials)}
        return cls(vocab, [(tokens[a], tokens[b]) for a, b in merges], special_ids, pattern, rule)

    # -- what it is

    @property
    def vocab_size(self) -> int:
        """How many rows an embedding needs: the largest id plus one."""
        return max(self.vocab.values()) + 1

    @property
    def inverse_vocab(self) -> dict[int, str]:
        """Id -> token, written as in `vocab`."""
        return {i: token for token, i in self.vocab.items()}

    @property
    def eot_id(self) -> int | None:
        """Id of the token that ends a document, or None where there is none."""
        return next((self.special_tokens[name] for name in END_OF_TEXT if name in self.special_tokens), None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets; data made with another tokenizer is recognised."""
        merges = self.merges if self.rule == "merges" else []  # a longest match asks for none
        parts = [sorted(self.vocab.items(), key=lambda item: item[1]), merges, sorted(self.special_tokens.items())]
        parts += [self.pattern, self.rule, self.normalization, self.whole_pieces]
        if self.always_matched or self.matched_late:
            parts += [sorted(self.always_matched), sorted(self.matched_late)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size}, merges={len(self.merges)}, rule={self.rule!r})"

    def with_rule(self, rule: str) -> "BPETokenizer":
        """The same vocabulary with the other encoding rule; ValueError where the merges that it needs are not known."""
        if rule == "merges" and not self.merges and any(len(token) > 1 for token in self.token_bytes.values()):
            raise ValueError(
                "rule='merges' needs merges, and this tokenizer has none (a tokenizer.json for longest match holds "
                "none): read the file that it was saved to by `save`"
            )
        return BPETokenizer.from_dict(self.to_dict() | {"rule": rule})

    # -- encoding

    def encode(self, text: str, allowed_special: str | set[str] | None = "none", engine: str = "fast") -> list[int]:
        """
        The token ids of a text, and nothing else: no token is added at the beginning or the end.

        Special tokens in the text are ordinary characters unless allowed: "all", or a set of their names. So a user's
        message cannot forge the end of a conversation. (Those in `always_matched` are tokens in any text.)
        """
        if engine not in ("fast", "reference"):
            raise ValueError(f'engine={engine!r} is unknown: use "fast" or "reference"')
        encode = self._encode_fast if engine == "fast" else self._encode_reference
        if isinstance(allowed_special, str) and allowed_special == "none" and not self.always_matched:
            return encode(text)
        out = []
        for part in self._parts(text, self._matched(allowed_special)):
            out += [part] if isinstance(part, int) else encode(part)
        return out

    def encode_to_array(self, text: str) -> np.ndarray:
        """Like `encode` without special tokens, as an int32 array (no Python object per token)."""
        if self.always_matched:
            return self.encode_batch([text], num_threads=1)[0]
        return self._encoder.encode_texts([self._normalize(text)])[0].copy()

    def _encode_fast(self, text: str) -> list[int]:
        """Encode with the compiled loops of `fast_encoding.py`."""
        return self._encoder.as_list(self._encoder.encode_texts([self._normalize(text)])[0])

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None) -> list[np.ndarray]:
        """One int32 array per text, as from `encode_to_array`; texts are dealt to threads (default: all processors)."""
        if isinstance(texts, str):
            raise TypeError("texts is one str: encode_batch takes a list of them, encode one")
        _check_threads(num_threads)
        if not self.always_matched:
            return self._encoder.encode_batch([self._normalize(text) for text in texts], num_threads)
        parts = [self._parts(text, self.always_matched) for text in texts]
        between = [self._normalize(part) for text in parts for part in text if isinstance(part, str)]
        encoded = iter(self._encoder.encode_batch(between, num_threads))
        ids = ([np.array([p], np.int32) if isinstance(p, int) else next(encoded) for p in text] for text in parts)
        return [np.concatenate(arrays) for arrays in ids]

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text as readable strings (bytes that are no whole character show as U+FFFD)."""
        return [decode_utf8(self.token_bytes[i]) for i in self.encode(text)]

    def _normalize(self, text: str) -> str:
        _check_text(text)
        return unicodedata.normalize(self.normalization, text) if self.normalization else text

    @cached_property
    def _encoder(self):
        """The compiled vocabulary; built at the first use, because numba takes a while to load."""
        from phase1_foundation.project2_tokenizer import fast_encoding
        from phase1_foundation.project2_tokenizer.encoder import Encoder

        rule = fast_encoding.WHOLE_THEN_MERGES if self.whole_pieces else fast_encoding.MERGES
        rule = fast_encoding.LONGEST_MATCH if self.rule == "longest_match" else rule
        merges = [(self.vocab[a], self.vocab[b], self.vocab[a + b]) for a, b in self.merges]
        return Encoder([(token, i) for i, token in self.token_bytes.items()], merges, self.pattern, rule)

    @cached_property
    def _tables(self) -> tuple[dict[bytes, int], dict[tuple[bytes, bytes], int]]:
        """Token -> id and merge -> rank, in bytes, for the reference."""
        ranks = {(from_printable(a), from_printable(b)): rank for rank, (a, b) in enumerate(self.merges)}
        return {token: i for i, token in self.token_bytes.items()}, ranks

    def _encode_reference(self, text: str) -> list[int]:
        """Encode with the plain algorithms of `reference.py`."""
        ids, ranks = self._tables
        out = []
        for piece in map(encode_utf8, split(self._normalize(text), self.pattern)):
            if self.rule == "longest_match":
                parts = reference.longest_match(piece, ids)
            else:
                whole = self.whole_pieces and piece in ids
                parts = [piece] if whole else reference.apply_merges(piece, ranks)
            out += [ids[part] for part in parts]
        return out

    def _matched(self, allowed_special: str | set[str] | None) -> set[str]:
        """The names of the special tokens to look for."""
        names = allowed_special
        if names is None or isinstance(names, str):
            names = {"all": set(self.special_tokens), "none": set(), None: set()}.get(names)
        if names is None or not set(names) <= self.special_tokens.keys():
            raise ValueError(
                f'allowed_special={allowed_special!r}: use "all", "none" or a set of '
                f"{', '.join(self.special_tokens) or 'nothing, there are none'}"
            )
        return set(names) | self.always_matched

    def _parts(self, text: str, names: set[str]) -> list[str | int]:
        """The text in parts, in order: ids of these special tokens, and what lies between them."""
        _check_text(text)
        late = names & self.matched_late
        parts = self._cut([text], names - late)
        return self._cut([p if isinstance(p, int) else self._normalize(p) for p in parts], late) if late else parts

    def _cut(self, parts: list[str | int], names: set[str]) -> list[str | int]:
        """Replace special tokens in the texts among `parts`; the longest of several at one place wins."""
        if not names:
            return parts
        expression, out = _any_of(tuple(sorted(names, key=lambda name: (-len(name), name)))), []
        for part in parts:
            pieces = [part] if isinstance(part, int) else expression.split(part)  # text, name, text, name, text
            out += [self.special_tokens[piece] if k % 2 else piece for k, piece in enumerate(pieces)]
        return out

    # -- decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind token ids; an id that is no token raises ValueError."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join(map(self._bytes_of_id.__getitem__, ids))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]!r} is no token: ids go from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids; special tokens appear by name, bytes that are no text as U+FFFD."""
        return decode_utf8(self.decode_bytes(ids))

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        return self.token_bytes | {i: encode_utf8(name) for name, i in self.special_tokens.items()}

    # -- files

    def to_dict(self) -> dict:
        """Everything as plain dicts, lists, strings and integers (for checkpoints)."""
        return {
            "kind": "bpe",
            "vocab": dict(self.vocab),
            "merges": list(self.merges),
            "special_tokens": dict(self.special_tokens),
            "pattern": self.pattern,
            "rule": self.rule,
            "normalization": self.normalization,
            "whole_pieces": int(self.whole_pieces),
            "always_matched": sorted(self.always_matched),
            "matched_late": sorted(self.matched_late),
            "other_entries": self.other_entries,
        }

    @classmethod
    def from_dict(cls, fields: dict) -> "BPETokenizer":
        """The inverse of `to_dict`."""
        return cls(**file_formats.checked_fields(fields))

    def save(self, path: str | Path) -> None:
        """Write a `.pkl`: `vocab`, `inverse_vocab`, `merges` and metadata, builtin containers, str and int alone."""
        file_formats.write_pickle(path, self.to_dict() | {"inverse_vocab": self.inverse_vocab})

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` wrote. A hostile or damaged file raises ValueError and runs nothing."""
        fields = safe_pickle.load(path)
        with _naming(path):
            return cls.from_dict(fields)

    @classmethod
    def from_gpt2_files(cls, encoder_json: str | Path, vocab_bpe: str | Path, rule: str = "merges") -> "BPETokenizer":
        """Read GPT-2's `encoder.json` and `vocab.bpe` (also `.gz`); the ids are those of tiktoken's "gpt2"."""
        fields = file_formats.read_gpt2_files(encoder_json, vocab_bpe)
        with _naming(f"{encoder_json} with {vocab_bpe}"):
            return cls(**fields, rule=rule)

    @classmethod
    def from_huggingface(cls, tokenizer_json: str | Path) -> "BPETokenizer":
        """
        Read a byte-level `tokenizer.json` (or the folder it is in); others raise ValueError and say why.

        `encode` gives the ids of `tokenizers.Tokenizer.encode(text, add_special_tokens=False)`, neither truncated nor
        padded; with special tokens matched in the text, as there, by `allowed_special="all"`.
        """
        fields = file_formats.read_huggingface(tokenizer_json)
        with _naming(tokenizer_json):
            return cls(**fields)

    def to_huggingface(self, path: str | Path) -> Path:
        """Write a `tokenizer.json` (to this file, or into this folder) that gives the same ids; returns its path."""
        return file_formats.write_huggingface(path, self.to_dict())

    def __getstate__(self) -> dict:
        return self.to_dict()

    def __setstate__(self, state: dict) -> None:
        self.__init__(**file_formats.checked_fields(state))


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}: encode takes str (decode bytes first)")


def _check_threads(num_threads: int | None) -> None:
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1, or None for all processors")


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Say which file it was that made no tokenizer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer: {error}") from None


@lru_cache(maxsize=64)
def _any_of(names: tuple[str, ...]) -> regex.Pattern:
    """An expression that matches one of these names and keeps it when splitting."""
    return regex.compile("(" + "|".join(map(regex.escape, names)) + ")")
