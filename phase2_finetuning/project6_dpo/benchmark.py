"""Measure project 6: packed pairs against padded ones and against trl; the losses side by side; what beta buys.

    uv run python phase2_finetuning/project6_dpo/benchmark.py
    uv run python phase2_finetuning/project6_dpo/benchmark.py --parts losses beta --epochs 3

Padded pairs are laid out as trl's collator does: chosen answers, then rejected ones, each padded to the longest of the
batch. trl's own DPOTrainer is timed in turn with ours, in a process of its own (on a CPU; `uv run --with trl` fetches
it). The parts "losses" and "beta" are runs of train_dpo.py from one fine-tuned model.
"""

import functools
import json
import shlex
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from common import CHECKPOINTS, ROOT
from common.benchmark import Report, measure
from common.plots import curves
from common.run import Run
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.head import IGNORE
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import newest_checkpoint
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.preparation import load_tokenizer
from phase1_foundation.project3_pretrain.trainer import Step
from phase2_finetuning.project4_sft.exporting import export
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import with_chat_tokens
from phase2_finetuning.project6_dpo import benchmark_config, train_dpo
from phase2_finetuning.project6_dpo.dpo import LOSSES, PreferenceObjective, orpo_loss, simpo_loss
from phase2_finetuning.project6_dpo.judging import judge, remember_reference
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset, render_pair
from phase2_finetuning.project6_dpo.preferences import read_preferences

CONSTANTS = types.SimpleNamespace(BETA=0.1, LABEL_SMOOTHING=0.0, IPO_TAU=0.1)  # of the losses that are compared
VARIANTS = {
    "DPO": ["--loss", "dpo"],
    "cDPO, 10% flipped": ["--loss", "dpo", "--label_smoothing", "0.1"],
    "IPO": ["--loss", "ipo"],
    "SimPO": ["--loss", "simpo"],
    "ORPO": ["--loss", "orpo"],
}


def main(argv=None):
    """Run the parts that were asked for and write the results."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        report = Report("project6_dpo", "Preference optimization", run.device,
                        keep=len(s.PARTS) < len(benchmark_config.PARTS))  # fmt: skip
        if "speed" in s.PARTS or "trl" in s.PARTS:
            pairs, template = read_preferences(s.CORPUS), build_template(s)
            sides = [render_pair(template, pair, s.BLOCK_SIZE) for pair in pairs]
        if "speed" in s.PARTS:
            compare_layouts(report, sides, template, s, run.device)
        if "trl" in s.PARTS:
            compare_trl(report, pairs, sides, template, s)
        if {"losses", "beta"} & set(s.PARTS):
            compare_runs(report, s)
        report.finish()


def build_template(s):
    """The template of GPT-2's tokenizer on a GPU; on a CPU of a vocabulary that is learned from the pairs."""
    if s.PRESET == "gpt2":
        return ChatTemplate(with_chat_tokens(load_tokenizer("gpt2")))
    texts = [text for pair in read_preferences(s.CORPUS) for text in (pair.messages[-1]["content"], *pair[1:])]
    return ChatTemplate(with_chat_tokens(BPETokenizer.train(texts, 4000, ["<|endoftext|>"], rule="merges")))


