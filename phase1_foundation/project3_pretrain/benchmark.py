"""Measure pre-training: tokens per second step by step, MFU, and the recipe against nanoGPT's settings.

    uv run python phase1_foundation/project3_pretrain/benchmark.py
    uv run python phase1_foundation/project3_pretrain/benchmark.py --nanogpt ~/nanoGPT --quality_steps 600

Speed: GPT-2 124M shapes at context 1024 on a GPU, a small shape on a CPU, in turn with the same shape in `transformers`
and, where a checkout is given, nanoGPT. Recipes: runs of train_pretrain.py on the same tokens; a finished run is used
as it is, so they can be trained beforehand. `--parts recipes` measures these alone and keeps the other rows.
"""

import gc
import importlib.util
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import CHECKPOINTS, ROOT, catalog
from common.benchmark import Report, measure
from common.device import peak_flops
from common.kernels import relative_error
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain import benchmark_config, train_pretrain
from phase1_foundation.project3_pretrain.fused_loss import fused_nll
from phase1_foundation.project3_pretrain.head import plain_nll
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step, flops_per_token

TRAIN = Path(train_pretrain.__file__)
RECIPE_SEQUENCES = 480  # of one step of the default recipe on a GPU
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}


@dataclass(frozen=True)
class _Version:
    """One rung of the ladder: how the same training step is computed."""

    shape: dict = field(default_factory=dict)  # changes of the GPT-2 shape
    uses: tuple = ()  # transforms from the catalog
    float32_stream: bool = False
    compiled: bool = True
    small_micro: bool = False  # half the micro batch, twice as many


# each line changes one thing of the line above
LADDER = {
    "eager": _Version(float32_stream=True, compiled=False, small_micro=True),
    "+ torch.compile": _Version(float32_stream=True, small_micro=True),
    "+ residual stream in bf16": _Version(uses=("cudnn",), small_micro=True),
    "+ no biases (as nanoGPT)": _Version(NO_BIAS, ("cudnn",), small_micro=True),
    "+ fused loss": _Version(NO_BIAS, ("cudnn", "fused_loss"), small_micro=True),
    "+ micro batch doubled": _Version(NO_BIAS, ("cudnn", "fused_loss")),
}


def main(argv=None):
    """Run all parts that this device can run and write the results."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s, gpu = run.settings, run.device.type == "cuda"
        report = Report("project3_pretrain", "Pre-training", run.device, keep=len(s.PARTS) < 3)
        if "speed" in s.PARTS:
            (measure_gpu if gpu else measure_cpu)(report, s, run.device)
        if "checks" in s.PARTS:
            check_fused_loss(report, run.device)
        if "checks" in s.PARTS and gpu:
            check_resume(report)
            check_ranks(report)
        if "recipes" in s.PARTS:
            compare_recipes(report, s)
        report.finish()


class _Ours:
    """One optimizer step of our trainer, over `micros` micro batches of random tokens."""

    def __init__(self, config, version, device, micro, micros, optimizer="adamw"):
        torch.manual_seed(0)
        self.model = catalog.apply(Transformer(config), version.uses).to(device)
        if version.float32_stream:
            self.model.use_stream(lambda x: torch.float32)
        optimizer = build_optimizer(self.model, optimizer, 6e-4, 0.1)
        dtype = torch.bfloat16 if device.type == "cuda" else None
        self.step = Step(self.model, NextToken(), optimizer, 1.0, dtype)
        if version.compiled:
            self.model.compile()
        if version.small_micro:
            micro, micros = micro // 2, 2 * micros
        shape = (micros, 2, micro, config.block_size)
        self.micros = [tuple(pair) for pair in torch.randint(0, config.vocab_size - 64, shape)]
        self.tokens = micros * micro * config.block_size

    def __call__(self):
        """Take the step."""
        self.step.backward(self.micros, self.tokens)
        self.step.update(1.0)


class _Theirs:
    """The same step with somebody else's model and torch's own fused AdamW; `loss(tokens, targets)` is a mean."""

    def __init__(self, model, loss, device, micro, micros, block_size, vocab_size):
        self.model, self.loss, self.device = model, loss, device
        self.optimizer = torch.optim.AdamW(model.parameters(), 6e-4, fused=True)
        shape = (micros, 2, micro, block_size)
        self.micros = [tuple(pair) for pair in torch.randint(0, vocab_size - 64, shape)]
        self.tokens = micros * micro * block_size

    def __call__(self):
        """Take the step."""
        for tokens, targets in self.micros:
            tokens, targets = tokens.to(self.device), targets.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.loss(tokens, targets) / len(self.micros)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_nanogpt(path, device, micro, micros):
    """nanoGPT's model from a checkout, compiled, with the settings of its benchmark."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path).expanduser() / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(vocab_size=50304, bias=False, dropout=0.0)).to(device)
    compiled = torch.compile(model)
    return _Theirs(model, lambda x, y: compiled(x, y)[1], device, micro, micros, 1024, 50304)


