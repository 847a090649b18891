"""Clients that measure: what is read of answers, the open loop, the model that is served, and the whole benchmark."""

import asyncio
import itertools
import json
import re
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phase1_foundation.project3_pretrain.loading import load
from phase2_finetuning.project5_lora.peft_format import read_adapter
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving import benchmark, benchmark_config
from phase10_deployment.project28_serving.load import (
    Answer,
    Clients,
    answers_of,
    read_answer,
    read_events,
    summarize,
)
from phase10_deployment.project28_serving.peers import (
    Served,
    free_port,
    their_command,
    words_of,
    words_tokenizer,
    write_adapters,
    write_model,
)
from phase10_deployment.project28_serving.sending import CHATS, COMPLETIONS, Order, send_all

SHAPE = {"vocab_size": 1024, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "n_ff": 128}


def ask(url, orders, **options):
    """Send orders from here: the answers."""
    return answers_of(asyncio.run(send_all(url, time.monotonic(), orders, **options)))


def event(body):
    """A server-sent event."""
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def said(text="", reason=None):
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


# -- what is read of an answer


STREAM = b"".join(map(event, [said("a"), said("é"), said("c", "length"), USAGE, b"[DONE]"]))


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_stream_is_cut(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [(float(i), STREAM[a:b]) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    found = list(read_events(chunks))
    assert [body for _, body in found] == [said("a"), said("é"), said("c", "length"), USAGE]
    for at, _ in found:
        assert chunks[int(at)][1], "an event has the time of a chunk that held something"
    assert [at for at, _ in found] == sorted(at for at, _ in found)


def test_a_stream_of_a_completion():
    chunks = [(1.0, event(said("a"))), (1.5, event(said("b")) + event(said())), (2.0, event(said("c", "length"))),
              (2.5, event(USAGE) + event(b"[DONE]"))]  # fmt: skip
    answer = read_answer(Answer(0.25, status=200, ended=2.5), chunks)
    assert (answer.text, answer.times, answer.error) == ("abc", [1.0, 1.5, 2.0], "")
    assert (answer.n_tokens, answer.n_prompt) == (3, 7)
    assert (answer.first, answer.gaps, answer.whole) == (0.75, [0.5, 0.5], 2.25)


def test_a_stream_of_a_chat_and_one_whose_last_text_brings_the_usage():
    def delta(reason=None, **fields):
        return event({"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]})

    chunks = [(1.0, delta(role="assistant", content="")), (2.0, delta(content="a")), (3.0, delta("stop"))]
    answer = read_answer(Answer(0.0, status=200), chunks)
    assert (answer.text, answer.times, answer.error) == ("a", [2.0], "")
    last = event(said("", "length") | {"usage": {"completion_tokens": 5, "prompt_tokens": 2}})
    assert read_answer(Answer(0.0, status=200), [(1.0, event(said("a")) + last)]).n_tokens == 5


def test_an_answer_in_one_piece():
    body = json.dumps(said("abc", "length") | {"usage": USAGE["usage"]}).encode()
    answer = read_answer(Answer(0.0, status=200, ended=2.0), [(1.0, body[:9]), (1.5, body[9:])])
    assert (answer.text, answer.times, answer.n_tokens, answer.error) == ("abc", [2.0], 3, "")
    chat = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}], "usage": USAGE["usage"]}
    assert read_answer(Answer(0.0, status=200), [(1.0, json.dumps(chat).encode())]).text == "hi"


@pytest.mark.parametrize(
    ("status", "sent", "reason"),
    [
        (429, b'{"error": {"message": "queue_full"}}', "status 429: .*queue_full"),
        (200, event(said("a")) + event({"error": {"message": "the engine broke"}}), "the engine broke"),
        (200, event(said("a")), "without a finish_reason"),
        (200, b"<html>", "could not be read"),
        (200, b"", "could not be read"),
        (200, event(b"{broken"), "could not be read"),
        (200, event({"choices": None}), "could not be read"),
    ],
)
def test_what_goes_wrong_is_said(status, sent, reason):
    answer = read_answer(Answer(0.0, status=status), [(1.0, sent)] if sent else [])
    assert re.search(reason, answer.error), answer.error


# -- in numbers


def test_a_summary():
    answers = [
        Answer(1.0, times=[2.0, 3.0], ended=3.0, sent=1.25, n_tokens=2),
        Answer(0.0, times=[3.0, 4.0, 10.0], ended=11.0, n_tokens=4),  # a token whose text came with the next
        Answer(0.0, error="status 429", ended=50.0),
    ]
    summary = summarize(answers)
    assert (summary.n_requests, summary.n_failed, summary.n_tokens, summary.late) == (3, 1, 6, 0.25)
    assert summary.throughput == pytest.approx(6 / 11)
    assert summary.first == pytest.approx((2.0, 2.98))  # of 1 and 3
    assert summary.gap == pytest.approx((1.0, 5.9, 6.0))  # of 1, 1 and 6
    assert summary.whole == pytest.approx((6.5, 10.91))  # of 2 and 11


def test_nothing_to_sum_up():
    with pytest.raises(ValueError, match="none of 2 requests brought text: an answer without text; status 500"):
        summarize([Answer(0.0), Answer(0.0, error="status 500")])


# -- the open loop


class Barrier:
    """A server that answers nobody before so many have asked: a client that waits for answers would wait forever."""

    def __init__(self, n):
        self.n, self.waiting, self.came, self.url = n, [], threading.Event(), ""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    async def answer(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(size))
        self.waiting.append(released := asyncio.Event())
        if len(self.waiting) == self.n:
            for each in self.waiting:
                each.set()
        await released.wait()
        events = event(said(body["prompt"])) + event(said("", "length")) + event(b"[DONE]")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + events)
        await writer.drain()
        writer.close()

    def __enter__(self):
        self.thread.start()
        port = free_port()
        asyncio.run_coroutine_threadsafe(asyncio.start_server(self.answer, "127.0.0.1", port), self.loop).result(10)
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def test_nobody_waits_for_the_answer_of_another():
    orders = [Order(0.01 * i, COMPLETIONS, {"prompt": f"<{i}>"}) for i in range(120)]
    with Barrier(len(orders)) as server:
        answers = ask(server.url, orders, patience=30)
    assert [answer.text for answer in answers] == [f"<{i}>" for i in range(120)]
    assert not any(answer.error for answer in answers)
    last = orders[-1].at
    for order, answer in zip(orders, answers):
        assert order.at == answer.arrived <= answer.sent <= answer.times[0] <= answer.ended
        assert answer.times[0] >= last, "nobody was answered before all had asked"


