"""
Manifests

This file implements how a Dockerfile, Compose and Kubernetes files are read, so that they can be checked before
anything is started.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
COMPOSE = ("compose.yaml", "compose.cuda.yaml")  # the second is laid over the first


class CannotCheckError(Exception):
    """A tool is missing; the message says which, and where it comes from."""


def documents(path: Path) -> list[dict]:
    """The documents of a YAML file."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where it was built
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8"), loader) if document]


def filled_in(value: Any, environment: dict[str, str] | None = None) -> Any:
    """A Compose file with its ``${NAME:-default}`` filled in.

    >>> filled_in({"ports": ["${PORT:-80}:8000"]}), filled_in("${PORT:-80}", {"PORT": "81"})
    ({'ports': ['80:8000']}, '81')
    """
    if isinstance(value, dict):
        return {key: filled_in(inner, environment) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled_in(inner, environment) for inner in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: (environment or {}).get(match[1]) or match[2], value)


def seconds(duration: str) -> float:
    """A duration of Compose in seconds.

    >>> seconds("1m30s"), seconds("40s")
    (90.0, 40.0)
    """
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))


def flag(command: list[str], name: str) -> str | None:
    """The value of ``--name=value`` in a command."""
    return next((word.split("=", 1)[1] for word in command if word.startswith(f"--{name}=")), None)


def kubernetes_files(folder: Path) -> list[Path]:
    """The manifests of Kubernetes, without kustomizations."""
    return [path for path in sorted((folder / "kubernetes").rglob("*.yaml")) if path.name != "kustomization.yaml"]


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """(instruction, the rest) of a Dockerfile, continued lines in one."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        yield name.upper(), " ".join(rest.split())


def targets(dockerfile: str) -> dict[str, list[tuple[str, str]]]:
    """The stages of a Dockerfile, each with the instructions of those that it is built on."""
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for name, rest in instructions(dockerfile):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = stages[stage] = list(stages.get(base, []))
        current.append((name, rest))
    return stages


def is_pinned(image: str) -> bool:
    """Whether an image is named by its digest."""
    return re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image) is not None
