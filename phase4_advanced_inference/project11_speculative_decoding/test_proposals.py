"""Proposals: the same answer, whether the host knows it already or a device still writes it."""

import pytest
import torch

from phase4_advanced_inference.project11_speculative_decoding.proposals import Proposal

GUESSES = [[5, 6, 7], [], [8]]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([4, 1, 2], [1, 5, 6, 7, 2, 3, 8]),  # as they are
        ([4, 4, 4], [1, 5, 6, 7, 2, None, None, None, 3, 8, None, None]),  # filled up: with any token
        ([2, 1, 1], [1, 5, 2, 3]),  # cut
        ([5, 5, 5], [1, 5, 6, 7, None, 2, None, None, None, None, 3, 8, None, None, None]),  # further than any
    ],
)
def test_a_proposal_reads_alike_where_it_is_known_and_where_it_is_on_its_way(widths, expected):
    known = Proposal.of(GUESSES)
    under_way = Proposal(torch.tensor([[5, 6, 7], [9, 9, 9], [8, 9, 9]]), [3, 0, 1])
    assert known.known and not under_way.known
    for proposal in (known, under_way):
        got = proposal.behind([1, 2, 3], widths)
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        assert len(got) == len(expected)
        assert all(b is None or a == b for a, b in zip(got, expected)) and all(0 <= token < 10 for token in got)
    assert under_way.tokens == known.tokens == GUESSES and under_way.known


def test_some_rows_of_a_proposal():
    odds = torch.arange(9.0).view(3, 3, 1)
    for proposal in (Proposal.of(GUESSES), Proposal(torch.tensor([[5, 6, 7], [9, 9, 9], [8, 9, 9]]), [3, 0, 1], odds)):
        picked = proposal.pick([2, 0, 1], [1, 2, 0])
        assert picked.tokens == [[8], [5, 6], []] and picked.counts == [1, 2, 0]
    assert picked.odds[:, 0, 0].tolist() == [6, 0, 3]
    empty = Proposal.of([])
    assert empty.tokens == [] and empty.drafted.shape == (0, 0)


if __name__ == "__main__":
    print(Proposal.of(GUESSES).behind([1, 2, 3], [4, 4, 4]))
    raise SystemExit(pytest.main([__file__]))
