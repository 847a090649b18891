"""Measure project 7: float8 against bfloat16 in products, training steps, inference and a real run; loss scaling.

    uv run python phase3_core_inference/project7_mixed_precision/benchmark.py
    uv run python phase3_core_inference/project7_mixed_precision/benchmark.py --parts steps --models 124M
    uv run python phase3_core_inference/project7_mixed_precision/benchmark.py --parts run --run_steps 300

products: the three products of a layer, with and without the casts. steps: whole training steps in all precisions.
inference: weights of one byte. run: the same training in bfloat16 and float8. The peers are torch.amp and torchao,
timed in turn with ours. Without float8 hardware it is emulated: then only the errors mean something, not the speed.
"""

import copy
import functools
import gc
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from common import CHECKPOINTS, ROOT, graphs
from common.benchmark import Report, measure, measure_recorded, run_parts
from common.device import peak_flops
from common.kernels import relative_error
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain import config as pretraining
from phase1_foundation.project3_pretrain.fused_loss import use_fused_loss
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.plans import use_cudnn_attention
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase3_core_inference.project7_mixed_precision import benchmark_config
from phase3_core_inference.project7_mixed_precision.few_rows import (
    FEW,
    few_rows_product,
    have_kernels,
    round_reference,
    round_rows,
)
from phase3_core_inference.project7_mixed_precision.float8 import (
    Float8Linear,
    emulated_product,
    product_for,
)
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear, store_float8
from phase3_core_inference.project7_mixed_precision.master_weights import MasterStep
from phase3_core_inference.project7_mixed_precision.product_rates import (
    float8_products,
    has_float8,
    layer_products,
    plain_products,
)
from phase3_core_inference.project7_mixed_precision.step_rivals import Uniform, loss_scale, rivals_of, with_torchao

TRAIN = ROOT / "phase1_foundation" / "project3_pretrain" / "train_pretrain.py"
TINY_LLAMA = PRESETS["llama-7b"](n_layer=22, n_embd=2048, n_kv_head=4, n_ff=5632, block_size=1024)
# name -> (shape, sequences of a micro batch, micro batches of a step)
SHAPES = {
    "small": (PRESETS["cpu-small"](block_size=64), 4, 1),
    "124M": (replace(PRESETS["llama-125m"](), qk_norm=False), 32, 4),
    "1.1B": (TINY_LLAMA, 8, 4),
}
LAYERS = {  # (in, out) of a layer's product and its number of tokens
    "cuda": [(2048, 2048, 8192), (2048, 5632, 8192), (5632, 2048, 8192)],
    "cpu": [(256, 512, 256)],
}
CLAIM = "matches 16-bit training (abstract)"


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # all rivals share the code of a block
        report = Report("project7_mixed_precision", "Mixed precision", run.device, keep=len(s.PARTS) < 5)
        parts = {
            f"{part} ({shape})": functools.partial(PARTS[part], report, s, run.device, shape)
            for part in s.PARTS
            for shape in (s.MODELS if part == "steps" else s.MODELS[-1:])
        }
        run_parts(report, parts, forget)


def forget():
    """Free what the last part left in memory and in the compiler."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- checks


def check(report, s, device, _):
    """The hardware's products against the emulation's; a layer's error against float64."""
    generator = torch.Generator().manual_seed(s.SEED)
    x, grad = (torch.randn(512, n, generator=generator).to(device) for n in (256, 512))
    weight = torch.randn(512, 256, generator=generator).to(device)
    exact = (x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double())
    if have_kernels(x):
        check_few_rows(report, x, weight)
    for scaling in ("tensor", "row"):
        found = {}
        for name, product in (("here", product_for(device)), ("emulated", emulated_product)):
            layer = Float8Linear.of(layer_of(weight), scaling)
            layer.product = product
            x_leaf = x.bfloat16().requires_grad_()
            y = layer(x_leaf)
            y.backward(grad.bfloat16())
            found[name] = (y, x_leaf.grad, layer.weight.grad)
        errors = [relative_error(a, b) for a, b in zip(found["here"], exact)]
        report.check(f"float8, a scale a {scaling}: y, dx and dW against float64", max(errors) < 0.1,
                     ", ".join(f"{e:.1%}" for e in errors))  # fmt: skip
        if has_float8(device):
            gaps = [relative_error(a, b) for a, b in zip(found["here"], found["emulated"])]
            report.check(f"float8, a scale a {scaling}: the hardware computes what is emulated", max(gaps) < 1e-2,
                         ", ".join(f"{g:.1e}" for g in gaps))  # fmt: skip


