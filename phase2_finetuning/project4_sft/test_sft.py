"""Tests of fine-tuning as a user sees it: answers, the script, interruptions, chat.py, bad input."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import chat as chat_script
from common import ROOT
from phase1_foundation.project3_pretrain.evaluation import validation_loss
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft import config, train_sft
from phase2_finetuning.project4_sft.answering import answer, prompt_within
from phase2_finetuning.project4_sft.conversations import read_conversations
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.test_template import TALK, ask, exchange
from phase2_finetuning.project4_sft.tuning import find_checkpoint, load_base
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens

# -- answering


def collect(generator):
    """What a generator yields, as one text, and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return "".join(pieces), end.value


def test_an_answer_stops_at_its_end_and_streams_whole_characters(template, monkeypatch):
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    ids = [*template.tokenizer.encode("Yes \u2603!"), template.end_id, 65]
    monkeypatch.setattr("phase2_finetuning.project4_sft.answering.stream", lambda *a, **k: iter(ids))
    pieces = list(answer(model, template, ask("?")))
    assert "".join(pieces) == "Yes \u2603!" and "\u2603" in pieces and model.training
    for reply, end, whole in (("a\ufffd", [template.end_id], True), ("cut", [], False)):
        ids = [*template.tokenizer.encode(reply), *end]
        said, ended = collect(answer(model, template, ask("?")))
        assert said == reply and ended is whole


def test_a_long_history_forgets_its_beginning(template):
    talk = [*exchange("first", "1"), *exchange("second", "2"), *ask("third")]
    assert prompt_within(template, talk, 1000) == template.prompt(talk)
    assert template.tokenizer.decode(prompt_within(template, talk, 25)) == template.tokenizer.decode(
        template.prompt(talk[2:])
    )
    for before in ([], TALK[:1]):
        cut = prompt_within(template, [*before, *ask("0123456789")], 8)
        assert template.tokenizer.decode(cut) == "<|endoftext|><|user|>6789<|end|><|assistant|>"
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(args[0][0].tolist()))
    list(answer(model, template, ask("x" * 500), 500, seed=1))
    assert all(tokens[0] == template.start_id and len(tokens) <= 64 for tokens in seen)  # the question stays in sight


# -- the script

