"""CUDA graphs: nothing changes on a CPU; on a GPU the replay computes the same."""

import pytest
import torch

from common.graphs import capture


def test_without_a_gpu_the_function_itself_comes_back():
    def function(a, b):
        return a + b

    assert capture(function, torch.ones(2), torch.ones(2)) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_computes_what_the_function_does():
    def function(a, b):
        return (a @ b).relu(), a.sum()

    draw = lambda: (torch.randn(8, 8, device="cuda"), torch.randn(8, 8, device="cuda"))  # noqa: E731
    replay = capture(function, *draw())
    for _ in range(3):
        arguments = draw()
        for ours, exact in zip(replay(*arguments), function(*arguments)):
            torch.testing.assert_close(ours, exact)
    with pytest.raises(ValueError, match=r"captured for shape \(8, 8\), not \(4, 8\)"):
        replay(torch.ones(4, 8, device="cuda"), arguments[1])


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