def check_few_rows(report, x, weight):
    """The kernels of stored weights against their references."""
    stored = StoredFloat8Linear(layer_of(weight))
    x8, of_x = round_rows(x[:FEW].bfloat16())
    report.check("float8: rows are rounded as step by step", torch.equal(x8, round_reference(x[:FEW].bfloat16())[0]))
    few = [f(x8, of_x, stored.codes, stored.scale, torch.float32) for f in (few_rows_product, few_rows_product.reference)]  # fmt: skip  # noqa: E501
    report.check("float8: the product of few rows is what is emulated", relative_error(*few) < 1e-5,
                 f"{relative_error(*few):.1e}")  # fmt: skip


def layer_of(weight):
    """A plain layer with this weight (out, in)."""
    layer = nn.Linear(*weight.shape[::-1], bias=False, device=weight.device)
    layer.weight.data.copy_(weight)
    return layer


# -- products


def products(report, s, device, _):
    """Forward and both backward products of single layers: TFLOP/s, without the casts and with them."""
    real = has_float8(device)
    kind = "bfloat16" if real else "float32"
    roof = None
    if real:
        a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        roof = 2 * 8192**3 * 10 / measure({"": lambda: [a @ b for _ in range(10)]}, 5, 2, device)[""].median
        report.row("bf16 product, 8192 x 8192 x 8192", roof / 1e12, "TFLOP/s", limit=peak_flops(device) / 1e12,
                   limit_name="datasheet")  # fmt: skip
    limit = {"limit": 2 * roof / 1e12, "limit_name": "twice this run's bf16"} if roof else {}
    for n_in, n_out, tokens in LAYERS["cuda" if real else "cpu"]:
        work, name = 6 * n_in * n_out * tokens / 1e12, f"{n_in} -> {n_out}, {tokens} tokens"
        bare = {kind: plain_products(n_in, n_out, tokens, device)}
        for scaling in ("tensor", "row"):
            bare[scaling] = float8_products(n_in, n_out, tokens, device, scaling)
        timings = measure_recorded(bare, s.REPEATS, 20, device=device)
        for scaling in ("tensor", "row"):
            rate = timings[scaling].rate(work)
            report.row(f"{name}: products alone, a scale a {scaling}", rate[0], "TFLOP/s", spread=rate[1:],
                       peer=work / timings[kind].median, peer_name=kind, **limit,
                       note="y, dx and dW; operands cast before" if real else "emulated: no speed")  # fmt: skip
        layer_rows(report, s, device, (n_in, n_out, tokens), name, kind, limit)


