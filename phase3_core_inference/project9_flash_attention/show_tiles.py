"""Show what tiled attention does: which tiles it visits, how its softmax grows, and what memory it needs."""

import functools
import sys
from pathlib import Path

import torch

from common.plots import curves
from common.run import Run
from phase3_core_inference.project9_flash_attention import config
from phase3_core_inference.project9_flash_attention.memory import peak_of, plain_attention
from phase3_core_inference.project9_flash_attention.reference import (
    OnlineSoftmax,
    lower_bounds,
    tiled_attention,
    walk,
)

SIGNS = {"full": "#", "masked": "/", "skipped": "."}


def main(argv=None):
    """Draw the tiles, follow one row, compare with plain attention, and count memory."""
    with Run(config, argv, description=__doc__) as run:
        s = run.settings
        torch.manual_seed(s.SEED)
        draw_tiles(s)
        follow_one_row(s)
        compare(s)
        print(f"wrote {count_memory(s)}")


def starts_of(lengths):
    """Where the document of each token begins, (1, T); None without documents."""
    firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], dtype=torch.long)
    return firsts.repeat_interleave(torch.tensor(lengths)).unsqueeze(0) if lengths else None


def draw_tiles(s):
    """Each tile of the score matrix: full, masked, or not visited at all."""
    lower = lower_bounds(s.LENGTH, s.WINDOW, starts_of(s.DOCUMENTS), "cpu")
    print(f"{s.LENGTH} queries (down) and keys (across) in tiles of {s.QUERIES} x {s.KEYS}: "
          "# full, / masked, . skipped\n")  # fmt: skip
    counts = dict.fromkeys(SIGNS, 0)
    for first in range(0, s.LENGTH, s.QUERIES):
        last = min(first + s.QUERIES, s.LENGTH)
        kinds = [kind for _, _, kind in walk(first, last, lower, s.LENGTH, s.CAUSAL, s.KEYS)]
        for kind in kinds:
            counts[kind] += 1
        print(f"  queries {first:4}-{last - 1:<4} " + " ".join(SIGNS[kind] for kind in kinds))
    total = sum(counts.values())
    print(f"\n{total} tiles: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())
          + f"; {1 - counts['skipped'] / total:.0%} of the matrix is computed\n")  # fmt: skip


def follow_one_row(s):
    """The last query's softmax, tile after tile."""
    T = s.LENGTH
    scores, values = torch.randn(1, T, dtype=torch.float64) * 2, torch.randn(T, 1, dtype=torch.float64)
    softmax = OnlineSoftmax((1,), 1, torch.float64, "cpu")
    print(f"the online softmax of one row of {T} random scores")
    print("  keys        maximum      sum  weighted values so far")
    for begin in range(0, T, s.KEYS):
        softmax.update(scores[:, begin : begin + s.KEYS], values[begin : begin + s.KEYS])
        so_far = float(softmax.values / softmax.total)
        last = min(begin + s.KEYS, T) - 1
        print(f"  {begin:4}-{last:<4} {float(softmax.top):9.4f} {float(softmax.total):8.4f} {so_far:9.4f}")
    exact = float(scores.softmax(-1) @ values)
    print(f"  softmax over the whole row:   {exact:9.4f}\n")


def compare(s):
    """Values and gradients of tiled and of plain attention, in float64."""
    inputs = [torch.randn(1, s.LENGTH, s.HEADS, s.HEAD_SIZE, dtype=torch.float64) for _ in range(3)]
    options = {"scale": s.HEAD_SIZE**-0.5, "window": s.WINDOW, "starts": starts_of(s.DOCUMENTS), "causal": s.CAUSAL}
    results = []
    for kernel, tile in ((plain_attention, {}), (tiled_attention, {"m": s.QUERIES, "n": s.KEYS})):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = kernel(*leaves, **options, **tile)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(*results)]
    named = ", ".join(f"{name} {gap:.1e}" for name, gap in zip(("o", "dq", "dk", "dv"), gaps))
    print(f"largest differences of tiled from plain attention, float64: {named}\n")


def count_memory(s):
    """Peak bytes of both, by the length of the row; returns the plot that was written."""
    kernels = {"plain": plain_attention, "tiled": functools.partial(tiled_attention, m=s.TILE, n=s.TILE)}
    lines = {f"{name}, {way}": [] for name in kernels for way in ("forward", "forward and backward")}
    print(f"peak memory in MiB, {s.HEADS} heads of {s.HEAD_SIZE}, float32, tiles of {s.TILE} x {s.TILE}")
    print("      T  " + "  ".join(f"{name:>27}" for name in lines))
    for T in s.LENGTHS:
        inputs = [torch.randn(1, T, s.HEADS, s.HEAD_SIZE) for _ in range(3)]
        for name, kernel in kernels.items():
            for way in ("forward", "forward and backward"):
                peak = peak_of(kernel, inputs, s.HEAD_SIZE**-0.5, way != "forward")
                lines[f"{name}, {way}"].append(peak / 2**20)
        print(f"  {T:5}  " + "  ".join(f"{line[-1]:27.2f}" for line in lines.values()))
        sys.stdout.flush()
    series = {name: (s.LENGTHS, line) for name, line in lines.items()}
    return curves(Path(s.OUT_DIR) / "memory.png", series, "tokens", "peak memory (MiB)",
                  "Memory of attention beyond its inputs", logx=True, logy=True)  # fmt: skip


if __name__ == "__main__":
    main()