def load_transformers_gpt2(device, micro, micros):
    """The same shape in `transformers`, compiled."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=50304, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(shape).to(device)
    compiled = torch.compile(model)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = lambda x, y: cross_entropy(compiled(x).logits.view(-1, 50304), y.view(-1))  # noqa: E731
    return _Theirs(model, loss, device, micro, micros, 1024, 50304)


def product_roof(device, n=8192):
    """FLOP/s of a large bf16 matrix product here and now: what no training step can exceed."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    seconds = measure({"product": lambda: a @ b}, 20, 5, device)["product"].median
    return 2 * n**3 / seconds


def measure_gpu(report, s, device):
    """GPT-2 124M shapes at context 1024: the ladder of changes, then ours against the peers, in turn."""
    roof = product_roof(device)
    report.row("bf16 product, 8192 x 8192 x 8192", roof / 1e12, "TFLOP/s", limit=peak_flops(device) / 1e12,
               limit_name="datasheet")  # fmt: skip
    model = Transformer(PRESETS["gpt2"](vocab_size=50304, **NO_BIAS))
    # a causal kernel skips half of the attention that MFU counts in full
    half_attention = sum(6 * spec.n_head * spec.head_size * 1024 for spec in model.specs)
    limit = roof / (flops_per_token(model, 1024) - half_attention)
    name_of_limit = f"all products at the {roof / 1e12:.0f} TFLOP/s of this run"
    for name, version in LADDER.items():
        ours = _Ours(PRESETS["gpt2"](vocab_size=50304, **version.shape), version, device, s.MICRO_BATCH, s.MICROS)
        rate = measure({name: ours}, s.REPEATS, 2, device)[name].rate(ours.tokens)
        report.row(f"124M training, {name}", rate[0], "tok/s", spread=rate[1:], limit=limit, limit_name=name_of_limit)
        del ours
        _forget()
    measure_rivals(report, s, device, limit, name_of_limit)
    measure_recipe(report, s, device)


