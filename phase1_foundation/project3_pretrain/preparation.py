"""
From text to tokens

This file implements the preparation of a corpus for pre-training following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - byte-level BPE over a web-scale corpus
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - a vocabulary learned from the
  text itself

Each component is explained with paper references for educational purposes.
"""

import contextlib
import glob
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import DATA, ROOT, stages
from common.download import read_documents
from common.progress import track
from phase1_foundation.project3_pretrain.token_file import (
    END_OF_TEXT,
    TokenFileError,
    TokenWriter,
    encode_all,
    fingerprint_of,
    read_header,
)

SAMPLE = DATA / "sample_corpus.jsonl.xz"  # bundled: what is taken when no text was downloaded
BATCH_BYTES = 8 << 20  # text handed to the tokenizer at once
VOCABULARY_BYTES = 200 << 20  # text that a vocabulary is learned from, at most
GPT2_FILES = (DATA / "gpt2" / "encoder.json.gz", DATA / "gpt2" / "vocab.bpe.gz")


def prepare(settings, only_load_tokenizer=False, refresh=False):
    """
    Make ``train.bin`` and ``val.bin`` in DATA_DIR out of the text at TRAIN_DATA_PATH, unless they stand already

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), sections 2.1 and 2.2.
    PAPER CONTEXT: documents of a large corpus become one stream of byte-level BPE tokens; held-out text measures.
    INTUITION: chop once, cook many times: tokenising takes minutes, every later run opens the result in milliseconds.
    IMPLEMENTATION: a hash of each document's text decides whether it is held out, so the split depends on neither the
        order nor the machine, and a document that occurs twice cannot be on both sides. Batches of documents are
        encoded by NUM_WORKERS threads while the next batch is read. A vocabulary that does not exist is learned first.
    WHY: preparing again after a change must be safe, and free when nothing has changed.

    Args:
        settings: with TRAIN_DATA_PATH (a file, a pattern such as ``data/corpus/*.jsonl.zst``, or several with commas
            between them), DATA_DIR, TOKENIZER, VOCAB_SIZE, VAL_FRACTION, VAL_DATA_PATH (a held-out text of its own,
            or None) and NUM_WORKERS.
        only_load_tokenizer: prepare nothing, just load the tokenizer that the prepared data belong to.
        refresh: make tokens that stand anew if they come from another text than the settings name. Without it, that
            happens only when a flag named the text: who trains after ``prepare_data.py --train_data_path ...`` gets
            those tokens.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: there is no such text or tokenizer.
        ValueError: nothing is left for one of the two files, the tokenizer has not the VOCAB_SIZE that a flag asks
            for, or (without `refresh`) the tokens that stand belong to another tokenizer.
        OSError: the disk is full; what stood there before is untouched.
    """
    folder = Path(settings.DATA_DIR)
    if only_load_tokenizer or (not refresh and keeps(settings, folder)):
        return load_tokenizer(settings.TOKENIZER)
    inputs = training_text(settings)
    held_out = find_inputs(settings.VAL_DATA_PATH) if settings.VAL_DATA_PATH else []
    tokenizer = ensure_tokenizer(settings, inputs)
    plan = {"prepared_from": describe(inputs, held_out, settings.VAL_FRACTION)}
    if stands(folder, tokenizer, plan):
        print(f"{folder} holds the tokens of this text already")
        return tokenizer
    print(f"Tokenising {', '.join(map(str, [*inputs, *held_out]))} into {folder}")
    names = " ".join(path.name for path in inputs)
    with contextlib.ExitStack() as files:
        train, val = (
            files.enter_context(TokenWriter(folder / name, tokenizer, names, plan)) for name in ("train.bin", "val.bin")
        )
        fraction = 0.0 if held_out else settings.VAL_FRACTION
        tokenise(inputs, tokenizer, train, val, fraction, settings.NUM_WORKERS)
        if held_out:
            tokenise(held_out, tokenizer, val, val, 0.0, settings.NUM_WORKERS)
        refuse_empty(train, val, settings.VAL_FRACTION)
    for writer in (train, val):
        print(
            f"{writer.path}: {writer.tokens:,} tokens of {writer.documents:,} documents "
            f"({writer.text_bytes / 1e6:.1f} MB, {writer.text_bytes / max(1, writer.tokens):.2f} bytes a token)"
        )
    return tokenizer


