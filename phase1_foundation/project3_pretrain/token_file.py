"""
Token files

This file implements tokenised text on disk following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - WebText, read as one stream of tokens

Each component is explained with paper references for educational purposes.
"""

import base64
import contextlib
import glob
import hashlib
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np

from common.checkpoint import atomic_write

FORMAT = "llm-roadmap tokens"
VERSION = 1
END_OF_TEXT = "<|endoftext|>"
_BLOCKS, _BLOCK_BYTES = 64, 16384  # what the digest looks at, spread evenly over the file


class TokenFileError(ValueError):
    """A token file that is missing its header, damaged, truncated, or made with another tokenizer."""


def fingerprint_of(tokenizer):
    """A short text that differs between tokenizers: their own fingerprint, or a hash of what they would save."""
    if hasattr(tokenizer, "fingerprint"):
        return tokenizer.fingerprint
    return hashlib.blake2b(json.dumps(tokenizer.to_dict(), sort_keys=True).encode(), digest_size=16).hexdigest()


def separator(tokenizer):
    """The tokens written before every document: <|endoftext|>, or a newline where the tokenizer has no such token."""
    if getattr(tokenizer, "eot_id", None) is not None:
        return [tokenizer.eot_id]
    return list(tokenizer.encode("\n"))


def token_bytes(tokenizer):
    """How many bytes of text each token stands for (int32, by id); special tokens stand for none."""
    if hasattr(tokenizer, "token_sizes"):  # a library's: its tokens are spelled in several ways
        return np.array(tokenizer.token_sizes(), dtype=np.int32)
    special = set(getattr(tokenizer, "special_tokens", {}).values())
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    if hasattr(tokenizer, "vocab"):  # byte-level: one printable letter a byte
        for token, i in tokenizer.vocab.items():
            sizes[i] = 0 if i in special else len(token)
        for name in getattr(tokenizer, "always_matched", ()):  # text with an id of its own, such as <think>
            sizes[tokenizer.special_tokens[name]] = len(name.encode())
    else:
        for i in range(tokenizer.vocab_size):
            sizes[i] = 0 if i in special else len(tokenizer.decode([i]).encode())
    return sizes


