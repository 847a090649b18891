"""Serve a model behind an OpenAI-compatible API.

uv run python phase10_deployment/project28_serving/serve.py
uv run python phase10_deployment/project28_serving/serve.py --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct
uv run python phase10_deployment/project28_serving/serve.py --lora polite=checkpoints/project5/adapter
uv run python phase10_deployment/project28_serving/serve.py --host 0.0.0.0 --api_key secret --max_waiting 64

Any OpenAI client can talk to it: give it the base URL that is printed. Ctrl-C, or SIGTERM, lets it finish what it has
accepted. http://HOST:PORT/docs describes every route.
"""

import functools
import os
from pathlib import Path

from common.run import Run
from phase1_foundation.project3_pretrain.loading import default_source
from phase10_deployment.project28_serving import config


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
        app = create_app(EngineClient(functools.partial(build_engine, options)), server)
        run.print(f"loading {options.checkpoint}; the API will be at http://{s.HOST}:{s.PORT}/v1, the model's name is "
                  f"{server.name}")  # fmt: skip
        run_server(app, s.HOST, s.PORT, s.DRAIN_SECONDS, s.LOG_LEVEL, run.print)


def engine_options(s):
    """What the engine is made of."""
    from phase10_deployment.project28_serving.engine import EngineOptions

    memory = None if s.KV_CACHE_MEMORY is None else int(s.KV_CACHE_MEMORY * 2**20)
    return EngineOptions(
        str(s.CHECKPOINT or default_source()), str(s.DEVICE), s.DTYPE, tuple(s.USE), config.adapters_of(s),
        s.MAX_RUNNING, s.CONTEXT, memory, s.PAGE, s.MAX_BATCH_TOKENS, s.SHARE, int(s.SWAP_MIB * 2**20), s.GRAPHS,
        s.COMPILED, s.DRAFT, s.DRAFT_TOKENS,
    )  # fmt: skip


def server_options(s, source: str):
    """What the server is told beside its engine."""
    from phase10_deployment.project28_serving.asking import Limits
    from phase10_deployment.project28_serving.gate import GateOptions
    from phase10_deployment.project28_serving.server import ServerOptions

    keys = [*s.API_KEY, *filter(None, os.environ.get("LLM_ROADMAP_API_KEYS", "").split(","))]
    return ServerOptions(
        s.MODEL_NAME or name_of(source), s.MAX_WAITING, GateOptions(tuple(keys), s.MAX_BODY_KIB * 1024, s.MAX_PER_KEY),
        Limits(s.MAX_CHOICES, s.MAX_STOPS), tuple(s.ORIGIN), s.TRACES,
    )  # fmt: skip


def name_of(source: str) -> str:
    """What clients call a model.

    >>> name_of("checkpoints/speedrun/dpo/best.pt"), name_of("/models/mine.pt"), name_of("org/name")
    ('dpo', 'mine', 'org/name')
    """
    path = Path(source)
    if path.suffix == ".pt":
        return path.parent.name if path.stem in ("best", "last") else path.stem
    return path.name if path.is_dir() else source


if __name__ == "__main__":
    main()
