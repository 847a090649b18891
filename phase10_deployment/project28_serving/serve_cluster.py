"""Serve several replicas of a model behind one OpenAI-compatible API, on one machine or on many.

uv run python phase10_deployment/project28_serving/serve_cluster.py
uv run python phase10_deployment/project28_serving/serve_cluster.py --replicas 4 --checkpoint org/name
uv run python phase10_deployment/project28_serving/serve_cluster.py --address auto --replicas 2 --max_replicas 16

Requests that begin alike go to the replica that has their beginning in its cache. Ray Serve starts the replicas,
watches them and replaces them. For many machines: the same checkout on each, `ray start --head` on one, `ray start
--address` on the others, and `--address auto` here. Ctrl-C, or SIGTERM, lets it finish what it has accepted.
"""

import signal
import threading

from common.run import Run
from phase10_deployment.project28_serving import cluster_config
from phase10_deployment.project28_serving.options import engine_options, server_options


def main(argv=None):
    """Run the script."""
    with Run(cluster_config, argv, description=__doc__, quiet=True) as run:
        from phase10_deployment.project28_serving.cluster import RayCluster

        s, asked = run.settings, threading.Event()
        engine = engine_options(s)
        options = server_options(s, engine.checkpoint)
        with RayCluster(s) as cluster:
            for number in (signal.SIGINT, signal.SIGTERM):  # now: Ray has set handlers of its own
                signal.signal(number, lambda *_: _ask(asked))
            run.print(f"loading {engine.checkpoint}, {s.REPLICAS} times; the model's name is {options.name}")
            run.print(f"ready: the API is at {cluster.run(engine, options)}/v1")
            while not asked.wait(1.0):  # a wait without a limit would not be interrupted on every system
                pass
            run.print("draining: new requests are refused")
            if not cluster.drain(s.DRAIN_SECONDS):
                run.print(f"requests are given up after {s.DRAIN_SECONDS:g} s")


def _ask(asked: threading.Event) -> None:
    """The first signal asks for the end, the second one demands it."""
    if asked.is_set():
        raise KeyboardInterrupt
    asked.set()


if __name__ == "__main__":
    main()
