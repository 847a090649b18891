"""Tests of preference training: the script, resuming, the reference, judging, the distance, stages, bad input."""

import functools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import ROOT, checkpoint
from common.benchmark import Report
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.token_file import write_tokens
from phase2_finetuning.project4_sft.packing import apart
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase2_finetuning.project6_dpo import benchmark, compare_stages, config, stage_report, train_dpo
from phase2_finetuning.project6_dpo.dpo import LOSSES
from phase2_finetuning.project6_dpo.judging import Distance, Judgement, judge, mean_length, remember_reference
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset, render_pair
from phase2_finetuning.project6_dpo.preferences import Preference

TINY = ["--block_size", "48", "--batch_tokens", "384", "--max_steps", "12", "--warmup_steps", "2", "--eval_every", "6",
        "--eval_tokens", "4096", "--save_every", "1", "--sample_tokens", "4", "--device", "cpu", "--dtype", "float32",
        "--no_compile", "--use", "--learning_rate", "3e-3", "--kl_tokens", "64", "--answers", "2"]  # fmt: skip


def ask(text):
    return [{"role": "user", "content": text}]


def save(model, tokenizer, path):
    content = {
        "iter": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 1.0,
        "val_loss": 1.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer.to_dict(), "recipe": [],
    }  # fmt: skip
    checkpoint.save(path, content)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint to start from, and pairs that are easy to tell apart: kind words and rude ones."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    source = save(Transformer(PRESETS["cpu-tiny"](vocab_size=320)), with_chat_tokens(byte_tokenizer()), folder / "b.pt")
    lines = (json.dumps({"prompt_messages": ask(f"say {i}"), "chosen": f"please {i % 7}", "rejected": f"fool {i % 5}"})
             for i in range(120))  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--checkpoint", source, "--train_data_path", str(folder / "pairs.jsonl"), "--val_fraction", "0.2"]


def run(*flags):
    train_dpo.main([*TINY, *flags])


