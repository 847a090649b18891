"""Evaluation: sums that can be checked by hand, and oracles that must get everything right."""

import itertools
import json
import math
import types

import pytest
import torch
from torch import nn

from common import DATA, checkpoint
from phase1_foundation.project3_pretrain import evaluation
from phase1_foundation.project3_pretrain import score as script
from phase1_foundation.project3_pretrain.data import TokenDataset, write_tokens
from phase1_foundation.project3_pretrain.evaluation import (
    Score,
    bits_per_byte,
    bits_per_byte_of_text,
    perplexity,
    score,
    score_text,
    validation_loss,
)
from phase1_foundation.project3_pretrain.head import chunked_nll
from phase1_foundation.project3_pretrain.model import PRESETS, ModelConfig, Transformer
from phase1_foundation.project3_pretrain.test_data import BYTES
from phase1_foundation.project3_pretrain.zero_shot import blimp, continuations, lambada, read_records

V = 257


class Model(nn.Module):
    """A language model given by a function from tokens (B, T) to logits (B, T, V)."""

    def __init__(self, logits, block_size=8):
        super().__init__()
        self.logits, self.config = logits, types.SimpleNamespace(block_size=block_size, vocab_size=V)

    def forward(self, tokens, targets=None):
        logits = self.logits(tokens)
        if targets is None:
            return logits
        nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return nats.view_as(targets)


def uniform(block_size=8):
    """Believes nothing: every token costs ln 257 nats."""
    return Model(lambda tokens: torch.zeros(*tokens.shape, V), block_size)


