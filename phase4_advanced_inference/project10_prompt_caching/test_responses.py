"""Caches of whole answers, the script, the operations of the benchmark, and what each of them refuses."""

import pytest
import torch

from common import checkpoint, settings
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase4_advanced_inference.project10_prompt_caching import ask, benchmark_config, config
from phase4_advanced_inference.project10_prompt_caching.response_cache import (
    ExactCache,
    SemanticCache,
    letters_of,
    likeness,
)


def test_an_exact_cache_answers_the_same_text_alone_and_forgets_the_oldest():
    cache = ExactCache(2)
    cache.put("a", "1")
    cache.put("b", "2")
    assert cache.get("a") == "1" and cache.get("A") is None
    cache.put("c", "3")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("1", None, "3")
    cache.put("a", "4")
    assert cache.get("a") == "4"


def test_likeness_is_a_cosine():
    a, b = letters_of("What is the capital of Australia?"), letters_of("what is  the capital of Austria?")
    assert likeness(a, a) == pytest.approx(1.0) and 0.8 < likeness(a, b) < 1.0
    assert likeness(a, letters_of("zzz")) == 0.0 and letters_of("  TO be") == letters_of("to BE ")


def test_a_semantic_cache_gives_wrong_answers():
    cache = SemanticCache(0.8)
    cache.put("What is the capital of Australia?", "Canberra")
    assert cache.get("What is the capital of Austria?") == "Canberra"  # this is the risk
    assert cache.get("Which city is Australia's capital?") is None  # and this is missed
    cache.put("What is the capital of Austria?", "Vienna")
    assert cache.get("What is the capital of Austria?") == "Vienna"
    assert SemanticCache(0.5).get("anything") is None


def test_bad_arguments():
    for threshold in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="threshold="):
            SemanticCache(threshold)
    with pytest.raises(ValueError, match="size=0"):
        ExactCache(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, block_size=128))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder / "model.pt", {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": byte_tokenizer().to_dict(),
    })  # fmt: skip
    (folder / "text.txt").write_text("All the world's a stage, " * 20)
    return ["--checkpoint", str(folder / "model.pt"), "--document", str(folder / "text.txt"), "--device", "cpu",
            "--dtype", "float32", "--max_new_tokens", "4", "--document_tokens", "80"]  # fmt: skip


def run(capsys, *flags):
    ask.main(list(flags))
    return capsys.readouterr().out


def test_the_document_is_read_once_and_the_texts_are_the_same(saved, capsys, tmp_path):
    flags = [*saved, "--question", "one", "two", "--prefixes", str(tmp_path / "kept")]
    out = run(capsys, *flags, "--compare")
    assert "'one': 0 of 85 tokens known" in out and "'two': 82 of 85 tokens known" in out  # two newlines are shared
    assert out.count("the same text") == 2 and "another text" not in out
    assert "82 of 168 tokens were known (48.8%)" in out
    again = run(capsys, *flags)
    assert "kept: " in again and "'one': 84 of 85 tokens known" in again and "(100.0%)" in again
    answers = [line for line in out.splitlines() if line.startswith("    ")]
    assert answers == [line for line in again.splitlines() if line.startswith("    ")] and len(answers) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--document", "/nowhere.txt"], "cannot be read as text"), (["--cache", "sliding"], "CACHE=sliding"),
        (["--budget_mib", "-1"], "BUDGET_MIB=-1.0 must be at least 0"), (["--max_new_tokens", "200"], "leave no room"),
        (["--prefixes", __file__], "is a file: name a folder"), (["--chunk", "0"], "CHUNK=0"),
        (["--dtype", "int8"], "DTYPE=int8"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(saved, flags, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        ask.main([*saved, *flags])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_the_benchmark_refuses_what_cannot_be_measured():
    for flags, said in (
        (["--parts", "speed"], "PARTS="), (["--model", "9B"], "MODEL=9B"), (["--hit_rates", "1"], "HIT_RATES="),
        (["--cache", "sliding"], "CACHE=sliding"), (["--repeats", "0"], "REPEATS=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings.load(benchmark_config, flags)
    assert config.CACHE == "contiguous"


if __name__ == "__main__":
    for question in ("What is the capital of Austria?", "Which city is Australia's capital?"):
        vectors = [letters_of(text) for text in ("What is the capital of Australia?", question)]
        print(f"{likeness(*vectors):.2f}  {question}")
    raise SystemExit(pytest.main([__file__]))
