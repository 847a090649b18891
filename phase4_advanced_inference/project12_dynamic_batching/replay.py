"""Serve requests that arrive over time in one batch; show who was in it when, and what each request experienced.

uv run python phase4_advanced_inference/project12_dynamic_batching/replay.py
uv run python phase4_advanced_inference/project12_dynamic_batching/replay.py --compare --check
uv run python phase4_advanced_inference/project12_dynamic_batching/replay.py --rate 20 --n_rows 4 --max_tokens 16
uv run python phase4_advanced_inference/project12_dynamic_batching/replay.py --prompt "The history of" "Once upon a"
"""

from pathlib import Path

import torch

from common.plots import timeline as draw_timeline
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache.generation import Generation, SamplingParams, append, generate
from phase4_advanced_inference.project12_dynamic_batching import config
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.capacity import GangSlots, Slots
from phase4_advanced_inference.project12_dynamic_batching.timeline import Timeline
from phase4_advanced_inference.project12_dynamic_batching.traces import Lengths, make_trace, own_params, replay

SLOTS = {"continuous": Slots, "static": GangSlots}


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = model_of(run, s)
        policies = [s.POLICY, *(name for name in SLOTS if name != s.POLICY and s.COMPARE)]
        serve = serve_prompts if s.PROMPT else serve_trace
        panels = serve(run, s, model, tokenizer, policies)
        if s.PLOT and panels:
            spans = {f"{name} batching": timeline.spans() for name, timeline in panels.items()}
            run.print(f"wrote {draw_timeline(s.PLOT, spans, 'step', 'row', 'Who is in the batch (dark: reads)')}")


def model_of(run, s):
    """The model that was asked for; with nothing asked and nothing there, one that knows nothing."""
    try:
        return load(s.CHECKPOINT, run.device, getattr(torch, s.DTYPE))
    except FileNotFoundError:
        if s.CHECKPOINT is not None:
            raise
    run.print("there is no model yet: a small one with random weights writes, whose words mean nothing (train one with "
              "`uv run python speedrun.py`, or pass --checkpoint)")  # fmt: skip
    tokenizer = byte_tokenizer()
    shape = PRESETS["llama-7b"](vocab_size=320, block_size=256, n_layer=4, n_embd=128, n_head=4, n_ff=384)
    return Transformer(shape).to(run.device, getattr(torch, s.DTYPE)).eval(), tokenizer


def batcher_of(s, model, tokenizer, policy):
    """A batcher with this policy, which has served two requests already, to warm up."""
    batcher = Batcher(model, tokenizer, s.N_ROWS, cache=s.CACHE, graphs=s.GRAPHS, patience=s.PATIENCE,
                      max_tokens=s.MAX_TOKENS if policy == "continuous" else s.N_ROWS * model.config.block_size,
                      slots=SLOTS[policy])  # fmt: skip
    batcher.generate([[0], [0, 1]], SamplingParams(2, 0.0, stop_ids=()))
    return batcher


# -- a trace


def serve_trace(run, s, model, tokenizer, policies):
    """Replay the trace with each policy; what they were like, as a table."""
    batchers = {policy: batcher_of(s, model, tokenizer, policy) for policy in policies}
    trace, params = trace_of(s, model, tokenizer), SamplingParams(temperature=s.TEMPERATURE, seed=s.SEED)
    panels, columns, texts = {}, {}, {}
    for policy, batcher in batchers.items():
        found = replay(batcher, trace, params, stopping=lambda: run.stopping)
        if run.stopping:
            raise KeyboardInterrupt
        panels[policy], columns[policy] = found.timeline, found.summary()
        texts[policy] = [record.tokens for record in found.records]
        show(run, s, policy, found.timeline)
    run.print("\n".join(table(columns)))
    if s.CHECK:
        many = (own_params(trace, place, params) for place in range(len(trace)))
        alone = [generate(model, tokenizer, each.prompt, own, cache=s.CACHE) for each, own in zip(trace, many)]
        check(run, texts, [text.tokens for text in alone])
    return panels


def trace_of(s, model, tokenizer):
    """Who comes when: prompts out of a text, half of the context at most; continuations in the other half."""
    try:
        text = Path(s.TEXT).read_text(encoding="utf-8")[:50_000]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"TEXT={s.TEXT} cannot be read as text: {error}") from error
    half = model.config.block_size // 2
    prompts, outputs = Lengths(s.PROMPT_TOKENS, s.SPREAD, 1, half), Lengths(s.NEW_TOKENS, s.SPREAD, 1, half)
    return make_trace(s.N_REQUESTS, s.RATE, prompts, outputs, tokenizer.encode(text), s.SEED)


def table(columns):
    """The summaries side by side."""
    lines = {
        "": list(columns),
        "tokens per second": [f"{c.throughput:,.0f}" for c in columns.values()],
        "steps": [f"{c.n_steps:,}" for c in columns.values()],
        "rows in use": [f"{c.occupancy:.0%}" for c in columns.values()],
    }
    for name, field, which in (
        ("first token", "first", ("median", "99th percentile")),
        ("between tokens", "gap", ("median", "99th percentile", "longest")),
        ("end to end, a token", "normalized", ("median", "99th percentile")),
    ):
        for place, kind in enumerate(which):
            lines[f"{name}: {kind}"] = [f"{getattr(c, field)[place] * 1e3:.1f} ms" for c in columns.values()]
    width = max(map(len, lines))
    return [f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in lines.items()]


# -- given prompts


def serve_prompts(run, s, model, tokenizer, policies):
    """Continue the given prompts with each policy; each is printed when it has ended."""
    panels, texts = {}, {}
    params = [SamplingParams(s.MAX_NEW_TOKENS, s.TEMPERATURE, seed=s.SEED + i) for i in range(len(s.PROMPT))]
    for policy in policies:
        batcher, timeline = batcher_of(s, model, tokenizer, policy), Timeline(s.N_ROWS)
        requests = [batcher.add(*each) for each in zip(s.PROMPT, params)]
        places = {request.index: place for place, request in enumerate(requests)}
        written = [Generation(request.n_prompt) for request in requests]
        while batcher.busy:
            if run.stopping:
                raise KeyboardInterrupt
            pieces = batcher.step()
            timeline.note(batcher.last, places)
            for piece in pieces:
                place = places[piece.index]
                append(written[place], piece)
                if piece.finish_reason and policy == policies[0]:
                    run.print(f"--- {place + 1} ({piece.finish_reason})\n{s.PROMPT[place]}{written[place].text}")
        panels[policy], texts[policy] = timeline, [text.tokens for text in written]
        show(run, s, policy, timeline)
    if s.CHECK:
        alone = [generate(model, tokenizer, *each, cache=s.CACHE) for each in zip(s.PROMPT, params)]
        check(run, texts, [text.tokens for text in alone])
    return panels


# -- both


def show(run, s, policy, timeline):
    """The timeline of one policy."""
    if s.WIDTH:
        run.print(f"\n{policy} batching (a letter a request, in capitals while it reads; a column a step)")
        run.print(timeline.text(s.WIDTH), end="\n\n")


def check(run, texts, alone):
    """Whether each text is the one that is written alone; raises ValueError if not."""
    for policy, written in texts.items():
        same = sum(a == b for a, b in zip(written, alone))
        run.print(f"{policy}: {same} of {len(alone)} texts are what they are alone")
        if same < len(alone):
            raise ValueError(f"{len(alone) - same} texts of the {policy} batch are not what they are alone")


if __name__ == "__main__":
    main()
