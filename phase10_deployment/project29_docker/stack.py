"""
Stack

This file implements what stands between a clean machine and running containers: what Docker must have, which ports must
be free, which model is served, and what Compose is told of it.
"""

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common import CHECKPOINTS, MODELS, ROOT
from phase1_foundation.project3_pretrain.loading import default_source
from phase10_deployment.project29_docker import config

FOLDER = Path(__file__).resolve().parent
SPARE_SECONDS = 10  # between the end of draining and SIGKILL


def compose_command(s, *words: str) -> list[str]:
    """A command of Docker Compose for the files of this folder."""
    files = ["compose.yaml"] + ["compose.cuda.yaml"] * s.CUDA
    return ["docker", "compose", *(word for name in files for word in ("--file", str(FOLDER / name))), *words]


def start_command(s) -> list[str]:
    """The command that starts everything, and returns when it is healthy."""
    return compose_command(s, "up", "--detach", "--wait", "--wait-timeout", str(s.WAIT_SECONDS), *["--build"] * s.BUILD)


def environment(s, source: str) -> dict[str, str]:
    """What the ``${...}`` of the Compose files stand for.

    Args:
        source: of the model, from `model_source`.
    """
    mounted, inside = mount_of(source)
    values = {
        "LLM_TARGET": "cuda" if s.CUDA else "cpu",
        "LLM_CHECKPOINT": inside,
        "LLM_CHECKPOINTS": str(mounted),
        "LLM_DRAIN_SECONDS": str(s.DRAIN_SECONDS),
        "LLM_STOP_SECONDS": str(s.DRAIN_SECONDS + SPARE_SECONDS),
        "LLM_BIND": s.BIND,
        "LLM_GRAFANA_ANONYMOUS": "true" if s.GRAFANA_PASSWORD is None else "false",
        "LLM_ROADMAP_API_KEYS": ",".join(config.api_keys(s)),
    }
    values |= {f"LLM_{name}": str(getattr(s, name)) for name in config.PORTS}
    if s.MEMORY_GIB is not None:
        values["LLM_MEMORY"] = f"{round(s.MEMORY_GIB * 1024)}m"
    if s.GRAFANA_PASSWORD is not None:
        values["LLM_GRAFANA_PASSWORD"] = s.GRAFANA_PASSWORD
    return values


def model_source(s) -> str:
    """The model that will be served, as on this machine; raises FileNotFoundError where there is none."""
    if s.CHECKPOINT is None:
        return str(default_source())
    path = Path(s.CHECKPOINT)
    is_name = s.CHECKPOINT.count("/") == 1 and path.suffix != ".pt" and not s.CHECKPOINT.startswith((".", "/"))
    if not path.exists() and not is_name:
        raise FileNotFoundError(f"CHECKPOINT={s.CHECKPOINT} does not exist: give a checkpoint, a folder or org/name")
    return str(path.resolve()) if path.exists() else s.CHECKPOINT


def mount_of(source: str) -> tuple[Path, str]:
    """(the folder of this machine that the server sees as checkpoints/, the model as the server calls it)."""
    path = Path(source)
    if not path.exists():
        return CHECKPOINTS, source  # org/name: the server fetches it
    for folder in (CHECKPOINTS, MODELS):  # models/ is a part of the image
        if path.is_relative_to(folder):
            return CHECKPOINTS, path.relative_to(ROOT).as_posix()
    return path.parent, f"checkpoints/{path.name}"


def docker_problem() -> str | None:
    """What is missing before Docker can do anything, with the remedy; None if nothing is."""
    if not shutil.which("docker"):
        return "the docker command is missing: install Docker Engine or Docker Desktop"
    if _fails("docker", "info"):
        return "the docker command reaches no engine: start Docker, or set DOCKER_HOST to the address of one"
    if _fails("docker", "compose", "version"):
        return "docker has no compose command: install the plugin docker-compose-plugin"
    return None


def model_problem(source: str) -> str | None:
    """Why the server, which is another user, could not read a model; None if it can."""
    path = Path(source)
    unreadable = next((each for each in _files(path) if not each.stat().st_mode & stat.S_IROTH), None)
    if unreadable is not None:
        return f"{unreadable} is not readable by others, as the server is: chmod -R o+rX {path.parent}"
    return None


def _files(path: Path) -> Iterator[Path]:
    """A file itself, all files of a folder, or nothing."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (each for each in path.rglob("*") if each.is_file())


def port_problems(s) -> list[str]:
    """Ports that something else has; none if these containers run already, as they are only brought up to date."""
    running = subprocess.run(compose_command(s, "ps", "--quiet"), capture_output=True, text=True)
    if running.returncode == 0 and running.stdout.strip():
        return []
    found = []
    for name in config.PORTS:
        address = "127.0.0.1" if name == "PROMETHEUS_PORT" else s.BIND
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address, getattr(s, name)))
            except OSError as error:
                found.append(f"{name}={getattr(s, name)} cannot be used at {address} ({error.strerror}): give another "
                             f"--{name.lower()}")  # fmt: skip
    return found


def addresses(s) -> dict[str, str]:
    """Where everything is, once it runs."""
    host = "localhost" if config.is_loopback(s.BIND) or s.BIND in ("0.0.0.0", "::") else s.BIND
    return {
        "API": f"http://{host}:{s.SERVER_PORT}/v1",
        "chat page": f"http://{host}:{s.UI_PORT}",
        "dashboard": f"http://{host}:{s.GRAFANA_PORT}",
        "Prometheus": f"http://localhost:{s.PROMETHEUS_PORT}",
    }


def run_compose(command: list[str], values: dict[str, str]) -> int:
    """Run Compose at this terminal; returns its exit status."""
    return subprocess.run(command, env=os.environ | values).returncode


def _fails(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode != 0
    except subprocess.TimeoutExpired:
        return True