TINY = ["--block_size", "64", "--batch_tokens", "512", "--max_steps", "12", "--warmup_steps", "2", "--eval_every", "6",
        "--eval_tokens", "1024", "--save_every", "1", "--sample_tokens", "4", "--device", "cpu", "--dtype", "float32",
        "--no_compile", "--use", "--learning_rate", "1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint to start from, and conversations with a pattern that is easy to learn."""
    from common import checkpoint

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model, tokenizer = Transformer(PRESETS["cpu-tiny"](vocab_size=257)), byte_tokenizer()
    config = {"kind": "transformer", "model": model.config.to_dict(), "settings": {}}
    checkpoint.save(folder / "base.pt", {
        "iter": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 1.0,
        "val_loss": 1.0, "config": config, "tokenizer": tokenizer.to_dict(), "recipe": [],
    })  # fmt: skip
    lines = (json.dumps({"messages": exchange(f"say {i}", "yes yes yes")}) for i in range(200))
    (folder / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--checkpoint", str(folder / "base.pt"), "--train_data_path", str(folder / "talks.jsonl")]


def _main(capsys, *flags):
    train_sft.main([*TINY, *flags])
    return capsys.readouterr().out


def test_a_run_learns_the_answers_and_leaves_a_model_that_chats(base, tmp_path, capsys):
    out = _main(capsys, *base, "--out_dir", str(tmp_path))
    assert "4 tokens added for the template" in out and "answers held out:" in out
    before, after = (float(word) for word in out.split("answers held out: ")[1].split(" nats")[0].split(" -> "))
    assert after < 0.6 * before
    model, tokenizer = load(tmp_path / "best.pt")
    template = ChatTemplate(tokenizer)
    data = ConversationDataset([template.render(exchange("say 7", "yes yes yes"))], 64, template.start_id)
    plan = apart(template.start_id)
    assert validation_loss(model, data, plan=plan) == pytest.approx(after, rel=0.2)

    chat = subprocess.run(
        [sys.executable, "chat.py", "--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu", "--seed", "1",
         "--max_new_tokens", "5"], input=f"Hello\n/what\n/save {tmp_path}/talk.jsonl\n/reset\n/quit\n", cwd=ROOT,
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr[-1500:]
    assert "/reset forgets" in chat.stdout and "(forgotten)" in chat.stdout


def test_what_is_saved_can_be_trained_on(tmp_path, capsys):
    replies = iter([("Hello.", "stop"), ("Never fin", "length"), ("Bye.", "stop")])

    class Scripted:
        def answer(self, messages, params):
            text, reason = next(replies)
            yield SimpleNamespace(text=text, finish_reason=reason)

    settings = SimpleNamespace(SYSTEM="Be kind.", MAX_NEW_TOKENS=9, TEMPERATURE=1.0, TOP_K=None, TOP_P=None, SEED=None)
    talk = chat_script._Conversation(Scripted(), settings)
    path = tmp_path / "talk.jsonl"
    lines = ("/save", f"/save {path}", "Hi", "Go on", "Bye", f"/save {path}", f"/save {path}", "/save /", "/quit")
    assert [talk.react(line) for line in lines] == [True] * 8 + [False]
    printed = capsys.readouterr().out
    assert "no whole answer" in printed and "Never fin [cut off]" in printed and f"{path} exists" in printed
    kept = [message["content"] for message in read_conversations(path)[0]]
    assert kept == ["Be kind.", "Hi", "Hello.", "Bye", "Bye."]


def test_an_interrupted_run_continues_with_the_same_losses(base, tmp_path, capsys):
    from phase1_foundation.project3_pretrain.hooks import read_metrics

    losses = []
    for folder, stops in (("whole", ()), ("parts", ("5",))):
        for steps in (*stops, "12"):
            _main(capsys, *base, "--schedule", "wsd", "--decay_fraction", "0.1", "--max_steps", steps, "--out_dir",
                  str(tmp_path / folder))  # fmt: skip
        losses.append([e["train_loss"] for e in read_metrics(tmp_path / folder / "metrics.jsonl") if "train_loss" in e])
    assert losses[0][:4] == losses[1][:4] and len(losses[0]) == len(losses[1]) == 12


def test_what_a_user_can_get_wrong(base, tmp_path, capsys):
    for flags, said in (
        (["--block_size", "128"], "BLOCK_SIZE=128 exceeds the block_size=64"),
        (["--block_size", "8"], "leaves no room"),
        (["--epochs", "0"], "EPOCHS=0.0 must be positive"),
        (["--train_data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--forgetting_data", "nowhere.bin"], "nowhere.bin"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train_sft.main([*TINY, *base, *flags, "--out_dir", str(tmp_path)])
        assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_a_base_is_found_adapted_and_must_know_the_template_where_it_is_not_to_grow(base, tmp_path, monkeypatch):
    monkeypatch.setattr("phase2_finetuning.project4_sft.tuning.CHECKPOINTS", tmp_path)
    for grow, said in ((True, "no pre-trained model yet.*speedrun.py"), (False, "no fine-tuned model yet.*train_sft")):
        with pytest.raises(ValueError, match=said):
            find_checkpoint(["project3", "speedrun"], grow)
    for name in ("speedrun", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").write_bytes(b"")
    assert find_checkpoint(["project3", "speedrun", "other"]) == tmp_path / "speedrun" / "best.pt"
    settings = SimpleNamespace(CHECKPOINT=base[1], BLOCK_SIZE=64, DROPOUT=0.5, USE=[])
    run = SimpleNamespace(settings=settings, device=torch.device("cpu"), print=lambda text: None)
    seen = []
    model, grown, found = load_base(run, adapt=lambda model, added: seen.append(added) or model.requires_grad_(False))
    assert seen == [[257, 258, 259, 260]] and grown.tokenizer.vocab_size == 261 and found.source == base[1]
    assert model.config.dropout == 0.5 and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"has no <\|system\|>.*train_sft.py"):
        load_base(run, grow=False)


def test_the_config_counts_steps_by_epochs():
    config.validate_config()
    assert config.MAX_STEPS == 0


if __name__ == "__main__":
    demonstration = ChatTemplate(with_chat_tokens(byte_tokenizer()))
    left = prompt_within(demonstration, ask("0123456789"), 8)
    print("what 8 tokens leave of a question of ten digits:", demonstration.tokenizer.decode(left))
    raise SystemExit(pytest.main([__file__]))
