"""Measure project 11: how often drafts are right, how many tokens a step brings, and how much faster text comes.

    uv run python phase4_advanced_inference/project11_speculative_decoding/benchmark.py
    uv run python phase4_advanced_inference/project11_speculative_decoding/benchmark.py --parts speed

checks: speculation writes the tokens of plain decoding, with trained weights. acceptance: acceptance rate and tokens a
step by draft, length, temperature and rule, against the formula. speed: against plain decoding with the same cache and
the same decoder, against E / (k c + 1) with c measured. peers: assisted generation and prompt lookup of `transformers`
with the same weights. A pair of models is trained first, in minutes, where there is none: random weights say nothing.
"""

import functools
import itertools
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import ROOT, checkpoint
from common.benchmark import Report, measure, run_parts
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer
from phase4_advanced_inference.project11_speculative_decoding import benchmark_config
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.formulas import expected_speedup
from phase4_advanced_inference.project11_speculative_decoding.speculative import SpeculativeWriter

TRAIN = ROOT / "phase1_foundation" / "project3_pretrain" / "train_pretrain.py"
CLAIM = "3.4× (T5-XXL, greedy, γ=7, table 2)"
SHAPES = {
    "cpu": {
        "target": PRESETS["cpu-small"](n_layer=8, n_embd=256),
        "draft": PRESETS["cpu-small"](n_layer=1, n_head=2, n_embd=128),
    },
    "cuda": {
        "target": PRESETS["llama-125m"](block_size=256),
        "draft": PRESETS["llama-125m"](block_size=256, n_layer=2, n_head=4, n_embd=256),
    },
}


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        bench = _Bench(s, run.device)
        report = Report("project11_speculative_decoding", "Speculative decoding", run.device, keep=len(s.PARTS) < 4)
        parts = {part: functools.partial(PARTS[part], report, s, bench) for part in s.PARTS}
        run_parts(report, parts)


# -- the pair, and what it continues


class _Bench:
    """A target, a draft, two sets of prompts, and writers for them."""

    def __init__(self, s, device):
        self.s, self.device, self.graphs = s, device, device.type == "cuda"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for kind in ("target", "draft"):
            train(s, device, kind)
        self.target, self.tokenizer = load(Path(s.PAIR_DIR) / "target" / "best.pt", device, self.dtype)
        self.small, _ = load(Path(s.PAIR_DIR) / "draft" / "best.pt", device, self.dtype)
        self.sets = prompts_of(s)

    def writer(self, draft=None, n_rows=1, k=4, rule="rejection"):
        """A writer with the draft of this name, or without one; all else is the same."""
        options = {"n_rows": n_rows, "capacity": self.s.PROMPT_TOKENS + self.s.NEW_TOKENS, "graphs": self.graphs,
                   "cache": self.s.CACHE}  # fmt: skip
        if draft is None:
            return Writer(self.target, self.tokenizer, **options)
        kind = self.model_draft() if draft == "model" else NGramDraft()
        return SpeculativeWriter(self.target, self.tokenizer, kind, k, rule, **options)

    def model_draft(self):
        """The small model as a draft."""
        return ModelDraft(self.small, cache=self.s.CACHE, graphs=self.graphs)

    def params(self, n, temperature=0.0):
        """One SamplingParams a prompt, each with a seed of its own."""
        kinds = (SamplingParams(n, temperature, seed=self.s.SEED + i, stop_ids=()) for i in range(self.s.N_PROMPTS))
        return list(kinds)


def tokens_of(writer, prompts, params):
    """What a writer writes: a list of tokens for each prompt."""
    texts = [[] for _ in prompts]
    for piece in writer.stream(prompts, params[: len(prompts)]):
        texts[piece.index].append(piece.token)
    return texts


