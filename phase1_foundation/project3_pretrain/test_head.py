"""Tests of the loss heads: the chunked loss is the plain one and never holds all logits; what autocast leaves wide."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from phase1_foundation.project3_pretrain.head import IGNORE, chunked_nll, plain_nll, use_chunked_loss
from phase1_foundation.project3_pretrain.test_model import make, random_tokens


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunked_loss_is_the_plain_one(chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    targets[1, :3] = IGNORE
    upstream = torch.rand(3, 5, generator=generator)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    for loss in (plain_nll, lambda *args: chunked_nll(*args, chunk=chunk)):
        nll = loss(x, weight, targets)
        assert nll.dtype == torch.float32 and not nll[1, :3].any()
        torch.testing.assert_close(nll, expected.float())
        ours = torch.autograd.grad((nll * upstream).sum(), (x, weight), retain_graph=True)
        theirs = torch.autograd.grad((expected * upstream).sum(), (x, weight), retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_chunked_loss_never_holds_all_logits():
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(0, 500, (64,))
    largest = {}
    for name, loss in {"plain": plain_nll, "chunked": lambda *args: chunked_nll(*args, chunk=8)}.items():
        with LargestTensor() as mode:
            loss(x, weight, targets).sum().backward()
        largest[name] = mode.largest
    assert largest["plain"] == 64 * 500
    assert largest["chunked"] == 8 * 500


def test_the_loss_is_chosen_once():
    model, tokens = make(), random_tokens(2, 16)
    plain = model(tokens, targets=tokens)
    torch.testing.assert_close(use_chunked_loss(model, chunk=5)(tokens, targets=tokens), plain)
    assert model.use_loss(lambda x, weight, targets: targets.float())(tokens, targets=tokens).equal(tokens.float())


@pytest.mark.parametrize("loss", [plain_nll, chunked_nll])
def test_autocast_runs_the_stream_in_its_dtype_and_the_loss_in_float32(loss):
    model, tokens = make().use_loss(loss), random_tokens(2, 16)
    reference = model(tokens, targets=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(tokens, torch.arange(16)).dtype == torch.bfloat16
        nll, logits = model(tokens, targets=tokens), model(tokens)
        wide = model.use_stream(lambda x: x.dtype).embed(tokens, torch.arange(16))
    assert nll.dtype == torch.float32 and logits.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert (nll - reference).abs().max() < 0.1
    nll.sum().backward()
    assert model.blocks[0].mlp.up_proj.weight.grad.dtype == torch.float32


if __name__ == "__main__":
    print("the largest tensor of a loss over 64 tokens and a vocabulary of 500:")
    for title, loss in (("plain", plain_nll), ("chunks of 8", lambda *args: chunked_nll(*args, chunk=8))):
        with LargestTensor() as seen:
            loss(torch.randn(64, 4), torch.randn(500, 4), torch.zeros(64, dtype=torch.long))
        print(f"  {title:12s} {seen.largest:6d} values")
    raise SystemExit(pytest.main([__file__, "-q"]))
