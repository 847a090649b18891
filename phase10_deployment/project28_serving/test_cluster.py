"""Replicas behind one door: what passes through unchanged, who meets again, and what becomes of one that dies."""

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common import ROOT, checkpoint, settings
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving import cluster_config
from phase10_deployment.project28_serving.cluster import check_resources, reason_of
from phase10_deployment.project28_serving.front import Front, labelled
from phase10_deployment.project28_serving.gate import GateOptions
from phase10_deployment.project28_serving.replica import Replica, sent_by

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

# -- settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", "0"], "REPLICAS=0"),
        (["--max_replicas", "1"], "MAX_REPLICAS=1 must be at least REPLICAS=2"),
        (["--slack", "9", "--max_running", "8"], "SLACK=9 must be at most MAX_RUNNING=8"),
        (["--worth", "2"], "WORTH=2.0"),
        (["--page", "3"], "PAGE=3"),  # of the server's own config
    ],
)
def test_settings_that_cannot_work_are_refused(flags, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        cluster_config.validate_config(settings.load(cluster_config, flags))


def test_a_cluster_that_is_too_small_is_refused():
    s = settings.load(cluster_config, ["--device", "cpu", "--replicas", "4", "--cpus", "1"])
    check_resources(s, {"CPU": 4.0})
    with pytest.raises(ValueError, match="REPLICAS=4 with CPUS=1 need 4 CPUs, and there are 2"):
        check_resources(s, {"CPU": 2.0})


def test_the_reason_is_found_in_a_report():
    assert reason_of("Deploying failed:\n  File x\nsome.UnavailableError: no such model\n") == "no such model"
    assert reason_of("nothing known") == "nothing known"


# -- replica and front by themselves


def test_a_replica_hands_on_messages_as_they_come_and_together():
    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [], "path": scope["path"]})
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ask():
        letter = sent_by({"type": "http", "path": "/x", "app": object()}, b"hello", "")
        return [batch async for batch in Replica.answer(SimpleNamespace(name="r1", app=app), letter)]

    taken, first, *rest = asyncio.run(ask())
    assert taken == [{"type": "taken", "by": "r1"}]
    assert [message.get("path", message.get("body")) for message in first] == ["/x", b"hello"]
    assert [message["more_body"] for batch in rest for message in batch] == [False]


def test_a_replica_that_is_not_read_any_more_ends_its_work():
    ended = []

    async def app(scope, receive, send):
        try:
            await receive()
            await send({"type": "http.response.start"})
            await receive()  # never comes
        finally:
            ended.append(True)

    async def leave():
        answer = Replica.answer(SimpleNamespace(name="r1", app=app), sent_by({}, b"", ""))
        await anext(answer), await anext(answer)
        await answer.aclose()
        assert ended == [True]

    asyncio.run(leave())


def test_what_an_app_raises_is_raised():
    async def app(scope, receive, send):
        raise KeyError("lost")

    async def ask():
        with pytest.raises(KeyError, match="lost"):
            async for _ in Replica.answer(SimpleNamespace(name="r1", app=app), sent_by({}, b"", "")):
                pass

    asyncio.run(ask())


class FakeReplicas:
    """A handle whose only replica says what it is told, and then dies, or never takes anything."""

    def __init__(self, batches, error=None, patient=False):
        self.batches, self.error, self.patient, self.cancelled = batches, error, patient, False

    def options(self, **_):
        return self

    def remote(self, letter):
        async def answer():
            if self.patient:
                await asyncio.Event().wait()
            yield [{"type": "taken", "by": "r1"}]
            for batch in self.batches:
                yield batch
            if self.error:
                raise self.error

        generator = answer()
        fake = self

        class Answer:
            def __aiter__(self):
                return generator

            def __anext__(self):
                return anext(generator)

            def cancel(self):
                fake.cancelled = True

        return Answer()


def ask_front(replicas, **options):
    """The answer of a front to one request."""
    app = Front(replicas, GateOptions(**options), patience=0.05).__serve_build_asgi_app__()

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as http:
            return await http.post("/v1/completions", json={"prompt": "x" * 50})

    return asyncio.run(ask())


def start_of(kind):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def part_of(body, more):
    return {"type": "http.response.body", "body": body, "more_body": more}


def test_the_front_passes_on_and_names_the_replica():
    pytest.importorskip("ray")
    replicas = FakeReplicas([[start_of(b"application/json")], [part_of(b"{}", False)]])
    answer = ask_front(replicas)
    assert (answer.status_code, answer.text, answer.headers["x-replica"]) == (200, "{}", "r1") and replicas.cancelled


def test_the_front_refuses_what_nobody_takes_and_what_is_too_large():
    pytest.importorskip("ray")
    replicas = FakeReplicas([], patient=True)
    answer = ask_front(replicas)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5") and replicas.cancelled
    assert ask_front(FakeReplicas([]), max_body=20).status_code == 413


