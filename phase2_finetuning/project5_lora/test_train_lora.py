"""Tests of the scripts: train_lora.py from end to end, interruptions, several processes, merge.py, the benchmark."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import ROOT, checkpoint
from common.benchmark import Report
from common.run import Run
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft import config as sft_config
from phase2_finetuning.project4_sft.packing import ConversationDataset
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.tuning import fine_tune
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, grow_vocabulary, with_chat_tokens
from phase2_finetuning.project5_lora import benchmark, merge, train_lora
from phase2_finetuning.project5_lora.layers import DoRALinear, LoRALinear
from phase2_finetuning.project5_lora.lora import load_adapter, without_adapters

TINY = ["--block_size", "64", "--batch_tokens", "512", "--max_steps", "12", "--warmup_steps", "2", "--eval_every", "6",
        "--eval_tokens", "1024", "--save_every", "1", "--sample_tokens", "4", "--device", "cpu", "--dtype", "float32",
        "--no_compile", "--use", "--learning_rate", "3e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags: a checkpoint to start from, and conversations with a pattern that is easy to learn."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model, tokenizer = Transformer(PRESETS["cpu-tiny"](vocab_size=257)), byte_tokenizer()
    merge.write_plain(model, tokenizer, folder / "base.pt")
    exchange = lambda i: [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes yes yes"}]  # noqa: E731
    lines = (json.dumps({"messages": exchange(i)}) for i in range(200))
    (folder / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--checkpoint", str(folder / "base.pt"), "--train_data_path", str(folder / "talks.jsonl")]


def run(capsys, *flags):
    """What a run prints."""
    train_lora.main([*TINY, *flags])
    return capsys.readouterr().out


def run_sft(capsys, *flags):
    """What project 4's script prints with these flags."""
    with Run(sft_config, [*TINY, *flags]) as frame:
        fine_tune(frame)
    return capsys.readouterr().out


def losses_of(folder):
    return [entry["train_loss"] for entry in read_metrics(folder / "metrics.jsonl") if "train_loss" in entry]


def test_a_run_learns_and_leaves_a_model_an_adapter_and_a_plain_model(base, tmp_path, capsys):
    out = run(capsys, *base, "--out_dir", str(tmp_path), "--dora", "--targets", "q_proj", "mlp")
    assert "4 tokens added for the template" in out and "values are trained" in out
    before, after = (float(word) for word in out.split("answers held out: ")[1].split(" nats")[0].split(" -> "))
    assert after < before - 0.5
    assert f"adapter alone, 0.0{os.path.getsize(tmp_path / 'adapter' / 'adapter_model.safetensors') // 10000}" in out
    model, tokenizer = load(tmp_path / "best.pt")
    assert isinstance(model.blocks[0].mlp.up_proj, DoRALinear) and model.blocks[0].mlp.up_proj.dropout == 0.05
    assert not isinstance(model.blocks[0].attention.k_proj, LoRALinear)

    template = ChatTemplate(tokenizer)
    talk = [{"role": "user", "content": "say 7"}, {"role": "assistant", "content": "yes yes yes"}]
    tokens = torch.tensor([template.render(talk)[0]])
    plain, _ = load(base[1])  # all but the adapter is as it was
    grow_vocabulary(plain, 257, 261)
    with without_adapters(model), torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(load_adapter(plain, tmp_path / "adapter")(tokens), expected)
        merge.main(["--checkpoint", str(tmp_path / "best.pt"), "--merged", str(tmp_path / "merged.pt")])
        merged, tokenizer = load(tmp_path / "merged.pt")
        torch.testing.assert_close(merged(tokens), expected, rtol=1e-4, atol=1e-4)
    assert ChatTemplate(tokenizer).stop_ids == template.stop_ids and merged.recipe == []
    again = run_sft(capsys, *base, "--checkpoint", str(tmp_path / "merged.pt"), "--out_dir", str(tmp_path / "sft"),
                "--max_steps", "3")  # fmt: skip
    assert "0 tokens added" in again
    start = float(again.split("before: ")[1].split(" nats")[0])
    assert start == pytest.approx(after, abs=2e-3)


