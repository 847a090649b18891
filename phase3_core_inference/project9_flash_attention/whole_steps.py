"""
Whole steps

This file implements the measuring of whole steps, of which attention is a part, following:
- "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (Dao, 2023) - training end to end
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - the other half of a step: linear layers in float8

Only benchmark.py uses it: training steps by kernel, with project 7's float8 beside it, and decoding steps through
project 8's cache.

Each component is explained with paper references for educational purposes.
"""

import copy
import functools

import torch

from common.benchmark import measure
from phase1_foundation.project3_pretrain.fused_loss import use_fused_loss
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.plans import prefer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase3_core_inference.project7_mixed_precision.float8 import convert_to_float8
from phase3_core_inference.project7_mixed_precision.float8_inference import store_float8
from phase3_core_inference.project7_mixed_precision.step_rivals import Uniform, shared
from phase3_core_inference.project8_kv_cache.attention import KERNELS as CACHE_KERNELS
from phase3_core_inference.project8_kv_cache.decoder import FastDecoder
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project9_flash_attention import gluon_attention
from phase3_core_inference.project9_flash_attention.cached_attention import split_attention
from phase3_core_inference.project9_flash_attention.flash_attention import flash_attention

TINY_LLAMA = PRESETS["llama-7b"](n_layer=22, n_embd=2048, n_kv_head=4, n_ff=5632, block_size=1024)
PEERS = {"SDPA flash": "flash", "cuDNN": "cudnn"}


def ours():
    """Our kernels by name: the Gluon forward only where it runs."""
    kernels = {"Triton": flash_attention}
    try:
        gluon_attention.require_hopper()
        kernels["Gluon"] = gluon_attention.gluon_attention
    except ValueError as error:
        print(f"without the Gluon kernel: {error}")
    return kernels


# -- training steps


