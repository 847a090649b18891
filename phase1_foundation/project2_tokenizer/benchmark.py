"""Measure project 2: training and encoding against Hugging Face's tokenizers and tiktoken, and the two rules.

    uv run python phase1_foundation/project2_tokenizer/benchmark.py
    uv run python phase1_foundation/project2_tokenizer/benchmark.py --corpus data/wikipedia_train.txt --gigabyte

All figures of a row come from the same run, ours and the peers' in turn. Compilation (once a machine) is a row of its
own and counted nowhere else. With 100 MB of text about four minutes on two cores, most of them the peers'.
"""

import gzip
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from common import DATA, RESULTS, ROOT, plots
from common.benchmark import Report, measure
from common.download import read_documents
from common.run import Run
from phase1_foundation.project2_tokenizer import benchmark_config, patterns
from phase1_foundation.project2_tokenizer.bytes_alphabet import encode_utf8
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

SAMPLE = DATA / "sample_corpus.jsonl.xz"
GPT2_FILES = DATA / "gpt2" / "encoder.json.gz", DATA / "gpt2" / "vocab.bpe.gz"
SPECIAL = "<|endoftext|>"
FEW_BYTES = 30_000_000  # a downloaded corpus below this is not worth preferring to the sample


def main(argv=None):
    """Run all parts and write the results."""
    with Run(benchmark_config, argv, sections=("Benchmark",), description=__doc__) as run:
        s = run.settings
        folder = Path(s.OUT_DIR) if s.OUT_DIR else RESULTS
        title = "A byte-level BPE tokenizer, training and encoding"
        report = Report("project2_tokenizer", title, folder=folder, host=True)
        train_texts, unseen = read_corpus(run, s)
        compilation(report)
        tokenizer = training(report, s, train_texts)
        speeds = encoding(report, s, unseen)
        compare_rules(report, s, tokenizer, unseen)
        memory(report, s, train_texts)
        draw(report, s, speeds, tokenizer, unseen)
        report.finish()


def size_of(texts):
    """Bytes of UTF-8."""
    return sum(len(encode_utf8(text)) for text in texts)


def read_corpus(run, s):
    """(documents to train on, documents to encode); the latter are others, if the file is long enough."""
    downloaded = DATA / "wikipedia_train.txt"
    large = downloaded.is_file() and downloaded.stat().st_size >= FEW_BYTES
    path = Path(s.CORPUS) if s.CORPUS else downloaded if large else SAMPLE
    train, unseen, sizes = [], [], [0, 0]
    for number, text in enumerate(read_documents(path)):
        part = number % 8 == 7  # every eighth document is for encoding
        if sizes[part] < (s.TRAIN_BYTES, s.ENCODE_BYTES)[part]:
            (train, unseen)[part].append(text)
            sizes[part] += len(encode_utf8(text))
        if sizes[0] >= s.TRAIN_BYTES and sizes[1] >= s.ENCODE_BYTES:
            break
    run.print(f"{path.name}: {sizes[0] / 1e6:.1f} MB to train on, {sizes[1] / 1e6:.1f} MB to encode")
    return train, unseen


# --- compilation ---

FIRST_USE = """
import time
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
import numba
began = time.perf_counter()
for rule in ("merges", "longest_match"):
    BPETokenizer.train(["a first use"] * 2, 260, rule=rule).encode("a first use")
print(time.perf_counter() - began)
"""


