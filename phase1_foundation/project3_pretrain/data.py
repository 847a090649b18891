"""
Training data

This file implements batches from tokenised text following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - fixed windows of one stream of tokens
- "Scaling Data-Constrained Language Models" (Muennighoff et al., 2023) - every epoch reads everything once

Each component is explained with paper references for educational purposes.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.shuffle import mix, permute
from phase1_foundation.project3_pretrain.token_file import (
    TokenFileError,
    TokenWriter,
    read_header,
    token_bytes,
    write_tokens,
)

__all__ = ["Batches", "TokenDataset", "TokenFileError", "TokenWriter", "token_bytes", "write_tokens"]


class TokenDataset:
    """
    A tokenised text on disk, read in windows

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 2.
    PAPER CONTEXT: a language model learns p(token | the tokens before it in the window) from raw text.
    INTUITION: lay a ruler of `block_size` tokens anywhere on the scroll; the targets are the same tokens, one later.
    IMPLEMENTATION: a memory map of uint16 or uint32 (token_file.py); rows are copied out of it and widened to int64
        only when a batch needs them. The documents are separated by a token, not by padding.
    WHY: opening a corpus of any size takes milliseconds, memory holds only the pages in use, and all processes of a
        machine share them.

    Args:
        path: ``name.bin``; its header ``name.json`` lies beside it.
        block_size: tokens of a window.
        tokenizer_fingerprint: refuse a file made with another tokenizer (None: take any).

    Attributes:
        header: what the JSON file says (documents, text_bytes, source ...); `n_tokens`, `vocab_size`, `fingerprint`
            are its most wanted entries.
        tokens: the memory map.
        token_bytes: bytes of text per token, by id: what bits per byte are computed with.

    Raises:
        FileNotFoundError: there is no such file.
        TokenFileError: the file is damaged, truncated, too short, or belongs to another tokenizer.
    """

    def __init__(self, path, block_size, tokenizer_fingerprint=None):
        self.path, self.block_size = Path(path), block_size
        self.header = read_header(self.path)
        self.n_tokens, self.vocab_size = self.header["tokens"], self.header["vocab_size"]
        self.fingerprint, self.token_bytes = self.header["tokenizer"], self.header["token_bytes"]
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != self.fingerprint:
            raise TokenFileError(
                f"{self.path} was made with another tokenizer (fingerprint {self.fingerprint[:12]}, yours is "
                f"{tokenizer_fingerprint[:12]}): run prepare_data.py with your tokenizer, or load the other one"
            )
        if self.n_tokens <= block_size:
            raise TokenFileError(
                f"{self.path} has {self.n_tokens} tokens, too few for one window of block_size={block_size} and its "
                f"targets: give more text or a smaller block_size"
            )
        self.tokens = np.memmap(self.path, dtype=self.header["dtype"], mode="r", shape=(self.n_tokens,))
        # Every possible window as a row of a view: picking rows is one plain copy each.
        self._rows = np.lib.stride_tricks.sliding_window_view(np.asarray(self.tokens), block_size + 1)

    def __len__(self):
        """Windows that do not overlap, the last partial one included."""
        return -(-(self.n_tokens - 1) // self.block_size)

    def gather(self, starts):
        """The windows that begin at `starts`: (tokens, targets), int64 tensors (len(starts), block_size)."""
        rows = self._rows[starts]  # (B, T + 1)
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    @property
    def epoch_size(self):
        """Windows of an epoch of training; less than one window is left out, so that any offset fits."""
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def rows(self, places, key):
        """The windows at `places` of an epoch, which its `key` begins to cut where no other does; as `gather`."""
        offset = mix(key, 1) % min(self.block_size, self.n_tokens - self.epoch_size * self.block_size)
        return self.gather(places * self.block_size + offset)

    def batches(self, seed, batch_size, micro_batch_size, rank=0, world_size=1):
        """The training batches, by step; see `Batches`."""
        return Batches(self, seed, batch_size, micro_batch_size, rank, world_size)

    def windows(self, batch_size, max_tokens=None):
        """Windows that do not overlap, for evaluation: yields (tokens, targets), each (batch_size, block_size).

        Without `max_tokens` they cover every target of the file exactly once. With it, windows evenly spread over the
        file, the same ones every time. What is left of the last batch is filled up with targets of -100, so that
        all batches have one shape (a compiled model needs that); a single batch may be smaller.
        """
        total, block = len(self), self.block_size
        wanted = total if max_tokens is None else min(total, max(1, max_tokens // block))
        chosen = np.arange(wanted) * total // wanted
        batch_size = min(batch_size, wanted)
        for first in range(0, wanted, batch_size):
            starts = chosen[first : first + batch_size] * block
            full = starts + block < self.n_tokens
            tokens, targets = self.gather(np.where(full, starts, 0))
            if not full.all():  # only the file's last window can be short
                rest = torch.from_numpy(np.asarray(self.tokens[starts[-1] :]).astype(np.int64))
                tokens[-1], targets[-1] = 0, IGNORE
                tokens[-1, : len(rest) - 1], targets[-1, : len(rest) - 1] = rest[:-1], rest[1:]
            missing = (0, 0, 0, batch_size - len(starts))
            yield torch.nn.functional.pad(tokens, missing), torch.nn.functional.pad(targets, missing, value=IGNORE)


class Batches:
    """
    The batches of a run, a pure function of (seed, step, rank)

    PAPER: "Scaling Data-Constrained Language Models" (Muennighoff et al., 2023), arXiv:2305.16264.
    PAPER CONTEXT: repeating data for a few epochs costs little loss compared with fresh data.
    INTUITION: each epoch is a newly shuffled deck of windows; a step takes the next `batch_size` cards, and each rank
        its share of them.
    IMPLEMENTATION: an epoch visits the dataset's rows (windows of a text that do not overlap, from an offset of its
        own so that borders move) in the order of `permute`. The batch of a step is the same set for every world_size:
        ranks take contiguous slices of it, micro batches slices of those.
    WHY: no state to save: resuming is asking for another step, on any number of ranks.

    Args:
        dataset: has ``epoch_size`` and ``rows(places, key)``, which gives the rows at some places of the epoch with
            this key as a tuple of tensors (len(places), ...): a `TokenDataset`, or what a later project trains on.
        seed: chooses the order.
        batch_size: sequences of one step, over all ranks and micro batches.
        micro_batch_size: sequences of one forward; the last micro batch of a step may be smaller.
        rank, world_size: which share.

    ``batches[step]`` is a list of such tuples, (tokens, targets) of a text, with micro_batch_size rows each. The step
    after the one asked for is fetched by a thread meanwhile; that changes when it is read, never what.

    Raises:
        ValueError: the sizes do not divide as they must.
    """

    def __init__(self, dataset, seed, batch_size, micro_batch_size, rank=0, world_size=1):
        if batch_size < 1 or micro_batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size} and micro_batch_size={micro_batch_size} must be at least 1, and "
                f"rank={rank} must be one of the {world_size} ranks"
            )
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} sequences cannot be shared by {world_size} processes: use a multiple of "
                f"{world_size}, such as {max(1, batch_size // world_size) * world_size}"
            )
        self.dataset, self.seed = dataset, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._thread, self._ahead = ThreadPoolExecutor(1), (None, None)  # (step, future)

    def __getitem__(self, step):
        if step < 0:
            raise IndexError(f"step={step}: steps count from 0")
        ahead, future = self._ahead
        batch = future.result() if ahead == step else self._fetch(step)
        self._ahead = (step + 1, self._thread.submit(self._fetch, step + 1))
        return batch

    def _fetch(self, step):
        """Read this rank's rows of a step and cut them into micro batches."""
        share, size = self.batch_size // self.world_size, self.dataset.epoch_size
        samples = np.arange(share, dtype=np.int64) + (step * self.batch_size + self.rank * share)
        epochs, places = np.divmod(samples, size)
        parts = []
        for epoch in np.unique(epochs):  # a step may reach into the next epoch
            key = mix(self.seed, int(epoch))
            parts.append(self.dataset.rows(permute(places[epochs == epoch], size, key), key))
        columns = (torch.cat(column).split(self.micro_batch_size) for column in zip(*parts))
        return list(zip(*columns))

    def __iter__(self):
        raise TypeError("batches have no end: ask for batches[step]")
