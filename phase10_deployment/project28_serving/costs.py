"""
Costs

This file implements the measuring of what a server adds to its engine, and what its services cost, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - what the layer before a model
  adds to its latency
- "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models" (Dong et al., 2024) -
  masks of grammars cost time in each step
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - blocks of a
  text that has ended serve others
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - one base, many adapters

Only benchmark.py uses it: `report` is its Report, `s` its settings, `bench` what it has started.

Each component is explained with paper references for educational purposes.
"""

import json
import statistics
import time
from pathlib import Path

from phase1_foundation.project3_pretrain.loading import load
from phase4_advanced_inference.project13_paged_attention.latency import time_to_first_token
from phase10_deployment.project28_serving.grammar import Grammars, json_schema_grammar
from phase10_deployment.project28_serving.load import summarize
from phase10_deployment.project28_serving.peers import NAME, write_adapters
from phase10_deployment.project28_serving.sending import CHATS, COMPLETIONS, Order

ADDED_MS = 1.0  # goal: at most so much more until the first token over HTTP


def check_whole(report, name, answers, trace):
    """Record whether every request got all of its tokens."""
    wanted = sum(each.n_new for each in trace)
    got, errors = sum(answer.n_tokens for answer in answers), sorted({answer.error for answer in answers} - {""})
    report.check(f"{name}: every text is whole", got == wanted and not errors,
                 "; ".join([f"{got:,} of {wanted:,} tokens", *errors[:2]]))  # fmt: skip


# -- the first token


def measure_first_token(report, s, bench):
    """Rows for the time to the first token: the engine's own, and that of a client of the server.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 6.
    PAPER CONTEXT: a layer before the models need not cost much: throughput and latency are comparable to those of a
        server that is tied to its models.
    INTUITION: stop the same runner with two watches, one at the track and one at the stadium's gate.
    IMPLEMENTATION: an engine here and one behind the server get prompts of one length in turn; what HTTP adds is the
        difference of the medians. The client is a socket that is kept, as a library's parsing would be measured, too.
    WHY: the difference is HTTP, checks, tokens to text, and the way to another process and back.
    """
    engine, connection = bench.engine, bench.ours.connect()
    for n in (s.SHORTEST, s.LONG_PROMPT):
        spent = {"engine": [], "ids": [], "text": []}
        for _ in range(3 + s.FIRST_N):
            spent["engine"].append(time_to_first_token(engine, bench.prompt(n)))
            spent["ids"].append(first_over_http(connection, bench.prompt(n)))
            spent["text"].append(first_over_http(connection, bench.tokenizer.decode(bench.prompt(n))))
        ms = {kind: sorted(1e3 * each for each in times[3:]) for kind, times in spent.items()}
        median = {kind: statistics.median(times) for kind, times in ms.items()}
        name, quarter = f"{s.MODEL}: first token of {n:,}", s.FIRST_N // 4
        for kind, how in (("ids", "over HTTP, prompt as ids"), ("text", "over HTTP, prompt as text")):
            times = ms[kind]
            report.row(f"{name}, {how}", median[kind], "ms", peer=median["engine"], peer_name="the engine alone",
                       higher_is_better=False, spread=(times[quarter], times[-1 - quarter]),
                       note="one request at a time; spread: quartiles")  # fmt: skip
            report.row(f"{name}, {how}: HTTP adds", median[kind] - median["engine"], "ms", limit=ADDED_MS,
                       limit_name="goal", higher_is_better=False)  # fmt: skip
    connection.close()


def first_over_http(connection, prompt):
    """Seconds from sending a request to the first event of its answer."""
    request = post({"prompt": prompt, "max_tokens": 2, "temperature": 0.0, "stream": True, "ignore_eos": True})
    began = time.perf_counter()
    connection.sendall(request)
    answer = receive(connection, b"data: {")
    spent = time.perf_counter() - began
    answer = receive(connection, b"0\r\n\r\n", answer)  # the last chunk
    if b'"error"' in answer or b"data: [DONE]" not in answer:
        raise RuntimeError(f"the server answered {answer[:300]!r}")
    return spent


