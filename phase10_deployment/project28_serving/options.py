"""
Options

This file implements what engine and server are made of by the settings of a script: serve.py, serve_cluster.py, and the
page of project 30 share it. Libraries of the web are imported where they are needed.
"""

import os
from pathlib import Path

from phase1_foundation.project3_pretrain.loading import default_source
from phase10_deployment.project28_serving import config


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