def layer_rows(report, s, device, sizes, name, kind, limit):
    """Whole layers, forward and backward, with all casts, compiled: ours in turn with the plain one and torchao's."""
    n_in, n_out, tokens = sizes
    plain = nn.Linear(n_in, n_out, bias=False, device=device)
    layers = {kind: plain, "tensor": Float8Linear.of(plain, "tensor"), "row": Float8Linear.of(plain, "row")}
    wrapped = with_torchao(nn.Sequential(copy.deepcopy(plain))) if has_float8(device) else None
    if wrapped is not None:
        layers["torchao"] = wrapped
    dtype = torch.bfloat16 if has_float8(device) else torch.float32
    x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, n_out, device=device, dtype=dtype)

    timed = {key: layer_products(layer, x, grad) for key, layer in layers.items()}
    exact, *others = (run() for run in timed.values())
    for key, found in zip(list(timed)[1:], others):
        errors = [relative_error(a, b) for a, b in zip(found, exact)]
        report.check(f"{name}: y, dx and dW of the timed layer, {key}", max(errors) < 0.1,
                     ", ".join(f"{e:.1%}" for e in errors))  # fmt: skip
    timings = measure_recorded(timed, s.REPEATS, 20, device=device)
    work = 6 * n_in * n_out * tokens / 1e12
    for scaling in ("tensor", "row"):
        rate = timings[scaling].rate(work)
        for peer in [kind, *(["torchao"] if "torchao" in layers else [])]:
            report.row(f"{name}: layer with casts, a scale a {scaling}, against {peer}", rate[0], "TFLOP/s",
                       spread=rate[1:], peer=work / timings[peer].median, peer_name=peer, **limit)  # fmt: skip
    if "torchao" not in layers:
        why = "torchao is not installed" if has_float8(device) else "needs float8 hardware"
        report.skip(f"{name}: layer with casts, against torchao", why)


# -- training steps


def steps(report, s, device, shape):
    """Whole training steps, AdamW and clipping included: tokens per second in turn, and peak memory."""
    config, rows, micros = SHAPES[shape]
    gpu = device.type == "cuda"
    torch.manual_seed(s.SEED)
    model = Transformer(config)
    if gpu:
        use_fused_loss(use_cudnn_attention(model))
    model.to(device)
    rivals = rivals_of(model, device)
    if shape == "1.1B":  # each costs a compilation
        rivals = {name: rival for name, rival in rivals.items() if name.split(",")[0] not in ("float16", "float32")}
    optimizer = build_optimizer(model, "adamw", 1e-4, 0.1)
    objective = NextToken(lambda model, tokens: Uniform(tokens, model.specs, model.kernel))
    if gpu:
        for one in {id(m): m for m, _, _ in rivals.values()}.values():
            for block in one.blocks:
                block.compile(fullgraph=True)
    batches = [tuple(p) for p in torch.randint(0, config.vocab_size, (micros, 2, rows, config.block_size))]
    tokens = micros * rows * config.block_size
    takers = {name: kind(one, objective, optimizer, 1.0, dtype) for name, (one, kind, dtype) in rivals.items()}
    check_gradients(report, shape, takers, batches, tokens, "bfloat16" if gpu else "float32")
    taken, memory = {name: stepping(step, batches, tokens) for name, step in takers.items()}, {}
    if gpu:
        memory = {name: peak_of(step, device) for name, step in taken.items()}
    scales = {name: loss_scale(step) for name, step in takers.items() if "float16" in name.split(",")}
    timings = measure(taken, s.REPEATS, 1, device)
    for name, before in scales.items():
        report.check(f"{shape}: no timed step in {name} was left out", loss_scale(takers[name]) >= before)
    step_rows(report, shape, timings, memory, tokens, gpu)
    if shape == "124M":
        del rivals, taken
        master_row(report, s, device, model, objective, batches, tokens)


def check_gradients(report, shape, takers, batches, tokens, base):
    """The direction of each rival's gradient, as it is timed: what is fast and wrong shows here.

    Rounding adds up over layers, all the more before training, when gradients are small sums of large parts; but what
    is wrong stands at right angles: among so many numbers, cosines of chance are about 1e-4.
    """
    found = {}
    for name in sorted(takers, key=lambda name: name != base):  # the base first
        takers[name].backward(batches, tokens)
        gradient = torch.cat([p.grad.flatten() for p in takers[name].parameters])
        for parameter in takers[name].parameters:
            parameter.grad = None
        found.setdefault("base", gradient)
        cosine = float(nn.functional.cosine_similarity(gradient, found["base"], dim=0))
        report.check(f"{shape}: the gradient in {name} points where that in {base} does", cosine > 0.8,
                     f"cosine {cosine:.4f}")  # fmt: skip


