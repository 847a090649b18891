"""Measure project 9: attention kernels alone, decoding, memory, and what they bring to a whole training step.

    uv run python phase3_core_inference/project9_flash_attention/benchmark.py
    uv run python phase3_core_inference/project9_flash_attention/benchmark.py --parts step

attention: TFLOP/s forward and backward by length, windows and documents, against PyTorch's flash and cuDNN kernels.
decode: bytes a second of one query over a long cache. cache: decoding steps through project 8's cache. memory: the peak
of plain, tiled and fused attention. step: a training step of GPT-2 124M, also with heads of 128, by kernel. together:
what these kernels and project 7's float8 bring to a training step of 1.1B parameters. Kernels are timed on the GPU's
own clock, several launches in one CUDA graph, in turn with their peers.
"""

import functools
import os
import subprocess
import sys

import torch
import torch.nn.functional as F

from common import ROOT
from common.benchmark import Report, measure_recorded, run_parts
from common.device import peak_flops
from common.kernels import relative_error
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.plans import prefer, sdpa
from phase3_core_inference.project9_flash_attention import benchmark_config, gluon_attention
from phase3_core_inference.project9_flash_attention.decoding import flash_decode
from phase3_core_inference.project9_flash_attention.flash_attention import flash_attention
from phase3_core_inference.project9_flash_attention.memory import peak_of, plain_attention
from phase3_core_inference.project9_flash_attention.reference import tiled_attention
from phase3_core_inference.project9_flash_attention.whole_steps import (
    PEERS,
    measure_cached_step,
    measure_step,
    measure_together,
    ours,
)

CLAIMS = {  # H100, causal, forward, 16k tokens: FlashAttention-3's repository and paper
    64: "FlashAttention-2: 299, FlashAttention-3: 473 (H100)",
    128: "FlashAttention-2: 335, FlashAttention-3: 616 (H100)",
}
INTERPRETED = """
import torch
from common.kernels import fuzz
from phase3_core_inference.project9_flash_attention.flash_attention import flash_attention
from phase3_core_inference.project9_flash_attention.memory import plain_attention

def draw(generator):
    T, group = (int(torch.randint(1, most, (1,), generator=generator)) for most in (150, 4))
    shapes = (1, T, 2 * group, 32), (1, T, 2, 32), (1, T, 2, 32)
    starts = torch.arange(T).unsqueeze(0) // 40 * 40
    return *(torch.randn(shape, generator=generator) for shape in shapes), starts

def with_gradients(kernel):
    def run(q, k, v, starts):
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = kernel(q, k, v, scale=0.2, window=50, starts=starts)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))
    return run

print(fuzz(with_gradients(flash_attention), with_gradients(plain_attention), draw, cases=4, tolerance=1e-5))
"""


