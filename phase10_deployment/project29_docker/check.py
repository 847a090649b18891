"""Check the Dockerfile, the Compose and Kubernetes files, and every query of the dashboard, without starting anything.

uv run python phase10_deployment/project29_docker/check.py
uv run python phase10_deployment/project29_docker/check.py --strict --kubernetes_version 1.35

What cannot be checked here, as a tool is missing, is named; with --strict that counts as wrong.
"""

from common.run import Run
from phase10_deployment.project29_docker import config


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Check",), description=__doc__, quiet=True) as run:
        from phase10_deployment.project29_docker.agreement import checks
        from phase10_deployment.project29_docker.manifests import CannotCheckError

        wrong, unchecked = 0, 0
        for check in checks(run.settings.KUBERNETES_VERSION):
            try:
                problems = check.problems()
                verdict = "ok" if not problems else f"{len(problems)} wrong"
            except CannotCheckError as error:
                problems, verdict, unchecked = [], f"not checked: {error}", unchecked + 1
            run.print(f"{check.what:<28} {check.by:<28} {verdict}")
            for problem in problems:
                run.print(f"    {problem}")
            wrong += len(problems)
        if wrong or (unchecked and run.settings.STRICT):
            raise ValueError(f"{wrong} wrong, {unchecked} not checked: see above")


if __name__ == "__main__":
    main()
