"""The script: continues one prompt or many, compares with and without a cache, and says what it cannot do."""

import pytest
import torch

from common import checkpoint
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache import benchmark_config, config, generate


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": byte_tokenizer().to_dict(),
    })  # fmt: skip
    return ["--checkpoint", str(path), "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "12"]


def run(capsys, *flags):
    """What the script prints."""
    generate.main(list(flags))
    return capsys.readouterr().out


def text_of(capsys, *flags):
    """The same without the line that tells the speed."""
    return run(capsys, *flags).rsplit("\n[", 1)[0]


def test_one_prompt_is_continued_the_same_with_the_same_seed(saved, capsys):
    first = run(capsys, *saved, "--prompt", "Hello", "--seed", "1")
    assert first.startswith("Hello") and "[12 tokens in" in first and "tokens/s, prefill included]" in first
    again, other = (text_of(capsys, *saved, "--prompt", "Hello", "--seed", seed) for seed in "12")
    assert first.startswith(again + "\n[") and other != again


def test_several_prompts_are_one_batch(saved, capsys):
    out = run(capsys, *saved, "--prompt", "Hello", "a", "--seed", "1", "--cache", "sliding")
    assert "--- 1 (length)\nHello" in out and "--- 2 (length)\na" in out and "[24 tokens" in out
    assert text_of(capsys, *saved, "--prompt", "Hello", "--seed", "1") in out


def test_the_comparison_finds_the_same_tokens(saved, capsys):
    out = run(capsys, *saved, "--prompt", "Hello", "--compare", "--graphs")
    assert "with the cache" in out and "without" in out and "the same tokens" in out
    assert "512 bytes a token" in out  # 2 * 2 layers * 32 channels * 4 bytes


def test_lines_are_continued_until_an_empty_one(saved, capsys, monkeypatch):
    lines = iter(["Hello", "x" * 64, "b", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(lines))
    out = run(capsys, *saved, "--interactive", "--seed", "1")
    assert "Hello" in out and "\nb" in out and "error: a prompt of 64 tokens leaves no room" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cache", "ghost"], "CACHE=ghost is unknown: use one of contiguous"),
        (["--top_p", "2"], "TOP_P=2.0 must lie above 0"), (["--dtype", "int8"], "DTYPE=int8"),
        (["--chunk", "0"], "CHUNK=0 must be at least 1"), (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--temperature", "-1"], "TEMPERATURE=-1.0 must be 0 (greedy) or positive"),
        (["--stop", ""], "empty text"), (["--prompt"], "PROMPT=[] begins no text"),
        (["--prompt", "x" * 64], "leaves no room to go on: capacity=64"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(saved, flags, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        generate.main([*saved, *flags])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_the_benchmark_refuses_what_cannot_be_measured():
    from common import settings

    for flags, said in (
        (["--parts", "speed"], "PARTS=.* must name some of checks"), (["--models", "9B"], "MODELS=.* must name"),
        (["--prompt_tokens", "1000"], "exceed the block_size of 1024"), (["--lengths", "0"], "LENGTHS="),
        (["--batches", "0"], "BATCHES="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings.load(benchmark_config, flags)
    assert config.CACHE == "contiguous"


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