def main(argv=None):
    """Run all parts that this device can run and write the results."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        torch.manual_seed(s.SEED)
        report = Report("project9_flash_attention", "FlashAttention", run.device, keep=len(s.PARTS) < len(PARTS))
        parts = {part: functools.partial(PARTS[part], report, s, run.device) for part in s.PARTS}
        run_parts(report, parts, torch.cuda.empty_cache)


# -- attention


def measure_attention(report, s, device):
    """Forward and backward by head size and length; windows and documents."""
    if device.type != "cuda":
        check_in_the_interpreter(report)
        report.skip("TFLOP/s of the kernels", "need a GPU")
        return
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    roof = 2 * 8192**3 / measure_recorded({"product": lambda: a @ b}, s.REPEATS)["product"].median / 1e12
    report.row("bf16 product, 8192 x 8192 x 8192", roof, "TFLOP/s", limit=peak_flops(device) / 1e12,
               limit_name="datasheet")  # fmt: skip
    kernels, speeds = ours(), {}
    for D in s.HEAD_SIZES:
        check_values(report, kernels, D, device)
        for T in s.LENGTHS:
            speeds[D, T] = measure_length(report, s, kernels, D, T, roof, device)
    for D in s.HEAD_SIZES:
        plot_speeds(report, s, speeds, D)
        against = {T: (speeds[D, T]["forward"]["Triton"], speeds[D, T]["forward"]["SDPA flash"]) for T in s.LENGTHS}
        report.check(f"D={D}: forward at least as fast as SDPA flash at every length",
                     all(a >= b for a, b in against.values()),
                     ", ".join(f"{T}: {a:.0f} and {b:.0f}" for T, (a, b) in against.items()))  # fmt: skip
        if "Gluon" in kernels:
            measure_turns(report, s, D, device)
    measure_masks(report, s, device)


def draw(s, D, T, device, grad=False):
    """Queries, keys and values (B, T, H, D) in bfloat16: 2048 channels, TOKENS tokens."""
    shape = (s.TOKENS // T, T, 2048 // D, D)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad) for _ in range(3)]


def check_values(report, kernels, D, device):
    """Values and gradients in bfloat16 against float64, beside the error of SDPA."""
    inputs = [torch.randn(1, 1000, heads, D, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    upstream = torch.randn(1, 1000, 8, D, device=device, dtype=torch.bfloat16)
    starts = torch.arange(1000, device=device).unsqueeze(0) // 300 * 300
    for masks, options in {"causal": {}, "window and documents": {"window": 200, "starts": starts}}.items():
        results = {}
        for name, kernel in {"float64": sdpa, "sdpa": sdpa, **kernels}.items():
            leaves = [(x.double() if name == "float64" else x.clone()).requires_grad_() for x in inputs]
            out = kernel(*leaves, scale=D**-0.5, **options)
            results[name] = (out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))
        exact = results.pop("float64")
        errors = {name: [relative_error(x, y) for x, y in zip(got, exact)] for name, got in results.items()}
        allowed = [1.5 * error for error in errors["sdpa"]]
        for name in kernels if masks == "causal" else ["Triton"]:  # what has windows or documents is left to Triton
            report.check(f"D={D}, {masks}: {name} within 1.5 times the error of SDPA",
                         all(error <= most for error, most in zip(errors[name], allowed)),
                         "o, dq, dk, dv: " + ", ".join(f"{x:.1e} ({y:.1e})" for x, y in zip(errors[name], errors["sdpa"])))  # fmt: skip  # noqa: E501


def backward_of(kernel, inputs, scale):
    """A function that runs the backward alone: autograd runs it on the stream of the forward, here its first call's."""
    out = []

    def run():
        if not out:
            out.append(kernel(*inputs, scale=scale))
        torch.autograd.grad(out[0], inputs, torch.ones_like(out[0]), retain_graph=True)

    return run


def measure_length(report, s, kernels, D, T, roof, device):
    """TFLOP/s of all kernels at one length, {"forward": {name: ...}, "backward": ...}, with rows of some of them."""
    inputs = draw(s, D, T, device, grad=True)
    flops = 4 * s.TOKENS * T * 2048 / 2 / 1e12  # causal
    everyone = kernels | {name: prefer(backend) for name, backend in PEERS.items()}
    with torch.no_grad():
        forward = measure_recorded({name: lambda kernel=kernel: kernel(*inputs, scale=D**-0.5) for name, kernel in everyone.items()}, s.REPEATS)  # fmt: skip  # noqa: E501
    backward = measure_recorded({name: backward_of(kernel, inputs, D**-0.5) for name, kernel in everyone.items() if name != "Gluon"}, s.REPEATS, 4)  # fmt: skip  # noqa: E501
    speeds = {"forward": {name: flops / t.median for name, t in forward.items()},
              "backward": {name: 2.5 * flops / t.median for name, t in backward.items()}}  # fmt: skip
    for way, name, peer in (("forward", "Triton", "SDPA flash"), ("forward", "Triton", "cuDNN"),
                            ("forward", "Gluon", "cuDNN"), ("backward", "Triton", "SDPA flash"),
                            ("backward", "Triton", "cuDNN")):  # fmt: skip
        if name in speeds[way] and T in (s.LENGTHS[0], 4096, s.LENGTHS[-1]):
            timing = (forward if way == "forward" else backward)[name]
            claim = CLAIMS[D] if (way, T) == ("forward", 16384) else None
            report.row(f"D={D}, T={T:,}: {way}, {name} against {peer}", speeds[way][name], "TFLOP/s", claim=claim,
                       spread=timing.rate(flops if way == "forward" else 2.5 * flops)[1:], peer=speeds[way][peer],
                       peer_name=peer, limit=roof, limit_name="bf16 product")  # fmt: skip
    return speeds


