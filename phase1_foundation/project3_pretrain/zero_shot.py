"""
Zero-shot tests

This file implements tests that need no training and no prompt following:
- "BLiMP: The Benchmark of Linguistic Minimal Pairs for English" (Warstadt et al., 2019) - does the model prefer the
  grammatical sentence of a pair
- "The LAMBADA dataset: Word prediction requiring a broad discourse context" (Paperno et al., 2016) - can it guess the
  last word of a passage
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - both without any training on the task

Each component is explained with paper references for educational purposes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.download import open_text
from phase1_foundation.project3_pretrain.evaluation import evaluating, tokens_at_once
from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.token_file import separator


@dataclass(frozen=True)
class BlimpScore:
    """What `blimp` found: `accuracy` is the unweighted mean over `paradigms` (by name); guessing gives 0.5."""

    accuracy: float
    paradigms: dict[str, float]
    pairs: int


@dataclass(frozen=True)
class LambadaScore:
    """What `lambada` found: `accuracy` of the greedy guess, `perplexity` of the last word, number of `passages`."""

    accuracy: float
    perplexity: float
    passages: int


def blimp(model, tokenizer, path, limit=None, dtype=None):
    """
    BLiMP: the share of minimal pairs in which the acceptable sentence is the more probable one

    PAPER: arXiv:1912.00582, section 3 (the data) and section 4 (the measure).
    PAPER CONTEXT: 67 paradigms of 1,000 pairs, generated from grammars; the two sentences of a pair differ in one
        contrast ("Whose hat should Tonya wear?" / "Whose should Tonya wear hat?") and are otherwise equally likely.
    INTUITION: no question is asked; whoever knows the grammar is less surprised by the good sentence.
    IMPLEMENTATION: log P(sentence), the sum over all its tokens, the first one predicted from the document's mark. A
        pair counts if the good one's is strictly higher. Of a sentence beyond block_size only its end is judged.
    WHY: it works from the first thousand steps of a small model on, long before questions in words do.

    Args:
        path: a folder of ``.jsonl`` files or one file; records with ``sentence_good``, ``sentence_bad``, ``UID``.
        limit: look at the first so many pairs of each paradigm.

    Returns:
        A `BlimpScore`.

    Raises:
        ValueError: a record lacks a field, or there are none.
        FileNotFoundError: there are no such files.
    """
    groups = {}
    for record in read_records(path, ("sentence_good", "sentence_bad", "UID")):
        group = groups.setdefault(record["UID"], [])
        if limit is None or len(group) < limit:
            group.append((record["sentence_good"], record["sentence_bad"]))
    _refuse_empty(path, groups)
    pairs = [pair for group in groups.values() for pair in group]
    mark = separator(tokenizer)[-1:]
    rows = [(mark, tokenizer.encode(sentence)) for pair in pairs for sentence in pair]
    nats = iter([nats for nats, _ in continuations(model, rows, dtype)])
    found = {name: [next(nats) < next(nats) for _ in group] for name, group in groups.items()}
    paradigms = {name: sum(right) / len(right) for name, right in sorted(found.items())}
    return BlimpScore(sum(paradigms.values()) / len(paradigms), paradigms, len(pairs))


def lambada(model, tokenizer, path, limit=None, dtype=None):
    """
    LAMBADA: the last word of a passage, guessed from all that stands before it

    PAPER: arXiv:1606.06031, section 2; the untokenised variant and the zero-shot use: "Language Models are
        Unsupervised Multitask Learners" (Radford et al., 2019), section 3.3.
    PAPER CONTEXT: people find the word when they read the whole passage, and fail when they see its last sentence only.
    INTUITION: the name at the end was dropped three sentences ago; who has forgotten it cannot answer.
    IMPLEMENTATION: the passage up to the last space is the context, the space and the word are the continuation.
        Accuracy counts a passage when every token of the continuation is the most probable one (what greedy decoding
        writes). Perplexity is exp of the mean nats of a *word*, all its tokens together.
    WHY: the shortest test of whether the model uses a long context.

    Args:
        path: a file (or a folder of files) of records with ``text``.
        limit: look at the first so many passages.

    Returns:
        A `LambadaScore`.

    Raises:
        ValueError: a record lacks its text, the text has a single word, a last word does not fit into block_size (its
            end alone would be judged), or there are no records.
        FileNotFoundError: there are no such files.
    """
    mark, rows = separator(tokenizer)[-1:], []
    for record in read_records(path, ("text",)):
        context, space, word = record["text"].rstrip().rpartition(" ")
        if not context:
            raise ValueError(f"{path}: the passage {record['text']!r} has no word before its last one")
        rows.append(([*mark, *tokenizer.encode(context)], tokenizer.encode(space + word)))
        if len(rows[-1][1]) > model.config.block_size:
            raise ValueError(
                f"{path}: the last word {word!r} is {len(rows[-1][1])} tokens, more than the model's "
                f"block_size={model.config.block_size} holds: this model cannot take the test"
            )
        if limit is not None and len(rows) >= limit:
            break
    _refuse_empty(path, rows)
    results = continuations(model, rows, dtype)
    mean = sum(nats for nats, _ in results) / len(results)
    accuracy = sum(greedy for _, greedy in results) / len(results)
    return LambadaScore(accuracy, math.exp(min(mean, 700.0)), len(results))


def continuations(model, rows, dtype=None):
    """
    How probable continuations are after their contexts

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2, equation 1.
    PAPER CONTEXT: p(continuation | context) is a product of next-token probabilities.
    INTUITION: hide the answer, ask the model token by token, and show it each one after it was asked.
    IMPLEMENTATION: rows of similar length share a batch, padded on the right: a causal model never looks there, so
        padding changes nothing. Only the rows of logits that predict a continuation go through the softmax. Rows that
        exceed block_size lose the beginning of their context.
    WHY: BLiMP, LAMBADA and every multiple-choice test are this one function with other rows.

    Args:
        rows: list of (context tokens, continuation tokens), neither of them empty.

    Returns:
        In the order of `rows`: (nats of the continuation, is it what greedy decoding would write).
    """
    block = model.config.block_size
    results = [None] * len(rows)
    with evaluating(model, dtype) as device:
        for chosen in _by_length(rows, block, tokens_at_once(model)):
            tokens, targets = _pad([rows[i] for i in chosen], block)
            row, place = torch.nonzero(targets != IGNORE, as_tuple=True)
            logits = model(tokens.to(device))[row.to(device), place.to(device)].float()  # (targets that count, V)
            wanted = targets[row, place].to(device)
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu().double()
            right = (logits.argmax(-1) == wanted).cpu()
            total = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row, nats)
            missed = torch.zeros(len(chosen)).index_add_(0, row, (~right).float())
            for i, nats_of_row, errors in zip(chosen, total.tolist(), missed.tolist()):
                results[i] = (nats_of_row, errors == 0)
    return results


def _by_length(rows, block, most):
    """Batches of row numbers of similar length, each at most `most` tokens with its padding."""
    lengths = [min(len(context) + len(continuation), block) for context, continuation in rows]
    batch = []
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _pad(rows, block):
    """(tokens, targets), int64 (B, T): the last block_size tokens of each row, padded on the right."""
    rows = [([*context, *continuation][-block - 1 :], len(continuation)) for context, continuation in rows]
    width = max(len(tokens) for tokens, _ in rows) - 1
    x, y = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), IGNORE)
    for r, (tokens, wanted) in enumerate(rows):
        n = len(tokens) - 1
        x[r, :n] = torch.tensor(tokens[:-1])
        first = max(0, n - wanted)
        y[r, first:n] = torch.tensor(tokens[first + 1 :])
    return x, y


def read_records(path, fields):
    """The records of a JSON Lines file, or of all those in a folder (by name), checked for `fields`."""
    path = Path(path)
    files = sorted(file for file in path.iterdir() if ".jsonl" in file.suffixes) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no .jsonl files")
    for file in files:
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(line, fields, file, number)


def _refuse_empty(path, found):
    """Raise unless there were records."""
    if not found:
        raise ValueError(f"{path} holds no records: get it again, or name another file")


def _record(line, fields, file, number):
    """One checked record."""
    try:
        record = json.loads(line)
        if all(isinstance(record[field], str) for field in fields):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file}, line {number}: not a JSON object with the text fields {', '.join(fields)}")