def compilation(report):
    """Seconds of the first use on a machine, and of the first use in a later process."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            environment = os.environ | {"NUMBA_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, cwd=ROOT,
                                  env=environment, check=True)  # fmt: skip
            seconds.append(float(done.stdout))
    report.row("compilation, once a machine", seconds[0], "s", higher_is_better=False,
               note="counted in no other row; every later process loads the compiled loops from disk")  # fmt: skip
    report.row("loading the compiled loops, once a process", seconds[1], "s", higher_is_better=False)


# --- training ---


def train_peer(texts, vocab_size):
    """Hugging Face's trainer on the same texts, with the same alphabet, pattern and size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training(report, s, texts):
    """Train with both on all cores; returns our tokenizer (rule `merges`)."""
    results, size = {}, size_of(texts)
    functions = {
        "ours": lambda: results.update(ours=BPETokenizer.train(
            texts, s.TRAIN_VOCAB_SIZE, [SPECIAL], rule="merges", num_threads=s.THREADS)),
        "tokenizers": lambda: results.update(peer=train_peer(texts, s.TRAIN_VOCAB_SIZE)),
    }  # fmt: skip
    BPETokenizer.train(["compiled already"], 300).encode("x")
    os.environ["RAYON_NUM_THREADS"] = str(s.THREADS)
    times = measure(functions, repeats=s.TRAIN_REPEATS, warmup=0)
    ours, low, high = times["ours"].rate(size / 1e6)
    limit = scanning_rate(texts[: max(1, len(texts) // 10)]) * s.THREADS
    report.row(
        f"training {s.TRAIN_VOCAB_SIZE:,} ids on {size / 1e6:.0f} MB, {s.THREADS} threads", ours, "MB/s",
        spread=(low, high), peer=times["tokenizers"].rate(size / 1e6)[0], peer_name="tokenizers",
        limit=limit, limit_name="cutting the text into pieces alone",
        note=f"{times['ours'].median:.2f} s against {times['tokenizers'].median:.2f} s",
    )  # fmt: skip
    theirs = merges_of(results["peer"])
    report.check(
        "merges are those of tokenizers, in order", results["ours"].merges == theirs, f"{len(theirs):,} merges"
    )
    return results["ours"]


def merges_of(tokenizer):
    """The merges of a `tokenizers` tokenizer as pairs."""
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def scanning_rate(texts):
    """MB/s of the scanner alone on one thread: nothing that reads the text can be faster."""
    from phase1_foundation.project2_tokenizer.scanner import scan
    from phase1_foundation.project2_tokenizer.text_buffer import TextBuffer

    text = TextBuffer(["\n".join(texts)], patterns.GPT2)
    ends = np.empty(int(text.lengths[0]) + 16, dtype=np.int64)
    work = lambda: scan(text.data, 0, int(text.lengths[0]), patterns.character_classes(), text.transitions, ends)  # noqa: E731
    return int(text.lengths[0]) / measure({"scan": work}, repeats=5)["scan"].low / 1e6


# --- encoding ---


def peers():
    """tiktoken and tokenizers with GPT-2's vocabulary, made from the bundled files."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for path in GPT2_FILES:
            Path(folder, path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(Path(folder, "vocab.bpe")), encoder_json_file=str(Path(folder, "encoder.json"))
        )
        gpt2 = BPETokenizer.from_gpt2_files(*GPT2_FILES)
        theirs = Tokenizer.from_file(str(gpt2.to_huggingface(folder)))
    openai = tiktoken.Encoding("gpt2", pat_str=patterns.GPT2, mergeable_ranks=ranks, special_tokens={SPECIAL: 50256})
    return gpt2, openai, theirs


def encoding(report, s, texts):
    """Encode text with GPT-2's vocabulary, document by document and in batches; returns MB/s for the plot."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    gpt2, openai, theirs = peers()
    speeds = {}
    for name, documents in (("English", texts), ("Python code", python_sources(s.ENCODE_BYTES // 2))):
        speeds[name] = encode_documents(report, s, name, documents, gpt2, openai, theirs)
    encode_batches(report, s, texts, gpt2, openai, theirs)
    return speeds


def python_sources(max_bytes):
    """The standard library of this Python, a document a file."""
    sources, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        sources.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(sources[-1])
        if size >= max_bytes:
            break
    return sources


def encode_documents(report, s, name, texts, gpt2, openai, theirs):
    """One thread, one call a document, lists of ids: cold, warm, and the peers."""
    size, limit = size_of(texts), scanning_rate(texts)
    ours = lambda: [gpt2.encode(text) for text in texts] and None  # noqa: E731
    tiktoken = lambda: [openai.encode_ordinary(text) for text in texts] and None  # noqa: E731
    peers = {
        "tiktoken": tiktoken,
        "tokenizers": lambda: [theirs.encode(text, add_special_tokens=False).ids for text in texts] and None,
    }
    array = {"array": lambda: [gpt2.encode_to_array(text) for text in texts] and None}
    rates = {}
    for states, functions, before, label in (
        ("empty cache", {"tiktoken": tiktoken}, lambda: gpt2._encoder.forget(also_vocabulary=True), "no word known"),
        (
            "just loaded",
            {"tiktoken": tiktoken},
            gpt2._encoder.forget,
            "the vocabulary's own tokens known, no text seen",
        ),
        ("warm", array | peers, None, "the text seen before"),
    ):
        times = measure({"ours": ours} | functions, repeats=s.REPEATS, before=before)
        rates[states] = {key: timing.rate(size / 1e6) for key, timing in times.items()}
        report.row(
            f"encoding {name}, one thread, {states}", rates[states]["ours"][0], "MB/s",
            spread=rates[states]["ours"][1:], peer=rates[states]["tiktoken"][0], peer_name="tiktoken", limit=limit,
            limit_name="cutting alone", note=f"GPT-2's vocabulary, lists of ids, {label}; "
            f"{size / 1e6:.1f} MB in {len(texts):,} documents",
        )  # fmt: skip
    report.row(
        f"encoding {name}, one thread, warm, to an array", rates["warm"]["array"][0], "MB/s",
        spread=rates["warm"]["array"][1:], peer=rates["warm"]["tiktoken"][0], peer_name="tiktoken's lists",
        limit=limit, limit_name="cutting alone",
    )  # fmt: skip
    report.row(
        f"encoding {name}, one thread, warm, against tokenizers", rates["warm"]["ours"][0], "MB/s",
        peer=rates["warm"]["tokenizers"][0], peer_name="tokenizers",
    )  # fmt: skip
    same = all(gpt2.encode(text) == openai.encode_ordinary(text) for text in texts)
    report.check(f"ids of {name} are tiktoken's", same, f"{size / 1e6:.1f} MB")
    cold = {f"ours, {state}": rates[state]["ours"][0] for state in rates}
    return cold | {peer: rates["warm"][peer][0] for peer in peers}


def encode_batches(report, s, texts, gpt2, openai, theirs):
    """A list of documents in one call, on several threads."""
    size = size_of(texts)
    gpt2.encode_batch(texts, num_threads=s.THREADS)
    functions = {
        "ours": lambda: gpt2.encode_batch(texts, num_threads=s.THREADS),
        "tiktoken": lambda: openai.encode_ordinary_batch(texts, num_threads=s.THREADS),
        "tokenizers": lambda: theirs.encode_batch_fast(texts, add_special_tokens=False),
    }
    times = measure(functions, repeats=s.REPEATS)
    rates = {key: timing.rate(size / 1e6) for key, timing in times.items()}
    for peer in ("tiktoken", "tokenizers"):
        report.row(
            f"encoding English in a batch, {s.THREADS} threads" + ", against tokenizers" * (peer == "tokenizers"),
            rates["ours"][0], "MB/s", spread=rates["ours"][1:],
            peer=rates[peer][0], peer_name=peer,
        )  # fmt: skip
    same = all(ours.tolist() == gpt2.encode(text) for ours, text in zip(gpt2.encode_batch(texts), texts))
    report.check("a batch gives the ids of its documents", same)


# --- the two rules ---


def compare_rules(report, s, tokenizer, texts):
    """Tokens, speed and round trip of both rules on the vocabulary just trained."""
    size, by_rule = size_of(texts), {rule: tokenizer.with_rule(rule) for rule in RULES}
    functions = {rule: lambda t=t: [t.encode(text) for text in texts] and None for rule, t in by_rule.items()}
    times = measure(functions, repeats=s.REPEATS)
    tokens = {rule: sum(len(t.encode(text)) for text in texts) for rule, t in by_rule.items()}
    report.row(
        f"bytes per token, longest match, {tokenizer.vocab_size:,} ids", size / tokens["longest_match"], "B",
        peer=size / tokens["merges"], peer_name="merges, same vocabulary",
        claim="greedy inference works surprisingly well for BPE (Uzan et al., 2024, abstract)",
    )  # fmt: skip
    report.row(
        "encoding English by longest match, one thread, warm", times["longest_match"].rate(size / 1e6)[0], "MB/s",
        peer=times["merges"].rate(size / 1e6)[0], peer_name="merges, same vocabulary",
    )  # fmt: skip
    for rule, t in by_rule.items():
        ok = all(t.decode(t.encode(text)) == text for text in texts)
        report.check(f"every document comes back, rule {rule}", ok, f"{len(texts):,} documents")


# --- memory ---

TRAIN_FILE = """
import re, sys
from common.download import read_documents
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
BPETokenizer.train(read_documents(sys.argv[1]), int(sys.argv[2]), num_threads=int(sys.argv[3]))
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def memory(report, s, texts):
    """Peak memory of training in a process of its own, on the corpus and on a gigabyte."""
    if sys.platform != "linux":
        report.skip("peak memory of training", "measured on Linux alone")
        return
    names = ["the corpus"] + ["a gigabyte of it, each copy in another cipher"] * s.GIGABYTE
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, "text.txt")
            size = write_copies(path, texts, 1_000_000_000 if "gigabyte" in name else 1)
            command = [sys.executable, "-c", TRAIN_FILE, str(path), str(s.TRAIN_VOCAB_SIZE), str(s.THREADS)]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
            report.row(
                f"peak memory of training on {name}", int(done.stdout) / 2**30, "GiB", limit=4.0,
                limit_name="what we allow a gigabyte", higher_is_better=False,
                note=f"{size / 1e6:.0f} MB, whole process, {time.perf_counter() - began:.0f} s with start and reading",
            )  # fmt: skip
    if not s.GIGABYTE:
        report.skip("peak memory of training on a gigabyte", "run with --gigabyte")


def write_copies(path, texts, min_bytes):
    """Write texts to a file, again and again in Caesar's cipher, so that every copy brings its own words."""
    letters, size, copy = "abcdefghijklmnopqrstuvwxyz", 0, 0
    with open(path, "wb") as file:
        while size < min_bytes:
            turned = letters[copy % 26 :] + letters[: copy % 26]
            table = str.maketrans(letters + letters.upper(), turned + turned.upper())
            for text in texts:
                line = encode_utf8(" ".join(text.splitlines()).translate(table)) + b"\n"
                file.write(line)
                size += len(line)
            copy += 1
    return size


# --- plots ---


def draw(report, s, speeds, tokenizer, texts):
    """Speeds as bars, and bytes per token of both rules over the size of the vocabulary."""
    groups = {kind: [speeds[name][kind] for name in speeds] for kind in speeds["English"]}
    title = "Encoding with GPT-2's vocabulary on one thread"
    plots.bars(report.folder / f"project2_tokenizer.{report.slug}.png", list(speeds), groups, "MB/s", title)
    sample, series = texts[: max(1, len(texts) // 4)], {}
    size = size_of(sample)
    sizes = [v for v in (512, 1024, 2048, 4096, 8192, 16384, 32768) if v < tokenizer.vocab_size] + [
        tokenizer.vocab_size
    ]
    for rule in RULES:
        ys = []
        for vocab_size in sizes:
            part = shortened(tokenizer, vocab_size).with_rule(rule)
            ys.append(size / sum(map(len, part.encode_batch(sample))))
        series[rule] = (sizes, ys)
        report.series(f"bytes per token by vocabulary size: {rule}", sizes, ys)
    path = report.folder / f"project2_tokenizer.rules.{report.slug}.png"
    plots.curves(path, series, "ids", "bytes per token", "The two encoding rules on one vocabulary", logx=True)


def shortened(tokenizer, vocab_size):
    """The tokenizer that training would have given for a smaller vocabulary: merges are learned one after the other."""
    merges = tokenizer.merges[: vocab_size - 257]
    kept = 256 + len(merges)
    vocab = {token: i for token, i in tokenizer.vocab.items() if i < kept and token != SPECIAL}
    return BPETokenizer(vocab, merges, {SPECIAL: kept}, tokenizer.pattern, tokenizer.rule)


if __name__ == "__main__":
    main()
