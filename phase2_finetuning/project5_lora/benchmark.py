"""Measure project 5: what adapters cost and reach, against training all weights and against `peft`.

    uv run python phase2_finetuning/project5_lora/benchmark.py
    uv run python phase2_finetuning/project5_lora/benchmark.py --parts loss --checkpoint base.pt

checks: `peft` computes the logits of our adapters, we compute those of its own. cost: values trained, optimizer state,
memory and time of a training step. batch: a batch in which each row has its own adapter. loss: what fine-tuning on the
bundled conversations reaches. The peer is `peft` on the same shape in `transformers`, timed in turn with ours.
"""

import functools
import itertools
import tempfile

import torch
import torch.nn.functional as F

from common import CHECKPOINTS
from common.benchmark import Report, measure, run_parts
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.evaluation import validation_loss
from phase1_foundation.project3_pretrain.hub import choose_family, to_huggingface
from phase1_foundation.project3_pretrain.loading import load, newest_checkpoint
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project4_sft.packing import ConversationDataset, render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.tuning import PRETRAINED
from phase2_finetuning.project4_sft.vocabulary import grow_vocabulary, with_chat_tokens
from phase2_finetuning.project5_lora import benchmark_config
from phase2_finetuning.project5_lora.lora import add_lora, load_adapter, save_adapter, trainable
from phase2_finetuning.project5_lora.stacking import stack_adapters

BASES = "adapters float32 on a bfloat16 base; all weights: float32 under autocast"  # on a GPU
# name -> (shape, sequences of a step)
SHAPES = {
    "small": (PRESETS["cpu-small"](block_size=128), 16),
    "124M": (PRESETS["llama-125m"](qk_norm=False), 16),
    "1.1B": (
        PRESETS["llama-7b"](n_layer=22, n_embd=2048, n_kv_head=4, n_ff=5632, block_size=1024), 8
    ),  # TinyLlama's shape
}  # fmt: skip


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        report = Report("project5_lora", "LoRA", run.device, keep=len(s.PARTS) < 4)
        parts = {
            f"{part} ({shape})": functools.partial(PARTS[part], report, s, run.device, shape)
            for part in s.PARTS
            for shape in (s.MODELS if part == "cost" else s.MODELS[-1:])
        }
        run_parts(report, parts, torch.cuda.empty_cache)


# -- the peer


def in_transformers(config, device, dtype=torch.float32):
    """The same shape in `transformers`, its weights random."""
    import transformers

    theirs = transformers.AutoConfig.for_model(**choose_family(config).write_config(config))
    theirs.use_cache = False
    with device:
        return transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype).to(device)


