"""
Queries

This file implements what a dashboard, an alert or an autoscaler asks Prometheus for, and whether a server has it: a
name that nobody exports is no error to Prometheus but an empty panel, and an alert that never fires.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TARGET = {"job", "instance"}  # labels that Prometheus adds to everything it reads
OWN = {"up": set()}  # series that Prometheus makes itself, with their labels beside those
# By what stands where a duration or a label belongs, the query is filled in before it is sent.
FILLED_IN = {"$__rate_interval": "5m", "$__interval": "5m", "$__range": "1h"}


@dataclass(frozen=True)
class Query:
    """An expression, where it stands, and the labels that its legend or text shows."""

    where: str
    expression: str
    shown: tuple[str, ...] = ()


def exported(registry) -> dict[str, set[str]]:
    """What a registry of prometheus_client has: {name of a series: its labels}."""
    series: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


@functools.cache
def server_series() -> dict[str, set[str]]:
    """What the server of project 28 exports; raises ModuleNotFoundError without its libraries."""
    from phase10_deployment.project28_serving.metrics import create_metrics

    metrics = create_metrics("model")
    metrics.answered("GET", "/v1/models", 200)  # a counter of answers begins with the first one
    return exported(metrics.registry)


def dashboard_queries(path: Path) -> Iterator[Query]:
    """The queries of a Grafana dashboard, of its variables and of its panels."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    for variable in dashboard["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((.+), *(\w+)\)", variable["query"]["query"])
        yield Query(f"{path.name}: ${variable['name']}", asked[1], (asked[2],))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield Query(f"{path.name}: {panel['title']}", target["expr"],
                        tuple(re.findall(r"\{\{ *(\w+) *\}\}", target["legendFormat"])))  # fmt: skip


def alert_queries(path: Path) -> Iterator[Query]:
    """The queries of a file of alerts."""
    import yaml

    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            text = " ".join(rule["annotations"].values())
            yield Query(f"{path.name}: {rule['alert']}", rule["expr"], tuple(re.findall(r"\$labels\.(\w+)", text)))


def adapter_queries(rule: dict, names: list[str]) -> Iterator[Query]:
    """The queries that a rule of prometheus-adapter makes for the series of these names that it selects."""
    for name in filter(re.compile(selected_by(rule)).search, names):
        expression = rule["metricsQuery"].replace("<<.Series>>", name)
        expression = expression.replace("<<.LabelMatchers>>", 'job="any"').replace("<<.GroupBy>>", "instance")
        yield Query(f"adapter: {offered_by(rule, name)}", expression)


def selected_by(rule: dict) -> str:
    """The regular expression for names that a rule of prometheus-adapter starts from."""
    return re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1]


def offered_by(rule: dict, name: str) -> str:
    """Under which name prometheus-adapter offers a series.

    >>> offered_by({"name": {"matches": "^vllm:(.*)$", "as": "vllm_$1"}}, "vllm:num_requests_waiting")
    'vllm_num_requests_waiting'
    """
    return re.sub(rule["name"]["matches"], re.sub(r"\$(\d)", r"\\\1", rule["name"]["as"]), name)


def problems(query: Query, series: dict[str, set[str]]) -> list[str]:
    """What a query asks for and never gets; empty if all is there. Raises ModuleNotFoundError without promql_parser."""
    import promql_parser

    expression = query.expression
    for name, value in FILLED_IN.items():
        expression = expression.replace(name, value)
    try:
        tree = promql_parser.parse(expression)
    except ValueError as error:
        return [f"{query.where}: {error} in {query.expression}"]
    series, found = OWN | series, []
    kept = _labels(tree, series, found)
    found += [f"shows {label}, which is not left in its result" for label in query.shown if label not in kept]
    return [f"{query.where}: {text}" for text in dict.fromkeys(found)]


def _labels(node, series: dict[str, set[str]], found: list[str]) -> set[str]:
    """The labels that the result of an expression can have; what is missing is added to `found`."""
    import promql_parser as p

    if isinstance(node, p.MatrixSelector):
        node = node.vector_selector
    if isinstance(node, p.VectorSelector):
        if node.name not in series:
            found.append(f"no series is called {node.name}")
            return set(TARGET)
        labels = series[node.name] | TARGET
        asked = [matcher.name for matcher in node.matchers.matchers]
        found += [f"{node.name} has no label {label}" for label in asked if label not in labels]
        return labels
    if isinstance(node, p.AggregateExpr):
        labels = _labels(node.expr, series, found)
        if node.modifier is None:
            return set()
        named = set(node.modifier.labels)
        found += [f"there is no label {label} to group by" for label in sorted(named - labels)]
        return labels & named if node.modifier.type == p.AggModifierType.By else labels - named
    if isinstance(node, p.Call):
        inner = [_labels(argument, series, found) for argument in node.args]
        return set().union(*inner) - ({"le"} if node.func.name == "histogram_quantile" else set())
    if isinstance(node, p.BinaryExpr):
        sides = [_labels(side, series, found) for side in (node.lhs, node.rhs)]
        number = [isinstance(side, p.NumberLiteral) for side in (node.lhs, node.rhs)]
        return sides[0] | sides[1] if any(number) else sides[0]
    if isinstance(node, (p.ParenExpr, p.UnaryExpr, p.SubqueryExpr)):
        return _labels(node.expr, series, found)
    return set()  # a number or a text
