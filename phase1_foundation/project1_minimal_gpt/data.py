"""
Text as Batches

This file implements the data of a character-level language model following:
- "Improving Language Understanding by Generative Pre-Training" (Radford et al., 2018) - contiguous text, next token

Each component is explained with paper references for educational purposes.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text; raises FileNotFoundError or ValueError with the remedy."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no text at {path}: run "
            "`uv run python phase1_foundation/project1_minimal_gpt/download_data.py`, or give a --train_data_path"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None


def fingerprint(text: str) -> str:
    """A short hash that tells one text from another."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def split(text: str, tokenizer: CharTokenizer, val_fraction: float, block_size: int) -> tuple[Tensor, Tensor]:
    """Encode a text and hold out its end: returns (training tokens, validation tokens), each 1-D.

    The end and not a random part: neighbouring passages resemble each other, so a random split would leak.
    """
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.long)
    n_train = int(len(tokens) * (1.0 - val_fraction))
    parts = tokens[:n_train], tokens[n_train:]
    for name, part in zip(("training", "validation"), parts):
        if len(part) <= block_size:
            raise ValueError(
                f"the {name} part has only {len(part)} characters, and one example needs BLOCK_SIZE + 1 = "
                f"{block_size + 1}: take a longer text or a smaller --block_size"
            )
    return parts


def batch(tokens: Tensor, step: int, seed: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draw the training examples of one step: (inputs, targets), both (B, T), targets one character ahead.

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 4.1.
    PAPER CONTEXT: trained on minibatches of randomly sampled, contiguous sequences of 512 tokens.
    INTUITION: open the book at B random places and read T characters at each.
    IMPLEMENTATION: the places depend on (seed, step) alone; one indexing operation gathers all rows.
    WHY: with nothing to remember, resuming a run at step n gives the very batches it would have seen.

    >>> x, y = batch(torch.arange(100), step=0, seed=1, batch_size=2, block_size=3)
    >>> x.shape, bool((y == x + 1).all())
    (torch.Size([2, 3]), True)
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    # Only the B starting points travel to a GPU.
    places = starts.to(tokens.device, non_blocking=True) + torch.arange(block_size + 1, device=tokens.device)
    rows = tokens[places]  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


def windows(
    tokens: Tensor, block_size: int, batch_size: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through tokens in windows that do not overlap: yields (inputs, targets), both (B, T).

    With `limit`, only about that many windows, evenly spread. The last, incomplete window is left out.
    """
    n_windows = (len(tokens) - 1) // block_size
    inputs = tokens[: n_windows * block_size].view(n_windows, block_size)
    targets = tokens[1 : n_windows * block_size + 1].view(n_windows, block_size)
    stride = 1 if limit is None else max(1, n_windows // limit)
    yield from zip(inputs[::stride].split(batch_size), targets[::stride].split(batch_size))
