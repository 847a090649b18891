"""The script: serves prompts from everywhere, shows blocks, compares with project 8, and says what it cannot do."""

import re
import signal

import pytest
import torch

from common import checkpoint, settings
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase3_core_inference.project8_kv_cache.generation import Piece
from phase4_advanced_inference.project13_paged_attention import benchmark_config, config, serve_batch


def save(path, tokenizer):
    """A checkpoint with random weights that have opinions."""
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, block_size=128))
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
    save(path / "model.pt", byte_tokenizer())
    save(path / "other.pt", with_chat_tokens(byte_tokenizer()))
    return path


BLOCK = 8 * 512 / 2**20  # MiB of 8 tokens: 2 * 2 layers * 32 channels * 4 bytes each
PROMPTS = ["--prompt", "Hello there, A", "Hello there, B", "Hello there, C", "Hello there, D", "x"]


def run(folder, capsys, *more):
    """What the script prints."""
    serve_batch.main(["--checkpoint", str(folder / "model.pt"), "--device", "cpu", "--dtype", "float32", "--page", "8",
                      "--max_new_tokens", "12", *more])  # fmt: skip
    return capsys.readouterr().out


def texts_of(out):
    return out[out.index("--- 1") :].rsplit(" tokens in ", 1)[0].rsplit("\n\n", 1)[0]


def test_passages_share_their_header(folder, capsys):
    out = run(folder, capsys, "--header", "Here is a passage of a play. ", "--passages", "5", "--rows", "3")
    assert "5 prompts of 53 to 53 tokens; 3 rows, 27 blocks of 8 tokens, 0.1 MiB" in out
    assert "--- 1 (length)\nFirst Citizen:\nBefore w" in out and out.count("(length)") + out.count("(stop)") == 5
    # 29 tokens are alike, 3 whole blocks, of the 52 that are looked up for each
    assert "found in the tree: 96 of 260 tokens" in out and "60 tokens in" in out
    assert "preempted: 0 times (0 to be read anew, 0 swapped to the host)" in out
    assert "tokens 60/60" in out and "running 0" in out


def test_texts_do_not_depend_on_how_they_are_served(folder, capsys, tmp_path):
    plain = texts_of(run(folder, capsys, *PROMPTS, "--compare"))
    assert plain.startswith("--- 1 (length)\nHello there, A") and plain.count("---") == 5
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS[1:]) + "\n", encoding="utf-8")
    few = str(6 * BLOCK)
    for more in (
        ["--no_share"], ["--ahead"], ["--rows", "2", "--step_tokens", "5"], ["--memory_mib", few],
        ["--memory_mib", few, "--swap_mib", "1"], ["--draft_tokens", "3"], ["--graphs"], ["--page", "1"],
        ["--draft_tokens", "3", "--draft", str(folder / "model.pt"), "--memory_mib", few],
    ):  # fmt: skip
        out = run(folder, capsys, *PROMPTS, *more)
        assert texts_of(out) == plain, more
        assert ("found in the tree" in out) is (more != ["--no_share"])
        assert ("acceptance rate" in out) is ("--draft_tokens" in more)
    assert texts_of(run(folder, capsys, "--prompts_file", str(file))) == plain
    assert texts_of(run(folder, capsys, *PROMPTS, "--seed", "1")) != plain


def test_the_comparison_finds_the_same_texts(folder, capsys):
    out = run(folder, capsys, *PROMPTS, "--compare", "--rows", "2", "--graphs")
    said = re.findall(r"project 8, (.*?) +[\d.]+ tokens/s: this was [\d.]+ times as fast; the same texts", out)
    assert said == ["one by one", "in batches of 2"]
    out = run(folder, capsys, *PROMPTS, "--compare", "--seed", "none", "--temperature", "1")
    assert out.count("the same texts") == 2
    out = run(folder, capsys, *PROMPTS, "--compare", "--draft_tokens", "3", "--rule", "rejection", "--draft",
              str(folder / "model.pt"), "--temperature", "2")  # fmt: skip
    assert re.search(r"; \d of 5 texts are the same", out)


def test_preemption_is_counted(folder, capsys):
    few = ["--memory_mib", str(8 * BLOCK), "--no_share", "--max_new_tokens", "30", "--stop"]
    counted = r"preempted: (\d+) times \((\d+) to be read anew, (\d+) swapped"
    times, anew, swapped = map(int, re.search(counted, run(folder, capsys, *PROMPTS, *few)).groups())
    assert times == anew > 0 and swapped == 0
    out = run(folder, capsys, *PROMPTS, *few, "--swap_mib", "1")
    times, anew, swapped = map(int, re.search(counted, out).groups())
    assert times == swapped > 0 and anew == 0


def test_little_memory_ends_texts_and_says_so(folder, capsys):
    out = run(folder, capsys, "--prompt", "Hello there", "--stop", "--memory_mib", str(2 * BLOCK))
    assert "holds 16 tokens: texts end there, which might have 23" in out and "5 tokens in" in out


