"""
Validators

This file implements whether the manifests follow their schemas, by the tools that everybody uses for it. Each function
returns what is wrong, and raises CannotCheckError where its tool is missing.
"""

import json
import shutil
import subprocess
from pathlib import Path

from phase10_deployment.project29_docker.manifests import (
    COMPOSE,
    CannotCheckError,
    documents,
    kubernetes_files,
)


def tool(folder: Path, source: str, *command: str) -> subprocess.CompletedProcess:
    """Run a program in a folder; raises CannotCheckError where there is none. source: where it comes from."""
    if not shutil.which(command[0]):
        raise CannotCheckError(f"{command[0]} is not installed: {source}")
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def lint_dockerfile(folder: Path) -> list[str]:
    """What hadolint says of the Dockerfile."""
    done = tool(folder, "uv sync --group dev", "hadolint", "--format", "json", "Dockerfile")
    return [f"line {one['line']}: {one['code']} {one['message']}" for one in json.loads(done.stdout or "[]")]


def compose_schema(folder: Path, name: str) -> list[str]:
    """Where a file breaks the schema of the Compose specification."""
    try:
        import jsonschema
        from check_jsonschema.builtin_schemas import get_builtin_schema
    except ModuleNotFoundError:
        raise CannotCheckError("check-jsonschema is not installed: uv sync --group dev") from None
    schema = jsonschema.Draft202012Validator(get_builtin_schema("vendor.compose-spec"))
    errors = schema.iter_errors(documents(folder / name)[0])
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def compose_config(folder: Path) -> list[str]:
    """What Compose itself says of its files, laid over each other."""
    if tool(folder, "see Docker's own pages", "docker", "compose", "version").returncode:
        raise CannotCheckError("the docker command here has no compose plugin")
    files = [word for name in COMPOSE for word in ("--file", name)]
    done = tool(folder, "see Docker's own pages", "docker", "compose", *files, "config", "--quiet")
    return done.stderr.splitlines() if done.returncode else []


def kubernetes_problems(document: dict, version: str, where: str) -> list[str]:
    """Where a manifest breaks the schemas of a version of Kubernetes; unknown fields are wrong, too."""
    try:
        import kubernetes_validate
    except ModuleNotFoundError:
        raise CannotCheckError("kubernetes-validate is not installed: uv sync --group dev") from None
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(map(str, error.path))
        return [f"{where}: {document['kind']} {document['metadata']['name']}: {path}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{where}: {error}"]
    return []


def kubernetes_schema(folder: Path, version: str) -> list[str]:
    """Where the manifests break the schemas."""
    return [
        problem
        for path in kubernetes_files(folder)
        for document in documents(path)
        for problem in kubernetes_problems(document, version, path.name)
    ]


def kustomized(folder: Path, overlay: str) -> list[dict]:
    """The manifests of a folder below kubernetes/, put together by kubectl; raises ValueError if it cannot."""
    import yaml

    done = tool(folder, "see the pages of Kubernetes", "kubectl", "kustomize", f"kubernetes/{overlay}")
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return list(yaml.safe_load_all(done.stdout))


def prometheus_config(folder: Path) -> list[str]:
    """What promtool says of Prometheus's configuration and of the alerts in it."""
    done = tool(folder, "it comes with Prometheus", "promtool", "check", "config", "prometheus.yml")
    return done.stderr.splitlines() if done.returncode else []
