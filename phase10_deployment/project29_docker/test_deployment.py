"""The manifests are valid, agree with each other and with the server; and what would break them is noticed."""

import fnmatch
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent import futures
from pathlib import Path

import pytest

from common import ROOT
from common import settings as settings_module
from phase10_deployment.project29_docker import agreement, check, config, manifests, promql, stack, validators

FOLDER = manifests.FOLDER
CHECKS = agreement.checks(config.KUBERNETES_VERSION)


# --- the manifests ---


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: f"{one.what}: {one.by}")
def test_nothing_is_wrong(one):
    try:
        assert one.problems() == []
    except manifests.CannotCheckError as error:
        pytest.skip(str(error))


# (file, what stands there, what is put there, what is said of it)
MISTAKES = [
    ("Dockerfile", "USER 10001:10001", "USER llm", "USER llm must be a number"),
    ("Dockerfile", "HEALTHCHECK", "LABEL x=1 ", "no HEALTHCHECK"),
    ("Dockerfile", 'CMD ["python", "phase10', "CMD python phase10", "CMD is a line for a shell"),
    ("Dockerfile", "@sha256:3", "@sha256:x", "names no digest"),
    ("Dockerfile", "COPY . .\n", "", "the code is not the last thing that is copied"),
    ("Dockerfile", "WORKDIR /app", "WORKDIR app", "DL3000"),
    ("compose.yaml", "read_only: true\n  #", "read_only: false\n  #", "server: can write to its image"),
    ("compose.yaml", "cap_drop: [ALL]\n  security", "cap_drop: [MKNOD]\n  security", "server: has rights"),
    ("compose.yaml", "prom/prometheus:v3.13.3@sha256:6", "prom/prometheus:latest@sha256:x", "neither built here nor"),
    ("compose.yaml", "LLM_STOP_SECONDS:-40", "LLM_STOP_SECONDS:-20", "killed after 20s, before it has drained (35 s)"),
    ("compose.yaml", "./alerts.yml:/etc", "./alarms.yml:/etc", "there is no ./alarms.yml"),
    ("compose.yaml", "restart: unless-stopped\n  logging", "restarts: always\n  logging", "'restarts' was unexpected"),
    ("compose.yaml", "dashboards/serving.json", "dashboards/home.json", "there is no dashboard"),
    ("kubernetes/base/server.yaml", "GracePeriodSeconds: 60", "GracePeriodSeconds: 40", "after 40 s, and needs 45"),
    ("kubernetes/base/server.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "server: runs as root"),
    ("kubernetes/base/server.yaml", "readOnlyRootFilesystem: true", "privileged: false", "can write to its image"),
    ("kubernetes/base/server.yaml", "readinessProbe:", "readynessProbe:", "lacks a probe"),
    ("kubernetes/base/server.yaml", "readinessProbe:", "readynessProbe:", "'readynessProbe' was unexpected"),
    ("kubernetes/base/server.yaml", "selector: {app.kubernetes.io/name: server}", "selector: {a: b}", "selects"),
    ("kubernetes/base/server.yaml", "--max_running=64", "--max_running=32", "never reaches 48, as a server has 32"),
    ("kubernetes/base/autoscaler.yaml", "vllm_num_requests_waiting", "vllm:num_requests_waiting", "no rule of prom"),
    ("kubernetes/base/autoscaler.yaml", "Deployment, name: server", "Deployment, name: s", "scales nothing"),
    ("kubernetes/base/autoscaler.yaml", "autoscaling/v2", "autoscaling/v2beta1", "autoscaler.yaml"),
    ("kubernetes/cuda/kustomization.yaml", 'value: "192"', 'value: "300"', "cuda: autoscaler: vllm_num_requests"),
    ("kubernetes/cuda/kustomization.yaml", "resources: [../base]", "resources: [../basis]", "cuda: "),
    ("kubernetes/prometheus-adapter.yaml", "(waiting|running)", "(waiting)", "offers vllm_num_requests_running"),
    ("kubernetes/prometheus-adapter.yaml", "avg_over_time(<<", "avg_over_time((<<", "adapter: vllm_num_requests"),
    ("alerts.yml", "vllm:num_preemptions_total", "vllm:num_preemption_total", "no series is called vllm:num_preem"),
    ("alerts.yml", "avg by (model_name)", "avg by (model)", "QueueGrows: there is no label model to group by"),
    ("alerts.yml", 'status=~"5.."}[5m]))\n', 'code=~"5.."}[5m]))\n', "http_requests_total has no label code"),
    ("alerts.yml", "$labels.instance }} preempts", "$labels.pod }} preempts", "CacheThrashes: shows pod"),
    ("alerts.yml", "expr: up", "expr: (up", "unclosed left parenthesis"),
    ("grafana/dashboards/serving.json", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "serving.json: KV"),
    ("grafana/dashboards/serving.json", "{{finished_reason}}", "{{reason}}", "How texts end: shows reason"),
    ("grafana/provisioning/datasources/prometheus.yaml", "uid: prometheus", "uid: other", "asks an unknown source"),
    ("grafana/provisioning/dashboards/dashboards.yaml", "/etc/grafana/dash", "/var/dash", "where none are"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "said"), MISTAKES, ids=[f"{m[0]}: {m[3]}" for m in MISTAKES])
def test_a_mistake_is_noticed(tmp_path, name, old, new, said):
    folder = tmp_path / "copy"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    problems, unchecked = [], []
    quick = ("rules of this project", "what the server exports")
    for one in sorted(agreement.checks(config.KUBERNETES_VERSION, folder), key=lambda one: one.by not in quick):
        try:
            problems += one.problems()
            if any(said in problem for problem in problems):
                return
        except manifests.CannotCheckError as error:
            unchecked.append(str(error))
        except KeyError as error:  # of another check, whose place the mistake has taken away
            problems.append(f"lacks {error}")
    if unchecked:
        pytest.skip("; ".join(unchecked))
    pytest.fail(f"nobody noticed: {problems}")


def test_probes_and_scrapes_ask_paths_that_the_server_has():
    pytest.importorskip("fastapi")
    from phase10_deployment.project28_serving.client import EngineClient
    from phase10_deployment.project28_serving.server import create_app

    paths = set(create_app(EngineClient(lambda: None)).openapi()["paths"])
    template = manifests.documents(FOLDER / "kubernetes" / "base" / "server.yaml")[0]["spec"]["template"]
    container = template["spec"]["containers"][0]
    asked = {container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    asked.add(template["metadata"]["annotations"]["prometheus.io/path"])
    assert asked == {"/health/ready", "/health/live", "/metrics"} and asked <= paths
    healthcheck = dict(manifests.targets((FOLDER / "Dockerfile").read_text(encoding="utf-8"))["cpu"])["HEALTHCHECK"]
    assert "http://127.0.0.1:8000/health/ready" in healthcheck


def commands():
    """(where it stands, the words) of every command that a container runs."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    yield "Dockerfile", json.loads(dict(manifests.targets(text)["cpu"])["CMD"])
    services = manifests.filled_in(manifests.documents(FOLDER / "compose.yaml")[0])["services"]
    yield from ((f"compose {name}", services[name]["command"]) for name in ("server", "ui"))
    for path in manifests.kubernetes_files(FOLDER):
        for document in manifests.documents(path):
            if document["kind"] == "Deployment":
                yield path.name, document["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("where", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_scripts_take_the_flags_they_are_given(where, words):
    assert words[0] == "python"
    script = ROOT / words[1]
    if not script.exists() and "project30" in words[1]:
        pytest.skip("the chat page is not built yet")
    module = ".".join(script.parent.relative_to(ROOT).parts) + ".config"
    settings = settings_module.load(importlib.import_module(module), words[2:])
    assert settings.HOST == "0.0.0.0" and settings.PORT in (8000, 7860)


# --- the image's contents ---


def is_let_in(path, patterns):
    """Docker's rule: the last pattern that names a path, or a folder above it, decides."""
    let_in, parts = True, path.split("/")
    for pattern in patterns:
        bare = pattern.lstrip("!")
        for n in range(1, len(parts) + 1):
            above = "/".join(parts[:n])
            anywhere = bare.startswith("**/") and fnmatch.fnmatch(parts[n - 1], bare[3:])
            if anywhere or (fnmatch.fnmatch(above, bare) and above.count("/") == bare.count("/")):
                let_in = pattern.startswith("!")
    return let_in


@pytest.fixture(scope="module")
def patterns():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_no_secrets_and_no_ballast_are_let_in(patterns):
    for path in (".git/config", ".env", "checkpoints/project3/best.pt", "data/pretrain/x.bin", "results/a.json",
                 "README.md", "tests/house.py", "common/__pycache__/run.pyc", "report/report.md",
                 "phase10_deployment/project29_docker/compose.yaml",
                 "phase1_foundation/project3_pretrain/test_model.py"):  # fmt: skip
        assert not is_let_in(path, patterns), path


def test_what_is_let_in_is_all_that_the_server_needs(tmp_path, patterns):
    pytest.importorskip("uvicorn")
    for folder in ("common", *(path.name for path in ROOT.glob("phase*"))):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and is_let_in(name, patterns):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / name)
    program = (
        "import sys, common; assert common.__file__.startswith(sys.argv[1]), common.__file__\n"
        "import phase10_deployment.project28_serving.serve as serve\n"
        "from phase10_deployment.project28_serving import client, engine, server, shutdown, worker\n"
        "serve.main(['--help'])"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--drain_seconds" in done.stdout


def test_stages_inherit_what_they_are_built_on():
    text = "ARG A=1\nFROM python AS base\nUSER 7\n# FROM nothing\nFROM base AS last\nRUN a && \\\n    b\n"
    assert manifests.targets(text)["last"] == [
        ("FROM", "python AS base"), ("USER", "7"), ("FROM", "base AS last"), ("RUN", "a && b")
    ]  # fmt: skip


# --- queries ---

SERIES = {"a_total": {"model"}, "b_bucket": {"model", "le"}, "c": set()}
QUERIES = [
    ("sum(rate(a_total[5m]))", (), []),
    ('a_total{model=~"$m", job="x"}', ("model", "instance"), []),
    ("histogram_quantile(0.9, sum by (le) (rate(b_bucket[$__rate_interval])))", (), []),
    ("sum by (model, le) (b_bucket) / ignoring (le) group_left c", ("model", "le"), []),
    ("a", (), ["no series is called a"]),
    ("rate(a_total[5m]) and x > 1", (), ["no series is called x"]),
    ('a_total{node="1"}', (), ["a_total has no label node"]),
    ("sum by (le) (a_total)", (), ["there is no label le to group by"]),
    ("sum(a_total)", ("model",), ["shows model, which is not left in its result"]),
    ("sum without (model) (a_total)", ("model",), ["shows model, which is not left in its result"]),
    ("histogram_quantile(0.9, b_bucket)", ("le",), ["shows le, which is not left in its result"]),
    ("1 - max_over_time((c)[5m:1m])", ("job",), []),
    ("up == 0", ("instance",), []),
    ("sum(", (), ["unclosed left parenthesis in sum("]),
]


@pytest.mark.parametrize(("expression", "shown", "expected"), QUERIES, ids=[query[0] for query in QUERIES])
def test_what_a_query_asks_for_in_vain(expression, shown, expected):
    pytest.importorskip("promql_parser", reason="promql-parser is not installed: uv sync --group dev")
    found = promql.problems(promql.Query("here", expression, shown), SERIES)
    assert found == [f"here: {text}" for text in expected]


def test_series_are_those_of_the_registry():
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    client.Gauge("now", "", ["model"], registry=registry).labels("m").set(1)
    client.Counter("ever", "", registry=registry).inc()
    client.Histogram("times", "", ["model"], registry=registry).labels("m").observe(1)
    client.Counter("nothing", "", ["model"], registry=registry)  # without a value: nobody can ask for it yet
    series = promql.exported(registry)
    assert series["now"] == {"model"} and series["ever_total"] == set() and "nothing_total" not in series
    assert series["times_bucket"] == {"model", "le"} and series["times_sum"] == {"model"}


def test_every_metric_of_the_server_is_on_the_dashboard():
    asked = " ".join(
        query.expression for query in promql.dashboard_queries(FOLDER / agreement.DASHBOARDS / "serving.json")
    )
    names = {name.removesuffix("_bucket") for name in promql.server_series()}
    names = {name for name in names if not name.endswith(("_created", "_sum", "_count"))}
    assert {name for name in names if name not in asked} == set()


# --- check.py ---


def test_the_table_names_what_could_not_be_checked(monkeypatch, capsys):
    def missing():
        raise manifests.CannotCheckError("no such tool")

    table = [agreement.Check("a", "tool", lambda: []), agreement.Check("b", "tool", missing)]
    monkeypatch.setattr(agreement, "checks", lambda version: table)
    check.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["a", "tool", "ok"],
        ["b", "tool", "not", "checked:", *["no", "such", "tool"]],
    ]
    with pytest.raises(SystemExit):
        check.main(["--strict"])
    table.append(agreement.Check("c", "tool", lambda: ["c is wrong"]))
    with pytest.raises(SystemExit):
        check.main([])
    assert "c is wrong" in capsys.readouterr().out


def test_a_missing_tool_is_no_mistake(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for function in (validators.lint_dockerfile, validators.compose_config, validators.prometheus_config):
        with pytest.raises(manifests.CannotCheckError, match="is not installed"):
            function(Path(FOLDER))


# --- a real container, where there is an engine ---


@pytest.fixture
def engine():
    """The docker or podman command that reaches an engine which has the image."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("neither docker nor podman reaches an engine")
    if subprocess.run([name, "image", "inspect", "llm-roadmap:cpu"], capture_output=True).returncode:
        pytest.skip("there is no image llm-roadmap:cpu: build it as the Dockerfile says")
    return lambda *words: subprocess.run([name, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def container(engine):
    """(its id, the address of its API): confined as in compose.yaml, with the newest model of this machine."""
    try:
        mounted, source = stack.mount_of(str(stack.default_source()))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    confined = "--read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp:exec,mode=1777,size=1g"
    command = [*manifests.documents(FOLDER / "compose.yaml")[0]["services"]["server"]["command"][:4]]
    started = engine("run", "--detach", "--no-healthcheck", "--publish", "127.0.0.1::8000", *confined.split(),
                     "--memory", "4g", "--volume", f"{mounted}:/app/checkpoints:ro", "llm-roadmap:cpu", *command,
                     f"--checkpoint={source}")  # fmt: skip
    yield started, "http://" + engine("port", started, "8000").splitlines()[0]
    engine("rm", "--force", started)


def ask(address, n_tokens):
    """A completion, as an object."""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": n_tokens, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def n_running(address):
    """Texts that are being written."""
    with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
        return json.load(response)["running"]


@pytest.mark.slow
def test_a_confined_container_serves_drains_and_ends_with_0(engine, container):
    name, address = container
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/health/ready", timeout=5)
            break
        except OSError:  # refused, or 503
            assert engine("inspect", "--format", "{{.State.Running}}", name) == "true", engine("logs", name)
            time.sleep(0.5)
    else:
        pytest.fail(f"not ready: {engine('logs', name)}")
    assert engine("exec", name, "python", "-c", "import os; print(os.getuid())") == "10001"
    assert ask(address, 4)["usage"]["completion_tokens"] == 4
    with futures.ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(ask, address, 100) for _ in range(8)]
        while n_running(address) < 8 and not all(each.done() for each in asked):
            time.sleep(0.02)
        engine("stop", "--time", "40", name)
        assert [each.result()["usage"]["completion_tokens"] for each in asked] == [100] * 8
    assert engine("inspect", "--format", "{{.State.ExitCode}}", name) == "0"


if __name__ == "__main__":
    for one in CHECKS:
        print(f"{one.what:<28} {one.by}")
    raise SystemExit(pytest.main([__file__]))
