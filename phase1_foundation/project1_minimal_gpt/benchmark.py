"""Measure project 1: how good the default run becomes in how long, and how fast a training step is.

    uv run python phase1_foundation/project1_minimal_gpt/benchmark.py

Trains with the defaults and with nanoGPT's settings for this kind of device, each in a process of its own, then times
training steps in turn with the same shape in `transformers`. About six minutes on two cores, four on an H100.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import RESULTS, plots
from common.benchmark import Report, measure
from common.device import device_slug, peak_flops, peak_memory
from common.run import Run
from phase1_foundation.project1_minimal_gpt import benchmark_config, train
from phase1_foundation.project1_minimal_gpt.data import batch
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig
from phase1_foundation.project1_minimal_gpt.optimization import build_optimizer, training_step

# What nanoGPT's README documents for its Shakespeare lesson, and the settings that gave it.
DOCUMENTED = {
    "cpu": (1.88, "nanoGPT's README: 1.88 in about 3 minutes on a CPU"),
    "cuda": (1.4697, "nanoGPT's README: 1.4697 in about 3 minutes on one A100"),
}
TARGET = {"cpu": 1.80, "cuda": 1.45}
NANOGPT = {
    "cpu": "--block_size 64 --n_layer 4 --n_head 4 --n_embd 128 --dropout 0 --batch_size 12 --max_iters 2000 "
    "--learning_rate 1e-3 --min_learning_rate 1e-4",
    "cuda": "--block_size 256 --n_layer 6 --n_head 6 --n_embd 384 --dropout 0.2 --batch_size 64 --max_iters 5000 "
    "--learning_rate 1e-3 --min_learning_rate 1e-4",
}
NANOGPT_BOTH = "--no_bias --gelu exact --init_std 0.02 --warmup_iters 100 --weight_decay 0.1 --beta2 0.99 --clip 1.0"


def main(argv=None):
    """Run all parts and write the results."""
    with Run(benchmark_config, argv, sections=("Benchmark", "System"), description=__doc__) as run:
        s, kind = run.settings, "cuda" if run.device.type == "cuda" else "cpu"
        folder = RESULTS if s.MAX_STEPS is None else Path(s.OUT_DIR)  # a trial leaves the real results alone
        report = Report("project1_minimal_gpt", "A character-level GPT on tiny Shakespeare", run.device, folder)
        runs = {"defaults of this project": train_in_process(s, "defaults", [])}
        if s.COMPARE:
            flags = f"{NANOGPT[kind]} {NANOGPT_BOTH}".split()
            runs["nanoGPT's settings, same code"] = train_in_process(s, "nanogpt", flags)
        report_training(report, runs, kind, shortened=s.MAX_STEPS is not None)
        draw(report, runs, kind)
        measure_steps(report, s, run.device)
        report.finish()


def train_in_process(s, name, flags):
    """Run train.py as a user would; returns its metrics and the seconds from start to exit, imports included."""
    out = Path(s.OUT_DIR, name)
    flags = [*flags, "--device", s.DEVICE, "--out_dir", str(out)]
    if s.MAX_STEPS is not None:
        flags += ["--max_iters", str(s.MAX_STEPS), "--warmup_iters", "1"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, train.__file__, *flags], check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise ValueError(f"train.py {' '.join(flags)} failed with status {done.returncode}: see its message above")
    return {"lines": train.read_metrics(out / "metrics.jsonl"), "seconds": seconds}


def report_training(report, runs, kind, shortened):
    """Add the rows of quality and time; the check keeps the project's promise."""
    ours, theirs = runs["defaults of this project"], runs.get("nanoGPT's settings, same code")
    loss = ours["lines"][-1]["final_val_loss"]
    report.row(
        "validation loss, nats per character", loss, "", claim=DOCUMENTED[kind][1], higher_is_better=False,
        peer=theirs and theirs["lines"][-1]["final_val_loss"], peer_name=theirs and "nanoGPT's settings, same code",
        note="best checkpoint, whole last tenth of the text, in windows of BLOCK_SIZE that do not overlap",
    )  # fmt: skip
    report.row(
        "whole run, imports and evaluation included", ours["seconds"], "s", higher_is_better=False,
        claim="about 3 minutes (nanoGPT's README)", peer=theirs and theirs["seconds"],
        peer_name=theirs and "nanoGPT's settings, same code",
    )  # fmt: skip
    if not shortened:
        report.check(f"validation loss at most {TARGET[kind]}", loss <= TARGET[kind], f"{loss:.4f}")


