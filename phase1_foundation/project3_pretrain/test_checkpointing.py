"""Tests of activation checkpointing: it changes memory alone, and blocks stay what they were."""

import pytest
import torch
from torch import nn

from common.modules import swap_modules
from phase1_foundation.project3_pretrain import layers
from phase1_foundation.project3_pretrain.checkpointing import checkpoint_activations
from phase1_foundation.project3_pretrain.test_model import make, random_tokens


def saved_bytes(model, tokens):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, targets=tokens).sum()
    loss.backward()
    return total, loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_memory_alone(every):
    tokens, names = random_tokens(2, 32), list(make().state_dict())
    plain_total, plain_loss, plain_grads = saved_bytes(make(), tokens)
    model = checkpoint_activations(make(), every=every)
    total, loss, grads = saved_bytes(model, tokens)
    assert loss == plain_loss and list(model.state_dict()) == names
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)
    share = total / plain_total
    assert share < 0.4 if every == 1 else 0.4 < share < 0.8


def test_layers_can_be_swapped_inside_checkpointed_blocks():
    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    model, reference, tokens = checkpoint_activations(make()), make(), random_tokens(1, 8)
    for changed in (model, reference):
        swap_modules(changed, lambda name, old: Zero(), lambda name, module: name.endswith("mlp"))
    assert torch.equal(model(tokens), reference(tokens))


def test_a_checkpointed_block_keeps_a_forward_of_its_own():
    class Doubling(layers.Block):
        def forward(self, x, plan, layer):
            return 2 * super().forward(x, plan, layer)

    model, reference, tokens = make(), make(), random_tokens(1, 8)
    for changed in (model, reference):
        changed.blocks[1].__class__ = Doubling
    checkpoint_activations(checkpoint_activations(model))  # asked for twice, done once
    assert torch.equal(model(tokens), reference(tokens))
    assert not torch.equal(model(tokens), make()(tokens))
    assert isinstance(model.blocks[1], Doubling)


def test_checkpointing_refuses_nonsense():
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        checkpoint_activations(make(), every=0)
    with pytest.raises(ValueError):
        checkpoint_activations(nn.Linear(2, 2))


if __name__ == "__main__":
    print("bytes saved for the backward pass of 2 x 32 tokens:")
    print(f"  {'every block kept':24s} {saved_bytes(make(), random_tokens(2, 32))[0]:9,d}")
    for every in (2, 1):
        total, *_ = saved_bytes(checkpoint_activations(make(), every=every), random_tokens(2, 32))
        print(f"  {f'checkpointed, every={every}':24s} {total:9,d}")
    raise SystemExit(pytest.main([__file__, "-q"]))