def plot_speeds(report, s, speeds, D):
    """The curves of one head size."""
    series = {}
    for way in ("forward", "backward"):
        for name in speeds[D, s.LENGTHS[0]][way]:
            ys = [speeds[D, T][way][name] for T in s.LENGTHS]
            report.series(f"D={D}, {way}, {name}", s.LENGTHS, ys)
            if way == "forward":
                series[name] = (s.LENGTHS, ys)
    path = report.folder / f"project9_flash_attention.D{D}.{report.slug}.png"
    curves(path, series, "tokens of a row", "TFLOP/s", f"Causal forward, heads of {D}, bfloat16", logx=True)


def measure_turns(report, s, D, device):
    """The Gluon forward with the other schedule: consumers that take turns, or that do not."""
    T, chosen = s.LENGTHS[-1], gluon_attention.SCHEDULES[D]
    inputs, flops = draw(s, D, T, device), 4 * s.TOKENS * T * 2048 / 2 / 1e12
    graphs = {}
    for schedule in (chosen, chosen._replace(ping_pong=not chosen.ping_pong)):

        def run(schedule=schedule):
            gluon_attention.SCHEDULES[D] = schedule
            gluon_attention.gluon_attention(*inputs, scale=D**-0.5)

        graphs["turns" if schedule.ping_pong else "free"] = run
    with torch.no_grad():
        timings = measure_recorded(graphs, s.REPEATS)
    gluon_attention.SCHEDULES[D] = chosen
    report.row(f"D={D}, T={T:,}: Gluon forward, consumers taking turns (ping-pong) or not",
               flops / timings["turns"].median, "TFLOP/s", spread=timings["turns"].rate(flops)[1:],
               peer=flops / timings["free"].median, peer_name="not")  # fmt: skip


