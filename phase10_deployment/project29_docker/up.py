"""Start the server, the chat page, Prometheus and Grafana in containers.

uv run python phase10_deployment/project29_docker/up.py
uv run python phase10_deployment/project29_docker/up.py --checkpoint checkpoints/project4/best.pt --api_key secret
uv run python phase10_deployment/project29_docker/up.py --cuda
uv run python phase10_deployment/project29_docker/up.py --down

Looks first whether it can work. Called again, it brings what runs up to date. --dry_run starts nothing.
"""

import shlex
import time

from common import CHECKPOINTS
from common.run import Run
from phase10_deployment.project29_docker import config


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Stack", "Access"), description=__doc__, quiet=True) as run:
        from phase10_deployment.project29_docker import stack

        s = run.settings
        if s.DOWN:
            _require(stack.docker_problem())
            _compose(stack.compose_command(s, "down"), {})
            return
        source = stack.model_source(s)
        run.print(f"model       {source}")
        _require(stack.model_problem(source))
        command, values = stack.start_command(s), stack.environment(s, source)
        if s.DRY_RUN:
            shown = {name: "..." if "PASSWORD" in name or "KEYS" in name else value for name, value in values.items()}
            run.print("command     " + " ".join(f"{name}={shlex.quote(value)}" for name, value in shown.items()),
                      shlex.join(command))  # fmt: skip
        _require(stack.docker_problem())
        _require("; ".join(stack.port_problems(s)))
        if s.DRY_RUN:
            return
        CHECKPOINTS.mkdir(exist_ok=True)  # Docker would make it, and root would own it
        began = time.monotonic()
        _compose(command, values)
        run.print(f"healthy after {time.monotonic() - began:.0f} s")
        for name, address in stack.addresses(s).items():
            run.print(f"{name:<11} {address}")


def _require(problem):
    """Stop where there is a problem."""
    if problem:
        raise ValueError(problem)


def _compose(command, values):
    """Run Compose; its own messages have said what is wrong."""
    from phase10_deployment.project29_docker import stack

    status = stack.run_compose(command, values)
    if status:
        raise ValueError(f"docker compose ended with status {status}: its messages above say why, or the server's own: "
                         f"`docker compose --project-name llm-roadmap logs server`")  # fmt: skip


if __name__ == "__main__":
    main()