def stepping(step, batches, tokens):
    """A function that takes a step."""

    def take():
        step.backward(batches, tokens)
        step.update(1.0)

    return take


def peak_of(step, device):
    """Peak memory of a step in GiB, after two that compiled and allocated."""
    step(), step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**30


def step_rows(report, shape, timings, memory, tokens, gpu):
    """One row for each pair that is of interest."""
    base = "bfloat16" if gpu else "float32"
    float8 = [name for name in timings if name.startswith("float8")]
    pairs = [(name, base) for name in [*float8, "float16", "float32"] if name in timings and name != base]
    pairs += [(name, "torchao") for name in float8 if "torchao" in timings]
    pairs += [("float16", "float16, GradScaler")] if "float16" in timings else []
    for name, peer in pairs:
        rate = timings[name].rate(tokens)
        note = "float8 is emulated here: no speed is to be expected"
        if memory:
            note = f"{tokens:,} tokens a step; peak memory {memory[name]:.2f} GiB, {peer} {memory[peer]:.2f}"
        report.row(f"{shape}: training step in {name} against {peer}", rate[0], "tok/s", spread=rate[1:],
                   peer=tokens / timings[peer].median, peer_name=peer, note=note)  # fmt: skip
    if "torchao" not in timings:
        why = "needs float8 hardware" if not gpu else "torchao is not installed"
        report.skip(f"{shape}: training step in float8 against torchao", why)


def master_row(report, s, device, model, objective, batches, tokens):
    """bfloat16 weights with float32 masters against autocast, in turn: they cannot share their parameters."""
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.compile(fullgraph=True)
    taken = {
        name: stepping(kind(one, objective, build_optimizer(one, "adamw", 1e-4, 0.1), 1.0, torch.bfloat16),
                       batches, tokens)
        for name, one, kind in (("autocast", plain, Step), ("masters", model, MasterStep))
    }  # fmt: skip
    timings = measure(taken, s.REPEATS, 3, device)
    rate = timings["masters"].rate(tokens)
    report.row("124M: training step with bfloat16 weights and float32 masters", rate[0], "tok/s", spread=rate[1:],
               peer=tokens / timings["autocast"].median, peer_name="autocast of float32 weights")  # fmt: skip


# -- inference


@torch.no_grad()
def inference(report, s, device, shape):
    """Bytes of the linear layers' weights, and the time of a forward of a few tokens, which must read them all."""
    config, gpu = SHAPES[shape][0], device.type == "cuda"
    torch.manual_seed(s.SEED)
    dtype = torch.bfloat16 if gpu else torch.float32
    models = {str(dtype).split(".")[1]: Transformer(config).to(device, dtype).eval()}
    (plain_name, plain), *_ = models.items()
    models["float8"] = store_float8(copy.deepcopy(plain))
    sizes = {name: bytes_of_linears(model) for name, model in models.items()}
    report.row(f"{shape}: bytes of the linear layers", sizes["float8"] / 2**20, "MiB", peer=sizes[plain_name] / 2**20,
               peer_name=plain_name, higher_is_better=False, limit=sizes[plain_name] / dtype.itemsize / 2**20,
               limit_name="one byte a weight")  # fmt: skip
    logits = [model(torch.arange(64, device=device)[None]) for model in models.values()]
    report.check(f"{shape}: logits of float8 weights", relative_error(*logits[::-1]) < 0.35,
                 f"relative difference {relative_error(*logits[::-1]):.3f} with random weights")  # fmt: skip
    for rows in (1, 4, 16, 64, 512):
        tokens = torch.randint(0, config.vocab_size, (rows, 1), device=device)
        timings = measure({n: forwarding(m, tokens, gpu) for n, m in models.items()}, s.REPEATS, 2, device)
        calls = 20 if gpu else 1
        ours, theirs = (1e3 * timings[name].median / calls for name in ("float8", plain_name))
        spread = [1e3 * seconds / calls for seconds in (timings["float8"].low, timings["float8"].high)]
        report.row(f"{shape}: forward of one token for {rows} rows", ours, "ms", spread=spread, peer=theirs,
                   peer_name=plain_name, higher_is_better=False,
                   note="blocks compiled, replayed as a CUDA graph; no cache, no attention to speak of" if gpu else
                   "float8 is emulated here")  # fmt: skip


