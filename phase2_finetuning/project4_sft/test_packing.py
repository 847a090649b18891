"""Tests of the way from a file of conversations to rows: reading, splitting, truncation, packing, the objective."""

import json
import math

import numpy as np
import pytest
import torch

from common import DATA
from phase1_foundation.project3_pretrain.evaluation import score
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.trainer import NextToken
from phase2_finetuning.project4_sft import download_data
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart, pack, render_within
from phase2_finetuning.project4_sft.test_template import TALK, exchange

# -- reading


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "talks.jsonl"
    good = json.dumps({"messages": exchange("a", "b")})
    for bad, said in (("{", "line 3: "), ('{"text": 1}', 'no object with "messages"'), ('{"messages": []}', "line 3")):
        path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=said) as error:
            read_conversations(path)
        assert str(path) in str(error.value)
    path.write_bytes((good + "\n").encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="damaged behind line"):
        read_conversations(path)
    zstandard = pytest.importorskip("zstandard")
    packed = path.with_suffix(".jsonl.zst")
    packed.write_bytes(b"no zstandard at all")
    with pytest.raises(ValueError, match="damaged behind line 0"):
        read_conversations(packed)
    packed.write_bytes(zstandard.compress((good + "\n").encode()))
    assert len(read_conversations(packed)) == 1
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(path)
    with pytest.raises(FileNotFoundError):
        read_conversations(tmp_path / "nowhere.jsonl")


def test_the_bundled_sample_is_whole_and_splits_by_question():
    talks = read_conversations(DATA / "sft_sample.jsonl.xz")
    train, held_out = split(talks, 0.1)
    assert len(talks) == 3270 and 250 < len(held_out) < 400 and len(train) + len(held_out) == len(talks)
    assert split(talks[::-1], 0.1)[1] == held_out[::-1]  # by content, not by place


def test_rows_of_public_sets_become_conversations():
    row = {"instruction": "Why?", "context": "Because.", "response": "So."}
    assert next(download_data.instructions([row]))["messages"] == exchange("Because.\n\nWhy?", "So.")
    rows = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": [{"role": "user", "content": None}]}]
    assert [entry["messages"] for entry in download_data.conversations(rows)] == [TALK]


# -- truncation and packing


def test_whatever_the_length_something_is_left_to_learn(template):
    rng = np.random.default_rng(0)
    for _ in range(300):
        talk = TALK[:1] * int(rng.integers(2))
        for _ in range(int(rng.integers(1, 4))):
            talk = talk + exchange("q" * int(rng.integers(80)), "a" * int(rng.integers(80)))
        limit = int(rng.integers(8, 120))
        tokens, mask = render_within(template, talk, limit)
        assert len(tokens) == len(mask) <= limit and sum(mask) >= 1
        assert tokens[0] == template.start_id and template.begin_ids["assistant"] in tokens
        whole, whole_mask = template.render(talk)
        if len(whole) <= limit:
            assert (tokens, mask) == (whole, whole_mask)


def test_what_is_cut_and_what_is_not(template):
    def text(talk, limit):
        return template.tokenizer.decode(render_within(template, talk, limit)[0])

    long = [*exchange("one", "1"), *exchange("two", "2")]
    assert text(long, 12) == "<|endoftext|><|user|>one<|end|><|assistant|>1<|end|>"  # whole exchanges go first
    assert "system" not in text([TALK[0], *exchange("one", "1")], 12)
    brief = [TALK[0] | {"content": "s" * 60}, *exchange("one", "1"), *exchange("two", "2")]
    assert text(brief, 40) == text(brief[1:], 40) == text(brief[1:], 100)  # the system goes before an exchange does
    assert text(exchange("0123456789", "ab"), 11) == "<|endoftext|><|user|>6789<|end|><|assistant|>ab<|end|>"
    assert text(exchange("0", "abcdefgh"), 10) == "<|endoftext|><|user|>0<|end|><|assistant|>abcde"  # no end learned
    with pytest.raises(ValueError, match="at least 8"):
        render_within(template, TALK, 7)


def test_packing_wastes_little_and_loses_nothing():
    lengths = np.random.default_rng(1).integers(1, 100, 500).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert len(rows) <= math.ceil(1.03 * sum(lengths) / 128)
    assert pack(lengths, 128) == rows and pack([], 8) == []
    with pytest.raises(ValueError, match="129 tokens exceeds the 128"):
        pack([129], 128)


def test_packing_changes_no_tokens_loss(template):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, block_size=96)).eval()
    talks = [exchange("Hi", "Hello there."), exchange("2+2?", "4"), TALK[:3], exchange("x" * 20, "y" * 10)]
    samples = [render_within(template, talk, 97) for talk in talks]
    packed = ConversationDataset(samples, 96, template.start_id)
    assert packed.epoch_size < len(talks)
    tokens, targets = packed.rows(np.arange(packed.epoch_size), 0)
    plan = apart(template.start_id)
    losses = model(tokens, plan(model, tokens), targets)
    alone = []
    for sample in samples:
        row = ConversationDataset([sample], len(sample[0]) - 1, template.start_id)
        x, y = row.rows(np.arange(1), 0)
        alone.append(model(x, targets=y)[y != -100])
    together = losses[targets != -100]
    torch.testing.assert_close(together.sort().values, torch.cat(alone).sort().values, rtol=1e-5, atol=1e-5)
    assert packed.n_targets == sum(sum(mask) for _, mask in samples)
    assert 0.5 < packed.fill <= 1
    found = score(model, packed, plan=plan)
    assert found.tokens == packed.n_targets and found.nats == pytest.approx(
        float(torch.cat(alone).sum().detach()), rel=1e-5
    )


def test_batches_read_every_row_once_an_epoch(template):
    samples = [render_within(template, exchange(f"question {i}", "a" * 12), 33) for i in range(10)]
    data = ConversationDataset(samples, 32, template.start_id)
    batches = data.batches(0, 5, 5)
    rows = torch.cat([batches[step][0][0] for step in range(2)])
    assert data.epoch_size == 10
    assert sorted(rows.tolist()) == sorted(data.tokens.tolist())


def test_the_objective_compiles_with_its_plan(template):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    samples = [render_within(template, exchange("q" * i, "a" * (20 - i)), 65) for i in range(1, 9)]
    data = ConversationDataset(samples, 64, template.start_id)
    batch = data.rows(np.arange(data.epoch_size), 0)
    objective = NextToken(apart(template.start_id))
    plain = objective(model, batch)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(objective(model, batch), plain)


if __name__ == "__main__":
    print("rows of lengths 5, 3, 3, 2, 2 in 8 places:", pack([5, 3, 3, 2, 2], 8))
    raise SystemExit(pytest.main([__file__]))
