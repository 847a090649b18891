"""Tests of attention for decoding: its definition, what it refuses, and how the keys are shared out."""

import pytest
import torch

from phase1_foundation.project3_pretrain.plans import sdpa
from phase3_core_inference.project9_flash_attention.decoding import choose_splits, flash_decode, flash_decode_op


def draw(rows=3, S=20, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, 8, generator=generator)
    return q, *torch.randn(2, rows, S, kv_heads, 8, generator=generator)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_the_last_query_of_a_row_sees_what_it_sees_in_a_whole_forward(window):
    q, k, v = draw()
    lengths = torch.tensor([20, 9, 1], dtype=torch.int32)
    ours = flash_decode(q, k, v, lengths, 0.3, window)
    for b, length in enumerate(lengths.tolist()):
        rows = torch.zeros(1, length, *q.shape[1:])
        rows[0, -1] = q[b]
        whole = sdpa(rows, k[b : b + 1, :length], v[b : b + 1, :length], scale=0.3, window=window)
        torch.testing.assert_close(ours[b], whole[0, -1])


def test_a_row_without_keys_gives_zeros_and_what_lies_behind_the_end_is_not_seen():
    q, k, v = draw()
    lengths = torch.tensor([5, 0, 20], dtype=torch.int32)
    expected = flash_decode(q, k, v, lengths, 0.3)
    k[0, 5:] = v[0, 5:] = float("nan")
    assert torch.equal(flash_decode(q, k, v, lengths, 0.3), expected)
    assert not expected[1].any() and expected[0].any()


def test_a_length_beyond_the_cache_means_all_of_it():
    q, k, v = draw()
    all_of_it, more = (torch.full((3,), n, dtype=torch.int32) for n in (20, 1000))
    assert torch.equal(flash_decode(q, k, v, more, 0.3), flash_decode(q, k, v, all_of_it, 0.3))


def test_the_operator_says_true_things_of_itself():
    q, k, v = draw()
    arguments = (q, k, v, torch.tensor([3, 4, 5], dtype=torch.int32), 0.3, 2, 4)
    torch.library.opcheck(flash_decode_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_keys_are_shared_out_from_the_shapes_alone():
    cpu = torch.device("cpu")
    few, many = choose_splits(1, 10_000, cpu), choose_splits(8, 10_000, cpu)
    assert few == 8 * many > 1  # a few programs for each of the four processors, however many rows there are
    assert choose_splits(1, 65, cpu) == 2 and choose_splits(1, 64, cpu) == 1  # none below a tile
    assert choose_splits(1000, 10_000, cpu) == 1


def test_what_does_not_fit_is_refused():
    q, k, v = draw()
    lengths = torch.tensor([3, 4, 5], dtype=torch.int32)
    for bad in ((q[:, :3], k, v), (q[:2], k, v), (q, k, v[:, :10]), (q[0], k, v)):
        with pytest.raises(ValueError, match=r"pass \(B, H, D\)"):
            flash_decode(*bad, lengths, 0.3)
    for bad in (lengths[:2], lengths.float(), lengths[:, None]):
        with pytest.raises(ValueError, match="pass one whole number a row"):
            flash_decode(q, k, v, bad, 0.3)
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        flash_decode(q, k, v, lengths, 0.3, splits=0)


if __name__ == "__main__":
    print("parts of 32,768 keys, one row of 8 key heads:", choose_splits(8, 32768, torch.device("cpu")), "on a CPU")
    raise SystemExit(pytest.main([__file__]))
