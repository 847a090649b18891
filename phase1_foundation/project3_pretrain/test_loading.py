"""Tests of `load`: every kind of source, recipes, and what happens when there is nothing to load."""

import os

import pytest
import torch
from torch import nn

from common import catalog, checkpoint
from common.checkpoint import CheckpointError
from common.modules import is_linear, swap_modules
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain import loading
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.loading import from_minimal_gpt, load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer


def model(seed=0, **fields):
    torch.manual_seed(seed)
    return Transformer(PRESETS["cpu-tiny"](**fields)).eval()


def saved(model, kind="transformer", tokenizer=None, **more):
    """A checkpoint dict as the trainers write it."""
    shape = model.config.to_dict() if kind == "transformer" else vars(model.config)
    return {
        "iter": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {},
        "train_loss": 1.0,
        "val_loss": 2.0,
        "config": {"kind": kind, "model": shape, "settings": {}},
        "tokenizer": tokenizer,
        **more,
    }


def tokens():
    return torch.randint(0, 65, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def empty_house(tmp_path, monkeypatch):
    """No bundled model, no checkpoints."""
    monkeypatch.setattr(loading, "MODELS", tmp_path / "models")
    monkeypatch.setattr(loading, "CHECKPOINTS", tmp_path / "checkpoints")


# --- our checkpoints ---


def test_a_checkpoint_is_rebuilt(tmp_path):
    original, tokenizer = model(windows=(4, None)), CharTokenizer.from_text("hello world")
    checkpoint.save(tmp_path / "best.pt", saved(original, tokenizer=tokenizer.to_dict()))
    loaded, characters = load(tmp_path / "best.pt")
    assert loaded.config == original.config and not loaded.training
    assert torch.equal(loaded(tokens()), original(tokens()))
    assert characters.encode("low") == tokenizer.encode("low")
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_bpe_tokenizer_is_rebuilt(tmp_path):
    tokenizer = BPETokenizer.train(["a rose is a rose is a rose"], vocab_size=262, special_tokens=["<|endoftext|>"])
    checkpoint.save(tmp_path / "best.pt", saved(model(), tokenizer=tokenizer.to_dict()))
    _, loaded = load(tmp_path / "best.pt")
    assert loaded.encode("a rose") == tokenizer.encode("a rose") and loaded.fingerprint == tokenizer.fingerprint


def test_dtypes_are_kept_unless_asked_otherwise(tmp_path):
    mixed = model().to(torch.bfloat16)
    mixed.norm.to(torch.float32)
    checkpoint.save(tmp_path / "best.pt", saved(mixed))
    stored, _ = load(tmp_path / "best.pt")
    assert stored.norm.weight.dtype == torch.float32 and stored.embed.tokens.weight.dtype == torch.bfloat16
    wide, _ = load(tmp_path / "best.pt", dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    assert torch.equal(wide.embed.tokens.weight, mixed.embed.tokens.weight.float())


class Scaled(nn.Module):
    """A swapped layer with a frozen buffer: what a transform of a later project leaves behind."""

    def __init__(self, linear, factor):
        super().__init__()
        self.linear = linear
        self.register_buffer("factor", torch.full((), float(factor)))

    def forward(self, x):
        return self.linear(x) * self.factor


def scale_layers(model, factor=1.0):
    swap_modules(model, lambda name, old: Scaled(old, factor), is_linear)
    return model


def test_the_recipe_is_replayed_before_the_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(catalog.GROUPS["transforms"], "scaled", f"{__name__}:scale_layers")
    changed = catalog.apply(model(), ["scaled:factor=3.0"])
    assert changed.recipe == [["scaled", {"factor": 3.0}]]
    checkpoint.save(tmp_path / "best.pt", saved(changed, recipe=changed.recipe))
    loaded, _ = load(tmp_path / "best.pt")
    assert isinstance(loaded.blocks[0].mlp.up_proj, Scaled) and loaded.recipe == changed.recipe
    assert torch.equal(loaded(tokens()), changed(tokens()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(config={"kind": "rnn", "model": {}}), "unknown name 'rnn'.*known are minimal_gpt, transformer"),
        (dict(config={"kind": "transformer", "model": {"depth": 3}}), "unknown model settings.*depth"),
        (dict(config=None), "it lacks 'kind'"),
        (dict(recipe=[["teleport", {}]]), "unknown transform 'teleport'"),
        (dict(model_state_dict={}), "Missing key"),
        (dict(tokenizer={"kind": "morse"}), "'morse' is unknown: known are char, bpe, foreign"),
        (dict(tokenizer={"kind": ["char"]}), r"\['char'\] is unknown"),
        (dict(tokenizer="char"), "tokenizer is 'char', not a dict"),
        (dict(model_state_dict=[1, 2]), r"model_state_dict is \[1, 2\], not a dict of tensors"),
        (dict(model_state_dict=None), "model_state_dict is None"),
        (dict(model_state_dict={"norm.weight": 3}), "not a dict of tensors"),
        (dict(config={"kind": "transformer", "model": {"rope_scaling": "linear"}}), "'str' object has no"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(change, said, tmp_path):
    checkpoint.save(tmp_path / "odd.pt", saved(model()) | change)
    with pytest.raises(CheckpointError, match=f"(?s)odd.pt holds no model that can be rebuilt.*{said}"):
        load(tmp_path / "odd.pt")


def test_a_misshapen_tensor_is_named(tmp_path):
    odd = saved(model())
    odd["model_state_dict"]["norm.weight"] = torch.zeros(3)
    checkpoint.save(tmp_path / "odd.pt", odd)
    with pytest.raises(CheckpointError, match=r"(?s)odd\.pt.*norm\.weight"):
        load(tmp_path / "odd.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_not_the_files_fault(tmp_path):
    checkpoint.save(tmp_path / "best.pt", saved(model()))
    to_huggingface(model(), None, tmp_path / "folder")
    for source in ("best.pt", "folder"):
        with pytest.raises(ValueError, match="DEVICE='cuda' cannot be used here") as raised:
            load(tmp_path / source, device="cuda")
        assert not isinstance(raised.value, CheckpointError)


def test_nor_is_its_memory(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    checkpoint.save(tmp_path / "best.pt", saved(model()))
    monkeypatch.setattr(loading, "fill", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("use", "said"),
    [("chunked_loss:chunk=0", "chunk=0 must be at least 1"), ("chunked_loss:chunk=abc", "does not take chunk='abc'")],
)
def test_a_loss_in_impossible_chunks_is_refused(use, said):
    with pytest.raises(ValueError, match=said):
        catalog.apply(model(), [use])


def test_damaged_and_missing_files_are_named(tmp_path):
    checkpoint.save(tmp_path / "best.pt", saved(model()))
    whole = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"best\.pt is damaged"):
        load(tmp_path / "best.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.pt"):
        load(tmp_path / "gone.pt")


# --- project 1's checkpoints ---


@pytest.mark.parametrize(
    "fields",
    [{}, dict(bias=False), dict(tie_head=False), dict(gelu="exact"), dict(attention="explicit", dropout=0.2)],
    ids=str,
)
@torch.no_grad()
def test_the_minimal_gpt_and_the_transformer_compute_the_same(fields, tmp_path):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=3, n_head=4, n_embd=32, **fields)).eval()
    for parameter in gpt.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    loaded = from_minimal_gpt(saved(gpt, kind="minimal_gpt"))
    assert (loaded(tokens()) - gpt(tokens())).abs().max() < 1e-5
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in gpt.parameters())
    characters = CharTokenizer("".join(chr(65 + i) for i in range(65)))
    checkpoint.save(tmp_path / "gpt.pt", saved(gpt, kind="minimal_gpt", tokenizer=characters.to_dict()))
    again, tokenizer = load(tmp_path / "gpt.pt")
    assert torch.equal(again(tokens()), loaded(tokens())) and tokenizer.vocab_size == 65


def test_project_1s_default_shape_is_the_gpt2_preset():
    shape = dict(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=32)
    converted = from_minimal_gpt(saved(GPT(GPTConfig(**shape)), kind="minimal_gpt"))
    assert converted.config == PRESETS["gpt2"](**shape)


# --- where a model comes from ---


def test_a_hugging_face_folder(tmp_path):
    original = model()
    to_huggingface(original, None, tmp_path / "folder")
    loaded, tokenizer = load(tmp_path / "folder")
    assert torch.equal(loaded(tokens()), original(tokens())) and tokenizer is None
    assert load(str(tmp_path / "folder"), dtype=torch.bfloat16)[0].embed.tokens.weight.dtype == torch.bfloat16


def test_nothing_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train one with `uv run python phase1_foundation/project3_pretrain"):
        load()
    for seed, (name, age) in enumerate({"project3/old.pt": 200, "project1/new.pt": 100}.items()):
        checkpoint.save(tmp_path / "checkpoints" / name, saved(model(seed)))
        stamp = (tmp_path / "checkpoints" / name).stat().st_mtime - age
        os.utime(tmp_path / "checkpoints" / name, (stamp, stamp))
    assert torch.equal(load()[0](tokens()), model(1)(tokens()))  # the newest
    assert torch.equal(load(tmp_path / "checkpoints/project3")[0](tokens()), model(0)(tokens()))
    for seed, name in enumerate(("best.pt", "last.pt"), 3):
        checkpoint.save(tmp_path / "checkpoints/project4" / name, saved(model(seed)))
    assert torch.equal(load()[0](tokens()), model(3)(tokens()))  # of the newest run the best, which was written before
    to_huggingface(model(2), None, tmp_path / "models" / "bundled")
    assert torch.equal(load()[0](tokens()), model(2)(tokens()))


def test_names_that_are_neither_file_nor_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder, and no org/name"):
        load("gpt2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path / "empty")


if __name__ == "__main__":
    gpt = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=32)).eval()
    converted = from_minimal_gpt(saved(gpt, kind="minimal_gpt"))
    difference = (converted(tokens()) - gpt(tokens())).abs().max().item()
    print(f"project 1's GPT as a Transformer: largest difference of the logits {difference:.1e}")
    raise SystemExit(pytest.main([__file__, "-q"]))