def test_blocks_are_drawn_after_the_first_steps(folder, capsys):
    out = run(folder, capsys, *PROMPTS, "--show_blocks", "2", "--rows", "3", "--stop")
    assert out.count("tables: the blocks of each row") == 1
    assert "-- after step 1\n" in out and "-- after step 2\n" in out and "-- after step 3\n" not in out
    first = out.split("-- after step 1\n")[1].split("\n\n")[0].splitlines()
    assert first[:3] == [
        "row 0  text 1   14 tokens  0* 1[######..]",
        "row 1  text 2   14 tokens  0* 2[######..]",
        "row 2  text 3   14 tokens  0* 3[######..]",
    ]
    assert first[3].startswith("block  0  3+ 1  1  1  .")
    assert "-- after" not in run(folder, capsys, "--prompt", "x")


def test_progress_comes_every_so_many_steps(folder, capsys):
    out = run(folder, capsys, "--prompt", "x", "--every", "4", "--stop")
    assert re.findall(r"step (\d+)", out) == ["1", "4", "8", "12"]


@pytest.mark.parametrize("compare", [False, True])
def test_ctrl_c_ends_it_with_the_texts_so_far(folder, capsys, monkeypatch, compare):
    step, stopped = serve_batch.Runner.step, []

    def interrupted(runner):
        stopped.append(1)
        if len(stopped) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(runner)

    monkeypatch.setattr(serve_batch.Runner, "step", interrupted)
    with pytest.raises(SystemExit) as exit_:
        run(folder, capsys, *PROMPTS, "--stop", *(["--compare"] if compare else []))
    out = capsys.readouterr().out
    assert exit_.value.code == 130 and len(stopped) == 3
    assert out.count("(interrupted)") == 5 and "15 tokens in 3 steps" in out and "project 8" not in out


def test_ctrl_c_while_it_compares(folder, capsys, monkeypatch):
    monkeypatch.setattr(serve_batch, "Writer", lambda *_, **__: _Interrupted())
    with pytest.raises(SystemExit) as exit_:
        run(folder, capsys, "--prompt", "x", "--compare", "--stop")
    out = capsys.readouterr().out
    assert exit_.value.code == 130 and "12 tokens in 12 steps" in out and "project 8" not in out


class _Interrupted:
    """A writer that is interrupted at its first piece."""

    def stream(self, prompts, params):
        signal.raise_signal(signal.SIGINT)
        yield Piece(0, "", None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rows", "0"], "ROWS=0 must be at least 1"), (["--page", "3"], "PAGE=3 must be a power of two"),
        (["--memory_mib", "0"], "MEMORY_MIB=0.0 must be positive"), (["--memory_mib", "nan"], "MEMORY_MIB=nan"),
        (["--swap_mib", "-1"], "SWAP_MIB=-1.0 must be at least 0"), (["--passages", "0"], "PASSAGES=0"),
        (["--step_tokens", "4"], "STEP_TOKENS=4 must be at least ROWS=8"), (["--top_p", "2"], "TOP_P=2.0"),
        (["--max_new_tokens", "0"], "MAX_NEW_TOKENS=0"), (["--draft_tokens", "-1"], "DRAFT_TOKENS=-1"),
        (["--rule", "luck"], "RULE=luck is unknown: use one of rejection, coupled"), (["--every", "0"], "EVERY=0"),
        (["--dtype", "int8"], "DTYPE=int8 is unknown"), (["--show_blocks", "-1"], "SHOW_BLOCKS=-1"),
        (["--prompts_file", "nowhere.txt"], "PROMPTS_FILE=nowhere.txt cannot be read as text"),
        (["--prompt", "x", "--prompts_file", "x.txt"], "give one of both"),
        (["--document", "nowhere.txt"], "DOCUMENT=nowhere.txt cannot be read as text"),
        (["--passages", "1000000"], "PASSAGES=1000000 are more than the"),
        (["--prompt", "x" * 128], "a prompt of 128 tokens has no room to go on: the model's block_size=128"),
        (["--prompt", "x" * 20, "--memory_mib", "0.008"], "MEMORY_MIB=0.008 holds 16 tokens, and a prompt has 20: give "
         "at least 0.0117188"),
        (["--prompt", "x", "--draft_tokens", "80"], "k + 1 at most what the cache takes"),
        (["--prompt", "x", "--draft_tokens", "1", "--draft", "other.pt"], "has another tokenizer than its target"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(folder, more, said, capsys):
    more = [str(folder / word) if word == "other.pt" else word for word in more]
    with pytest.raises(SystemExit) as exit_:
        run(folder, capsys, *more)
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_a_file_without_prompts(folder, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(folder, capsys, "--prompts_file", str(tmp_path / "empty.txt"))
    assert "holds no prompt: write one on each line" in capsys.readouterr().err


def test_an_empty_prompt_begins_a_document(folder, capsys):
    assert "1 prompts of 1 to 1 tokens" in run(folder, capsys, "--prompt", "")


def test_the_benchmark_refuses_what_cannot_be_measured():
    for more, said in (
        (["--parts", "luck"], "PARTS=.* must name some of checks"), (["--model", "huge"], "MODEL=huge is unknown"),
        (["--repeats", "0"], "REPEATS=0 must be at least 1"), (["--max_tokens", "1"], "MAX_TOKENS=1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings.load(benchmark_config, more)


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