def losses_in(folder):
    return [entry["train_loss"] for entry in read_metrics(folder / "metrics.jsonl") if "train_loss" in entry]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_run_learns_what_is_preferred(base, tmp_path, capsys, loss):
    run(*base, "--loss", loss, "--out_dir", str(tmp_path))
    out = capsys.readouterr().out
    evaluations = [entry for entry in read_metrics(tmp_path / "metrics.jsonl") if "accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [6, 12]
    last = evaluations[-1]
    assert last["accuracy"] > 0.9 and last["margin"] > 1 and last["kl"] > 0 and {"chosen", "rejected"} <= last.keys()
    assert "reward accuracy" in out and "before" in out and "longer answer:" in out and "--- user: say" in out
    assert {"best.pt", "last.pt", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    model, tokenizer = load(tmp_path / "best.pt")
    assert ChatTemplate(tokenizer).stop_ids and not model.recipe


def test_the_first_loss_is_that_of_a_model_that_is_its_own_reference(base, tmp_path):
    run(*base, "--out_dir", str(tmp_path), "--max_steps", "3", "--warmup_steps", "0")
    assert losses_in(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_run_that_goes_on_from_an_earlier_step_repeats_itself_bit_by_bit(base, tmp_path, capsys):
    seen = []
    for _ in range(2):
        run(*base, "--save_every", "6", "--answers", "0", "--out_dir", str(tmp_path))
        entries = read_metrics(tmp_path / "metrics.jsonl")
        seen.append([{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in entries])
        (tmp_path / "last.pt").unlink()  # previous.pt holds step 6
    assert "resuming" in capsys.readouterr().out
    assert seen[0] == seen[1] and len(seen[0]) == 12 + 2 + 1
    # A reference taken anew from the weights of step 6 would give a smaller margin and a smaller KL at the end.
    last, best = [entry for entry in seen[1] if "val_loss" in entry][-1], seen[1][-1]["best"]
    assert last["margin"] > 1 and last["kl"] > 0.01
    assert best["margin"] > 1 and best["kl"] > 0.01 and {"likelier_per_token", "longer_preferred"} <= best.keys()


@pytest.mark.slow
def test_a_killed_run_continues_bit_by_bit(base, tmp_path):
    flags = [*TINY, *base, "--answers", "0"]
    command = [sys.executable, train_dpo.__file__, *flags, "--out_dir", str(tmp_path / "parts")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    metrics = tmp_path / "parts" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(entry["step"] >= 4 for entry in read_metrics(metrics)):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it had finished before it was killed"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout[-1500:] + done.stderr[-1500:]
    run(*base, "--answers", "0", "--out_dir", str(tmp_path / "whole"))
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")
    evaluations = [[{k: e[k] for k in ("step", "val_loss", "kl", "margin")} for e in read_metrics(path) if "kl" in e]
                   for path in (metrics, tmp_path / "whole" / "metrics.jsonl")]  # fmt: skip
    assert evaluations[0] == evaluations[1]


def test_adapters_with_either_reference_train_alike(base, tmp_path, capsys):
    for reference in ("precomputed", "adapters_off"):
        run(*base, "--use", "lora:rank=4", "--reference", reference, "--out_dir", str(tmp_path / reference),
            "--learning_rate", "1e-2")  # fmt: skip
    stored, asked = (losses_in(tmp_path / name) for name in ("precomputed", "adapters_off"))
    assert stored == pytest.approx(asked, rel=1e-4) and stored[-1] < 0.5
    model, _ = load(tmp_path / "adapters_off" / "best.pt")
    assert model.recipe[0][0] == "lora"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(*base, "--reference", "adapters_off", "--out_dir", str(tmp_path / "none"))
    assert "REFERENCE=adapters_off: this model has no adapters" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # without them it would be another model than the one that this run begins with
        run(*base, "--checkpoint", str(tmp_path / "adapters_off" / "best.pt"), "--reference", "adapters_off",
            "--out_dir", str(tmp_path / "again"))  # fmt: skip
    assert "these adapters are trained already" in capsys.readouterr().err


def test_a_run_is_not_continued_against_another_reference(base, tmp_path, capsys):
    run(*base, "--max_steps", "6", "--out_dir", str(tmp_path / "run"))
    capsys.readouterr()
    with pytest.raises(SystemExit):  # its own result as the new reference
        run(*base, "--checkpoint", str(tmp_path / "run" / "best.pt"), "--out_dir", str(tmp_path / "run"))
    assert "was trained against another reference" in capsys.readouterr().err


def test_prompts_that_are_held_out_are_not_trained_on(base, tmp_path, capsys):
    lines = Path(base[base.index("--train_data_path") + 1]).read_text(encoding="utf-8").splitlines()
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(lines[:10]), encoding="utf-8")
    run(*base, "--val_data_path", str(held), "--max_steps", "2", "--warmup_steps", "1", "--out_dir", str(tmp_path))
    out = capsys.readouterr().out
    assert "10 training pairs left out: their prompts are held out" in out and "110 pairs in" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--beta", "0"], "BETA=0.0 must be above 0"),
        (["--label_smoothing", "0.5"], "LABEL_SMOOTHING=0.5 must be at least 0 and below 0.5"),
        (["--loss", "ppo"], "LOSS=ppo is unknown: use one of dpo, ipo, simpo, orpo"),
        (["--reference", "none"], "REFERENCE=none is unknown"),
        (["--ipo_tau", "inf"], "IPO_TAU=inf must be above 0 and finite"),
        (["--simpo_gamma", "-1"], "SIMPO_GAMMA=-1.0"),
        (["--block_size", "96"], "BLOCK_SIZE=96 exceeds the block_size=64"),
        (["--train_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--val_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_what_a_user_can_get_wrong(base, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as exit_:
        run(*base, *flags, "--out_dir", str(tmp_path))
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_a_model_that_cannot_chat_is_refused(base, tmp_path, capsys):
    path = save(Transformer(PRESETS["cpu-tiny"](vocab_size=257)), byte_tokenizer(), tmp_path / "base.pt")
    with pytest.raises(SystemExit):
        run(*base, "--checkpoint", path, "--out_dir", str(tmp_path / "out"))
    assert "fine-tune the model first" in capsys.readouterr().err


def test_the_config_names_the_losses_that_there_are():
    for name in LOSSES:
        config.validate_config(SimpleNamespace(**{**_defaults(), "LOSS": name}))


def _defaults():
    from common import settings

    return {name: constant.default for name, constant in settings.constants_of(config).items()}


# -- judging


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_a_judgement_by_hand():
    found = Judgement(sums=tensor([-2, -3], [-4, -1], [-5, -5]), reference=tensor([-3, -3], [-3, -2], [-5, -5]),
                      lengths=tensor([2, 4], [4, 1], [3, 3]))  # fmt: skip
    assert found.accuracy == pytest.approx((1 + 0 + 0.5) / 3)  # ratios [1, 0], [-1, 1], a tie
    assert found.margin == pytest.approx((1 - 2 + 0) / 3)
    assert (found.chosen, found.rejected) == (pytest.approx(-11 / 3), pytest.approx(-3))
    assert found.likelier == pytest.approx(1.5 / 3)
    assert found.likelier_per_token == pytest.approx((0 + 0.5 + 0.5) / 3)  # -1 against -0.75, then two ties
    assert found.longer_chosen == pytest.approx(1.5 / 3)
    assert found.longer_preferred == 0.0  # twice the shorter answer
    equal = Judgement(sums=tensor([-2, -3]), reference=tensor([-3, -3]), lengths=tensor([2, 2]))
    assert equal.longer_preferred == 0.5  # none is longer


@pytest.fixture(scope="module")
def pairs():
    template = ChatTemplate(with_chat_tokens(byte_tokenizer()))
    some = [Preference(ask("q" * (i % 5)), "a" * (i % 6 + 1), "b" * (i % 4 + 1)) for i in range(20)]
    data = PreferenceDataset([render_pair(template, one, 48) for one in some], 48, template.start_id)
    return template, data


def scaled(seed, scale=3.0):
    torch.manual_seed(seed)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def test_a_model_is_its_own_reference_before_it_moves(pairs):
    _, data = pairs
    model, other = scaled(0), scaled(1)
    remember_reference(model, data)
    before, after = judge(model, data), judge(other, data)
    assert len(before.sums) == data.n_pairs == 20
    assert before.accuracy == 0.5 and before.margin == 0.0  # not only close: the same forward
    assert after.log_ratios.abs().max() > 1 and torch.equal(after.reference, before.sums)
    lengths = sorted((i % 6 + 2, i % 4 + 2) for i in range(20))
    assert sorted(map(tuple, before.lengths.int().tolist())) == lengths
    model.embed.tokens.weight.data[97] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        remember_reference(model, data)


def test_the_distance_is_the_exact_kl_at_the_answers(pairs):
    template, data = pairs
    plan, reference, model = apart(template.start_id), scaled(0), scaled(1)
    distance = Distance(reference, data, most=10_000)  # all rows
    assert distance(reference) == 0.0
    total, count = 0.0, 0
    for tokens, targets, _ in data.windows(3):
        p, q = (m.eval()(tokens, plan(m, tokens))[targets != -100].detach() for m in (model, reference))
        p, q = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
        total += float(torch.distributions.kl_divergence(p, q).sum())
        count += len(p.logits)
    assert count == data.packed.n_targets
    assert distance(model) == pytest.approx(total / count, rel=1e-4) and distance(model) > 0.01
    few = Distance(reference, data, most=30)
    assert 0 < sum(map(len, few.reference)) < count and few(model) > 0


# -- stages


def test_stages_are_measured_as_far_as_they_can_be(tmp_path, capsys):
    plain, chatting = byte_tokenizer(), with_chat_tokens(byte_tokenizer())
    write_tokens(tmp_path / "val.bin", ["some text of pre-training " * 20], plain)
    write_tokens(tmp_path / "other.bin", ["some text"] * 20, chatting)
    torch.manual_seed(0)
    paths = {"base": save(Transformer(PRESETS["cpu-tiny"](vocab_size=257)), plain, tmp_path / "base.pt"),
             "chat": save(scaled(1), chatting, tmp_path / "chat.pt"),
             "tuned": save(scaled(2), chatting, tmp_path / "tuned.pt")}  # fmt: skip
    talks = [[*ask("Hi"), {"role": "assistant", "content": "Hello."}]]
    held_out = stage_report.HeldOut(tmp_path / "val.bin", talks, [Preference(ask("Hi"), "Hello.", "No.")], ("Hi",))
    base, chat, tuned = stages = stage_report.evaluate_stages(paths, held_out)
    assert all(stage.perplexity > 1 for stage in stages)  # the grown vocabulary reads the text, too
    assert base.answer_loss is None and "no <|system|>" in base.missing["answer_loss"]
    assert chat.answer_loss != tuned.answer_loss and chat.judgement.accuracy == 0.5
    assert tuned.judgement.accuracy in (0.0, 1.0) and all(len(stage.answers) == 1 for stage in stages)
    text = stage_report.markdown(stages, held_out.prompts)
    assert "| base |" in text and "base: no" in text and "| Hi |" in text
    assert stage_report.draw(tmp_path / "stages.png", stages).exists()
    other = stage_report.evaluate_stage("x", paths["base"], stage_report.HeldOut(tmp_path / "other.bin"))
    assert other.perplexity is None and "another tokenizer" in other.missing["perplexity"]

    compare_stages.main(["--stages", *(f"{name}={path}" for name, path in paths.items()), "--out_dir", str(tmp_path),
                         "--pretrain_data", str(tmp_path / "val.bin"), "--device", "cpu", "--max_tokens", "512",
                         "--prompts", "Hi"])  # fmt: skip
    out = capsys.readouterr().out
    assert "reward accuracy" in out and "user: Hi" in out and (tmp_path / "stages.md").exists()
    with pytest.raises(SystemExit):
        compare_stages.main(["--stages", "base.pt", "--out_dir", str(tmp_path)])
    assert "STAGES=base.pt is no name=checkpoint" in capsys.readouterr().err


# -- the benchmark


def test_the_benchmark_measures_and_checks(base, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "Report", functools.partial(Report, folder=tmp_path))
    monkeypatch.setattr(benchmark, "VARIANTS", {name: benchmark.VARIANTS[name] for name in ("DPO", "SimPO")})
    flags = shlex.join([*TINY[: TINY.index("--device")], *TINY[-6:-2], "--val_fraction", "0.2"])
    benchmark.main(["--preset", "cpu-tiny", "--block_size", "64", "--rows", "2", "--steps", "1", "--repeats", "1",
                    "--parts", "speed", "losses", "beta", "--betas", "0.1", "1", "--device", "cpu",
                    "--checkpoint", base[1], "--corpus", base[3], f"--flags={flags}"])  # fmt: skip
    found = json.loads((tmp_path / "project6_dpo.cpu.json").read_text(encoding="utf-8"))
    assert len(found["rows"]) == 2 + 2 + 2 and (tmp_path / "project6_dpo.cpu.png").exists()
    assert found["checks"] and all(check["ok"] for check in found["checks"])
    fill, speed = found["rows"][:2]
    assert 50 < fill["ours"] <= 100 and speed["ours"] > 0 and speed["peer"] > 0
    assert all(50 < row["ours"] <= 100 for row in found["rows"][2:])


def test_the_length_of_answers_is_counted_in_tokens(pairs):
    assert mean_length(pairs[0], ["abc", "a"]) == 2.0 and mean_length(pairs[0], []) == 0.0


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