def test_an_adapter_with_new_tokens_is_merged_into_its_published_base(base, tmp_path, capsys):
    plain, tokenizer = load(base[1])
    folder = to_huggingface(plain, tokenizer, tmp_path / "published")
    flags = [*base, "--checkpoint", str(folder)]
    out = run(capsys, *flags, "--out_dir", str(tmp_path / "run"))
    assert "4 tokens added for the template" in out
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(folder)
    merge.main(["--checkpoint", str(folder), "--adapter", str(tmp_path / "run" / "adapter"),
                "--merged", str(tmp_path / "merged.pt")])  # fmt: skip
    (merged, with_chat), (adapted, _) = load(tmp_path / "merged.pt"), load(tmp_path / "run" / "best.pt")
    tokens = torch.tensor([ChatTemplate(with_chat).prompt([{"role": "user", "content": "say 7"}])])
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), adapted(tokens), rtol=1e-4, atol=1e-4)
    assert train_lora.published(str(tmp_path / "run")) is None and train_lora.published("org/name") == "org/name"


def test_frozen_rows_of_new_tokens_are_pointed_out(base, tmp_path, capsys):
    out = run_sft(capsys, *base, "--out_dir", str(tmp_path), "--max_steps", "4", "--use", "lora:rank=2")
    assert "rows of the 4 new tokens" in out and "lora:tokens=[257,258,259,260]" in out
    out = run_sft(capsys, *base, "--out_dir", str(tmp_path / "trained"), "--max_steps", "4", "--use",
                  "lora:rank=2,tokens=[257,258,259,260]")  # fmt: skip
    assert "rows of the 4 new tokens" not in out


def test_an_interrupted_run_continues_with_the_same_losses(base, tmp_path, capsys):
    losses = []
    for folder, stops in (("whole", ()), ("parts", ("5",))):
        for steps in (*stops, "12"):
            out = run(capsys, *base, "--schedule", "wsd", "--decay_fraction", "0.1", "--max_steps", steps, "--out_dir",
                      str(tmp_path / folder), "--lora_dropout", "0.3", "--ema", "0.9")  # fmt: skip
        losses.append(losses_of(tmp_path / folder))
    assert "resuming" in out and losses[0][:4] == losses[1][:4] and len(losses[0]) == len(losses[1]) == 12
    saved = checkpoint.load(tmp_path / "whole" / "last.pt")
    state = saved["optimizer_state_dict"]["AdamW"]["state"]
    assert len(state) == len([name for name in saved["model_state_dict"] if name.endswith((".A", ".B", ".rows"))])
    finished = run(capsys, *base, "--schedule", "wsd", "--decay_fraction", "0.1", "--out_dir", str(tmp_path / "whole"),
                   "--lora_dropout", "0.3", "--ema", "0.9")  # fmt: skip
    assert "has finished its 12 steps" in finished and "wrote the adapter alone" in finished
    with pytest.raises(SystemExit) as exit_:  # adapters of another shape
        run(capsys, *base, "--out_dir", str(tmp_path / "whole"), "--rank", "4", "--ema", "0.9")
    assert exit_.value.code == 2 and "cannot be continued" in capsys.readouterr().err


def test_an_interruption_in_the_middle_changes_no_bit(base, tmp_path, capsys, monkeypatch):
    flags = [*base, "--lora_dropout", "0.3", "--optimizer", "muon"]
    run(capsys, *flags, "--out_dir", str(tmp_path / "whole"))
    log = Run.log

    def stop_at_5(self, **fields):
        self.stopping = self.stopping or fields.get("step") == 5
        log(self, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_at_5)
        with pytest.raises(SystemExit) as exit_:
            run(capsys, *flags, "--out_dir", str(tmp_path / "parts"))
    assert exit_.value.code == 130 and len(losses_of(tmp_path / "parts")) < 12
    run(capsys, *flags, "--out_dir", str(tmp_path / "parts"))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt")["model_state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_it_works_from_the_catalog_in_the_script_of_project_4(base, tmp_path, capsys):
    run_sft(capsys, *base, "--out_dir", str(tmp_path), "--use", 'lora:rank=2,alpha=4,targets=["q_proj"]')
    model, _ = load(tmp_path / "best.pt")
    assert model.recipe == [["lora", {"rank": 2, "alpha": 4, "targets": ["q_proj"]}]]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.attention.q_proj.{part}" for i in range(2) for part in "AB"
    ]


