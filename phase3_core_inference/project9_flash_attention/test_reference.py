"""Tests of the reference: tiles give what the formula gives, gradients too, and their memory grows with T alone."""

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.plans import Packed, sdpa, visible
from phase3_core_inference.project9_flash_attention.memory import PeakMemory, peak_of, plain_attention
from phase3_core_inference.project9_flash_attention.reference import (
    OnlineSoftmax,
    lower_bounds,
    tiled_attention,
    tiled_backward,
    tiled_forward,
    walk,
)

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "documents": {"starts": torch.tensor([[0] * 9 + [9] * 14, [0] * 23])},
    "documents and window": {"starts": torch.tensor([[0] * 4 + [4] * 19, [0] * 20 + [20] * 3]), "window": 7},
    "documents, full": {"starts": torch.tensor([[0] * 9 + [9] * 14, [0] * 23]), "causal": False},
}


def draw(T=23, heads=4, kv_heads=2, D=6, V=5, rows=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, T, heads, D), (rows, T, kv_heads, D), (rows, T, kv_heads, V)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def with_gradients(kernel, inputs, **options):
    out = kernel(*inputs, scale=0.3, **options)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    return (out, *torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_compiled_gradients_are_the_eager_ones(dtype, heads):
    inputs = [x.detach().to(dtype).requires_grad_() for x in draw(T=1, heads=heads, kv_heads=1 if heads == 1 else 2)]
    compiled = torch.compile(tiled_attention, backend="aot_eager")
    for ours, eager in zip(*(with_gradients(call, inputs, m=8, n=8) for call in (compiled, tiled_attention))):
        torch.testing.assert_close(ours, eager)
    assert eager.norm() > 0  # of the values


@pytest.mark.parametrize("tile", [(23, 23), (4, 3), (3, 8), (1, 1), (64, 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_give_what_the_formula_gives(mask, tile):
    inputs = draw()
    ours = with_gradients(tiled_attention, inputs, m=tile[0], n=tile[1], **MASKS[mask])
    for plain in (plain_attention, sdpa):
        for got, exact in zip(ours, with_gradients(plain, inputs, **MASKS[mask])):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 2, 4), (2, 3, 5, 2, 4), (1, 1, 1, 8)])
def test_any_leading_dimensions(shape):
    q, k, v = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(tiled_attention(q, k, v, scale=0.5, m=2, n=2), sdpa(q, k, v, scale=0.5))


def test_scores_beyond_what_exp_can_hold():
    q, k, v = draw()
    expected = plain_attention(q * 1e3, k, v, scale=1.0)
    torch.testing.assert_close(tiled_attention(q * 1e3, k, v, scale=1.0, m=4, n=4), expected)
    assert expected.isfinite().all()


def test_the_gradient_into_the_log_sum_exp():
    q, k, v = draw(kv_heads=4)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 0.3).masked_fill(~visible(23), -torch.inf)
    lse = scores.logsumexp(-1)  # (B, H, T)
    dlse = torch.randn(lse.shape, dtype=lse.dtype)
    exact = torch.autograd.grad(lse, (q, k), dlse)
    o, ours = tiled_forward(q, k, v, None, 0.3, True, 4, 4)
    torch.testing.assert_close(ours, lse)
    dq, dk, dv = tiled_backward(torch.zeros_like(o), dlse, q, k, v, o, ours, None, 0.3, True, 4, 4)
    torch.testing.assert_close((dq, dk), exact)
    assert not dv.any()


