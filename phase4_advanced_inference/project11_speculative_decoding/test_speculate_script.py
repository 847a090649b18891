"""The script: tells what drafts were worth, with a draft by name or from a file, and says what it cannot do."""

import pytest
import torch

from common import checkpoint, settings
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase4_advanced_inference.project11_speculative_decoding import benchmark_config, config, speculate


def save(path, seed, tokenizer, **fields):
    """A checkpoint with random weights that have opinions."""
    torch.manual_seed(seed)
    model = Transformer(PRESETS["cpu-tiny"](**{"vocab_size": 320} | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer.to_dict(),
    })  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    save(path / "target.pt", 0, byte_tokenizer())
    save(path / "draft.pt", 0, byte_tokenizer(), n_layer=1)
    save(path / "other.pt", 0, with_chat_tokens(byte_tokenizer()))
    return path


def flags(folder, *more):
    return ["--checkpoint", str(folder / "target.pt"), "--device", "cpu", "--dtype", "float32", "--max_new_tokens",
            "16", *more]  # fmt: skip


@pytest.mark.parametrize("draft", ["ngram", "ngram:n=2", "draft.pt", "target.pt"])
def test_what_it_tells(folder, draft, capsys):
    draft = str(folder / draft) if draft.endswith(".pt") else draft
    speculate.main(flags(folder, "--draft", draft, "--prompt", "Hello", "a"))
    out = capsys.readouterr().out
    assert "--- 1 (length)\nHello" in out and "--- 2 (length)\na" in out
    assert "acceptance rate" in out and "tokens a step, by the formula" in out
    assert "with the draft" in out and "without" in out and "times as fast; the same text" in out
    if draft.endswith("target.pt"):
        assert "acceptance rate 1.00" in out


def test_coupled_texts_are_the_same_and_rejection_ones_need_not_be(folder, capsys):
    sampled = ["--draft", str(folder / "draft.pt"), "--temperature", "1"]
    for seed in ([], ["--seed", "3"]):
        speculate.main(flags(folder, "--rule", "coupled", *sampled, *seed))
        assert "the same text" in capsys.readouterr().out
    speculate.main(flags(folder, "--rule", "rejection", *sampled, "--seed", "3"))
    assert "another text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--draft", "nowhere.pt"], "nowhere.pt"), (["--draft", "ngram:n=0"], "n=0 and shortest=1"),
        (["--draft", "ngram:length=3"], "draft 'ngram:length=3'"),
        (["--draft_tokens", "0"], "DRAFT_TOKENS=0 must be at least 1"),
        (["--rule", "luck"], "RULE=luck is unknown: use one of rejection, coupled"),
        (["--cache", "ghost"], "CACHE=ghost is unknown"), (["--top_p", "2"], "TOP_P=2.0"),
        (["--temperature", "-1"], "TEMPERATURE=-1.0"), (["--prompt"], "PROMPT=[] begins no text"),
        (["--draft_tokens", "80"], "k + 1 at most what the cache takes"),
        (["--prompt", "x" * 64], "leaves no room to go on"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(folder, more, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        speculate.main(flags(folder, *more))
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_a_draft_with_other_tokens_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        speculate.main(flags(folder, "--draft", str(folder / "other.pt")))
    assert "has another tokenizer than its target" in capsys.readouterr().err


def test_the_benchmark_refuses_what_cannot_be_measured():
    for more, said in (
        (["--parts", "luck"], "PARTS=.* must name some of checks"), (["--ks", "0"], "KS=.* must be at least 1"),
        (["--prompt_tokens", "250"], "exceed the 256 tokens"), (["--batches", "99"], "BATCHES="),
        (["--temperatures", "-1"], "TEMPERATURES="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings.load(benchmark_config, more)


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
