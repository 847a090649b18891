"""Serve a model behind an OpenAI-compatible API.

uv run python phase10_deployment/project28_serving/serve.py
uv run python phase10_deployment/project28_serving/serve.py --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct
uv run python phase10_deployment/project28_serving/serve.py --lora polite=checkpoints/project5/adapter
uv run python phase10_deployment/project28_serving/serve.py --host 0.0.0.0 --api_key secret --max_waiting 64

Any OpenAI client can talk to it: give it the base URL that is printed. Ctrl-C, or SIGTERM, lets it finish what it has
accepted. http://HOST:PORT/docs describes every route.
"""

import functools

from common.run import Run
from phase10_deployment.project28_serving import config
from phase10_deployment.project28_serving.options import engine_options, server_options


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        from phase10_deployment.project28_serving.client import EngineClient
        from phase10_deployment.project28_serving.engine import build_engine
        from phase10_deployment.project28_serving.server import create_app
        from phase10_deployment.project28_serving.shutdown import run_server

        s = run.settings
        options = engine_options(s)
        server = server_options(s, options.checkpoint)
        app = create_app(EngineClient(functools.partial(build_engine, options), silence=s.SILENT_SECONDS), server)
        run.print(f"loading {options.checkpoint}; the API will be at http://{s.HOST}:{s.PORT}/v1, the model's name is "
                  f"{server.name}")  # fmt: skip
        run_server(app, s.HOST, s.PORT, s.DRAIN_SECONDS, s.LOG_LEVEL, run.print)


if __name__ == "__main__":
    main()