def draw(report, runs, kind):
    """Keep the validation curves and draw them beside the results."""
    series = {}
    for name, result in runs.items():
        points = [(line["step"], line["val_loss"]) for line in result["lines"] if "val_loss" in line]
        series[name] = tuple(map(list, zip(*points)))
        report.series(f"validation loss: {name}", *series[name])
    path = report.folder / f"project1_minimal_gpt.{device_slug(report.device)}.png"
    title = "Project 1: validation loss on tiny Shakespeare"
    plots.curves(path, series, "step", "nats per character", title, hlines={"nanoGPT's README": DOCUMENTED[kind][0]})


def huggingface_twin(model):
    """Build the same model in `transformers`, with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=c.tie_head,
            activation_function={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[c.gelu],
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    names = {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm_1": "ln_1",
             "norm_2": "ln_2", "norm": "transformer.ln_f", "blocks": "transformer.h", "attention": "attn",
             "qkv_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj",
             "head": "lm_head"}  # fmt: skip
    weights = {}
    for name, weight in model.state_dict().items():
        transposed = "_proj.weight" in name  # transformers keeps GPT-2's (in, out) layout
        weights[".".join(names.get(part, part) for part in name.split("."))] = weight.T if transposed else weight
    if c.tie_head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    twin.load_state_dict(weights)
    return twin.to(next(model.parameters()).device).train(model.training)


def measure_steps(report, s, device):
    """Time one whole training step (forward, backward, clipping, AdamW) of ours and of `transformers`, in turn."""
    torch.manual_seed(s.SEED)
    model = GPT(train.model_config(s, vocab_size=65)).to(device).eval()
    twin = huggingface_twin(model)
    tokens = torch.randint(65, (100_000,)).to(device)
    x, y = batch(tokens, 0, s.SEED, s.BATCH_SIZE, s.BLOCK_SIZE)
    with torch.no_grad():
        error = (model(x) - twin(x).logits).abs().max().item()
    report.check("same logits as transformers (float32)", error < 1e-3, f"largest difference {error:.1e}")

    def their_loss(inputs, targets):
        return F.cross_entropy(twin(inputs).logits.flatten(0, 1).float(), targets.flatten())

    functions = {}
    for name, module, loss in (("ours", model, model), ("transformers", twin, their_loss)):
        module.train()
        optimizer = build_optimizer(module, s.LEARNING_RATE, s.WEIGHT_DECAY, (s.BETA1, s.BETA2))
        compiled = torch.compile(loss) if s.COMPILE else loss
        functions[name] = step_function(compiled, optimizer, x, y, s, device)
    times = measure(functions, repeats=s.REPEATS, warmup=3, device=device)
    per_step = s.BATCH_SIZE * s.BLOCK_SIZE
    median, low, high = times["ours"].rate(per_step)
    limit, limit_name = roof(model, device)
    report.row(
        "training step", median, "char/s", spread=(low, high), peer=times["transformers"].rate(per_step)[0],
        peer_name="transformers GPT2LMHeadModel" + ", both compiled" * s.COMPILE, limit=limit, limit_name=limit_name,
        note=f"{model.n_parameters():,} parameters, {s.BATCH_SIZE} x {s.BLOCK_SIZE} characters, {s.DTYPE}, "
        f"peak memory of this process {peak_memory(device) / 2**30:.1f} GiB" * (peak_memory(device) is not None),
    )  # fmt: skip


def step_function(loss, optimizer, x, y, s, device):
    """Bind one training step to its arguments."""
    return lambda: training_step(loss, optimizer, x, y, s.CLIP, train.autocast(s, device))


def flops_per_token(config: GPTConfig, n_parameters: int) -> float:
    """Matrix FLOPs of forward and backward per token: 6 per weight, and per layer half of 12 C T (causal attention)."""
    weights = n_parameters - config.block_size * config.n_embd  # looking a position up multiplies nothing
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size / 2


def roof(model, device):
    """Characters per second if every multiplication ran at the device's rate: (rate, where that rate is from)."""
    flops = flops_per_token(model.config, model.n_parameters())
    if peak_flops(device):
        return peak_flops(device) / flops, "datasheet bf16 FLOP/s"
    n = 1536
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    seconds = measure({"matmul": lambda: a @ b}, repeats=7, device=device)["matmul"].low
    return 2 * n**3 / seconds / flops, f"at the speed of a {n}-wide float32 matrix product here"


if __name__ == "__main__":
    main()