class TokenWriter:
    """
    Writes documents as one stream of tokens

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.1 (WebText); the
        delimiter is the one special token of the vocabulary that was released with it.
    PAPER CONTEXT: millions of documents of all lengths train a model with one fixed window of 1024 tokens.
    INTUITION: one long scroll with a mark before each text; the mark says that what came before is over.
    IMPLEMENTATION: <|endoftext|> *precedes* every document, so even its first token is predicted from something, and
        generation can start from the mark alone. uint16 where the vocabulary fits, else uint32. The stream goes to a
        temporary file that is renamed when whole; the JSON header beside it is written last and makes it valid.
    WHY: training reads random windows from a memory map: no parsing, no copies, any size of corpus.

    Args:
        path: ``name.bin``; the header becomes ``name.json``.
        tokenizer: the one that the tokens come from.
        source: where the text comes from, for the header.
        extra: more fields for the header.

    Use it as a context manager; leaving it without an error puts the file in place, with an error leaves nothing.

    Raises:
        OSError: the disk is full or not writable; the message says what to do.
        ValueError: a token that the vocabulary does not have.
    """

    def __init__(self, path, tokenizer, source="", extra=None):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.tokenizer, self.source, self.extra = tokenizer, source, extra or {}
        self.vocab_size = tokenizer.vocab_size
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sizes, self.separator = token_bytes(tokenizer), separator(tokenizer)
        self.tokens = self.documents = self.text_bytes = 0
        self.file = None

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):  # of a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - stale.stat().st_mtime > 3600:
                    stale.unlink()
        self.file = self._guard(open, self.temporary, "wb")
        return self

    def add(self, documents):
        """Append a batch of documents, each a sequence of tokens."""
        parts = [part for tokens in documents for part in (self.separator, np.asarray(tokens, dtype=np.int64))]
        stream = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
        if len(stream) and not 0 <= stream.min() <= stream.max() < self.vocab_size:
            raise ValueError(
                f"tokens from {stream.min()} to {stream.max()} do not fit vocab_size={self.vocab_size}: "
                f"the tokenizer and the tokens do not belong together"
            )
        self._guard(self.file.write, stream.astype(self.dtype).tobytes())
        self.tokens += len(stream)
        self.documents += len(parts) // 2
        self.text_bytes += int(self.sizes[stream].sum())

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._guard(self._finish)
        finally:
            with contextlib.suppress(OSError):  # on a full disk closing fails like the write before it, which was told
                self.file.close()
            self.temporary.unlink(missing_ok=True)

    def _finish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        header_path(self.path).unlink(missing_ok=True)  # from here to the new header there is no valid file
        os.replace(self.temporary, self.path)
        atomic_write(header_path(self.path), json.dumps(self.header(), indent=1, ensure_ascii=False) + "\n")

    def header(self):
        """What the JSON file says about the tokens."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32",
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "vocab_size": self.vocab_size,
            "tokenizer": fingerprint_of(self.tokenizer),
            "rule": getattr(self.tokenizer, "rule", None),
            "separator": [int(token) for token in self.separator],
            "source": self.source,
            **self.extra,
            "digest": digest(self.path),
            "token_bytes": _pack(self.sizes),
        }

    def _guard(self, action, *args):
        """Do something to the disk; a full one gets a message that helps."""
        try:
            return action(*args)
        except OSError as error:
            raise OSError(
                f"could not write {self.path} ({error.strerror or error}) after {self.tokens:,} tokens: free some "
                f"space, or write elsewhere. Nothing half-written was left."
            ) from error


def encode_all(tokenizer, texts, workers=None):
    """The tokens of many texts, by as many threads as the tokenizer can use."""
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts, num_threads=workers)
    return [tokenizer.encode(text) for text in texts]


def write_tokens(path, texts, tokenizer, source="", batch_bytes=4 << 20):
    """Tokenise an iterator of texts into a token file (one process, in batches); returns the header."""
    with TokenWriter(path, tokenizer, source) as writer:
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= batch_bytes:
                writer.add(encode_all(tokenizer, batch))
                batch, size = [], 0
        if batch:
            writer.add(encode_all(tokenizer, batch))
    return read_header(path)


def header_path(path):
    """The header beside a token file."""
    return Path(path).with_suffix(".json")


def read_header(path):
    """The checked header of a token file; its `token_bytes` become an array.

    Raises:
        FileNotFoundError: file or header are missing.
        TokenFileError: the two do not belong together, or one is damaged.
    """
    path, name = Path(path), header_path(path)
    again = "run prepare_data.py again"
    for part in (path, name):
        if not part.is_file():
            raise FileNotFoundError(f"{part} does not exist: tokenise a text first with prepare_data.py")
    try:
        header = json.loads(name.read_text(encoding="utf-8"))
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise TokenFileError(f"{name} is version {header['version']} of {header['format']!r}: {again}")
        size = header["tokens"] * np.dtype(header["dtype"]).itemsize
        header["token_bytes"] = _unpack(header["token_bytes"])
        sound = {"documents", "text_bytes", "vocab_size", "tokenizer", "separator", "digest"} <= header.keys()
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        if isinstance(error, TokenFileError):
            raise
        raise TokenFileError(f"{name} is not the header of a token file ({error!r}): {again}") from error
    if not sound:
        raise TokenFileError(f"{name} is incomplete: {again}")
    if path.stat().st_size != size:
        raise TokenFileError(
            f"{path} has {path.stat().st_size:,} bytes where its header promises {size:,} (truncated?): {again}"
        )
    if digest(path) != header["digest"]:
        raise TokenFileError(f"{path} is damaged (its content does not match the digest in {name}): {again}")
    return header


def digest(path):
    """A hash of blocks spread over a file and of its size: finds torn and swapped files in milliseconds."""
    size = os.path.getsize(path)
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for k in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK_BYTES) * k // (_BLOCKS - 1))
            hasher.update(file.read(_BLOCK_BYTES))
    return hasher.hexdigest()


def _pack(sizes):
    """An int array as text for JSON."""
    return base64.b64encode(zlib.compress(sizes.astype("<i4").tobytes(), 9)).decode()


def _unpack(text):
    """What `_pack` wrote."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4")
