"""
Tile sizes

This file implements the choice of tiles for the kernels following:
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - section 3.3: block
  sizes are tuned by hand for each head size, between registers spilled and shared memory exceeded
- "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations" (Tillet et al., 2019) - tuning
  by measuring a list of candidates

Each component is explained with paper references for educational purposes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """How a kernel cuts its work: m queries by n keys, in so many warps, with so many tiles in flight."""

    m: int
    n: int
    warps: int
    stages: int


# kind of kernel -> width of a head -> candidates, best on an H100 first, small ones for small GPUs last
CANDIDATES = {
    "forward": {
        32: [Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)],
        64: [Tile(64, 64, 4, 3), Tile(128, 64, 4, 4), Tile(128, 128, 8, 3)],
        128: [Tile(128, 64, 4, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)],
        256: [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 16, 4, 2)],
    },
    "keys": {
        32: [Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)],
        64: [Tile(32, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2)],
        128: [Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 1)],
        256: [Tile(32, 64, 8, 1), Tile(16, 64, 8, 1)],
    },
    "queries": {
        32: [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)],
        64: [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)],
        128: [Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)],
        256: [Tile(64, 32, 8, 2), Tile(64, 16, 4, 1)],
    },
}

_chosen: dict[tuple, Tile] = {}  # what was measured, or what fitted: (kind, width, bits of T) -> tile
_when = "never"  # candidates are measured: never, at the first launch of a size, or always


def width_of(*sizes: int) -> int:
    """The tile width of heads of these sizes: the next power of two, at least 16 (the depth of a matrix product)."""
    return max(16, 1 << (max(sizes) - 1).bit_length())


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within this block every launch measures all candidates, and keeps the fastest for its head size and length.

    PAPER: "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations" (Tillet et al., 2019).
    PAPER CONTEXT: an auto-tuner tries tile sizes and keeps what runs fastest on the machine at hand.
    INTUITION: nobody predicts registers, caches and pipelines well; a stopwatch does.
    IMPLEMENTATION: on demand and never by itself: another tile sums in another order, so a run could not be repeated.
    WHY: the table was measured on one GPU; yours may prefer another line of it.
    """
    global _when
    before, _when = _when, "always"
    try:
        yield
    finally:
        _when = before


def tune_at_first_use() -> None:
    """From now on measure the candidates once for each kernel, head size and length, when it is first launched."""
    global _when
    _when = "first"
    _chosen.clear()


def launch_best(kind: str, width: int, T: int, launch: Callable[[Tile], object]) -> None:
    """Call `launch` with the tile chosen for this kernel, head width and length (up to a factor of two)."""
    from triton.runtime.errors import OutOfResources

    key = (kind, max(width, 32), T.bit_length())
    candidates = CANDIDATES[kind][max(width, 32)]
    if _when == "always" or (_when == "first" and key not in _chosen):
        _chosen[key] = fastest(candidates, launch)
    for tile in [_chosen[key]] if key in _chosen else candidates:
        try:
            launch(tile)
        except OutOfResources:  # a GPU with less shared memory than an H100
            continue
        _chosen[key] = tile
        return
    raise ValueError(
        f"no tile of {kind!r} for heads of {width} fits this GPU: use smaller heads or use_attention(sdpa)"
    )


def fastest(candidates: list[Tile], launch: Callable[[Tile], object]) -> Tile:
    """The candidate that takes the least time on this GPU."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for tile in candidates:
        with contextlib.suppress(OutOfResources):
            times[tile] = do_bench(lambda tile=tile: launch(tile), warmup=5, rep=30, return_mode="median")
    return min(times, key=times.get) if times else candidates[-1]
