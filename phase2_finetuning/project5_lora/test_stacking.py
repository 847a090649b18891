"""Tests of stacked adapters: each row of a batch gets the logits that its adapter alone would give."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from common.modules import is_linear, swap_modules
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.plans import Packed
from phase2_finetuning.project5_lora.layers import Part
from phase2_finetuning.project5_lora.lora import add_lora, load_adapter, merge_lora, save_adapter, without_adapters
from phase2_finetuning.project5_lora.stacking import Choice, StackedDoRA, StackedLoRA, choice_of, stack_adapters
from phase2_finetuning.project5_lora.test_quantized_base import Int8Linear

TOKENS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
# different ranks, layers and kinds
ADAPTERS = {
    "a": {"rank": 4, "alpha": 8.0},
    "b": {"rank": 7, "alpha": 3.0, "rank_stabilized": True, "targets": ["q_proj", "down_proj"]},
    "c": {"rank": 2, "alpha": 8.0, "targets": ["v_proj", "blocks.1"]},
}
DORA = {"d": {"rank": 3, "alpha": 6.0, "dora": True, "targets": ["attention"]}}


def plain():
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](n_head=4, n_kv_head=2, block_size=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of trained adapters."""
    folders = {}
    for name, options in (ADAPTERS | DORA).items():
        model = add_lora(plain(), **options)
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.2 * torch.randn_like(parameter))
        folders[name] = save_adapter(model, tmp_path_factory.mktemp(name))
    return folders


def alone(made, name, base=None):
    """The model with one adapter, or none."""
    base = base or plain()
    return base if name is None else load_adapter(base, made[name])


