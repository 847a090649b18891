"""Swapping layers: which, how many, once each, and an error when none."""

import pytest
import torch
from torch import nn

from common.modules import is_linear, swap_modules


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 8), nn.LayerNorm(8), nn.Linear(8, width)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Doubled(nn.Module):
    """A stand-in for a quantized or adapted layer: it looks like a linear one and keeps the old one inside."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features, self.base = old.in_features, old.out_features, old

    def forward(self, x):
        return 2 * self.base(x)


def test_every_match_is_replaced_and_computes():
    model, x = Model(), torch.randn(2, 4)
    expected = model.head(x)
    assert swap_modules(model, lambda name, old: Doubled(old), is_linear) == (7, 7)
    assert sum(isinstance(m, Doubled) for m in model.modules()) == 7
    assert torch.equal(model.head(x), 2 * expected)
    assert model(x).shape == (2, 10)


def test_make_gets_dotted_names():
    names = []
    swap_modules(Model(2), lambda name, old: names.append(name) or old, is_linear)
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def test_a_class_is_a_match_too():
    model = Model()
    assert swap_modules(model, lambda name, old: nn.Identity(), nn.LayerNorm) == (3, 3)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


@pytest.mark.parametrize(
    ("skip", "swapped"),
    [
        (("head",), 6), ("head", 6), (("down",), 4), (("blocks.1.up",), 6), (("up", "down"), 1),
        (("blocks.0",), 5), (("blocks",), 1), (("head", "up", "down"), 0), (("hea", "block"), 7),
    ],
)  # fmt: skip
def test_skipped_names_stay(skip, swapped):
    model = Model()
    before = dict(model.named_modules())
    assert swap_modules(model, lambda name, old: Doubled(old), is_linear, skip) == (swapped, 7)
    kept = [name for name, module in before.items() if is_linear(name, module) and module is model.get_submodule(name)]
    assert len(kept) == 7 - swapped


def test_a_shared_block_stays_shared():
    model = Model(2)
    model.blocks.append(model.blocks[0])
    made = []
    make = lambda name, old: made.append(name) or Doubled(old)  # noqa: E731
    assert swap_modules(model, make, is_linear) == (5, 5)  # the layers of the shared block count once
    assert len(made) == 5
    assert model.blocks[2] is model.blocks[0]
    assert model.blocks[2].up is model.blocks[0].up


def test_a_match_in_two_places_is_made_once_and_put_in_both():
    model = Model(2)
    model.blocks.append(model.blocks[0])
    made = []
    assert swap_modules(model, lambda name, old: made.append(name) or Block(), Block) == (3, 3)
    assert made == ["blocks.0", "blocks.1"]
    assert model.blocks[2] is model.blocks[0]
    model.head = model.blocks[0].up  # one linear layer under two names
    assert swap_modules(model, lambda name, old: Doubled(old), is_linear)[0] == 5
    assert model.head is model.blocks[0].up


def test_techniques_stack_and_never_reach_into_each_other():
    model = Model(1)
    swap_modules(model, lambda name, old: Doubled(old), is_linear)
    swap_modules(model, lambda name, old: Doubled(old), is_linear, skip=("head",))
    assert isinstance(model.blocks[0].up.base, Doubled)
    assert isinstance(model.blocks[0].up.base.base, nn.Linear)
    assert isinstance(model.head.base, nn.Linear)


def test_none_matched_says_what_there_is():
    with pytest.raises(ValueError, match=r"no module of Model matched.*Block, LayerNorm, Linear, Model, ModuleList"):
        swap_modules(Model(), lambda name, old: old, nn.Conv2d)


def test_the_new_module_is_in_the_mode_of_the_old_one():
    model = Model().eval()
    swap_modules(model, lambda name, old: nn.Sequential(old, nn.Dropout(0.5)), is_linear)
    assert not any(m.training for m in model.modules())


if __name__ == "__main__":
    example = Model()
    print("swapped {} of {}".format(*swap_modules(example, lambda name, old: Doubled(old), is_linear, skip=("head",))))
    print(example)
    raise SystemExit(pytest.main([__file__]))
