"""
Agreement

This file implements what no schema knows: whether the manifests agree with each other and with the server, and keep the
rules of this project. Each function returns what is wrong.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from phase10_deployment.project29_docker import promql, validators
from phase10_deployment.project29_docker.manifests import (
    COMPOSE,
    FOLDER,
    CannotCheckError,
    documents,
    filled_in,
    flag,
    instructions,
    is_pinned,
    kubernetes_files,
    seconds,
    targets,
)

DASHBOARDS = Path("grafana", "dashboards")
CLOSING_SECONDS = 5  # that a server may take to close its connections after it has drained


def dockerfile_rules(folder: Path = FOLDER) -> list[str]:
    """Pinned, without rights, in a form that signals reach, and with code in the last layer."""
    text, found = (folder / "Dockerfile").read_text(encoding="utf-8"), []
    for name, rest in instructions(text):
        if name == "ARG" and rest.startswith("PYTHON_IMAGE=") and not is_pinned(rest.split("=", 1)[1]):
            found.append(f"{rest} names no digest")
    for target in ("cpu", "cuda"):
        steps = targets(text).get(target, [])
        last = dict(steps)
        user = last.get("USER", "root").split(":")[0]
        if not user.isdigit() or user == "0":
            found.append(f"{target}: USER {user} must be a number, and not 0: Kubernetes cannot see who a name is")
        found += [f"{target}: no HEALTHCHECK"] * ("HEALTHCHECK" not in last)
        found += [f"{target}: CMD is a line for a shell"] * (not last.get("CMD", "").startswith("["))
        copies = [rest for name, rest in steps if name == "COPY"]
        found += [f"{target}: the code is not the last thing that is copied"] * (copies[-1:] != [". ."])
    return found


def compose_rules(folder: Path = FOLDER, environment: dict[str, str] | None = None) -> list[str]:
    """Images pinned, nothing as root, enough time to drain, and every file there."""
    services, found = filled_in(documents(folder / "compose.yaml")[0], environment)["services"], []
    for name, service in services.items():
        image = service["image"]
        found += [f"{name}: {image} is neither built here nor pinned"] * (
            not image.startswith("llm-roadmap:") and not is_pinned(image)
        )
        confined = service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
        found += [f"{name}: has rights that it does not need"] * (not confined)
        found += [f"{name}: has no limit of memory"] * (not service["deploy"]["resources"]["limits"].get("memory"))
        found += [f"{name}: can write to its image"] * (image.startswith("llm") and not service.get("read_only"))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            if source.startswith("./") and not (folder / source).exists():
                found.append(f"{name}: there is no {source}")
    server = services["server"]
    drain = float(flag(server["command"], "drain_seconds")) + CLOSING_SECONDS
    if seconds(server["stop_grace_period"]) < drain:
        found.append(f"server: is killed after {server['stop_grace_period']}, before it has drained ({drain:g} s)")
    return found


def kubernetes_rules(folder: Path = FOLDER, overlay: list[dict] | None = None) -> list[str]:
    """Confined, probed, drained in time, and scaled by metrics that are there.

    Args:
        overlay: manifests put together by kustomize; none: those of kubernetes/base as they stand.
    """
    base = [path for path in kubernetes_files(folder) if path.parent.name == "base"]
    every = overlay or [one for path in base for one in documents(path)]
    deployments = {one["metadata"]["name"]: one["spec"]["template"] for one in every if one["kind"] == "Deployment"}
    found = [problem for name, template in deployments.items() for problem in _pod_rules(name, template)]
    for one in every:
        selector = one["spec"].get("selector") if one["kind"] in ("Service", "PodDisruptionBudget") else None
        wanted = (selector or {}).get("matchLabels", selector)
        labels = [template["metadata"]["labels"] for template in deployments.values()]
        if wanted and not any(wanted.items() <= each.items() for each in labels):
            found.append(f"{one['kind']} {one['metadata']['name']}: selects nothing")
    server = deployments["server"]["spec"]
    container = server["containers"][0]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = sleep + float(flag(container["args"], "drain_seconds")) + CLOSING_SECONDS
    if server["terminationGracePeriodSeconds"] < needed:
        found.append(f"server: is killed after {server['terminationGracePeriodSeconds']} s, and needs {needed:g}")
    rows = int(flag(container["args"], "max_running"))
    scaler = next(one for one in every if one["kind"] == "HorizontalPodAutoscaler")
    return found + _scaler_rules(scaler, set(deployments), rows, adapter_metrics(folder))


def kustomized_problems(folder: Path, kubernetes: str) -> list[str]:
    """What is wrong with that which kubectl would send."""
    found = []
    for overlay in ("base", "cuda"):
        try:
            every = validators.kustomized(folder, overlay)
        except ValueError as error:
            found.append(f"{overlay}: {error}")
            continue
        problems = [text for one in every for text in validators.kubernetes_problems(one, kubernetes, overlay)]
        found += problems or [f"{overlay}: {text}" for text in kubernetes_rules(folder, every)]
    return found


def _pod_rules(name: str, template: dict) -> list[str]:
    """What a pod must say of itself."""
    spec, container = template["spec"], template["spec"]["containers"][0]
    confined = container["securityContext"]
    limits = container["resources"]["limits"]
    rules = {
        "runs as root": spec["securityContext"].get("runAsNonRoot") and spec["securityContext"].get("runAsUser"),
        "can write to its image": confined.get("readOnlyRootFilesystem"),
        "can get more rights": confined.get("allowPrivilegeEscalation") is False,
        "keeps capabilities": confined.get("capabilities") == {"drop": ["ALL"]},
        "lacks a probe": {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(),
        "has no limit of memory": limits.get("memory"),
        "asks for nothing": container["resources"].get("requests", {}).keys() >= {"cpu", "memory"},
        "has no place to write": any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]),
    }
    return [f"{name}: {text}" for text, holds in rules.items() if not holds]


def _scaler_rules(scaler: dict, deployments: set[str], rows: int, offered: set[str]) -> list[str]:
    """Whether what the autoscaler looks at exists, and can be reached."""
    found = []
    if scaler["spec"]["scaleTargetRef"]["name"] not in deployments:
        found.append("autoscaler: scales nothing")
    for metric in scaler["spec"]["metrics"]:
        name, target = metric["pods"]["metric"]["name"], float(metric["pods"]["target"]["averageValue"])
        found += [f"autoscaler: no rule of prometheus-adapter offers {name}"] * (name not in offered)
        if name.endswith("_running") and target >= rows:
            found.append(f"autoscaler: {name} never reaches {target:g}, as a server has {rows} rows")
    return found


def adapter_rules(folder: Path = FOLDER) -> list[dict]:
    """The rules of prometheus-adapter."""
    import yaml

    config_map = documents(folder / "kubernetes" / "prometheus-adapter.yaml")[0]
    return yaml.safe_load(config_map["data"]["config.yaml"])["rules"]


def adapter_metrics(folder: Path = FOLDER) -> set[str]:
    """The metrics that prometheus-adapter offers, of those that the server has."""
    names = list(_series())
    return {
        promql.offered_by(rule, name) for rule in adapter_rules(folder) for name in names
        if re.search(promql.selected_by(rule), name)
    }  # fmt: skip


def _series() -> dict[str, set[str]]:
    try:
        return promql.server_series()
    except ModuleNotFoundError as error:
        raise CannotCheckError(f"{error.name} is not installed: uv sync --group serve") from None


def queries(folder: Path = FOLDER) -> list[promql.Query]:
    """All that is asked of Prometheus."""
    found = [query for path in sorted((folder / DASHBOARDS).glob("*.json")) for query in promql.dashboard_queries(path)]
    found += promql.alert_queries(folder / "alerts.yml")
    return found + [query for rule in adapter_rules(folder) for query in promql.adapter_queries(rule, list(_series()))]


def query_problems(folder: Path = FOLDER) -> list[str]:
    """Queries for metrics or labels that the server does not have."""
    series = _series()
    try:
        return [problem for query in queries(folder) for problem in promql.problems(query, series)]
    except ModuleNotFoundError:
        raise CannotCheckError("promql-parser is not installed: uv sync --group dev") from None


def grafana_rules(folder: Path = FOLDER) -> list[str]:
    """The dashboards' source of data is the one that is set up, and they lie where they are looked for."""
    provisioning = folder / "grafana" / "provisioning"
    sources = documents(provisioning / "datasources" / "prometheus.yaml")[0]["datasources"]
    uids, found = {source["uid"] for source in sources}, []
    for path in sorted((folder / DASHBOARDS).glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        used = [*dashboard["panels"], *dashboard["templating"]["list"]]
        found += [f"{path.name}: {one.get('title') or one['name']} asks an unknown source" for one in used
                  if one["datasource"]["uid"] not in uids]  # fmt: skip
        ids = [panel["id"] for panel in dashboard["panels"]]
        found += [f"{path.name}: two panels have the same id"] * (len(set(ids)) < len(ids))
    grafana = documents(folder / "compose.yaml")[0]["services"]["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    looked = documents(provisioning / "dashboards" / "dashboards.yaml")[0]["providers"][0]["options"]["path"]
    found += [f"dashboards are looked for in {looked}, where none are"] * (mounted["./grafana/dashboards"] != looked)
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    found += [f"there is no dashboard {home}"] * (not (folder / DASHBOARDS / Path(home).name).exists())
    return found


class Check(NamedTuple):
    """One check: what is looked at, by whom, and a function that returns what is wrong."""

    what: str
    by: str
    problems: Callable[[], list[str]]


def checks(kubernetes: str, folder: Path = FOLDER) -> list[Check]:
    """All of them, for this version of Kubernetes."""
    schema = partial(validators.compose_schema, folder)
    return [
        Check("Dockerfile", "hadolint", partial(validators.lint_dockerfile, folder)),
        Check("Dockerfile", "rules of this project", partial(dockerfile_rules, folder)),
        *(Check(name, "schema of Compose", partial(schema, name)) for name in COMPOSE),
        Check("compose.yaml", "docker compose config", partial(validators.compose_config, folder)),
        Check("compose.yaml", "rules of this project", partial(compose_rules, folder)),
        Check("kubernetes/", f"schemas of Kubernetes {kubernetes}",
              partial(validators.kubernetes_schema, folder, kubernetes)),
        Check("kubernetes/", "kubectl kustomize, then both", partial(kustomized_problems, folder, kubernetes)),
        Check("kubernetes/", "rules of this project", partial(kubernetes_rules, folder)),
        Check("prometheus.yml, alerts.yml", "promtool", partial(validators.prometheus_config, folder)),
        Check("queries", "what the server exports", partial(query_problems, folder)),
        Check("grafana/", "rules of this project", partial(grafana_rules, folder)),
    ]  # fmt: skip