def measure_step(report, s, device):
    """A whole training step of the 124M model by kernel, all else alike: forward, backward, clipping, AdamW."""
    if device.type != "cuda":
        report.skip("124M training step by kernel", "needs a GPU")
        return
    kernels = ours() | {name: prefer(backend, "flash") for name, backend in PEERS.items()}
    for heads in s.STEP_HEADS:
        for T in s.STEP_LENGTHS:
            config = PRESETS["gpt2"](n_head=heads, block_size=T, vocab_size=50304)
            model, optimizer = start(config, device)
            batch = tuple(torch.randint(0, config.vocab_size, (2, s.STEP_TOKENS // T, T)))
            steps = {name: functools.partial(one_step, step_of(model, optimizer, kernel), [batch], s.STEP_TOKENS)
                     for name, kernel in kernels.items()}  # fmt: skip
            timings = measure(steps, s.REPEATS, 2, device)
            for name in ours():
                rate = timings[name].rate(s.STEP_TOKENS)
                for peer in PEERS:
                    report.row(f"124M training step, {heads} heads, T={T:,}: {name} against {peer}", rate[0], "tok/s",
                               spread=rate[1:], peer=s.STEP_TOKENS / timings[peer].median, peer_name=peer,
                               note=f"{s.STEP_TOKENS:,} tokens a step, bf16, compiled layer by layer")  # fmt: skip
            del model, optimizer, steps
            torch.cuda.empty_cache()


def measure_together(report, s, device):
    """A training step of 1.1B parameters with each of phase 3's two means, and with both.

    PAPER: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691,
        section 4.2; "FP8 Formats for Deep Learning", arXiv:2209.05433.
    PAPER CONTEXT: a faster kernel is worth what it brings to the training of a whole model.
    INTUITION: two workers were made faster: how much sooner is the house built?
    IMPLEMENTATION: all kernels times both precisions, the same weights and optimizer in all, timed in turn.
    WHY: attention is a small part of a step at 1,024 tokens, and float8 casts what it multiplies.
    """
    if device.type != "cuda":
        report.skip("1.1B training step, what each brings", "needs a GPU")
        return
    model, optimizer = start(TINY_LLAMA, device)
    batches = [tuple(p) for p in torch.randint(0, TINY_LLAMA.vocab_size, (4, 2, 8, TINY_LLAMA.block_size))]
    n_tokens, steps, gradients = sum(tokens.numel() for tokens, _ in batches), {}, {}
    kernels = {"cuDNN": prefer("cudnn", "flash")} | ours()
    for name, kernel in kernels.items():
        for kind in ("bf16", "fp8"):
            step = step_of(convert_to_float8(shared(model)) if kind == "fp8" else model, optimizer, kernel)
            steps[f"{name} and {kind}"] = functools.partial(one_step, step, batches, n_tokens)
            gradients[f"{name} and {kind}"] = direction(step, batches[:1], batches[0][0].numel())
    base = "cuDNN and bf16"
    cosines = {name: float(gradients[name] @ gradients[base]) for name in steps}
    report.check("1.1B training step: the gradients of all point the same way", min(cosines.values()) > 0.8,
                 ", ".join(f"{name}: {cosine:.4f}" for name, cosine in cosines.items()))  # fmt: skip
    gradients.clear()
    timings = measure(steps, s.REPEATS, 1, device)
    for name in steps:
        rate = timings[name].rate(n_tokens)
        report.row(f"1.1B training step: {name}", rate[0], "tok/s", spread=rate[1:],
                   peer=None if name == base else n_tokens / timings[base].median,
                   peer_name=None if name == base else base,
                   note=f"{n_tokens:,} tokens a step of 1,024 each, AdamW and clipping included")  # fmt: skip


def start(config, device):
    """A model and its optimizer, nothing compiled yet."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # all rivals share the code of a block
    torch.manual_seed(0)
    model = use_fused_loss(Transformer(config).to(device))
    return model, build_optimizer(model, "adamw", 1e-4, 0.1)


def step_of(model, optimizer, kernel):
    """A training step of a copy of this model, not of its parameters, compiled layer by layer."""
    model = shared(model).use_attention(kernel)
    for block in model.blocks:
        block.compile(fullgraph=True)
    objective = NextToken(lambda model, tokens: Uniform(tokens, model.specs, model.kernel))
    return Step(model, objective, optimizer, 1.0, torch.bfloat16)


def direction(step, batches, n_tokens):
    """The gradient as one vector of length 1, in bfloat16."""
    step.backward(batches, n_tokens)
    gradient = torch.cat([p.grad.flatten().bfloat16() for p in step.parameters])
    for parameter in step.parameters:
        parameter.grad = None
    return gradient.div_(gradient.norm())


def one_step(step, batches, n_tokens):
    """Forward, backward, update."""
    step.backward(batches, n_tokens)
    step.update(1.0)


# -- decoding steps


@torch.no_grad()
def measure_cached_step(report, s, device):
    """A decoding step of whole models through project 8's cache, recorded, by what reads the cache; weights of one byte
    beside those of two."""
    if device.type != "cuda":
        report.skip("decoding step through the cache", "needs a GPU")
        return
    for name, config in (("124M", PRESETS["gpt2"]()), ("1.1B", TINY_LLAMA)):
        with device:
            model = Transformer(config).to(torch.bfloat16).eval()
        for rows in (1, 64):
            work, tokens, timed = [(row, 1, 1) for row in range(rows)], [1] * rows, {}
            models = {"": model} | ({", fp8 weights": store_float8(copy.deepcopy(model))} if name == "1.1B" else {})
            for kernel, read in {**CACHE_KERNELS, "flash": split_attention}.items():
                for weights, one in models.items():
                    cache = ContiguousCache(one.specs, rows, 1024, torch.bfloat16, device, kernel=read, padded=True)
                    timed[kernel + weights] = functools.partial(cached_steps, FastDecoder(one, cache), work, tokens)
            ms = {key: timing.median / 8e-3 for key, timing in measure(timed, s.REPEATS, 2, device).items()}
            for key in (key for key in ms if key != "sdpa"):
                report.row(f"{name}, batch {rows}: decoding step after 960 tokens, {key}", ms[key], "ms",
                           peer=ms["sdpa"], peer_name="SDPA with a mask", higher_is_better=False)  # fmt: skip


def cached_steps(decoder, work, tokens):
    """Eight steps behind 960 tokens; what was never written is zeros, and costs the same."""
    decoder.cache.lengths[:] = [960] * len(work)
    for _ in range(8):
        decoder.step(work, tokens)