def build_model(template, s, seed=0):
    """A new model; without QK-norm, so that `transformers` knows its shape as Llama's (or GPT-2's)."""
    torch.manual_seed(s.SEED + seed)
    vocab_size = -(-template.tokenizer.vocab_size // 64) * 64
    return Transformer(PRESETS[s.PRESET](vocab_size=vocab_size, block_size=max(s.BLOCK_SIZE, 64), qk_norm=False))


# -- packed and padded


class _PaddedObjective(PreferenceObjective):
    """The same objective for padded pairs: the first half of a batch's rows are the chosen answers."""

    def log_probs(self, model, tokens, targets, n):
        """The sums and lengths (1, n, 2)."""
        nll = model(tokens, None, targets)
        per_row = torch.stack([-nll.sum(dim=1), (targets != IGNORE).sum(dim=1).to(nll.dtype)])
        return per_row.view(2, 1, 2, n).transpose(2, 3)


def pad_pairs(sides, start_id, n):
    """Batches of n pairs in the order of the file: (tokens, targets (2 n, T), reference (1, n, 2))."""
    batches = []
    for first in range(0, len(sides) - n + 1, n):
        rows = [pair[side] for side in (0, 1) for pair in sides[first : first + n]]
        tokens = pad_sequence([torch.tensor(t[:-1]) for t, _ in rows], True, start_id)
        targets = [torch.where(torch.tensor(m[1:]) == 1, torch.tensor(t[1:]), IGNORE) for t, m in rows]
        batches.append((tokens, pad_sequence(targets, True, IGNORE), torch.zeros(1, n, 2)))
    return batches


def compare_layouts(report, sides, template, s, device):
    """How full rows are, and pairs a second, packed against padded."""
    data = PreferenceDataset(sides, s.BLOCK_SIZE, template.start_id)
    pairs_a_step = round(s.ROWS * data.n_pairs / data.epoch_size)  # so that both take about as many pairs
    padded = pad_pairs(sides, template.start_id, pairs_a_step)
    batches = data.batches(s.SEED, s.ROWS, s.ROWS)
    packed = [batches[i][0] for i in range(s.STEPS)]
    check_layouts(report, sides[:pairs_a_step], padded[0], template, s)
    report.row("places that hold a pair", 100 * data.fill, "%", peer=100 * fill_of(padded),
               peer_name="padded to the longest of a batch, as trl's collator", limit=100, limit_name="all",
               note=f"{data.n_pairs:,} pairs in rows of {2 * s.BLOCK_SIZE} tokens")  # fmt: skip
    loss = functools.partial(LOSSES["dpo"], CONSTANTS)
    rounds = {
        "packed": _Round(build_model(template, s), PreferenceObjective(loss, template.start_id), packed, device),
        "padded": _Round(
            build_model(template, s), _PaddedObjective(loss, template.start_id), padded[: s.STEPS], device
        ),
    }
    timings = measure(rounds, s.REPEATS, 1, device)
    rate = timings["packed"].rate(rounds["packed"].pairs)
    report.row("pairs a second, packed", rate[0], "pairs/s", spread=rate[1:],
               peer=rounds["padded"].pairs / timings["padded"].median, peer_name="padded, same model and optimizer",
               note=f"{s.PRESET}, about {pairs_a_step} pairs a step, AdamW included")  # fmt: skip


def check_layouts(report, sides, padded, template, s):
    """The summed loss of some pairs, packed and padded: the same, or the rest would prove nothing."""
    model, loss = build_model(template, s).eval(), functools.partial(LOSSES["dpo"], CONSTANTS)
    data = PreferenceDataset(sides, s.BLOCK_SIZE, template.start_id)
    with torch.no_grad():
        packed = sum(float(PreferenceObjective(loss, template.start_id)(model, batch)) for batch in data.windows(2))
        other = float(_PaddedObjective(loss, template.start_id)(model, padded))
    report.check("packed and padded pairs cost the same", abs(packed - other) < 1e-4 * other,
                 f"{packed:.4f} and {other:.4f}")  # fmt: skip


def fill_of(batches):
    """The part of all places that lie before the last target of their row."""
    used = sum(int((targets.shape[1] - (targets.flip(1) != IGNORE).int().argmax(1)).sum()) for _, targets, _ in batches)
    return used / sum(targets.numel() for _, targets, _ in batches)


class _Round:
    """A round of optimizer steps, one for each batch."""

    def __init__(self, model, objective, batches, device):
        dtype = torch.bfloat16 if device.type == "cuda" else None
        self.step = Step(model.to(device), objective, build_optimizer(model, "adamw", 1e-5, 0.0), 1.0, dtype)
        self.batches, self.pairs = batches, sum(objective.count(batch) for batch in batches)

    def __call__(self):
        """Take the steps."""
        for batch in self.batches:
            self.step.backward([batch], self.step.objective.count(batch))
            self.step.update(1.0)


# -- trl


def compare_trl(report, pairs, sides, template, s):
    """trl's losses against ours on the same pairs, then its DPOTrainer's steps in turn with ours."""
    name = "pairs a second, against trl's DPOTrainer"
    if report.device.type != "cpu":
        report.skip(name, "trl is measured on a CPU")
        return
    if shutil.which("uv") is None:
        report.skip(name, "needs uv, which fetches trl")
        return
    data = PreferenceDataset(sides, s.BLOCK_SIZE, template.start_id)
    pairs_a_step = round(s.ROWS * data.n_pairs / data.epoch_size)
    with tempfile.TemporaryDirectory() as folder:
        model, reference = build_model(template, s), build_model(template, s, seed=1)
        export(model, template, Path(folder) / "model")
        export(reference, template, Path(folder) / "reference")
        job = {
            "pairs": [_for_trl(pair) for pair in pairs], "pairs_a_step": pairs_a_step, "beta": CONSTANTS.BETA,
            "steps": s.STEPS, "rounds": s.REPEATS + 1, "means": (-3 * torch.rand(16, 2) - 0.1).tolist(),
        }  # fmt: skip
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        with _Peer(folder) as peer:
            if (said := peer.answer()) is None:
                report.skip(name, f"trl does not run here: {peer.reason()}")
                return
            check_trl(report, said, job, sides[:pairs_a_step], model, reference, template, s)
            batches = data.batches(s.SEED, s.ROWS, s.ROWS)
            objective = PreferenceObjective(functools.partial(LOSSES["dpo"], CONSTANTS), template.start_id)
            ours = _Round(model, objective, [batches[i][0] for i in range(s.STEPS)], report.device)
            timings = measure({"ours": ours, "trl": peer.round}, s.REPEATS, 1)
    rate = timings["ours"].rate(ours.pairs)
    report.row(name, rate[0], "pairs/s", spread=rate[1:], peer=s.STEPS * pairs_a_step / timings["trl"].median,
               peer_name=f"trl {said['version']}, padded, its own process",
               note=f"{s.PRESET} as Llama in transformers, float32, about {pairs_a_step} pairs a step, reference "
               "precomputed in both, no gradient checkpointing")  # fmt: skip


def _for_trl(pair):
    """A pair as trl's conversational format."""
    sides = {name: [{"role": "assistant", "content": text}] for name, text in zip(("chosen", "rejected"), pair[1:])}
    return {"prompt": pair.messages, **sides}


def check_trl(report, said, job, sides, model, reference, template, s):
    """The losses that trl found, against ours."""
    data = PreferenceDataset(sides, s.BLOCK_SIZE, template.start_id)
    remember_reference(reference, data)
    found = judge(model, data)
    ours = {trl: float(LOSSES[name](CONSTANTS, found.sums, found.reference, found.lengths).mean())
            for trl, name in (("sigmoid", "dpo"), ("ipo", "ipo"))}  # fmt: skip
    for name, value in ours.items():
        theirs = said["losses"][name]
        report.check(f"our loss is trl's: {name}", abs(value - theirs) < 1e-4 * abs(theirs),
                     f"{value:.6f} and {theirs:.6f}, a mean over {len(sides)} pairs")  # fmt: skip
    chosen, rejected = torch.tensor(job["means"]).T
    formulas = {"simpo": simpo_loss(chosen, rejected, 2.0, 0.5), "odds": -chosen - orpo_loss(chosen, rejected, 1.0)}
    for name, values in formulas.items():  # trl's odds-ratio term has the other sign and no fine-tuning in it
        gap = float((values - torch.tensor(said["formulas"][name])).abs().max())
        report.check(f"our formula is trl's: {name}", gap < 1e-4, f"largest gap {gap:.1e}")


class _Peer:
    """trl_peer.py in a process of its own."""

    def __init__(self, folder):
        script = Path(__file__).with_name("trl_peer.py")
        self.errors = open(Path(folder) / "errors.txt", "w+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(
            ["uv", "run", "--with", "trl", "python", str(script), "--folder", folder], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self):
        return self

    def answer(self):
        """What it says next, or None where it has died."""
        line = next((line for line in self.process.stdout if line.startswith("@")), None)
        return json.loads(line[1:]) if line else None

    def round(self):
        """Let it take a round of steps."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if self.answer() is None:
            raise RuntimeError(f"trl ended in the middle: {self.reason()}")

    def reason(self):
        """The last line of its errors."""
        self.process.wait()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["it said nothing"])[-1][:200]

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.errors.close()


# -- whole runs


def compare_runs(report, s):
    """The losses, and DPO with several betas, from one fine-tuned model: accuracy, margin and distance."""
    source = s.CHECKPOINT or newest_checkpoint(CHECKPOINTS / "project4")
    if source is None:
        report.skip("losses and betas compared", "needs a fine-tuned model: run project 4's train_sft.py first")
        return
    with tempfile.TemporaryDirectory() as folder:
        train = functools.partial(run_training, s, source, folder)
        if "losses" in s.PARTS:
            compare_losses(report, train)
        if "beta" in s.PARTS:
            compare_betas(report, train, s.BETAS)


def run_training(s, source, folder, flags):
    """Train with some flags and return what the best model prefers: the last line of metrics.jsonl."""
    train_dpo.main([
        "--checkpoint", str(source), "--train_data_path", s.CORPUS, "--epochs", str(s.EPOCHS),
        "--device", s.DEVICE, "--answers", "0", "--out_dir", folder, "--no_resume", *shlex.split(s.FLAGS), *flags,
    ])  # fmt: skip
    return [entry["best"] for entry in read_metrics(Path(folder) / "metrics.jsonl") if "best" in entry][-1]


def compare_losses(report, train):
    """A row for each loss."""
    for name, flags in VARIANTS.items():
        last = train(flags)
        report.row(f"reward accuracy on held-out pairs, {name}", 100 * last["accuracy"], "%",
                   limit=100, limit_name="all pairs; the fine-tuned model ties with itself: 50",
                   note=f"margin {last['margin']:.2f} nats, KL {last['kl']:.3f} nats a token, log-probability of the "
                   f"chosen answers {last['chosen']:.1f}, of the rejected ones {last['rejected']:.1f}; chosen answer "
                   f"likelier per token (what SimPO and ORPO compare) {last['likelier_per_token']:.1%}; longer answer "
                   f"preferred by reward {last['longer_preferred']:.1%}")  # fmt: skip


def compare_betas(report, train, betas):
    """A row for each beta, and accuracy against distance."""
    points = []
    for beta in sorted(betas):
        last = train(["--beta", str(beta)])
        report.row(f"reward accuracy on held-out pairs, DPO with beta {beta:g}", 100 * last["accuracy"], "%",
                   note=f"margin {last['margin']:.2f} nats, KL {last['kl']:.3f} nats a token")  # fmt: skip
        points.append((last["kl"], 100 * last["accuracy"], last["margin"]))
    kl, accuracy, margin = map(list, zip(*sorted(points)))
    report.series("accuracy (%) by KL", kl, accuracy)
    report.series("margin (nats) by KL", kl, margin)
    curves(report.folder / f"project6_dpo.{report.slug}.png",
           {"reward accuracy (%)": (kl, accuracy), "10 x margin (nats)": (kl, [10 * m for m in margin])},
           "KL to the reference (nats a token)", "on held-out pairs",
           f"DPO with beta from {max(betas):g} (left) to {min(betas):g}")  # fmt: skip


if __name__ == "__main__":
    main()