def with_weights_of(model, folder):
    """The same model in `transformers`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(to_huggingface(model, None, folder), dtype=torch.float32)


def with_peft(theirs, s, dora=False):
    """An adapter of `peft` on all linear layers."""
    import peft

    config = peft.LoraConfig(r=s.RANK, lora_alpha=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    return peft.get_peft_model(theirs, config)


# -- checks


@torch.no_grad()
def check(report, s, device, _):
    """Logits in float32: ours and peft's of one adapter, made here and made there."""
    import peft

    torch.set_float32_matmul_precision("highest")
    shape = {"vocab_size": 512, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
    kinds = {"lora": {}, "rslora": {"rank_stabilized": True}, "dora": {"dora": True}, "tokens": {"tokens": [5, 500]}}
    tokens = torch.randint(0, 512, (2, 32), device=device)
    for family, config in {
        "gpt2": PRESETS["gpt2"](**shape),
        "llama": PRESETS["llama-7b"](**shape, n_kv_head=2),
    }.items():
        worst = 0.0
        for options in kinds.values():
            torch.manual_seed(s.SEED)
            plain = Transformer(config).eval()
            state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
            with tempfile.TemporaryDirectory() as folder:
                theirs = with_weights_of(plain, f"{folder}/base").to(device)
                ours = add_lora(plain.to(device), s.RANK, 16.0, **options)
                for parameter in (p for p in ours.parameters() if p.requires_grad):
                    parameter.add_(0.1 * torch.randn_like(parameter))
                wrapped = peft.PeftModel.from_pretrained(theirs, save_adapter(ours, f"{folder}/ours")).eval()
                wrapped.save_pretrained(f"{folder}/theirs")
                again = Transformer(config).eval()
                again.load_state_dict(state)
                again = load_adapter(again.to(device), f"{folder}/theirs")
            logits = [ours(tokens), wrapped(tokens).logits, again(tokens)]
            worst = max([worst, *(float((a - b).abs().max()) for a, b in itertools.combinations(logits, 2))])
        report.check(f"{family}: peft computes our adapters' logits, and we those it saved", worst < 1e-4,
                     f"{', '.join(kinds)}: largest difference {worst:.1e}")  # fmt: skip


# -- cost


class _Rival:
    """One way to train: a step of it, what it trains, what its optimizer keeps, and its peak memory."""

    def __init__(self, config, n_rows, device, prepare):
        self.device = device
        before = self._memory()
        torch.manual_seed(0)
        self.step, self.optimizers, self.counts = prepare()
        shape = (2, n_rows, config.block_size)
        self.batch, self.tokens = tuple(torch.randint(0, config.vocab_size, shape)), shape[1] * shape[2]
        for _ in range(2):
            self()
        self.peak = self._memory(peak=True) - before

    def _memory(self, peak=False):
        """Bytes on the GPU, or None elsewhere."""
        if self.device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def __call__(self):
        """Take one step."""
        self.step(self.batch)

    @property
    def state_bytes(self):
        """What the optimizer keeps."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t) and t.dim())


def ours_of(config, s, device, compiled, adapters=None):
    """Our training step: of all weights (float32, on a GPU under autocast to bfloat16), or of adapters on a base."""
    gpu = device.type == "cuda"
    with device:
        model = Transformer(config)
    if adapters is not None:
        add_lora(model.bfloat16() if gpu else model, s.RANK, 16.0, **adapters)
    optimizer = build_optimizer(model, "adamw", 1e-4, 0.0)
    step = Step(model, NextToken(), optimizer, 1.0, torch.bfloat16 if gpu else None)
    if compiled:
        model.compile()

    def take(batch):
        step.backward([batch], batch[0].numel())
        step.update(1.0)

    return take, optimizer.optimizers, trainable(model)


def peft_of(config, s, device, compiled, dora=False):
    """The same step by `peft`, with torch's own fused AdamW."""
    gpu = device.type == "cuda"
    model = with_peft(in_transformers(config, device, torch.bfloat16 if gpu else torch.float32), s, dora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, fused=gpu)

    def loss_of(tokens, targets):
        logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of  # the loss with it, as in our model

    def take(batch):
        tokens, targets = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return take, [optimizer], trainable(model)


def measure_cost(report, s, device, shape):
    """A training step of all weights, of adapters, and of peft's."""
    torch.set_float32_matmul_precision("high")
    (config, n_rows), compiled = SHAPES[shape], shape in s.COMPILE
    ways = {
        "all weights": lambda: ours_of(config, s, device, compiled),
        "LoRA": lambda: ours_of(config, s, device, compiled, {}),
        "LoRA and 4 tokens": lambda: ours_of(config, s, device, compiled, {"tokens": [0, 1, 2, 3]}),
        "peft": lambda: peft_of(config, s, device, compiled),
    }
    if not compiled:  # compiling takes longer than measuring
        ways["DoRA"] = lambda: ours_of(config, s, device, False, {"dora": True})
        ways["peft, DoRA"] = lambda: peft_of(config, s, device, False, True)
    rivals = {way: _Rival(config, n_rows, device, prepare) for way, prepare in ways.items()}
    report_cost(report, s, shape, rivals, measure(rivals, s.REPEATS, 1, device), compiled)


def report_cost(report, s, name, rivals, timings, compiled):
    """The rows of one shape."""
    full, lora, peer = rivals["all weights"], rivals["LoRA"], rivals["peft"]
    shape = f"{name}, rank {s.RANK} on all linear layers"
    report.check(f"{name}: ours and peft's train equally many values", lora.counts[0] == peer.counts[0],
                 f"{lora.counts[0]:,} and {peer.counts[0]:,}")  # fmt: skip
    report.row(f"{name}: values trained", lora.counts[0] / 1e6, "M", peer=full.counts[0] / 1e6, peer_name="all weights",
               higher_is_better=False, claim="10,000× fewer (GPT-3 175B, abstract)", note=shape)  # fmt: skip
    report.row(f"{name}: optimizer state", lora.state_bytes / 2**20, "MiB", peer=full.state_bytes / 2**20,
               peer_name="all weights, AdamW", higher_is_better=False)  # fmt: skip
    how = ", compiled" * compiled + (f"; {BASES}" if lora.peak else "")
    if lora.peak:
        for peer_name, other in (("all weights", full), ("peft", peer)):
            claim = "3× less (GPT-3 175B, abstract)" if other is full else None
            report.row(f"{name}: peak memory of a step, against {peer_name}", lora.peak / 2**30, "GiB",
                       peer=other.peak / 2**30, peer_name=peer_name, higher_is_better=False, claim=claim,
                       note=f"{lora.tokens:,} tokens; {BASES}")  # fmt: skip
    else:
        report.skip(f"{name}: peak memory of a step", "needs a GPU, whose allocator counts for each model apart")
    pairs = (
        ("LoRA", "all weights"),
        ("LoRA", "peft"),
        ("LoRA and 4 tokens", "LoRA"),
        ("DoRA", "LoRA"),
        ("DoRA", "peft, DoRA"),
    )
    for way, peer_name in pairs:
        if way in rivals:
            rate = timings[way].rate(lora.tokens)
            report.row(f"{name}: {way} step against {peer_name}", rate[0], "tok/s", spread=rate[1:],
                       peer=lora.tokens / timings[peer_name].median, peer_name=peer_name,
                       note=f"{lora.tokens:,} tokens a step, AdamW included{how}")  # fmt: skip


# -- a batch of many adapters


@torch.no_grad()
def measure_batch(report, s, device, shape):
    """A forward in which each row has one of several adapters, against one forward for each adapter, and peft's."""
    torch.set_float32_matmul_precision("highest")  # for the check; what is timed on a GPU is bfloat16
    config, dtype = SHAPES[shape][0], torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.randint(0, config.vocab_size, (s.ROWS, s.ROW_TOKENS), device=device)
    names = [f"adapter {k}" for k in range(s.ADAPTERS)]
    rows = [names[i % s.ADAPTERS] for i in range(s.ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        plain, single, stacked = (copy_of(config, device) for _ in range(3))
        folders, alone = write_adapters(add_lora(single, s.RANK, 16.0), names, folder, tokens)
        stack_adapters(stacked, folders).choose(rows)
        theirs = with_peft(in_transformers(config, device), s)
        for name, path in folders.items():
            theirs.load_adapter(path, adapter_name=name)
    expected = torch.stack([alone[name][i] for i, name in enumerate(rows)])
    got = stacked(tokens)[:, -1]
    error = float((got - expected).norm() / expected.norm())
    report.check(f"{shape}: rows of a batch get the logits of their adapter alone", error < 1e-4,
                 f"{s.ADAPTERS} adapters, relative difference {error:.1e} in float32")  # fmt: skip
    for model in (plain, single, stacked, theirs):
        model.to(dtype).eval()
    groups = [tokens[i :: s.ADAPTERS] for i in range(s.ADAPTERS)]
    timings = measure({
        "ours": lambda: stacked(tokens),
        "one after another": lambda: [single(group) for group in groups],  # the values make no difference to the time
        "peft": lambda: theirs(input_ids=tokens, adapter_names=rows),
        "no adapters": lambda: plain(tokens),
    }, s.REPEATS, 2, device)  # fmt: skip
    rate, limit = timings["ours"].rate(tokens.numel()), tokens.numel() / timings["no adapters"].median
    for peer_name, peer in (("one forward for each adapter", "one after another"), ("peft, adapter_names", "peft")):
        report.row(f"{shape}: {s.ADAPTERS} adapters in one batch, against {peer_name}", rate[0], "tok/s",
                   spread=rate[1:], peer=tokens.numel() / timings[peer].median, peer_name=peer_name, limit=limit,
                   limit_name="the base without adapters",
                   note=f"forward of {s.ROWS} rows of {s.ROW_TOKENS} tokens, rank {s.RANK}, not compiled")  # fmt: skip


def copy_of(config, device):
    """A model of this shape, always with the same weights."""
    torch.manual_seed(0)
    with device:
        return Transformer(config).eval()


def write_adapters(model, names, folder, tokens):
    """Adapters with values of their own: (folder by name, the logits of each row's last token by name)."""
    folders, logits = {}, {}
    for name in names:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.02)
        folders[name] = str(save_adapter(model, f"{folder}/{name}"))
        logits[name] = model(tokens)[:, -1]
    return folders, logits


# -- losses


def measure_losses(report, s, device, _):
    """Fine-tune on conversations: all weights, adapters of several ranks, and peft's; draw the curves."""
    found = s.CHECKPOINT or next(filter(None, (newest_checkpoint(CHECKPOINTS / name) for name in PRETRAINED)), None)
    if found is None:
        return report.skip("loss on held-out answers", "needs a pre-trained model: --checkpoint, or run speedrun.py")
    base, tokenizer = load(found, dtype=torch.float32)
    extended = with_chat_tokens(tokenizer)
    added = list(range(tokenizer.vocab_size, extended.vocab_size))
    grow_vocabulary(base, tokenizer.vocab_size, extended.vocab_size)
    sets = conversation_sets(ChatTemplate(extended), s, base.config.block_size)
    ways = {
        "all weights": lambda: fresh(base, device),
        **{f"LoRA, rank {r}": lambda r=r: adapted(base, device, added, rank=r) for r in (2, s.RANK, 4 * s.RANK)},
        f"rsLoRA, rank {4 * s.RANK}": lambda: adapted(base, device, added, rank=4 * s.RANK, rank_stabilized=True),
        f"DoRA, rank {s.RANK}": lambda: adapted(base, device, added, rank=s.RANK, dora=True),
        "without rows of new tokens": lambda: adapted(base, device, [], rank=s.RANK),
    }
    lines = {}
    for name, build in ways.items():
        rate = s.FULL_RATE if name == "all weights" else s.LORA_RATE
        lines[name] = fine_tuned(build(), rate, *sets, s, device)
        report.series(f"loss on held-out answers: {name}", *lines[name])
        if name != "all weights":
            report.row(f"loss on held-out answers: {name}", lines[name][1][-1], "nats/token",
                       peer=lines["all weights"][1][-1], peer_name="all weights", higher_is_better=False,
                       note=f"after {s.STEPS} steps, from {lines[name][1][0]:.3f}; all adapters at a rate of {rate:g}, "
                            f"all weights at {s.FULL_RATE:g}, one seed")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        name = f"LoRA, rank {s.RANK}"
        theirs = peft_like(ways[name](), base, folder, device)
        losses = fine_tuned(theirs, s.LORA_RATE, *sets, s, device)[1]
    report.row(f"loss on held-out answers: {name}, against peft", lines[name][1][-1], "nats/token", peer=losses[-1],
               peer_name="peft, same start and batches", higher_is_better=False)  # fmt: skip
    curves(report.folder / f"project5_lora.{report.slug}.png", lines, "optimizer steps",
           "loss on held-out answers (nats a token)", "Fine-tuning on conversations")  # fmt: skip


def conversation_sets(template, s, block_size):
    """(training set, held-out set) of the corpus in rows of 128 tokens."""
    size = min(128, block_size)
    return [
        ConversationDataset([render_within(template, talk, size + 1) for talk in part], size, template.start_id)
        for part in split(read_conversations(s.CORPUS), 0.05)
    ]


def fresh(base, device):
    """A copy of the base."""
    model = Transformer(base.config)
    model.load_state_dict(base.state_dict())
    return model.to(device)


def adapted(base, device, added, rank, **options):
    """A copy of the base with adapters, always the same ones."""
    model = fresh(base, device)
    torch.manual_seed(0)
    return add_lora(model, rank, 16.0, tokens=added, **options)


class _AsOurs(torch.nn.Module):
    """A model of `transformers` that is called as ours are."""

    def __init__(self, theirs, config):
        super().__init__()
        self.theirs, self.config = theirs, config

    def forward(self, tokens, plan=None, targets=None):
        """Tokens (B, T) -> nats per token (B, T)."""
        logits = self.theirs(input_ids=tokens).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def auxiliary_losses(self):
        """None."""
        return 0.0


def peft_like(ours, base, folder, device):
    """What `ours` is, in `peft`: the same base, the same adapter."""
    import peft

    theirs = with_weights_of(base, f"{folder}/base").to(device)
    return _AsOurs(
        peft.PeftModel.from_pretrained(theirs, save_adapter(ours, f"{folder}/adapter"), is_trainable=True), base.config
    )


def fine_tuned(model, rate, train_set, val_set, s, device):
    """Take STEPS steps and return (steps, losses on held-out answers), the first before any step."""
    torch.set_float32_matmul_precision("high")
    step = Step(model, NextToken(), build_optimizer(model, "adamw", rate, 0.0), 1.0)
    batches, steps, losses = train_set.batches(s.SEED, 16, 16), [], []
    points = {round(i * s.STEPS / s.EVALUATIONS) for i in range(s.EVALUATIONS + 1)}
    for i in range(s.STEPS + 1):
        if i in points:
            losses.append(validation_loss(model, val_set, s.EVAL_TOKENS))
            steps.append(i)
        if i < s.STEPS:
            count = sum(step.objective.count(micro) for micro in batches[i])
            step.backward(batches[i], count)
            step.update(min(1.0, (i + 1) / 5) * (1 - i / s.STEPS))  # a short warm-up, then down to zero
    return steps, losses


PARTS = {"checks": check, "cost": measure_cost, "batch": measure_batch, "loss": measure_losses}


if __name__ == "__main__":
    main()