def tokenise(inputs, tokenizer, train, val, fraction, workers=1):
    """Encode all documents of some files and write each into `train` or `val`, with a progress bar."""
    batches = _batches(document for path in inputs for document in read_documents(path))
    # One batch is encoded by many threads while this thread reads and writes the others.
    with ThreadPoolExecutor(1) as encoder:
        pending = None
        total = sum(path.stat().st_size for path in inputs)
        label = "tokenising"
        plain = all(path.suffix in (".txt", ".jsonl") for path in inputs)  # else the size of the text is unknown
        for batch in track(batches, total if plain else None, label, "B", size=lambda item: sum(map(len, item))):
            future = encoder.submit(encode_all, tokenizer, batch, workers)
            if pending:
                _write(*pending, train, val, fraction)
            pending = (batch, future)
        if pending:
            _write(*pending, train, val, fraction)


def _batches(documents):
    """Lists of documents of about BATCH_BYTES together."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(texts, future, train, val, fraction):
    """Send each document of an encoded batch to its side of the split."""
    held = [is_held_out(text, fraction) for text in texts]
    for writer, side in ((train, False), (val, True)):
        writer.add(tokens for tokens, other in zip(future.result(), held) if other == side)


def is_held_out(text, fraction):
    """Whether a document belongs to the validation part: a function of its text alone.

    >>> is_held_out("a document", 1.0), is_held_out("a document", 0.0)
    (True, False)
    """
    number = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return number < fraction * 2**64


def training_text(settings):
    """The files of TRAIN_DATA_PATH; the bundled sample where nobody downloaded or named a text."""
    default = "TRAIN_DATA_PATH" not in getattr(settings, "overrides", ("TRAIN_DATA_PATH",))
    if default and not Path(str(settings.TRAIN_DATA_PATH)).exists():
        print(f"There is no {settings.TRAIN_DATA_PATH} (download_data.py gets it): taking the bundled {SAMPLE.name}")
        return [SAMPLE]
    return find_inputs(settings.TRAIN_DATA_PATH)


def find_inputs(paths):
    """The files that a path, a pattern, or several of them with commas between, stand for.

    Raises:
        FileNotFoundError: one of them stands for no file.
    """
    found = []
    listed = paths if isinstance(paths, list) else str(paths).split(",")
    for path in filter(None, (str(part).strip() for part in listed)):
        files = [Path(path)] if Path(path).is_file() else [Path(name) for name in sorted(glob.glob(path))]
        if not files:
            shown = SAMPLE.relative_to(ROOT).as_posix()
            raise FileNotFoundError(
                f"{path} does not exist: get text with `uv run python "
                f"phase1_foundation/project3_pretrain/download_data.py`, or name some, "
                f"such as `--train_data_path {shown}`"
            )
        found += files
    return found


def describe(inputs, held_out, fraction):
    """What prepared data depend on besides the tokenizer: names and content of the texts, and the split.

    All of the content is hashed, about a second a gigabyte: a sample would miss edits, and dates change with copies.
    """
    return {
        "inputs": [[path.name, stages.digest(path)] for path in inputs],
        "held_out": [[path.name, stages.digest(path)] for path in held_out],
        "val_fraction": fraction,
    }


def headers_of(folder):
    """The headers of ``train.bin`` and ``val.bin``; none if one of the two is missing or damaged."""
    try:
        return [read_header(folder / name) for name in ("train.bin", "val.bin")]
    except (OSError, TokenFileError):
        return []


def stands(folder, tokenizer, plan):
    """Whether both files are there, sound, and made from the same text with the same tokenizer."""
    headers = headers_of(folder)
    return bool(headers) and all(
        header["tokenizer"] == fingerprint_of(tokenizer) and header.get("prepared_from") == plan["prepared_from"]
        for header in headers
    )


def keeps(settings, folder):
    """Whether to take the tokens that stand, whatever text they come from: they are sound, and no flag names a text."""
    headers = headers_of(folder)
    if not headers or {"TRAIN_DATA_PATH", "VAL_DATA_PATH", "VAL_FRACTION"} & set(getattr(settings, "overrides", ())):
        return False
    tokenizer = load_tokenizer(settings.TOKENIZER)
    if any(header["tokenizer"] != fingerprint_of(tokenizer) for header in headers):
        raise TokenFileError(
            f"{folder} holds tokens of another tokenizer than TOKENIZER={settings.TOKENIZER}: name theirs with "
            f"--tokenizer, run prepare_data.py to replace them, or use another --data_dir"
        )
    check_vocab_size(settings, tokenizer)
    print(f"{folder} holds {headers[0]['tokens']:,} tokens of {headers[0]['source']}")
    return True


def refuse_empty(train, val, fraction):
    """Raise unless both sides got documents."""
    if not train.documents:
        raise ValueError(f"no document was left for training: VAL_FRACTION={fraction} is too large for so little text")
    if not val.documents:
        raise ValueError(
            f"none of the {train.documents} documents fell into the validation part (VAL_FRACTION={fraction}): "
            f"use a larger VAL_FRACTION, more documents (one per line), or a held-out text of its own"
        )


def check_vocab_size(settings, tokenizer):
    """Raise if a flag asks for another number of tokens than the tokenizer has."""
    if "VOCAB_SIZE" in getattr(settings, "overrides", ()) and tokenizer.vocab_size != settings.VOCAB_SIZE:
        raise ValueError(
            f"VOCAB_SIZE={settings.VOCAB_SIZE}, but TOKENIZER={settings.TOKENIZER} has {tokenizer.vocab_size} "
            f"tokens: leave VOCAB_SIZE out, or name a .pkl that does not exist yet"
        )


def ensure_tokenizer(settings, inputs):
    """The tokenizer that TOKENIZER names; a ``.pkl`` that does not exist yet is learned from the text and saved."""
    path = Path(settings.TOKENIZER)
    if settings.TOKENIZER == "gpt2" or path.suffix != ".pkl" or path.exists():
        tokenizer = load_tokenizer(settings.TOKENIZER)
        check_vocab_size(settings, tokenizer)
        return tokenizer
    from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer

    print(f"Learning a vocabulary of {settings.VOCAB_SIZE} tokens from the text into {path}")
    texts = _sample(inputs, settings.VAL_FRACTION)
    tokenizer = BPETokenizer.train(texts, settings.VOCAB_SIZE, special_tokens=[END_OF_TEXT], rule="merges")
    if tokenizer.vocab_size < settings.VOCAB_SIZE:
        raise ValueError(
            f"VOCAB_SIZE={settings.VOCAB_SIZE}, but the text has only enough different words for "
            f"{tokenizer.vocab_size} tokens: use VOCAB_SIZE={tokenizer.vocab_size}, or more text"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _sample(inputs, fraction):
    """Documents to learn a vocabulary from: not the held-out ones; up to VOCABULARY_BYTES, from all inputs alike."""
    for path in inputs:
        left = VOCABULARY_BYTES // len(inputs)
        for document in read_documents(path):
            if left > 0 and not is_held_out(document, fraction):
                yield document
                left -= len(document)
            elif left <= 0:
                break


def load_tokenizer(spec):
    """
    A tokenizer by its name or path

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.2: the GPT-2 one.
    PAPER CONTEXT: a vocabulary of 50,257 byte-level BPE tokens that can spell any text.
    INTUITION: one argument, whatever the vocabulary comes from.
    IMPLEMENTATION: ``gpt2`` is bundled; ``.pkl`` is written by project 2; ``.json`` is a Hugging Face tokenizer.json.
    WHY: the fingerprint of what this returns is stored with the tokens, so that no run mixes two vocabularies.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither a name nor a path of a known kind.
    """
    path = Path(spec)
    if str(spec) != "gpt2" and path.suffix not in (".pkl", ".json"):
        raise ValueError(f"TOKENIZER={spec} is unknown: use gpt2, or the path of a .pkl or a tokenizer.json")
    if str(spec) != "gpt2" and not path.is_file():
        raise FileNotFoundError(
            f"TOKENIZER={spec} does not exist: prepare_data.py learns a missing .pkl from the text, or use gpt2"
        )
    from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer  # brings numba: only when needed

    if str(spec) == "gpt2":
        return BPETokenizer.from_gpt2_files(*GPT2_FILES)
    return BPETokenizer.load(path) if path.suffix == ".pkl" else BPETokenizer.from_huggingface(path)
