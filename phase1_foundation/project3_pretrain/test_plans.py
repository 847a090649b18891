"""Tests of the plans: who sees whom, kernels against the formula of attention, packed documents, windows."""

import pytest
import torch

from phase1_foundation.project3_pretrain import plans
from phase1_foundation.project3_pretrain.plans import Packed, sdpa, visible
from phase1_foundation.project3_pretrain.test_model import make, random_tokens


def test_masks_written_out():
    assert visible(4).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert visible(4, window=2).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    documents = torch.tensor([0, 0, 2, 2, 2])  # lengths 2 and 3
    assert visible(5, starts=documents).int().tolist() == [
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1],
        ]
    ]
    assert visible(5, window=2, starts=documents)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert visible(3, window=2, causal=False).int().tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


def attention_by_the_formula(q, k, v, scale, mask):
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel", [sdpa, plans.prefer("math"), plans.prefer("cudnn", "flash", "math")])
def test_kernels_compute_the_formula(window, n_kv_head, documents, kernel):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 4, 6, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 9, n_kv_head, 6, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 9, n_kv_head, 5, generator=generator, dtype=torch.float64)
    starts = torch.tensor([[0] * 4 + [4] * 5, [0] * 9]) if documents else None
    mask = visible(9, window, starts)
    expected = attention_by_the_formula(q, k, v, 0.3, mask)
    torch.testing.assert_close(kernel(q, k, v, scale=0.3, window=window, starts=starts), expected)


def test_unknown_back_end():
    with pytest.raises(ValueError, match="cudnn, flash, efficient, math"):
        plans.prefer("cuda")


@pytest.mark.parametrize("fields", [{}, dict(windows=(3, None))])
@pytest.mark.parametrize("preset", ["cpu-tiny", "gpt2"])
def test_packed_documents_get_the_logits_they_get_alone(preset, fields):
    model = make(preset, **fields)
    texts = [random_tokens(n, seed=n) for n in (5, 1, 10, 16)]
    alone = [model(text.unsqueeze(0))[0] for text in texts]
    flat = model(torch.cat(texts), Packed([5, 1, 10, 16], model.specs, model.kernel))
    torch.testing.assert_close(flat, torch.cat(alone))
    rows = torch.stack([torch.cat(texts[:3]), texts[3]])
    nested = model(rows, Packed([[5, 1, 10], [16]], model.specs, model.kernel))
    torch.testing.assert_close(nested.flatten(0, 1), torch.cat(alone))


def test_documents_are_found_by_the_mark_before_them():
    tokens = torch.tensor([[7, 0, 5, 5, 5, 0, 1, 2], [0, 0, 3, 3, 3, 3, 3, 0]])
    marks = Packed.at_marks(tokens, 0, [], sdpa)
    lengths = Packed([[1, 4, 3], [1, 6, 1]], [], sdpa)
    assert torch.equal(marks.positions, lengths.positions) and torch.equal(marks.starts, lengths.starts)


def test_a_packed_document_longer_than_the_context_is_refused():
    model = make(block_size=8)
    Packed([8, 4], model.specs, model.kernel)
    with pytest.raises(ValueError, match="12 tokens exceeds block_size=8"):
        Packed([12], model.specs, model.kernel)


@pytest.mark.parametrize("lengths", [[], [3, 0], [[3, 5], [7]], [-1, 4]])
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(ValueError, match="must be positive and add up"):
        Packed(lengths, [], sdpa)


def test_windows_limit_what_a_stack_can_see():
    model, tokens = make(windows=(3, 3)), random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]  # two layers of window 3 reach 4 tokens back


if __name__ == "__main__":
    print("who sees whom, two documents of 2 and 3 tokens, window 2:")
    for row in visible(5, window=2, starts=torch.tensor([0, 0, 2, 2, 2]))[0].int().tolist():
        print("  " + " ".join(".x"[value] for value in row))
    raise SystemExit(pytest.main([__file__, "-q"]))