@pytest.mark.parametrize("names", ["abc", "abcd"])
def test_every_row_gets_what_its_adapter_gives_alone(made, names):
    model = plain()
    choice = stack_adapters(model, {name: made[name] for name in names})
    assert choice.names == list(names) and choice_of(model) is choice
    torch.testing.assert_close(model(TOKENS), plain()(TOKENS))  # until something is chosen
    rows = [names[-1], None, "a", "b", "c"]
    choice.choose(rows)
    out = model(TOKENS)
    for i, name in enumerate(rows):
        torch.testing.assert_close(out[i], alone(made, name)(TOKENS[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    assert (out[0] - out[1]).abs().max() > 0.1
    choice.choose("b")
    torch.testing.assert_close(model(TOKENS), alone(made, "b")(TOKENS), rtol=1e-4, atol=1e-4)
    choice.choose(None)
    torch.testing.assert_close(model(TOKENS), plain()(TOKENS))
    kinds = {type(m) for m in model.blocks[0].attention.children()} & {StackedLoRA, StackedDoRA}
    assert kinds == ({StackedDoRA} if "d" in names else {StackedLoRA})


def test_tokens_of_a_ragged_batch_choose_one_by_one(made):
    model, lengths = plain(), [3, 7, 2]
    choice = stack_adapters(model, {name: made[name] for name in "abcd"})
    tokens = TOKENS.flatten()[:12]
    plan = Packed(lengths, model.specs, model.kernel)
    rows = torch.tensor([0, 0, 0, *[-1] * 7, 3, 3])
    choice.choose(rows)
    out = model(tokens, plan)
    for name, part in (("a", slice(0, 3)), (None, slice(3, 10)), ("d", slice(10, 12))):
        expected = alone(made, name)(tokens[part][None])[0]
        torch.testing.assert_close(out[part], expected, rtol=1e-4, atol=1e-4)


def test_more_can_be_added_later(made):
    model = plain()
    choice = stack_adapters(model, {"a": made["a"]})
    assert stack_adapters(model, {"c": made["c"], "d": made["d"]}) is choice and choice.names == ["a", "c", "d"]
    choice.choose(["c", "a", None, "d", "a"])
    out = model(TOKENS)
    for i, name in enumerate(["c", "a", None, "d", "a"]):
        torch.testing.assert_close(out[i], alone(made, name)(TOKENS[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    with without_adapters(model):
        torch.testing.assert_close(model(TOKENS), plain()(TOKENS))


def test_a_new_choice_of_the_same_shape_compiles_nothing_and_reads_the_same_tensor(made):
    model = plain()
    choice = stack_adapters(model, {name: made[name] for name in "abc"})
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    reference = copy.deepcopy(model)
    model.compile(backend=counter, fullgraph=True)
    for rows in (["a", "b", "c", None, "a"], [None, "a", "a", "b", "c"]):
        choice.choose(rows)
        choice_of(reference).choose(rows)
        where = choice.rows.data_ptr()
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), reference(TOKENS))
        choice.choose(rows[::-1])
        assert choice.rows.data_ptr() == where
    assert counter.frame_count == 1


def test_a_quantized_or_half_base(made):
    model = plain()
    swap_modules(model, lambda name, old: Int8Linear(old), is_linear)
    expected = alone(made, "a", copy.deepcopy(model))(TOKENS)
    stack_adapters(model, {name: made[name] for name in "abd"}).choose("a")
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    half = plain().bfloat16()
    stack_adapters(half, {name: made[name] for name in "abd"}).choose("a")
    assert half(TOKENS).dtype == half.blocks[0].attention.q_proj.A.dtype == torch.bfloat16
    expected = alone(made, "a")(TOKENS)
    assert (half(TOKENS) - expected).norm() < 0.05 * expected.norm()


def test_several_are_merged_with_weights(made):
    model, weights = plain(), {"a": 0.7, "c": -0.4}
    stack_adapters(model, {name: made[name] for name in "abc"})
    merge_lora(model, weights)
    expected = dict(plain().named_parameters())
    for name, weight in weights.items():
        difference = dict(merge_lora(alone(made, name)).named_parameters())
        expected = {n: p + weight * (difference[n] - plain().get_parameter(n)) for n, p in expected.items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain().modules()}


def test_what_a_user_can_get_wrong(made, tmp_path):
    model = plain()
    choice = stack_adapters(model, {"a": made["a"], "d": made["d"]})
    for call, said in (
        (lambda: stack_adapters(model, {"a": made["b"]}), "there is an adapter 'a' already: choose another name"),
        (lambda: choice.choose(["a", "z"]), "there is no adapter 'z' here: there are a, d, or None"),
        (lambda: choice.choose("z"), "there is no adapter 'z'"),
        (lambda: (choice.choose(["a", None, "d"]), model(TOKENS[:1])), r"was given 3 rows, the batch has 1"),
        (lambda: merge_lora(model), "weights=None must name adapters of the stack .*: a, d"),
        (lambda: merge_lora(model, {"z": 1.0}), "must name adapters"),
        (lambda: merge_lora(model, {"a": 1.0, "d": 0.5}), "'d' is a DoRA adapter, whose lengths"),
        (lambda: add_lora(model), "has adapters already"),
        (lambda: save_adapter(model, tmp_path), "no adapter of its own"),
        (lambda: stack_adapters(add_lora(plain()), {"a": made["a"]}), "an adapter that can be trained: save_adapter"),
        (lambda: stack_adapters(plain(), {"x": tmp_path / "none"}), "is no folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            call()
    assert choice.names == ["a", "d"] and isinstance(model.blocks[0].mlp.up_proj, StackedLoRA)
    torch.testing.assert_close(merge_lora(model, {"a": 1.0})(TOKENS), alone(made, "a")(TOKENS), rtol=1e-4, atol=1e-4)
    folder = save_adapter(add_lora(plain(), tokens=[3]), tmp_path / "tokens")
    with pytest.raises(ValueError, match="'t' also trained rows of tokens"):
        stack_adapters(plain(), {"t": folder})


def test_zeros_of_others_cost_nothing_but_places():
    parts = [Part(torch.ones(2, 6), torch.ones(4, 2), 3.0), None, Part(torch.ones(1, 6), torch.ones(4, 1), 5.0)]
    layer = StackedLoRA(nn.Linear(6, 4), parts, Choice(["a", "b", "c"]))
    assert layer.A.shape == (3, 6) and layer.B.shape == (4, 3)
    assert layer.scales.tolist() == [[3, 3, 0], [0, 0, 0], [0, 0, 5], [0, 0, 0]]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