def test_the_front_says_that_a_replica_is_gone():
    lost = pytest.importorskip("ray").exceptions.RayError
    answer = ask_front(FakeReplicas([], lost("gone")))
    assert answer.status_code == 503 and "is gone" in answer.json()["error"]["message"]
    stream = [[start_of(b"text/event-stream; charset=utf-8"), part_of(b"data: {}\n\n", True)]]
    first, last = ask_front(FakeReplicas(stream, lost("gone"))).text.split("\n\n")[:2]
    assert first == "data: {}" and json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    with pytest.raises(lost):  # half of an object cannot be mended: the connection breaks
        ask_front(FakeReplicas([[start_of(b"application/json"), part_of(b"{", True)]], lost("gone")))


def test_pages_of_metrics_become_one():
    registry = CollectorRegistry()
    Counter("texts", "Texts", ["kind"], registry=registry).labels("long").inc(3)
    Histogram("seconds", "Time", buckets=(1, 2), registry=registry).observe(1.5)
    page = generate_latest(registry)
    families = list(text_string_to_metric_families(labelled({"a": page, "b": page}).decode()))
    assert len({family.name for family in families}) == len(families)
    samples = {(each.name, tuple(sorted(each.labels.items()))): each.value
               for family in families for each in family.samples}  # fmt: skip
    for name in "ab":
        assert samples["texts_total", (("kind", "long"), ("replica", name))] == 3
        assert samples["seconds_bucket", (("le", "2.0"), ("replica", name))] == 1
    assert labelled({}) == b""


# -- two replicas on this machine

