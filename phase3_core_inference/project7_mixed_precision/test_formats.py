"""Tests of number formats: the table against torch.finfo, rounding against torch's casts, on every value there is."""

import math

import pytest
import torch

from phase3_core_inference.project7_mixed_precision.formats import FORMATS, lost, round_to

SMALL = ["float16", "bfloat16", "e5m2", "e4m3"]


def all_values(name):
    """Every finite value of a format of at most 16 bits, in order, as float64."""
    dtype = FORMATS[name].dtype
    bits = 8 * torch.finfo(dtype).bits // 8
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
    values = codes.view(dtype).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_is_that_of_torch(name):
    form, info = FORMATS[name], torch.finfo(FORMATS[name].dtype)
    assert (form.largest, form.smallest_normal, form.epsilon) == (info.max, info.smallest_normal, info.eps)
    assert 1 + form.exponent_bits + form.mantissa_bits == info.bits


@pytest.mark.parametrize("name", SMALL)
def test_the_least_and_the_largest_value_are_those_that_exist(name):
    values = all_values(name)
    assert values.max() == FORMATS[name].largest and values[values > 0].min() == FORMATS[name].smallest


@pytest.mark.parametrize("name", SMALL)
def test_values_of_a_format_stay_what_they_are(name):
    values = all_values(name)
    assert torch.equal(round_to(values, name), values)


@pytest.mark.parametrize("name", SMALL)
def test_between_two_neighbours_rounding_is_torchs(name):
    """Below, on and above the middle of every pair of neighbours, subnormals among them."""
    values = all_values(name).float()
    values = values[values.abs() > 2.0**-120]  # for bfloat16: the middle must be a float32
    low, high = values[:-1].double(), values[1:].double()
    middle = (low + high) / 2
    probes = torch.cat([middle, middle + (high - low) / 64, middle - (high - low) / 64]).float()
    assert torch.equal(round_to(probes, name), probes.to(FORMATS[name].dtype).float())


def test_ties_go_to_the_even_mantissa():
    assert round_to(torch.tensor([17.0, 19.0, -17.0]), "e4m3").tolist() == [16.0, 20.0, -16.0]
    assert round_to(torch.tensor([2.0**-10, 3 * 2.0**-10]), "e4m3").tolist() == [0.0, 2.0**-8]


@pytest.mark.parametrize("name", SMALL)
def test_what_is_too_large_saturates_and_what_is_no_number_stays(name):
    largest = FORMATS[name].largest
    x = torch.tensor([largest * 1.5, -largest * 1.5, math.inf, -math.inf, math.nan], dtype=torch.float64)
    y = round_to(x, name)
    assert y[:4].tolist() == [largest, -largest, math.inf, -math.inf] and y[4].isnan()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_lost_is_what_a_cast_makes_zero(name):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).exp() * 2.0**-13
    x[:100] = 0
    for scale in (1.0, 2.0**-12, 2.0**10):
        zeros = ((x * scale).to(FORMATS[name].dtype).float() == 0) & (x != 0)
        assert lost(x, name, scale) == pytest.approx(float(zeros.sum()) / 19_900, abs=1e-9)
    assert lost(torch.zeros(3), name) == 0


if __name__ == "__main__":
    for name, form in FORMATS.items():
        print(f"{name:>8}: largest {form.largest:.4g}, smallest {form.smallest:.3g}, epsilon {form.epsilon:.3g}")
    raise SystemExit(pytest.main([__file__]))