def train(s, device, kind):
    """Train one of the pair by project 3's script, where it is not there yet."""
    folder = Path(s.PAIR_DIR) / kind
    if (folder / "best.pt").exists():
        return
    torch.manual_seed(s.SEED)
    model = Transformer(SHAPES["cuda" if device.type == "cuda" else "cpu"][kind])
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "initial.pt", {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": None,
    })  # fmt: skip
    tokenizer = "gpt2" if device.type == "cuda" else str(Path(s.PAIR_DIR) / "tokenizer.pkl")
    command = [
        sys.executable, str(TRAIN), "--checkpoint", str(folder / "initial.pt"), "--out_dir", str(folder),
        "--max_steps", str(s.TRAIN_STEPS), "--warmup_steps", str(s.TRAIN_STEPS // 10),
        "--block_size", "256", "--tokenizer", tokenizer, "--data_dir",
        str(Path(s.PAIR_DIR) / "tokens"), "--train_data_path", s.TRAIN_DATA_PATH, "--eval_every",
        str(max(1, s.TRAIN_STEPS // 2)), "--eval_tokens", "8192", "--device", device.type, *shlex.split(s.TRAIN_FLAGS),
    ]  # fmt: skip
    print(f"training the {kind} in {folder} ...", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:  # it shows its own progress
        raise RuntimeError(f"{' '.join(command)} failed: see above")


def prompts_of(s):
    """Beginnings of held-out passages, and passages that are quoted: their first third follows them once more."""
    data = TokenDataset(Path(s.PAIR_DIR) / "tokens" / "val.bin", s.PROMPT_TOKENS)
    generator = torch.Generator().manual_seed(s.SEED)
    starts = torch.randint(0, data.n_tokens - s.PROMPT_TOKENS - 1, (s.N_PROMPTS,), generator=generator).tolist()
    prose = [[int(token) for token in data.tokens[start : start + s.PROMPT_TOKENS]] for start in starts]
    whole = s.PROMPT_TOKENS * 3 // 4
    return {"prose": prose, "quotes": [text[:whole] + text[: s.PROMPT_TOKENS - whole] for text in prose]}


# -- parts


def check(report, s, bench):
    """The tokens of plain decoding, in float32: greedy by both rules, sampled by the coupled one."""
    dtype, bench.dtype = bench.dtype, torch.float32
    models, graphs = (bench.target, bench.small), bench.graphs
    bench.target, bench.small = (model.float() for model in models)
    torch.set_float32_matmul_precision("highest")
    n_rows = min(8, s.N_PROMPTS)
    prompts = bench.sets["prose"][:n_rows]
    for temperature, rules in ((0.0, ("rejection", "coupled")), (1.0, ("coupled",))):
        params = bench.params(s.NEW_TOKENS, temperature)
        expected = tokens_of(bench.writer(n_rows=n_rows), prompts, params)
        for rule in rules:
            for draft in ("model", "ngram"):
                same = tokens_of(bench.writer(draft, n_rows, s.K, rule), prompts, params) == expected
                report.check(f"temperature {temperature:g}, {rule}, {draft} draft: the tokens of plain decoding", same,
                             f"{n_rows} prompts, {s.NEW_TOKENS} tokens each, float32")  # fmt: skip
    bench.dtype, bench.graphs = dtype, graphs
    bench.target, bench.small = (model.to(dtype) for model in models)


def measure_acceptance(report, s, bench):
    """Acceptance rates and tokens a step: by draft, temperature, rule and prompts; then by length of the draft."""
    lines = {}
    for name in bench.sets:
        for draft in ("model", "ngram"):
            for temperature in s.TEMPERATURES:
                for rule in ("rejection", "coupled") if temperature and draft == "model" else ("rejection",):
                    acceptance_row(report, s, bench, name, draft, s.K, temperature, rule)
    for temperature in (min(s.TEMPERATURES), max(s.TEMPERATURES)):
        measured, formula = [], []
        for k in s.KS:
            known = k == s.K
            tally = acceptance_row(None if known else report, s, bench, "prose", "model", k, temperature, "rejection")
            measured.append(tally.tokens_per_step)
            formula.append(tally.expected_tokens_per_step)
        lines[f"temperature {temperature:g}: measured"] = (s.KS, measured)
        lines[f"temperature {temperature:g}: formula"] = (s.KS, formula)
    for name, (xs, ys) in lines.items():
        report.series(f"tokens a step, {name}", xs, ys)
    curves(report.folder / f"project11_speculative_decoding.{report.slug}.png", lines, "tokens of a draft (k)",
           "tokens a step", "Model draft, held-out prose: tokens a step of the target")  # fmt: skip


def acceptance_row(report, s, bench, name, draft, k, temperature, rule):
    """One row: tokens a step against what the formula says for the measured acceptance rate."""
    writer = bench.writer(draft, s.N_PROMPTS, k, rule)
    tokens_of(writer, bench.sets[name], bench.params(s.NEW_TOKENS, temperature))
    tally = writer.tally
    if report is not None:
        said = f"acceptance rate {tally.alpha:.3f} over {tally.tested:,} tested tokens"
        if draft == "ngram":
            said += f"; {tally.drafted / tally.steps:.2f} tokens drafted a step"
        how = f", {rule}" if temperature and draft == "model" else ""
        report.row(f"{name}, {draft} draft, k={k}, temperature {temperature:g}{how}: tokens a step",
                   tally.tokens_per_step, "tokens", limit=tally.expected_tokens_per_step,
                   limit_name="formula at this rate", note=said)  # fmt: skip
    return tally


def measure_speed(report, s, bench):
    """Times as fast as plain decoding, prefill taken off on both sides."""
    for n_rows in s.BATCHES:
        cost, verification = costs(s, bench, n_rows)
        for k in s.SPEED_KS:
            report.row(f"batch {n_rows}: a step of the target over {k + 1} tokens a row", verification[k], "steps",
                       limit=1.0, limit_name="as long as over one", higher_is_better=False)  # fmt: skip
        report.row(f"batch {n_rows}: a step of the model draft (c)", cost, "steps", note="of the target")
        for name, draft in (("prose", "model"), ("prose", "ngram"), ("quotes", "ngram")):
            speed_rows(report, s, bench, n_rows, name, draft, cost if draft == "model" else 0.0, verification)


@torch.no_grad()
def costs(s, bench, n_rows):
    """(c, {k: time of a step over k + 1 tokens}), in steps of the target over one token a row."""
    length, calls = s.PROMPT_TOKENS + s.NEW_TOKENS // 2, {}
    target, draft = bench.writer(n_rows=n_rows).decoder, bench.model_draft()
    draft.prepare(n_rows, s.PROMPT_TOKENS + s.NEW_TOKENS, bench.tokenizer.vocab_size)
    for decoder, row in itertools.product((target, draft.decoder), range(n_rows)):
        decoder.step([(row, length, 0)], [1] * length)

    def step(decoder, n):
        # Both sides look at the result: without that a GPU would still be working when the clock stops.
        for _ in range(8):
            for row in range(n_rows):
                decoder.cache.truncate(row, length)
            decoder.step([(row, n, n) for row in range(n_rows)], [1] * n * n_rows).argmax(-1).tolist()

    calls[0] = functools.partial(step, draft.decoder, 1)
    for n in (1, *(k + 1 for k in s.SPEED_KS)):
        calls[n] = functools.partial(step, target, n)
    timings = measure(calls, s.REPEATS, 2, bench.device)
    one = timings[1].median
    return timings[0].median / one, {k: timings[k + 1].median / one for k in s.SPEED_KS}


def write_until_an_end(writer, prompts, params):
    """Write as long as all rows do: up to the first that has its tokens."""
    stream = writer.stream(prompts, params[: len(prompts)])
    next(piece for piece in stream if piece.finish_reason)
    stream.close()


def speed_rows(report, s, bench, n_rows, name, draft, cost, verification):
    """The rows of one draft: every length in turn with plain decoding, as long as no row has ended."""
    prompts, params = bench.sets[name][:n_rows], bench.params(s.NEW_TOKENS)
    writers = {0: bench.writer(n_rows=n_rows)} | {k: bench.writer(draft, n_rows, k) for k in s.SPEED_KS}
    calls, written = {}, {0: n_rows * (s.NEW_TOKENS - 1)}  # tokens behind the first of each row
    for k, writer in writers.items():
        calls[k, "first"] = functools.partial(tokens_of, writer, prompts, bench.params(1))
        calls[k, "all"] = functools.partial(write_until_an_end, writer, prompts, params)
        if k:
            calls[k, "all"]()
            written[k] = writer.tally.kept + writer.tally.steps
    timings = measure(calls, s.REPEATS, 1, bench.device)
    rates = {k: n / (timings[k, "all"].median - timings[k, "first"].median) for k, n in written.items()}
    for k in s.SPEED_KS:
        tally = writers[k].tally
        alpha, mean = tally.alpha if tally.tested else 0.0, tally.drafted / max(tally.steps, 1)
        if draft == "model":
            limit, named = expected_speedup(alpha, k, cost), "E / (k c + 1)"
        else:
            limit, named = tally.expected_tokens_per_step, "E, as c = 0"
        # The paper lets a check cost what a step costs; here it is what was measured for drafts of these lengths.
        known = {0: 1.0} | verification
        checks = sum(n * np.interp(drafted, list(known), list(known.values())) for (drafted, _), n in
                     tally.checks.items()) / max(tally.steps, 1)  # fmt: skip
        real = tally.expected_tokens_per_step / (mean * cost + checks)
        note = (f"acceptance rate {alpha:.2f}, {mean:.2f} tokens drafted a step, c = {cost:.2f}; with the time that "
                f"checking takes: {real:.2f}×")  # fmt: skip
        report.row(f"batch {n_rows}, {name}, {draft} draft, k={k}: times as fast", rates[k] / rates[0], "×",
                   claim=CLAIM if draft == "model" else None, limit=limit, limit_name=named,
                   note=f"{note}; {rates[k]:,.0f} tokens/s, plain {rates[0]:,.0f}, greedy")  # fmt: skip


def measure_peers(report, s, bench):
    """Assisted generation of `transformers`, batch 1, the same weights, prompts and lengths of drafts."""
    try:
        import transformers
    except ImportError:
        return report.skip("against transformers, assisted", "transformers is not installed here")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in (("target", bench.target), ("draft", bench.small)):
            path = to_huggingface(model, None, Path(folder) / kind)
            theirs[kind] = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=bench.dtype).to(bench.device)
    settings = theirs["draft"].generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = s.K, "constant"
    settings.assistant_confidence_threshold = 0.0
    options = {"plain": {}, "model": {"assistant_model": theirs["draft"]}, "ngram": {"prompt_lookup_num_tokens": s.K}}
    for name in bench.sets:
        peer_rows(report, s, bench, name, theirs["target"], options)


def peer_rows(report, s, bench, name, theirs, options):
    """Four prompts, one after another: ours and theirs, without a draft and with both."""
    prompts, params = bench.sets[name][:4], bench.params(s.NEW_TOKENS)

    def write(**how):
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=bench.device)
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=s.NEW_TOKENS,
                                  do_sample=False, eos_token_id=None, pad_token_id=0, **how)  # fmt: skip
            found.append(out[0, len(prompt) :].tolist())
        return found

    writers = {kind: bench.writer(None if kind == "plain" else kind, 1, s.K) for kind in options}
    calls = {(kind, "ours"): functools.partial(tokens_of, writers[kind], prompts, params) for kind in options}
    calls |= {(kind, "theirs"): functools.partial(write, **how) for kind, how in options.items()}
    expected = calls["plain", "theirs"]()
    for kind in options:
        got = calls[kind, "ours"]()
        same = sum(a == b for a, b in zip(got, expected)) / len(prompts)
        if bench.dtype == torch.float32:
            report.check(f"{name}, {kind}: the tokens of transformers", same == 1, f"{same:.0%} of 4 prompts, greedy")
    timings = measure(calls, s.REPEATS, 1, bench.device)
    amount = len(prompts) * s.NEW_TOKENS
    for kind, peer in {"plain": "plain", "model": "assistant_model", "ngram": "prompt_lookup_num_tokens"}.items():
        ours, other = timings[kind, "ours"], timings[kind, "theirs"]
        gains = [timings["plain", who].median / timings[kind, who].median for who in ("ours", "theirs")]
        report.row(f"{name}, batch 1, {kind}{'' if kind == 'plain' else f' draft, k={s.K}'}", ours.rate(amount)[0],
                   "tok/s", spread=ours.rate(amount)[1:], peer=amount / other.median,
                   peer_name=f"transformers, {peer}",
                   note=f"prefill included, greedy; against its own plain decoding: ours {gains[0]:.2f}×, theirs "
                        f"{gains[1]:.2f}×")  # fmt: skip


PARTS = {"checks": check, "acceptance": measure_acceptance, "speed": measure_speed, "peers": measure_peers}


if __name__ == "__main__":
    main()
