"""
Number formats

This file implements what a floating-point number of few bits can hold, and how a value is rounded to it, following:
- "Mixed Precision Training" (Micikevicius et al., 2017) - which gradients float16 loses
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - E4M3 and E5M2

Each component is explained with paper references for educational purposes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """
    One floating-point format: a sign, some bits of exponent, some of mantissa

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3, table 1.
    PAPER CONTEXT: E5M2 is a small float16, with infinities; E4M3 has none, to win one more power of two.
    INTUITION: exponent bits say how far the ruler reaches, mantissa bits how many marks lie between powers of two.
    IMPLEMENTATION: what follows from the bits is computed here and held against `torch.finfo` by a test; only the
        largest value must be told, since formats differ in how many of the highest codes are no numbers.
    WHY: everything in this project is a consequence of these few numbers.

    >>> FORMATS["e4m3"].smallest == 2.0**-9, FORMATS["float16"].smallest_normal == 2.0**-14
    (True, True)
    """

    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def lowest_exponent(self) -> int:
        """Of a normal number; below it the marks of the ruler come no closer."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def smallest_normal(self) -> float:
        """The least value with all bits of its mantissa."""
        return 2.0**self.lowest_exponent

    @property
    def smallest(self) -> float:
        """The least value above zero (subnormal); half of it, and all below, rounds to zero."""
        return 2.0 ** (self.lowest_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """From 1 to the next larger value; rounding is off by half of it at most, relatively."""
        return 2.0**-self.mantissa_bits


FORMATS = {
    "float32": Format(torch.float32, 8, 23, (2 - 2.0**-23) * 2.0**127),
    "float16": Format(torch.float16, 5, 10, 65504.0),
    "bfloat16": Format(torch.bfloat16, 8, 7, (2 - 2.0**-7) * 2.0**127),
    "e5m2": Format(torch.float8_e5m2, 5, 2, 57344.0),
    "e4m3": Format(torch.float8_e4m3fn, 4, 3, 448.0),
}


def round_to(x: Tensor, name: str) -> Tensor:
    """
    The nearest values of a format, by arithmetic; what is too large becomes the largest

    PAPER: "FP8 Formats for Deep Learning", arXiv:2209.05433, section 2.
    PAPER CONTEXT: casts round to the nearest value, and saturate at the largest in place of becoming infinite.
    INTUITION: find the power of two below x: it says how far apart the marks are; go to the nearest, on a tie to the
        even one. Below the smallest normal number the distance stays what it is there.
    IMPLEMENTATION: x / quantum, rounded, * quantum, all in float64, where both are exact. NaN and infinity stay.
    WHY: the definition; the casts that are used (`to_float8`, autocast) are held against it, value by value.

    Shape and dtype stay those of x: the values are in the format, the container is not.

    >>> round_to(torch.tensor([0.3, 1000.0, 2.0**-11]), "e4m3").tolist()
    [0.3125, 448.0, 0.0]
    """
    form = FORMATS[name]
    wide = x.double()
    exponent = torch.frexp(wide).exponent - 1  # wide = m * 2^exponent, 1 <= |m| < 2
    quantum = torch.ldexp(
        torch.ones_like(wide), exponent.clamp(min=form.lowest_exponent) - form.mantissa_bits
    )  # the distance of the marks here
    nearest = (wide / quantum).round() * quantum  # torch rounds ties to even
    nearest = nearest.clamp(-form.largest, form.largest)
    return torch.where(wide.isfinite(), nearest, wide).to(x.dtype)


def lost(x: Tensor, name: str, scale: float = 1.0) -> float:
    """
    The share of the nonzero values of x that a format makes zero

    PAPER: "Mixed Precision Training", arXiv:1710.03740, section 3.2, figure 3.
    PAPER CONTEXT: many of a detector's activation gradients lie below float16's range and would become zeros.
    INTUITION: what is finer than half of the ruler's first mark is not there.
    IMPLEMENTATION: |x| * scale is at most half of the smallest value (the tie goes to zero, which is even).
    WHY: the one number that says whether a scale is needed, and whether it is enough.
    """
    nonzero = x[x != 0].double().abs()
    return float((nonzero * scale <= FORMATS[name].smallest / 2).double().mean()) if len(nonzero) else 0.0
