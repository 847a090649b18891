"""
Work

This file implements what one step of decoding is told to do, and its shape, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - prefill and decode are one forward with other counts

Each component is explained with paper references for educational purposes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# (row, n_new, n_wanted): so many new tokens for a row, logits wanted of the last n_wanted among them.
Work = Sequence[tuple[int, int, int]]
SHORT = 16  # new tokens a row, up to which a step counts as decoding


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one step stand, as plain arrays on the host.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: prefill runs all input tokens at once, decode one token a sequence; both read the cached past.
    INTUITION: a seating plan: for every guest the row and the seat, and who is going to speak.
    IMPLEMENTATION: everything follows from three columns by `repeat` and `cumsum`; no loop over tokens.
    WHY: decode, verification, chunked prefill and any mix of them are the same few arrays.
    """

    rows: np.ndarray  # (R,) rows of the cache, in the order of the work
    news: np.ndarray  # (R,) new tokens of each
    ends: np.ndarray  # (R,) lengths after this step
    token_rows: np.ndarray  # (N,) the row of the cache of each token
    token_order: np.ndarray  # (N,) which item of the work it belongs to
    offsets: np.ndarray  # (N,) its place among the new ones
    positions: np.ndarray  # (N,) its place in the sequence
    wanted: np.ndarray  # (W,) tokens whose logits are wanted

    @classmethod
    def of(cls, work: Work, lengths: Sequence[int], capacity: int) -> "Layout":
        """Lay out work; raises ValueError for what cannot be done (nothing has been changed then).

        >>> layout = Layout.of([(2, 3, 1), (0, 1, 1)], lengths=[7, 0, 4], capacity=16)
        >>> layout.positions.tolist(), layout.token_rows.tolist(), layout.wanted.tolist()
        ([4, 5, 6, 7], [2, 2, 2, 0], [2, 3])
        """
        check_work(work, lengths, capacity)
        numbers = np.fromiter(itertools.chain.from_iterable(work), np.int64, 3 * len(work))
        rows, news, wants = numbers.reshape(-1, 3).T.copy()  # each in one piece
        ends = news + [lengths[row] for row, _, _ in work]
        tokens = np.arange(news.sum())
        order = np.arange(len(rows)).repeat(news)
        upto = news.cumsum()  # tokens of the step up to the last of each row
        offsets = tokens - (upto - news)[order]
        positions = tokens + (ends - upto)[order]
        everything = (wants == news).all()
        wanted = tokens if everything else (tokens >= (upto - wants)[order]).nonzero()[0]
        return cls(rows, news, ends, rows[order], order, offsets, positions, wanted)


def check_work(work: Work, lengths: Sequence[int], capacity: int) -> None:
    """Raise ValueError for work that cannot be done; nothing has been changed then."""
    if not work:
        raise ValueError("work=[] has nothing to do: give (row, n_new, n_wanted) for at least one row")
    seen = set()
    for row, n_new, n_wanted in work:
        if not 0 <= row < len(lengths):
            raise ValueError(f"row {row} is unknown: this cache has the rows 0 to {len(lengths) - 1}")
        if row in seen:
            raise ValueError(f"row {row} stands twice in the work: join its tokens to one (row, n_new, n_wanted)")
        if n_new < 1:
            raise ValueError(f"row {row}: n_new={n_new} must be at least 1: leave idle rows out of the work")
        if not 0 <= n_wanted <= n_new:
            raise ValueError(f"row {row}: n_wanted={n_wanted} must lie between 0 and n_new={n_new}")
        if lengths[row] + n_new > capacity:
            raise ValueError(
                f"row {row} holds {lengths[row]} tokens, and {n_new} more exceed capacity={capacity}: end the sequence "
                f"(free the row), or build the cache with more capacity, up to the model's block_size"
            )
        seen.add(row)


def power_of_two(n: int) -> int:
    """n rounded up to a power of two; 0 stays 0.

    >>> [power_of_two(n) for n in (0, 1, 5, 8)]
    [0, 1, 8, 8]
    """
    return 1 << (n - 1).bit_length() if n else 0


def quarter_octaves(n: int, floor: int = 64) -> int:
    """n rounded up to one of four steps between two powers of two: above 256 at most a fifth is spare.

    Below, steps are of `floor`: up to half is spare (65 -> 128), and more below the floor itself.

    >>> [quarter_octaves(n) for n in (1, 65, 300, 513, 1000)]
    [64, 128, 320, 640, 1024]
    """
    step = max(floor, power_of_two(n) // 8)
    return -(-n // step) * step


def octaves(n: int, floor: int = 64) -> int:
    """n rounded up to a power of two, at least `floor`: so few sizes that code can be compiled for each.

    >>> [octaves(n) for n in (1, 64, 65, 300)]
    [64, 64, 128, 512]
    """
    return max(floor, power_of_two(n))


Rounding = Callable[[int], int]