def measure_masks(report, s, device):
    """Forward and backward with a window and with documents, against SDPA, which is given the mask as a matrix."""
    T, D = s.MASKED_LENGTH, s.HEAD_SIZES[0]
    inputs = [torch.randn(1, T, 2048 // D, D, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    starts = torch.arange(T, device=device).unsqueeze(0) // 1000 * 1000
    for name, options in {"a window of 1,024": {"window": 1024}, "documents of 1,000": {"starts": starts}}.items():

        def both(kernel, options=options):
            out = kernel(*inputs, scale=D**-0.5, **options)
            torch.autograd.grad(out, inputs, torch.ones_like(out))

        timings = measure_recorded({"ours": lambda b=both: b(flash_attention), "sdpa": lambda b=both: b(sdpa),
                               "whole": lambda: both(flash_attention, {})}, s.REPEATS, 2)  # fmt: skip
        ms = {key: timing.median * 1e3 for key, timing in timings.items()}
        report.row(f"D={D}, T={T:,}: forward and backward with {name}", ms["ours"], "ms", peer=ms["sdpa"],
                   peer_name="SDPA with the mask as a matrix", higher_is_better=False,
                   spread=(timings["ours"].low * 1e3, timings["ours"].high * 1e3),
                   note=f"ours without a mask: {ms['whole']:.2f} ms")  # fmt: skip


def check_in_the_interpreter(report):
    """The Triton kernels in Triton's interpreter against the reference in float64: what a CPU can say of them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    name = "kernels in Triton's interpreter against float64, values and gradients"
    if "No module named 'triton'" in done.stderr:
        report.skip(name, "needs Triton, which exists for Linux")
        return
    detail = f"worst relative error {float(done.stdout):.1e} in float32" if done.returncode == 0 else done.stderr[-200:]
    report.check(name, done.returncode == 0, detail)


# -- decoding


def measure_decode(report, s, device):
    """One query over a long cache, the L2 cache flushed before each: bytes a second against reading them alone."""
    if device.type != "cuda":
        report.skip("decoding, bytes a second", "needs a GPU")
        return
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    lengths = torch.full((1,), s.CONTEXT, dtype=torch.int32, device=device)
    counter = torch.zeros(1, device=device)
    for kv_heads in (32, 8):
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in
                   ((1, 32, 128), *2 * ((1, s.CONTEXT, kv_heads, 128),)))  # fmt: skip
        exact = sdpa_decode(q.double(), k.double(), v.double(), "math")
        error = relative_error(flash_decode(q, k, v, lengths, 128**-0.5), exact)
        report.check(f"decoding, {kv_heads} key heads, against float64", error < 5e-3, f"relative error {error:.1e}")
        whole = torch.cat([k.flatten(), v.flatten()]).view(torch.int64)
        functions = {"ours": lambda k=k, v=v, q=q: flash_decode(q, k, v, lengths, 128**-0.5),
                     "SDPA flash": lambda k=k, v=v, q=q: sdpa_decode(q, k, v, "flash"),
                     "cuDNN": lambda k=k, v=v, q=q: sdpa_decode(q, k, v, "cudnn"),
                     "read": lambda whole=whole: whole.sum(), "nothing": lambda: counter.add_(1)}  # fmt: skip
        timings = measure_recorded(functions, 3 * s.REPEATS, calls=1, before=flush.zero_)
        size = (k.nbytes + v.nbytes) / 1e12
        for peer in PEERS:
            report.row(f"decoding, batch 1, {s.CONTEXT:,} keys, {kv_heads} key heads, against {peer}",
                       size / timings["ours"].median, "TB/s", spread=timings["ours"].rate(size)[1:],
                       claim="up to 8× faster generation (Flash-Decoding)",
                       peer=size / timings[peer].median, peer_name=peer, limit=size / timings["read"].median,
                       limit_name="a sum over the same bytes",
                       note=f"32 query heads of 128, {size * 1e6:,.0f} MB in {timings['ours'].median * 1e6:.0f} µs, of "
                       f"which a launch that does nothing takes {timings['nothing'].median * 1e6:.0f}")  # fmt: skip


def sdpa_decode(q, k, v, backend):
    """PyTorch's attention of one query, q (B, H, D), k and v (B, S, Hkv, D), by one of its back ends."""
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, BACKEND_NAMES[backend])):
        q, k, v = q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).squeeze(2)


BACKEND_NAMES = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}

# -- memory


def measure_memory(report, s, device):
    """The peak of a forward and a backward beyond the inputs, by length."""
    gpu = device.type == "cuda"
    kernels = {"plain": plain_attention, "tiled": tiled_attention}
    kernels |= {"flash": flash_attention} if gpu else {}
    peaks = {name: [] for name in kernels}
    for T in s.MEMORY_LENGTHS:
        shape = (1, T, 16, 64) if gpu else (1, T, 2, 64)
        inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(3)]
        for name, kernel in kernels.items():
            peaks[name].append((allocated if gpu else peak_of)(kernel, inputs, 0.125, True) / 2**20)
        for name in list(kernels)[1:]:
            report.row(f"memory, forward and backward, T={T:,}, {shape[2]} heads: {name}", peaks[name][-1], "MiB",
                       peer=peaks["plain"][-1], peer_name="the matrix of scores", higher_is_better=False,
                       claim="O(N) in place of O(N²) (theorem 1)")  # fmt: skip
    for name, ys in peaks.items():
        report.series(f"memory, {name}", s.MEMORY_LENGTHS, ys)


def allocated(kernel, inputs, scale, backward):
    """The peak of the GPU's allocator beyond the inputs, in bytes."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = kernel(*inputs, scale=scale)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return torch.cuda.max_memory_allocated() - before


PARTS = {
    "attention": measure_attention,
    "decode": measure_decode,
    "cache": measure_cached_step,
    "memory": measure_memory,
    "step": measure_step,
    "together": measure_together,
}

if __name__ == "__main__":
    main()