def bytes_of_linears(model):
    """What the layers that were or could be stored in float8 take."""
    layers = (m for m in model.modules() if hasattr(m, "in_features"))
    return sum(t.numel() * t.element_size() for m in layers for t in (*m.parameters(), *m.buffers()))


def forwarding(model, tokens, gpu):
    """A function that runs a forward some times; on a GPU compiled and captured."""

    def forward(tokens):
        return model(tokens, Uniform(tokens, model.specs, model.kernel))

    if not gpu:
        return lambda: forward(tokens)
    for block in model.blocks:
        block.compile(fullgraph=True)
    replay = graphs.capture(forward, tokens)
    return lambda: [replay(tokens) for _ in range(20)]


# -- a real run


FLOAT8_RUNS = {"float8, a scale a tensor": ["fp8"], "float8, a scale a row": ["fp8:scaling=row"]}


def train_runs(report, s, device, _):
    """The same training by train_pretrain.py in bfloat16 (a CPU: float32) and in float8: validation losses, curves."""
    base = "bfloat16" if device.type == "cuda" else "float32"
    name = f"validation loss of a run, {{}} against {base}"
    if not s.RUN_STEPS:
        for kind in FLOAT8_RUNS:
            report.skip(name.format(kind), "whole runs, on demand: --parts run --run_steps 300")
        return
    runs = {base: [], **FLOAT8_RUNS}
    with ThreadPoolExecutor(s.RUNS_AT_ONCE) as pool:
        lines = dict(zip(runs, pool.map(lambda kind: train_run(s, base, kind, runs[kind]), runs)))
    for kind in FLOAT8_RUNS:
        ours, theirs = lines[kind][1][-1], lines[base][1][-1]
        gap = ours / theirs - 1
        report.row(name.format(kind), ours, "nats/token", claim=CLAIM, peer=theirs, peer_name=base,
                   higher_is_better=False, note=f"{s.RUN_STEPS} steps, one seed; {gap:+.2%}")  # fmt: skip
        report.check(f"the loss of a run in {kind}", abs(gap) < 5e-3, f"{gap:+.2%}, 0.5% allowed")
    for kind, (xs, ys) in lines.items():
        report.series(f"validation loss, {kind}", xs, ys)
    path = report.folder / f"project7_mixed_precision.{report.slug}.png"
    curves(path, lines, "step", "validation loss (nats a token)", f"The same run in {base} and in float8")


def train_run(s, base, kind, uses):
    """Train, in a process of its own; returns (steps, validation losses)."""
    out = CHECKPOINTS / ("project7_" + "".join(c if c.isalnum() else "_" for c in kind))
    flags = ["--max_steps", str(s.RUN_STEPS), "--dtype", base, "--use", *pretraining.USE, *uses,
             "--eval_every", str(max(1, s.RUN_STEPS // 10)), "--sample_tokens", "1", "--no_resume"]  # fmt: skip
    command = [sys.executable, str(TRAIN), *flags, *shlex.split(s.RUN_FLAGS), "--out_dir", str(out)]
    print(f"training in {kind} ...", flush=True)
    # Alone, a run shows its own progress; the lines of several would mix.
    quiet = {} if s.RUNS_AT_ONCE == 1 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, text=True, **quiet)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout or 'see above')[-2000:]}")
    entries = [entry for entry in read_metrics(out / "metrics.jsonl") if "val_loss" in entry]
    return [entry["step"] for entry in entries], [entry["val_loss"] for entry in entries]


PARTS = {"checks": check, "products": products, "steps": steps, "inference": inference, "run": train_runs}


if __name__ == "__main__":
    main()