def test_a_softmax_in_parts_whose_first_part_is_hidden():
    softmax, values = OnlineSoftmax((2,), 1, torch.float64, "cpu"), torch.arange(6.0, dtype=torch.float64).unsqueeze(-1)
    scores = torch.tensor([[-torch.inf, -torch.inf, 1.0, 900.0, 2.0, 3.0]] * 2, dtype=torch.float64)
    scores[1, 2:4] = -torch.inf
    for begin in (0, 2, 4):
        softmax.update(scores[:, begin : begin + 2], values[begin : begin + 2])
    o, lse = softmax.finish()
    torch.testing.assert_close(o, scores.softmax(-1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("mask", MASKS)
def test_tiles_are_skipped_or_left_unmasked_only_where_the_mask_allows(mask):
    options = {"causal": True} | MASKS[mask]
    starts = options.get("starts")
    seen = visible(23, options.get("window"), starts, options["causal"])
    seen = seen.reshape(-1, 23, 23)
    lower = lower_bounds(23, options.get("window"), starts, "cpu")
    kinds = set()
    for first in range(0, 23, 4):
        for begin, end, kind in walk(first, min(first + 4, 23), lower, 23, options["causal"], 3):
            tile = seen[:, first : first + 4, begin:end]
            assert kind != "skipped" or not tile.any()
            assert kind != "full" or tile.all()
            assert kind != "masked" or not tile.all(), "a mask for nothing"
            kinds.add(kind)
    assert "skipped" in kinds or mask == "full" or mask == "documents, full"


def test_bounds_say_what_the_mask_says():
    starts = torch.tensor([[0] * 4 + [4] * 5, [0] * 9])
    lower = lower_bounds(9, 3, starts, "cpu")
    expected = visible(9, 3, starts).squeeze(1).int().argmax(-1)  # the first key that is seen
    assert lower.tolist() == expected.tolist()
    assert lower_bounds(9, None, None, "cpu") is None and lower_bounds(9, 9, None, "cpu") is None


def test_a_model_with_packed_documents_gives_the_logits_of_each_alone():
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](n_layer=2, windows=(5, None))).double().use_attention(tiled_attention)
    tokens = torch.randint(0, 256, (1, 20))
    packed = model(tokens, Packed([[8, 12]], model.specs, model.kernel))
    alone = torch.cat([model(tokens[:, :8]), model(tokens[:, 8:])], dim=1)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(model.use_attention(sdpa)(tokens[:, :8]), alone[:, :8])


def test_memory_grows_with_the_length_and_not_with_its_square():
    def peaks(kernel, T):
        inputs = [torch.randn(1, T, 1, 16) for _ in range(3)]
        return peak_of(lambda *x, scale: kernel(*x, scale=scale), inputs, 0.25, backward=True)

    tiled = [peaks(lambda *x, scale: tiled_attention(*x, scale=scale, m=32, n=32), T) for T in (256, 512)]
    plain = [peaks(plain_attention, T) for T in (256, 512)]
    assert tiled[1] < 2.05 * tiled[0] and plain[1] > 3.5 * plain[0] and plain[1] > 10 * tiled[1]


def test_peak_memory_counts_what_is_alive_at_once():
    with PeakMemory() as memory:
        x = torch.zeros(1000, dtype=torch.float32)
        y = x[10:].view(90, 11)  # no bytes of its own
        for _ in range(3):
            x = x + 1  # the old one goes
    assert memory.peak == 12_000 and y.shape == (90, 11)  # y holds the first, beside two


BAD = {
    "unequal T": ([(1, 4, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)], {}, "of equal T"),
    "heads": ([(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}, "3 query heads are no multiple of 2"),
    "head size": ([(1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 8)], {}, "pass q"),
    "starts": ([(1, 4, 2, 8)] * 3, {"starts": torch.zeros(1, 5, dtype=torch.long)}, "each of the 4 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    shapes, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tiled_attention(*(torch.randn(shape) for shape in shapes), scale=0.5, **options)
    with pytest.raises(ValueError, match="convert them"):
        tiled_attention(torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 4, 2, 8).half(), scale=0.5)


if __name__ == "__main__":
    inputs = draw()
    gap = (tiled_attention(*inputs, scale=0.3, m=4, n=4) - plain_attention(*inputs, scale=0.3)).abs().max()
    print(f"tiles of 4 x 4 against the formula: largest difference {float(gap.detach()):.1e}")
    raise SystemExit(pytest.main([__file__]))