def test_clients_in_several_processes_keep_the_order():
    orders = [Order(0.0, COMPLETIONS, {"prompt": f"<{i}>"}) for i in range(7)]
    with Clients(2) as clients:
        for _ in range(2):
            with Barrier(len(orders)) as server:
                answers = clients.run(server.url, orders, patience=60)
            assert [answer.text for answer in answers] == [f"<{i}>" for i in range(7)]


def test_a_server_that_is_not_there_and_one_that_is_silent():
    (answer,) = ask(f"http://127.0.0.1:{free_port()}", [Order(0.0, COMPLETIONS, {})])
    assert answer.status == 0 and "Connect" in answer.error
    with Barrier(2) as server:
        order = Order(0.0, COMPLETIONS, {"prompt": "a"})
        (answer,) = ask(server.url, [order], patience=0.2)
    assert "Timeout" in answer.error and not answer.times
    with pytest.raises(ValueError, match="n_processes=0"):
        Clients(0)


def test_our_server_streamed_and_in_one_piece(tiny):
    body = {"model": "tiny", "max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    orders = []
    for stream in ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": False}):
        orders += [Order(0.0, COMPLETIONS, body | {"prompt": [5, 6, 7 + i]} | stream) for i in range(8)]
        orders.append(Order(0.0, CHATS, body | chat | stream))
    answers = ask(tiny.url, orders)
    assert not any(answer.error for answer in answers), [answer.error for answer in answers]
    assert {answer.n_tokens for answer in answers} == {24}
    assert [answer.n_prompt for answer in answers[:8]] == [3] * 8
    assert [answer.text for answer in answers[:9]] == [answer.text for answer in answers[9:]]
    assert all(len(answer.times) == 1 for answer in answers[9:])
    assert summarize(answers).n_tokens == 18 * 24


# -- what is served, and by whom


def test_words_are_tokens_for_us_and_for_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = write_model(tmp_path, SHAPE, 64, "cpu", std=0.2)
    assert tokenizer.vocab_size == 1024 == len(set(tokenizer.vocab.values()))
    words = words_of(tokenizer)
    ids = torch.randint(words.start, words.stop, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert len(text.split(" ")) == 301 and text.startswith(" ")
    model, loaded = load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    written = theirs.generate(torch.tensor([ids[:9]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    ours = generate(model, loaded, ids[:9], SamplingParams(20, 0.0, stop_ids=())).tokens
    assert written[0, 9:].tolist() == ours and all(token in words for token in ours)
    with pytest.raises(ValueError, match="vocab_size=260 leaves no room"):
        words_tokenizer(260)


def test_adapters_differ_and_the_model_stays(tmp_path):
    write_model(tmp_path / "model", SHAPE, 64, "cpu")
    model, _ = load(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (read_adapter(model, folder) for folder in write_adapters(model, tmp_path, 2, 4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, part in first.parts.items():
        assert part.B.abs().max() > 0 and not torch.equal(part.A, second.parts[name].A)


def test_a_server_that_ends_says_why(tmp_path):
    command = [sys.executable, "-c", "print('there is no such model'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="mine ended with status 3: there is no such model"):
        Served("mine", "model", command, tmp_path / "log")


def test_a_server_is_ended_with_what_it_has_started(tmp_path):
    import psutil

    code = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"status": "ready"}')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
    with Served("mine", "model", [sys.executable, "-c", code], tmp_path / "log") as server:
        assert server.health() == {"status": "ready"}
        child = int(server.said().split("child ")[1].split()[0])
        sizes = server.memory()
        assert set(sizes) == {"server", "engine"} and min(sizes.values()) > 2**20
    server.process.wait(20)
    assert server.process.returncode is not None
    _, alive = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], 20)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_commands_of_the_peer():
    assert their_command("m", "cpu", "float32", ["--x"])[:4] == [sys.executable, "-m", "transformers.cli.transformers",
                                                                 "serve"]  # fmt: skip
    start = "uv run --with 'transformers[serving]' transformers"
    assert their_command("m", "cpu", "float32", (), start)[:6] == ["uv", "run", "--with", "transformers[serving]",
                                                                   "transformers", "serve"]  # fmt: skip


# -- the benchmark


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [("--parts speed", "PARTS"), ("--model 7B", "MODEL=7B"), ("--rounds 2", "ROUNDS=2"), ("--loads 0", "LOADS"),
     ("--concurrent 0", "CONCURRENT"), ("--longest 2", "LONGEST=2"), ("--seconds 0", "SECONDS"),
     ("--first_n 0", "FIRST_N=0")],
)  # fmt: skip
def test_settings_that_cannot_be_measured(flags, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(flags.split())
    assert caught.value.code == 2 and wrong in capsys.readouterr().err


def test_quick_settings_leave_what_a_flag_has_set():
    from common.settings import load as load_settings

    s = benchmark_config.quick(load_settings(benchmark_config, ["--quick", "--n_requests", "3"]))
    assert (s.MODEL, s.N_REQUESTS) == ("tiny", 3)
    benchmark_config.validate_config(s)


@pytest.mark.slow
def test_the_benchmark_from_end_to_end(tmp_path):
    benchmark.main(["--quick", "--device", "cpu", "--folder", str(tmp_path), "--no_peer"])
    result = json.loads((tmp_path / "project28_serving.cpu.json").read_text(encoding="utf-8"))
    assert all(check["ok"] for check in result["checks"] if "memory" not in check["name"])
    assert not [row for row in result["rows"] if "skipped" in row] and len(result["rows"]) > 25
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "project28_serving.throughput.cpu.png", "project28_serving.first.cpu.png"}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