def post(body):
    """A request for a completion, as it is sent."""
    body = json.dumps(body)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def receive(connection, mark, answer=b""):
    """What has come and what comes, until it holds a mark; raises RuntimeError if the server closes first."""
    while mark not in answer:
        if not (data := connection.recv(2**16)):
            raise RuntimeError(f"the server closed the connection after {answer[:300]!r}")
        answer += data
    return answer


# -- forms


def schema_of(n):
    """A schema that is not satisfied before n records are written."""
    properties = {"name": {"type": "string", "maxLength": 24}, "count": {"type": "integer"},
                  "kind": {"enum": ["first", "second", "third"]}}  # fmt: skip
    record = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": record, "minItems": n}


def measure_forms(report, s, bench):
    """Rows for texts that are bound to a JSON schema: throughput, and the time of one mask.

    PAPER: "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", arXiv:2411.15100.
    PAPER CONTEXT: structured generation is judged by the time of a mask, and by what serving loses end to end.
    INTUITION: how much slower is a typist whose every key is looked up in the rules?
    IMPLEMENTATION: chats of equal length in turn, free and bound; masks are timed by themselves, along random texts of
        the same schema, which is so long that no text ends before its limit.
    WHY: masks are made on the host between two steps, where nothing else can hide them.
    """
    schema, rates = schema_of(s.NEW_TOKENS), {"free": [], "bound": []}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "records", "schema": schema}}}
    for _ in range(1 + s.REPEATS):
        for kind, more in (("free", {}), ("bound", form)):
            trace = bench.trace(s.N_STREAMS)
            orders = [bench.order(bench.ours, each, **more) for each in trace]
            orders = [Order(order.at, CHATS, chat_of(order.body)) for order in orders]
            answers = bench.clients.run(bench.ours.url, orders)
            rates[kind].append(summarize(answers).throughput)
    check_whole(report, f"{s.MODEL}: bound to a schema", answers, trace)
    free, bound = (statistics.median(rates[kind][1:]) for kind in ("free", "bound"))
    report.row(f"{s.MODEL}: {s.N_STREAMS} chats bound to a JSON schema", bound, "tok/s", peer=free,
               peer_name="not bound", note="streamed over HTTP")  # fmt: skip
    grammars, spent = Grammars(bench.tokenizer), []
    constraint = grammars.constraint(json_schema_grammar(schema))
    for _ in range(20 + 10 * s.FIRST_N):
        began = time.perf_counter()
        mask = constraint.allowed()
        spent.append(1e6 * (time.perf_counter() - began))
        allowed = [32 * word + bit for word, bits in enumerate(mask.tolist()) if bits for bit in range(32)
                   if bits >> bit & 1]  # fmt: skip
        constraint.accept(bench.draw.choice(allowed))
        if constraint.finished:
            constraint = grammars.constraint(json_schema_grammar(schema))
    spent = sorted(spent[20:])
    report.row(f"mask of a JSON schema, {bench.tokenizer.vocab_size:,} tokens, median", statistics.median(spent), "µs",
               higher_is_better=False, note=f"99%: {spent[len(spent) * 99 // 100]:.0f} µs; tokens drawn at random"
               )  # fmt: skip


def chat_of(body):
    """The same request as a chat."""
    rest = {name: value for name, value in body.items() if name != "prompt"}
    return rest | {"messages": [{"role": "user", "content": body["prompt"]}]}


# -- leaving