def bigram(block_size=8, seed=0):
    """Depends on the last token alone, so that windows cannot change what a token costs."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 2
    return Model(lambda tokens: table[tokens], block_size), table


def by_hand(table, tokens):
    """Total nats of a stream under a bigram table."""
    return sum(-math.log(torch.softmax(table[a].double(), -1)[b]) for a, b in itertools.pairwise(tokens))


class Places(Model):
    """Charges for a token how much context it had: place 0 costs 1 nat, place 1 costs 2, and so on."""

    def __init__(self, block_size):
        super().__init__(None, block_size)

    def forward(self, tokens, targets=None):
        return torch.where(targets == -100, 0.0, torch.arange(1.0, tokens.shape[1] + 1).expand(tokens.shape))


class Knows(Model):
    """Has learned some texts by heart: after a prefix of one, `sign` times 20 for its next token."""

    def __init__(self, texts, sign=1, block_size=512):
        super().__init__(self.recall, block_size)
        self.next = {}
        for text in texts:
            tokens = [256, *BYTES.encode(text)]
            for i in range(1, len(tokens)):
                self.next.setdefault(tuple(tokens[:i]), set()).add(tokens[i])
        self.sign = sign

    def recall(self, tokens):
        logits = torch.zeros(*tokens.shape, V)
        for b, row in enumerate(tokens.tolist()):
            for i in range(len(row)):
                for known in self.next.get(tuple(row[: i + 1]), ()):
                    logits[b, i, known] = 20.0 * self.sign
        return logits


@pytest.fixture
def held_out(tmp_path):
    texts = ["the first document", "zw\u00f6lf \u2603 documents", "x"]
    write_tokens(tmp_path / "val.bin", texts, BYTES)
    return TokenDataset(tmp_path / "val.bin", 8), texts


# --- loss, perplexity, bits per byte ---


def test_scores_by_hand(held_out):
    dataset, texts = held_out
    model, table = bigram()
    stream = [token for text in texts for token in [256, *text.encode()]]
    nats, n_bytes = by_hand(table, stream), sum(len(text.encode()) for text in texts)
    found = score(model, dataset)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert (found.tokens, found.bytes) == (len(stream) - 1, n_bytes)
    assert validation_loss(model, dataset) == pytest.approx(nats / (len(stream) - 1), rel=1e-6)
    assert perplexity(model, dataset) == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-5)
    assert bits_per_byte(model, dataset) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batching_changes_nothing(held_out, batch_size):
    model, _ = bigram()
    assert score(model, held_out[0], batch_size=batch_size).nats == pytest.approx(score(model, held_out[0]).nats)


def test_part_of_the_data_counts_its_own_bytes(held_out):
    dataset, _ = held_out
    found = score(uniform(), dataset, max_tokens=16)
    targets = torch.cat([targets.flatten() for _, targets in dataset.windows(9, 16)])
    assert found.tokens == 16 and found.bytes == int((targets < 256).sum())
    assert found.loss == pytest.approx(math.log(V))


def test_plain_tokens_are_scored_like_a_file(held_out):
    dataset, _ = held_out
    model, _ = bigram()
    whole = score(model, dataset)
    for tokens in (dataset.tokens, dataset.tokens.tolist(), torch.tensor(dataset.tokens.tolist())):
        plain = score(model, tokens, BYTES)
        assert (plain.tokens, plain.bytes) == (whole.tokens, whole.bytes)
        assert plain.nats == pytest.approx(whole.nats)
    assert perplexity(model, [1, 2]) > 1
    assert score(model, list(range(100)), max_tokens=10).tokens == 10
    with pytest.raises(ValueError, match="needs the tokenizer"):
        bits_per_byte(model, [1, 2, 3])
    with pytest.raises(ValueError, match="nothing to predict"):
        score(model, [1])


def test_scores_add_up_and_an_empty_one_is_nan():
    total = Score(2.0, 4, 8) + Score(1.0, 2, 4)
    assert total == Score(3.0, 6, 12) and total.loss == 0.5
    assert math.isnan(Score().loss) and math.isnan(Score().bits_per_byte) and math.isnan(Score().perplexity)


def test_mode_and_gradients_are_restored():
    model = bigram()[0].train()
    model.weight = nn.Parameter(torch.zeros(1))
    score(model, [1, 2, 3])
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_each_byte_of_a_text_is_counted_once(length, stride):
    model, table = bigram()
    text = ("h\u00e9llo w\u00f6rld, " * 9)[:length]
    found = score_text(model, BYTES, text, stride)
    assert (found.tokens, found.bytes) == (len(text.encode()),) * 2
    assert found.nats == pytest.approx(by_hand(table, [256, *text.encode()]), rel=1e-6)
    assert bits_per_byte_of_text(uniform(), BYTES, text, stride) == pytest.approx(math.log2(V), rel=1e-6)


def test_a_smaller_stride_gives_more_context():
    text = "abcdefghijkl"  # 12 tokens after the mark
    # windows of 4: costs 1 2 3 4; stride 4 judges all of each window, stride 1 only the last place after the first
    assert score_text(Places(4), BYTES, text, stride=4).nats == 3 * (1 + 2 + 3 + 4)
    assert score_text(Places(4), BYTES, text, stride=2).nats == (1 + 2 + 3 + 4) + 4 * (3 + 4)
    assert score_text(Places(4), BYTES, text, stride=1).nats == (1 + 2 + 3 + 4) + 8 * 4
    assert score_text(Places(4), BYTES, text[:11], stride=4).nats == 2 * 10 + (2 + 3 + 4)  # the last one ends with it


def test_impossible_requests_are_refused():
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride={stride} must be at least 1 and at most block_size=8"):
            score_text(uniform(), BYTES, "abc", stride)
    with pytest.raises(ValueError, match="empty"):
        score_text(uniform(), BYTES, "")


def test_a_window_that_is_too_long_is_measured_in_pieces(held_out, monkeypatch):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=V, block_size=32, n_layer=1, n_head=2, n_embd=16))
    pieces = []

    def loss(x, weight, targets):
        pieces.append(targets.numel())
        return chunked_nll(x, weight, targets)

    model.use_loss(loss)
    path = held_out[0].path
    text = " ".join(held_out[1]) * 3
    measures = (
        lambda: score(model, TokenDataset(path, 32)),
        lambda: score(model, range(100), batch_size=3),
        lambda: score_text(model, BYTES, text),
    )
    whole = [measure() for measure in measures]
    assert max(pieces) > 32
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 10 * V)  # ten tokens at once
    pieces.clear()
    for measure, expected in zip(measures, whole):
        found = measure()
        assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert max(pieces) == 10 and model.head.loss is loss
    assert evaluation.in_pieces(loss, 10) is evaluation.in_pieces(loss, 10)  # nothing is compiled twice


# --- zero-shot tests ---


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_continuations_by_hand():
    model, table = bigram(block_size=64)
    rows = [([256], [5, 7]), ([1, 2, 3], [4]), ([9] * 30, [1, 2, 3])]
    found = continuations(model, rows)
    for (context, continuation), (nats, greedy) in zip(rows, found):
        stream = [context[-1], *continuation]
        assert nats == pytest.approx(by_hand(table, stream), rel=1e-5)
        assert greedy == all(int(table[a].argmax()) == b for a, b in itertools.pairwise(stream))


def test_padding_and_neighbours_change_nothing():
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=V, block_size=32, n_layer=2, n_head=2, n_embd=16)
    model = Transformer(shape)
    rows = [([256, *range(k)], list(range(k, k + 3))) for k in (1, 9, 3, 27)]
    together = continuations(model, rows)
    alone = [continuations(model, [row])[0] for row in rows]
    for a, b in zip(together, alone):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]


def test_rows_longer_than_the_context_lose_their_beginning():
    table = bigram(block_size=4)[0]
    long, short = ([1] * 20 + [2, 3, 4], [5, 6]), ([2, 3, 4], [5, 6])
    assert continuations(table, [long])[0][0] == pytest.approx(continuations(table, [short])[0][0])
    huge = continuations(Model(lambda tokens: torch.zeros(*tokens.shape, V), 4), [([1], [2] * 10)])
    assert huge[0][0] == pytest.approx(4 * math.log(V), rel=1e-5)  # no more than a window can be judged


def test_an_oracle_gets_every_pair_and_its_opposite_none(tmp_path):
    path = DATA / "eval" / "blimp_sample.jsonl"
    good = [record["sentence_good"] for record in read_records(path, ("sentence_good",))]
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        found = blimp(Knows(good, sign), BYTES, path, limit=2)
        assert found.accuracy == expected and found.pairs == 2 * 34 and len(found.paradigms) == 34
    assert blimp(uniform(64), BYTES, write_records(tmp_path / "tie.jsonl", [pair("ab", "cd")])).accuracy == 0  # a tie


def pair(good, bad, name="p"):
    return {"sentence_good": good, "sentence_bad": bad, "UID": name}


def test_blimp_is_the_mean_over_paradigms(tmp_path):
    folder = tmp_path / "blimp"
    folder.mkdir()
    write_records(folder / "a.jsonl", [pair("yes", "no", "a"), pair("no", "yes", "a"), pair("yes", "nope", "a")])
    write_records(folder / "b.jsonl", [pair("yes", "no", "b")])
    (folder / "notes.txt").write_text("no records")
    found = blimp(Knows(["yes"]), BYTES, folder)
    assert found.paradigms == {"a": 2 / 3, "b": 1.0} and found.pairs == 4
    assert found.accuracy == pytest.approx((2 / 3 + 1) / 2)


def test_the_whole_sentence_is_judged_the_first_token_included(tmp_path):
    table = torch.zeros(V, V)
    table[256, ord("a")] = 5.0  # after the mark an a is likely
    model = Model(lambda tokens: table[tokens], 16)
    assert blimp(model, BYTES, write_records(tmp_path / "x.jsonl", [pair("ab", "cb")])).accuracy == 1.0


def test_lambada_oracle_and_opposite():
    path = DATA / "eval" / "lambada_sample.jsonl"
    texts = [record["text"] for record in read_records(path, ("text",))][:5]
    found = lambada(Knows(texts, block_size=2048), BYTES, path, limit=5)
    assert found.accuracy == 1.0 and found.perplexity == pytest.approx(1.0, abs=1e-3) and found.passages == 5
    assert lambada(Knows(texts, -1, 2048), BYTES, path, limit=5).accuracy == 0.0


def test_lambada_by_hand(tmp_path):
    path = write_records(tmp_path / "l.jsonl", [{"text": "one\ntwo cat"}, {"text": "three four dog "}])
    model, table = bigram(block_size=64)
    expected = (by_hand(table, list(b"o cat")) + by_hand(table, list(b"r dog"))) / 2
    found = lambada(model, BYTES, path)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4) and found.accuracy == 0.0


@pytest.mark.parametrize("line", ["not json", '{"sentence_good": "a", "UID": "x"}', "[1]", '{"text": 3}'])
def test_bad_records_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: .* text fields sentence_good, sentence_bad, UID"):
        blimp(uniform(), BYTES, path)
    with pytest.raises(ValueError, match=r"line 1|before its last"):
        lambada(uniform(), BYTES, path)


def test_files_without_records_are_named(tmp_path):
    path = write_records(tmp_path / "empty.jsonl", [])
    for test in (blimp, lambada):
        with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
            test(uniform(), BYTES, path)


def test_a_word_longer_than_the_context_is_refused(tmp_path):
    path = write_records(tmp_path / "l.jsonl", [{"text": "a bcdefgh"}])
    assert lambada(uniform(8), BYTES, path).perplexity == pytest.approx(V**8, rel=1e-3)  # the space and seven letters
    with pytest.raises(ValueError, match=r"l\.jsonl: the last word 'bcdefgh' is 8 tokens, .*block_size=7"):
        lambada(uniform(7), BYTES, path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl files"):
        blimp(uniform(), BYTES, tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lambada(uniform(), BYTES, tmp_path / "none.jsonl")


# --- score.py ---


def test_the_script_scores_text_tokens_and_tests(tmp_path, monkeypatch, capsys, held_out):
    model = bigram(block_size=8)[0]
    monkeypatch.setattr(script, "load", lambda checkpoint: (model, BYTES))
    (tmp_path / "a.txt").write_text("two lines\nof one text\n")
    script.main(
        [
            "--checkpoint",
            "the bigram",
            "--text",
            str(tmp_path / "a.txt"),
            "--tokens",
            str(held_out[0].path),
            "--limit",
            "1",
            "--details",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    )
    said = capsys.readouterr().out
    expected = bits_per_byte_of_text(model, BYTES, "two lines\nof one text\n")
    assert f"a.txt: {expected:.4f} bits a byte (22 bytes)" in said and "xz -9 needs" in said
    assert f"val.bin: {bits_per_byte(model, held_out[0]):.4f} bits a byte" in said
    assert "34 paradigms (34 pairs" in said and "of 1 last words" in said and "  adjunct_island" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--limit", "0"], "LIMIT=0 must be"), (["--blimp", "none", "--lambada", "none"], "name some")],
)
def test_the_script_refuses_what_cannot_work(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_script_needs_a_tokenizer_and_text(tmp_path, monkeypatch, capsys):
    model = Transformer(PRESETS["cpu-tiny"]())
    saved = dict(iter=0, optimizer_state_dict={}, train_loss=0.0, val_loss=0.0, model_state_dict=model.state_dict())
    saved["config"] = {"kind": "transformer", "model": model.config.to_dict(), "settings": {}}
    checkpoint.save(tmp_path / "bare.pt", saved)
    flags = ["--device", "cpu", "--blimp", "none", "--lambada", "none", "--text", str(tmp_path / "none.jsonl")]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(SystemExit) as stopped:
        script.main([*flags, "--checkpoint", str(tmp_path / "bare.pt")])
    assert stopped.value.code == 2 and "bare.pt holds a model without a tokenizer" in capsys.readouterr().err
    monkeypatch.setattr(script, "load", lambda checkpoint: (model, BYTES))
    with pytest.raises(SystemExit) as stopped:
        script.main([*flags, "--checkpoint", "another"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "none.jsonl holds no text" in printed.err and "scoring another" in printed.out


if __name__ == "__main__":
    print(f"a model that believes nothing: {bits_per_byte_of_text(uniform(), BYTES, 'hello'):.4f} bits a byte")
    for record, _ in zip(read_records(DATA / "eval" / "blimp_sample.jsonl", ("sentence_good",)), range(3)):
        print(f"BLiMP: {record['sentence_good']!r} over {record['sentence_bad']!r}")
    raise SystemExit(pytest.main([__file__, "-q"]))