KEY = "secret"
TEXT = "/v1/completions"
LONG_TEXT = {"prompt": "Once upon", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


def processes():
    """parent -> children, and the pids of all that live."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    children = collections.defaultdict(list)
    for pid, parent, state in map(str.split, rows.splitlines()):
        if not state.startswith("Z"):
            children[int(parent)].append(int(pid))
    return children


def descendants(pid):
    """All processes that a process has started, directly or not."""
    children, waiting, found = processes(), [pid], set()
    while waiting:
        new = children[waiting.pop()]
        found |= set(new)
        waiting += new
    return found


@pytest.fixture(scope="module")
def cluster(model, tokenizer, tmp_path_factory, eventually):
    """A running serve_cluster.py: two replicas with four rows and a queue of four each."""
    pytest.importorskip("ray")
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer.to_dict(),
    })  # fmt: skip
    script = str(ROOT / "phase10_deployment" / "project28_serving" / "serve_cluster.py")
    command = [sys.executable, script, "--port", "0", "--device", "cpu", "--checkpoint", str(path), "--api_key", KEY,
               "--max_running", "4", "--max_waiting", "4", "--max_batch_tokens", "64", "--cpus", "0.1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    found = lambda: re.search(r"ready: the API is at (http://\S+)/v1", "".join(lines))  # noqa: E731
    try:
        eventually(lambda: found() or process.poll() is not None, 600)
        assert found(), "".join(lines)
        url, headers = found()[1], {"Authorization": f"Bearer {KEY}"}
        http = httpx.Client(base_url=url, headers=headers, timeout=120)
        api = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        yield SimpleNamespace(url=url, http=http, openai=api, process=process, lines=lines, headers=headers)
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        if process.poll() is None:
            process.kill()


def health(cluster):
    return httpx.get(f"{cluster.url}/health", timeout=30).json()


def usage_of(cluster, prompt):
    """(which replica answered, tokens of the prompt that it knew)."""
    answer = cluster.http.post(TEXT, json={"prompt": prompt, "max_tokens": 2, "temperature": 0})
    return answer.headers["x-replica"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


slow = [pytest.mark.slow, pytest.mark.timeout(900)]


class TestTwoReplicas:
    """In this order: the last one ends them."""

    pytestmark = slow

    def test_answers_are_those_of_one_model(self, cluster, model, tokenizer):
        for prompt in ("Once upon", "In the year", "x"):
            expected = generate(model, tokenizer, prompt, SamplingParams(40, 0.0, stop_ids=())).text
            ask = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0,
                   "extra_body": {"ignore_eos": True}}  # fmt: skip
            assert cluster.openai.completions.create(**ask).choices[0].text == expected
            pieces = [chunk.choices[0].text for chunk in cluster.openai.completions.create(**ask, stream=True)]
            assert "".join(pieces) == expected and len(pieces) > 5
        said = [{"role": "user", "content": "Hello"}]
        answer = cluster.openai.chat.completions.create(model="tiny", messages=said, max_tokens=5)
        assert answer.usage.completion_tokens == 5
        assert [each.id for each in cluster.openai.models.list()] == ["tiny"]

    def test_refusals_pass_through(self, cluster):
        post = cluster.http.post
        wrong = post(TEXT, json={"prompt": "x", "temperature": -1})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
        assert post(TEXT, json={"prompt": "x", "model": "no"}).json()["error"]["code"] == "model_not_found"
        broken = post(TEXT, content=b"{", headers={"Content-Type": "application/json"})
        assert broken.json()["error"]["code"] == "invalid_json"
        assert post(TEXT, content=b" " * (5 * 2**20)).json()["error"]["code"] == "request_too_large"
        assert cluster.http.get("/nowhere").json()["error"]["code"] == "unknown_url"
        locked = httpx.post(cluster.url + TEXT, json={"prompt": "x"})
        assert (locked.status_code, locked.json()["error"]["code"]) == (401, "invalid_api_key")
        assert locked.headers["www-authenticate"] == "Bearer"

    def test_what_begins_alike_meets_again_and_the_rest_is_shared_out(self, cluster):
        places = collections.defaultdict(set)
        for text in "abcdef":
            found = [usage_of(cluster, text * 400 + str(i)) for i in range(3)]
            assert len({name for name, _ in found}) == 1
            assert [cached >= 384 for _, cached in found] == [False, True, True]
            places[found[0][0]].add(text)
        assert sorted(map(len, places.values())) == [3, 3]

    def test_too_much_at_once_fills_both_and_the_rest_is_refused(self, cluster):
        async def ask_all():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=120, headers=cluster.headers) as http:
                body = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}
                asks = (http.post(cluster.url + TEXT, json=body | {"prompt": "z" * 400 + str(i)}) for i in range(40))
                return await asyncio.gather(*asks)

        answers = asyncio.run(ask_all())
        statuses = collections.Counter(answer.status_code for answer in answers)
        assert statuses.keys() == {200, 429} and statuses[200] >= 16
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "queue_full"
        assert len({answer.headers["x-replica"] for answer in answers if answer.status_code == 200}) == 2

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_frees_its_blocks(self, cluster, eventually, stream):
        def running():
            return [each["running"] for each in health(cluster)["replicas"].values()]

        async def leave():
            async with httpx.AsyncClient(timeout=120, headers=cluster.headers) as http:
                asked = asyncio.ensure_future(http.post(cluster.url + TEXT, json=LONG_TEXT | {"stream": stream}))
                while not any(await asyncio.to_thread(running)):
                    assert not asked.done()
                asked.cancel()

        def aborted():
            page = httpx.get(f"{cluster.url}/metrics").text
            return sum(map(float, re.findall(r'request_success_total\{finished_reason="abort".*\} (\S+)', page)))

        before = aborted()
        asyncio.run(leave())
        eventually(lambda: not any(running()))
        assert aborted() == before + 1
        assert [each["kv_usage"] for each in health(cluster)["replicas"].values()] == [0, 0]

    def test_metrics_name_the_replica(self, cluster):
        names = health(cluster)["replicas"].keys()
        page = httpx.get(f"{cluster.url}/metrics").text
        found = re.findall(r'vllm:num_requests_running\{.*replica="(\w+)"\} 0.0', page)
        assert len(names) == 2 and set(found) == names
        assert page.count("# TYPE vllm:num_requests_running gauge") == 1

    def test_a_killed_replica_comes_back_and_nothing_is_lost_in_silence(self, cluster, eventually):
        with cluster.http.stream("POST", TEXT, json=LONG_TEXT | {"stream": True}) as stream:
            name, read = stream.headers["x-replica"], stream.iter_lines()
            next(read)
            gone = health(cluster)["replicas"][name]["process"]
            engines = descendants(gone)
            os.kill(gone, signal.SIGKILL)
            last = [line for line in read if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        for _ in range(5):  # the other one serves meanwhile
            answer = cluster.http.post(TEXT, json={"prompt": "Once upon", "max_tokens": 2})
            assert answer.status_code == 200 and answer.headers["x-replica"] != name
        eventually(lambda: len(health(cluster)["replicas"].keys() - {name}) == 2, 300)
        places = {usage_of(cluster, text * 400)[0] for text in "ghijkl"}
        assert len(places) == 2 and name not in places
        eventually(lambda: not engines & {pid for pids in processes().values() for pid in pids})

    def test_the_signal_lets_streams_end_and_leaves_no_process(self, cluster, eventually):
        started = descendants(cluster.process.pid)
        assert started >= {each["process"] for each in health(cluster)["replicas"].values()}
        with cluster.http.stream("POST", TEXT, json=LONG_TEXT | {"stream": True}) as stream:
            read = stream.iter_lines()
            next(read)
            cluster.process.send_signal(signal.SIGTERM)
            eventually(lambda: health(cluster)["status"] == "draining")
            refused = cluster.http.post(TEXT, json={"prompt": "x"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = [line for line in read if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert cluster.process.wait(120) == 0
        eventually(lambda: not started & {pid for pids in processes().values() for pid in pids}, 120)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