def measure_recipe(report, s, device):
    """The default recipe's model and optimizer, by the sequences of one forward: what `MOST_SEQUENCES` is chosen by."""
    config = PRESETS["llama-125m"](vocab_size=50304)
    version = _Version(uses=("cudnn", "fused_loss"))
    for micro in (30, 40, 60):
        torch.cuda.reset_peak_memory_stats(device)
        ours = _Ours(config, version, device, micro, RECIPE_SEQUENCES // micro, "muon")
        rate = measure({"recipe": ours}, s.REPEATS, 2, device)["recipe"].rate(ours.tokens)
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        report.row(f"the recipe's step (Llama-125M, Muon), {micro} sequences a forward", rate[0], "tok/s",
                   spread=rate[1:],
                   note=f"{RECIPE_SEQUENCES} sequences a step, peak memory {memory:.1f} GiB")  # fmt: skip
        del ours
        _forget()


def measure_rivals(report, s, device, limit, name_of_limit):
    """The last rung of the ladder in turn with nanoGPT's model and the same shape in `transformers`, both compiled."""
    micro, micros, version = s.MICRO_BATCH, s.MICROS, LADDER["+ micro batch doubled"]
    config = PRESETS["gpt2"](vocab_size=50304, **version.shape)
    rivals = {"ours": _Ours(config, version, device, micro, micros)}
    rivals["transformers"] = load_transformers_gpt2(device, micro // 2, 2 * micros)  # its logits are float32
    if s.NANOGPT:
        rivals["nanoGPT"] = load_nanogpt(s.NANOGPT, device, micro // 2, 2 * micros)
    timings = measure(rivals, s.REPEATS, 2, device)
    rate = timings["ours"].rate(rivals["ours"].tokens)
    for peer in list(rivals)[1:]:
        report.row(f"124M training step against {peer}, in turn", rate[0], "tok/s", spread=rate[1:],
                   peer=rivals[peer].tokens / timings[peer].median, peer_name=peer + ", torch.compile",
                   limit=limit, limit_name=name_of_limit,
                   note=f"{micros * micro} sequences of 1024 tokens a step, AdamW and clipping included; ours "
                   f"{micro} a forward, theirs {micro // 2}, as they hold their logits in float32")  # fmt: skip
    if not s.NANOGPT:
        report.skip("124M training step against nanoGPT", "needs a checkout of karpathy/nanoGPT: --nanogpt PATH")
    mfu = rate[0] * flops_per_token(rivals["ours"].model, 1024) / peak_flops(device)
    report.row("MFU", 100 * mfu, "%", limit=100, limit_name="989 TFLOP/s dense bf16",
               note="6 N + 12 L H D T FLOPs a token, attention counted in full (PaLM, appendix B)")  # fmt: skip
    del rivals
    _forget()


def measure_cpu(report, s, device):
    """A small Llama shape on this CPU against the same in `transformers`, in turn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = PRESETS["cpu-small"](qk_norm=False, block_size=128)
    ours = _Ours(config, _Version(compiled=False), device, 16, 1)
    shape = LlamaConfig(vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_ff,
                        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
                        max_position_embeddings=128, tie_word_embeddings=True, use_cache=False)  # fmt: skip
    peer = LlamaForCausalLM(shape)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = lambda x, y: cross_entropy(peer(x).logits.flatten(0, 1), y.flatten())  # noqa: E731
    theirs = _Theirs(peer, loss, device, 16, 1, 128, config.vocab_size)
    timings = measure({"ours": ours, "transformers": theirs}, s.REPEATS, 2, device)
    rate = timings["ours"].rate(ours.tokens)
    report.row(f"training step, {config.n_layer} layers x {config.n_embd}, float32", rate[0], "tok/s", spread=rate[1:],
               peer=theirs.tokens / timings["transformers"].median, peer_name="transformers",
               note="AdamW and clipping included, 16 x 128 tokens a step")  # fmt: skip
    report.skip("124M training", "needs a GPU")


def check_fused_loss(report, device):
    """Values and gradients of the fused loss against float64."""
    vocab = 50304 if device.type == "cuda" else 4096
    x, weight = torch.randn(512, 768, device=device), torch.randn(vocab, 768, device=device) * 0.05
    targets = torch.randint(0, vocab, (512,), device=device)
    exact = _loss_and_gradients(plain_nll, x.double(), weight.double(), targets)
    for name, loss in (("plain", plain_nll), ("fused", fused_nll)):
        with torch.autocast(device.type, torch.bfloat16):
            got = _loss_and_gradients(loss, x, weight, targets)
        errors = [relative_error(a, b) for a, b in zip(got, exact)]
        report.check(f"{name} loss in bf16 against float64", max(errors) < 2e-2,
                     "errors of value, x and weight gradient: " + ", ".join(f"{e:.1e}" for e in errors))  # fmt: skip


def _loss_and_gradients(loss, x, weight, targets):
    """The loss and its two gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = loss(x, weight, targets)
    nll.mean().backward()
    return nll, x.grad, weight.grad


TINY_RUN = ["--model", "gpt2", "--block_size", "256", "--batch_tokens", "16384", "--max_steps", "8", "--warmup_steps",
            "2", "--eval_every", "8", "--eval_tokens", "16384", "--save_every", "1", "--use", "--no_compile",
            "--sample_tokens", "1"]  # fmt: skip


def check_resume(report):
    """A deterministic run on this GPU, killed and resumed, against one that was not: the same losses, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*TINY_RUN, "--deterministic", "--dropout", "0.1"]
        whole = run_training([*flags, "--out_dir", f"{folder}/whole"])
        parts = run_training([*flags, "--out_dir", f"{folder}/parts"], kill_at=4)
    report.check("run killed and resumed, deterministic on this GPU, equals the uninterrupted one", whole == parts,
                 f"{len(whole)} losses, last {whole[-1]:.6f} and {parts[-1]:.6f}")  # fmt: skip


def check_ranks(report):
    """Two processes with NCCL against one, on the same global batch."""
    name = "two GPUs (NCCL) give the losses of one on the same global batch"
    if torch.cuda.device_count() < 2:
        report.skip(name, "needs two GPUs")
        return
    with tempfile.TemporaryDirectory() as folder:
        one = run_training([*TINY_RUN, "--dtype", "float32", "--out_dir", f"{folder}/one"])
        two = run_training([*TINY_RUN, "--dtype", "float32", "--out_dir", f"{folder}/two"], processes=2)
    worst = max(abs(a - b) for a, b in zip(one, two, strict=True))
    report.check(name, worst < 2e-3, f"{len(one)} losses in float32, largest gap {worst:.1e}")


def run_training(flags, kill_at=None, processes=1, environment=None):
    """Run train_pretrain.py in a process of its own and return the training losses, one per step.

    Args:
        flags: its command line; must hold ``--out_dir``.
        kill_at: kill the process (SIGKILL) once this step is in the metrics, then run it again to the end.
        processes: start it under ``torch.distributed.run`` with that many.

    Raises:
        RuntimeError: the script failed; the message holds the end of its output.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(TRAIN), *flags]
    metrics = Path(flags[flags.index("--out_dir") + 1]) / "metrics.jsonl"
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if kill_at:
        with subprocess.Popen(command, **options | {"stdout": subprocess.DEVNULL}) as process:
            while process.poll() is None and not any(e["step"] >= kill_at for e in read_metrics(metrics)):
                time.sleep(0.005)
            process.kill()
    done = subprocess.run(command, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return [entry["train_loss"] for entry in read_metrics(metrics) if "train_loss" in entry]


NANOGPT_RECIPE = ["--model", "gpt2", "--optimizer", "adamw", "--learning_rate", "6e-4", "--embed_learning_rate", "6e-4",
                  "--schedule", "cosine", "--weight_decay", "0.1"]  # fmt: skip
# what is compared with the default recipe: further flags of the same run, by kind of device
RIVAL_RECIPES = {
    "cuda": {"nanoGPT's settings": NANOGPT_RECIPE, "AdamW for Muon": ["--optimizer", "adamw"]},
    "cpu": {
        "AdamW for Muon": ["--optimizer", "adamw"],
        "AdamW for Muon, half the rate": [
            "--optimizer", "adamw", "--learning_rate", "3e-3", "--embed_learning_rate", "3e-3",
        ],
        "cosine for WSD": ["--schedule", "cosine"],
    },
}  # fmt: skip


def compare_recipes(report, s):
    """The default recipe against others on the same tokens: validation losses, curves, speed of the whole runs."""
    kind = "cuda" if report.device.type == "cuda" else "cpu"
    if not s.QUALITY_STEPS:
        for name in RIVAL_RECIPES[kind]:
            report.skip(f"validation loss, our recipe against: {name}", "whole runs, on demand: --quality_steps 360")
        return
    curves_by_name = {"our recipe": train_recipe(report, s, "our recipe", [])}
    millions, losses = curves_by_name["our recipe"]
    for name, flags in RIVAL_RECIPES[kind].items():
        curves_by_name[name] = train_recipe(report, s, name, flags)
        theirs = curves_by_name[name][1][-1]
        report.row(f"validation loss, our recipe against: {name}", losses[-1], "nats/token", peer=theirs,
                   peer_name=name, higher_is_better=False, note=f"after {millions[-1]:,.3g}M tokens")  # fmt: skip
        reached = next((x for x, y in zip(millions, losses) if y <= theirs), None)
        if reached:
            report.row(f"tokens to reach the last loss of: {name}", reached, "M tokens", peer=millions[-1],
                       peer_name=name, higher_is_better=False)  # fmt: skip
    path = report.folder / f"project3_pretrain.recipes.{report.slug}.png"
    curves(path, curves_by_name, "million tokens", "validation loss (nats a token)", "Recipes on equal data and tokens")


def train_recipe(report, s, name, flags):
    """Train a recipe, unless its finished run stands; returns (millions of tokens, validation losses)."""
    out = CHECKPOINTS / ("project3_" + re.sub(r"\W+", "_", name))
    train_pretrain.main(
        [*shlex.split(s.QUALITY_FLAGS), *flags, "--max_steps", str(s.QUALITY_STEPS), "--out_dir", str(out)]
    )
    entries = read_metrics(out / "metrics.jsonl")
    steps = [e for e in entries if "tokens" in e]
    points = [(e["step"] * steps[0]["tokens"] / 1e6, e["val_loss"]) for e in entries if "val_loss" in e]
    millions, losses = (list(column) for column in zip(*points))
    _forget()  # the next run chooses its micro batch by the memory that is free
    report.series(f"validation loss, {name}", millions, losses)
    if report.device.type == "cuda":  # minutes on a CPU are never undisturbed
        speed = statistics.median(e["tokens_per_s"] for e in steps[len(steps) // 2 :])
        report.row(f"whole training run, {name}", speed, "tok/s",
                   note="median over the second half of the run, data and optimizer included")  # fmt: skip
    return millions, losses


def _forget():
    """Free what the last variant left in memory and in the compiler."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