def test_a_base_in_bfloat16(base, tmp_path, capsys):
    run(capsys, *base, "--out_dir", str(tmp_path), "--base_dtype", "bfloat16", "--max_steps", "3")
    model, _ = load(tmp_path / "best.pt")
    layer = model.blocks[0].mlp.up_proj
    assert layer.base.weight.dtype == torch.bfloat16 and layer.A.dtype == torch.float32
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(base, tmp_path):
    flags = [*TINY, *base, "--lora_dropout", "0", "--dropout", "0"]
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n),
                   train_lora.__file__, *flags, "--out_dir", str(tmp_path / str(n))]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-1500:]
    assert losses_of(tmp_path / "1") == pytest.approx(losses_of(tmp_path / "2"), abs=1e-3)


def test_what_a_user_can_get_wrong(base, tmp_path, capsys):
    for script, flags, said in (
        (train_lora, ["--rank", "0"], "RANK=0 must be at least 1"),
        (train_lora, ["--alpha", "-1"], "ALPHA=-1.0 must be positive"),
        (train_lora, ["--lora_dropout", "1"], "LORA_DROPOUT=1.0 must be"),
        (train_lora, ["--targets", "query"], "target 'query' names no linear layer of this model: use some of"),
        (train_lora, ["--targets"], "leaves nothing to train"),
        (train_lora, ["--base_dtype", "int8"], "BASE_DTYPE=int8 is unknown"),
        (train_lora, ["--epochs", "0"], "EPOCHS=0.0 must be positive"),
    ):
        with pytest.raises(SystemExit) as exit_:
            script.main([*TINY, *base, "--out_dir", str(tmp_path), *flags])
        assert exit_.value.code == 2 and said in capsys.readouterr().err
    for flags, said in (
        (["--checkpoint", base[1]], "no adapters to merge"),
        (["--checkpoint", base[1], "--adapter", str(tmp_path)], "has no adapter_config.json"),
        (["--merged", "folder"], "must be the name of a checkpoint"),
        (["--checkpoint", "a.pt", "--merged", "./a.pt"], "would replace CHECKPOINT"),
    ):
        with pytest.raises(SystemExit) as exit_:
            merge.main(["--merged", str(tmp_path / "merged.pt"), *flags])
        assert exit_.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "merged.pt").exists()


def test_the_benchmark_measures_all_parts(tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    merge.write_plain(Transformer(PRESETS["cpu-tiny"](vocab_size=257)), tokenizer, tmp_path / "base.pt")
    monkeypatch.setattr(benchmark, "Report", functools.partial(Report, folder=tmp_path))  # leaves the README alone
    monkeypatch.setitem(benchmark.SHAPES, "small", (PRESETS["cpu-tiny"](), 2))
    monkeypatch.setattr(benchmark, "conversation_sets", lambda template, s, size: few_conversations(template))
    benchmark.main([
        "--device", "cpu", "--models", "small", "--compile", "--repeats", "1", "--adapters", "2", "--rows", "4",
        "--row_tokens", "4", "--steps", "4", "--evaluations", "2", "--rank", "2", "--lora_rate", "1e-2",
        "--checkpoint", str(tmp_path / "base.pt"),
    ])  # fmt: skip
    result = json.loads(next(Path(tmp_path).glob("project5_lora.*.json")).read_text(encoding="utf-8"))
    assert all(check["ok"] for check in result["checks"]) and len(result["checks"]) == 4
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["loss on held-out answers: LoRA, rank 2, against peft"]["vs_peer"] == pytest.approx(1, abs=1e-4)
    assert rows["small: values trained"]["vs_peer"] == pytest.approx(rows["small: optimizer state"]["vs_peer"])
    assert {"small: DoRA step against peft, DoRA", "loss on held-out answers: rsLoRA, rank 8",
            "small: 2 adapters in one batch, against peft, adapter_names"} <= set(rows)  # fmt: skip
    assert list(tmp_path.glob("project5_lora.*.png"))
    monkeypatch.setitem(benchmark.PARTS, "cost", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--device", "cpu", "--parts", "cost", "--models", "small", "--compile"])
    assert exit_.value.code == 2 and "the part cost (small) failed: division by zero" in capsys.readouterr().err


def few_conversations(template):
    """(training set, held-out set)."""
    talk = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes yes yes"}]
    return [ConversationDataset([template.render(talk)] * n, 32, template.start_id) for n in (40, 4)]


if __name__ == "__main__":
    print(with_chat_tokens(byte_tokenizer()).special_tokens)
    raise SystemExit(pytest.main([__file__]))