def measure_leaving(report, s, bench):
    """Rows for the time from a client's leaving until its row and its blocks are free: alone, and among others.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.3.
    PAPER CONTEXT: when a request has ended, its blocks are freed, and hold keys and values of other requests.
    INTUITION: a plate that nobody waits for any more should leave the stove.
    IMPLEMENTATION: a stream is closed after its first token; /health is asked until one text less is running.
    WHY: until then the text takes a row, blocks, and its part of every step.
    """
    for n_others in (0, max(1, s.N_ROWS // 2)):
        others = [open_stream(bench, bench.room) for _ in range(n_others)]
        spent = sorted(1e3 * time_to_leave(bench) for _ in range(3 + s.LEAVING_N))
        for connection in others:
            connection.close()
        wait_until(lambda: bench.ours.health()["running"] == 0)
        name = f"{s.MODEL}: a client leaves{f' while {n_others} others are served' if n_others else ''}"
        report.row(f"{name}: until row and blocks are free, median", statistics.median(spent), "ms",
                   higher_is_better=False, spread=(spent[0], spent[-1]))  # fmt: skip
    report.check("nothing is held for clients who left", bench.ours.health()["kv_usage"] < 1e-9,
                 str(bench.ours.health()))  # fmt: skip


def open_stream(bench, n_new):
    """The connection of a stream that has begun."""
    connection, prompt = bench.ours.connect(), bench.prompt(bench.s.SHORTEST)
    connection.sendall(post({"prompt": prompt, "max_tokens": n_new - len(prompt), "temperature": 0.0, "stream": True,
                             "ignore_eos": True}))  # fmt: skip
    receive(connection, b"data: {")
    return connection


def time_to_leave(bench):
    """Seconds from closing a stream until one request less is running."""
    connection = open_stream(bench, bench.room)
    running = bench.ours.health()["running"]
    began = time.perf_counter()
    connection.close()
    wait_until(lambda: bench.ours.health()["running"] < running)
    return time.perf_counter() - began


def wait_until(holds, seconds=60.0):
    """Wait, asking all the time; raises RuntimeError if it does not come true."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(f"the server was not as expected for {seconds:.0f} s")


# -- adapters


def measure_adapters(report, s, bench):
    """Rows for throughput with the base alone, one adapter, and several in one batch, against a server without any.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2.
    PAPER CONTEXT: an adapter that is merged costs nothing; in batches of several tasks it cannot be.
    INTUITION: what does it cost to let every guest choose the spice?
    IMPLEMENTATION: random adapters of all linear layers; the same number of streams in turn, of two servers.
    WHY: what the table costs those who ask for the base is paid by everybody.
    """
    folders = write_adapters(load(bench.model)[0], bench.folder, s.N_ADAPTERS, s.RANK)
    names = [Path(folder).name for folder in folders]
    flags = [f"{name}={folder}" for name, folder in zip(names, folders)]
    with bench.serve("adapted", "--lora", *flags) as server:
        kinds = {"no adapter, server without any": (bench.ours, [NAME]), "no adapter": (server, [NAME]),
                 "one adapter": (server, names[:1]), f"{len(names)} adapters in one batch": (server, names)
                 }  # fmt: skip
        rates, last = {kind: [] for kind in kinds}, {}
        for _ in range(1 + s.REPEATS):
            for kind, (which, models) in kinds.items():
                trace = bench.trace(s.N_STREAMS)
                orders = [bench.order(which, each, model=models[i % len(models)]) for i, each in enumerate(trace)]
                last[kind] = bench.clients.run(which.url, orders), trace
                rates[kind].append(summarize(last[kind][0]).throughput)
    for kind, (answers, trace) in last.items():
        check_whole(report, f"{s.MODEL}: {kind}", answers, trace)
    plain, *others = kinds
    for kind in others:
        report.row(f"{s.MODEL}: {s.N_STREAMS} streams, {kind}", statistics.median(rates[kind][1:]), "tok/s",
                   peer=statistics.median(rates[plain][1:]), peer_name=plain, note=f"rank {s.RANK}, all linear layers"
                   if kind == others[-1] else "")  # fmt: skip
