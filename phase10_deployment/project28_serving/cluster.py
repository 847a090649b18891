"""
Cluster

This file implements several servers as one application of Ray Serve, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - replicas of a model behind one
  frontend, on one machine or many

Each component is explained with paper references for educational purposes.
"""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from phase10_deployment.project28_serving.cluster_config import gpus_of, slack_of
from phase10_deployment.project28_serving.front import Front
from phase10_deployment.project28_serving.replica import Replica
from phase10_deployment.project28_serving.routing import prefix_router

NAME = "llm-roadmap"  # of the application
SPARE = 64  # calls beyond a full queue, so that it is the replica who says that it is full, and how it is
ENVIRONMENT = {  # for Ray, unless it is set already
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would copy this folder to every worker
    "RAY_worker_niceness": "0",  # replicas are what the machine is for
}
OWN = {  # of a Ray that is started here
    "_node_ip_address": "127.0.0.1",  # who reaches its ports may run programs
    "include_dashboard": False,
    "object_store_memory": 100 * 2**20,  # what travels is small
}
TRIES = 3  # on a busy machine Ray's parts miss their own deadline of 15 seconds
MANY = 100_000  # requests that the front may hold: a replica's queue and the gate are the limits


def cluster_app(s, engine, options):
    """Front and replicas, as what `serve.run` takes.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, sections 3 and 4.4.1.
    PAPER CONTEXT: a frontend dispatches to replicated containers, which are added to gain throughput.
    INTUITION: one door, any number of counters behind it; a porter (Ray) opens and closes counters.
    IMPLEMENTATION: two deployments: `Replica` with the router of routing.py, a GPU each where there is one; and one
        `Front`, the only one that HTTP reaches. How many there are, where, and what becomes of one that died, is Ray's.
    WHY: replicas share nothing, so that a cluster is a number in a configuration.

    Args:
        s: settings of cluster_config; engine: EngineOptions; options: ServerOptions.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    at_a_time = s.MAX_RUNNING + s.MAX_WAITING + SPARE
    if s.MAX_REPLICAS is None:
        number: dict[str, Any] = {"num_replicas": s.REPLICAS}
    else:  # more as soon as rows are full on average
        number = {"autoscaling_config": {"min_replicas": s.REPLICAS, "max_replicas": s.MAX_REPLICAS,
                                         "target_ongoing_requests": s.MAX_RUNNING}}  # fmt: skip
    router = RequestRouterConfig(
        request_router_class=prefix_router(),
        request_router_kwargs={"slack": slack_of(s), "chunk": s.CHUNK, "limit": s.REMEMBERED, "worth": s.WORTH},
    )
    replicas = serve.deployment(Replica).options(
        max_ongoing_requests=at_a_time, ray_actor_options={"num_cpus": s.CPUS, "num_gpus": gpus_of(s)},
        request_router_config=router, graceful_shutdown_timeout_s=5, health_check_period_s=2,
        health_check_timeout_s=10, max_constructor_retry_count=TRIES, **number,
    )  # fmt: skip
    front = serve.deployment(serve.ingress()(Front)).options(
        name="Front", max_ongoing_requests=MANY, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=5
    )
    return front.bind(replicas.bind(engine, options), options.gate, options.origins, s.PATIENCE)


class RayCluster:
    """Ray and Ray Serve, for as long as a `with` lasts.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 4.4.
    PAPER CONTEXT: containers run apart from each other and from the frontend, and are managed by a common layer.
    INTUITION: rent a house, or a room in one that stands; leave it as you found it.
    IMPLEMENTATION: without an address Ray is started here, for this program alone, and ends with it. With one, the
        cluster is used as it is, and only the application is taken away at the end. Ray sends no usage statistics.
    WHY: the same script serves from a laptop and from a rack.

    Args:
        s: settings of cluster_config. Raises ValueError where the cluster has too little for the replicas.
    """

    def __init__(self, s):
        self.s, self.handle = s, None
        self.port = s.PORT or free_port(s.HOST)

    def __enter__(self) -> "RayCluster":
        start_ray(self.s.ADDRESS)
        import ray

        try:
            check_resources(self.s, ray.cluster_resources())
        except ValueError:
            ray.shutdown()
            raise
        return self

    def run(self, engine, options) -> str:
        """Start the application; returns its address once replicas serve. Raises ValueError where it cannot be."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing it has set another one
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"host": self.s.HOST, "port": self.port}, logging_config=quiet)
        try:
            self.handle = serve.run(cluster_app(self.s, engine, options), name=NAME, logging_config=quiet)
        except RuntimeError as error:
            told = serve.status().applications[NAME].deployments.values()
            reason = reason_of("\n".join([str(error), *(each.message for each in told)]))
            raise ValueError(f"the replicas cannot be started: {reason}") from error
        return f"http://{self.s.HOST}:{self.port}"

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those inside; False: some were left after so many seconds."""
        try:
            self.handle.broadcast("drain").results(timeout_s=seconds)
        except TimeoutError:
            return False
        return True

    def __exit__(self, *_) -> None:
        import ray
        from ray import serve

        if self.handle is not None:
            serve.delete(NAME)
        ray.shutdown()


def start_ray(address: str | None) -> None:
    """Join a cluster, or start one on this machine; raises ValueError or OSError where that fails."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # Ray reads them when it is imported
    import ray

    own = OWN if address is None else {}
    for left in range(TRIES - 1, -1, -1):
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
            return
        except (ValueError, OSError):
            raise
        except Exception as error:  # Ray has no type for this
            ray.shutdown()
            if not left:
                raise ValueError(f"Ray does not start: {error}") from error


def check_resources(s, there: Mapping[str, float]) -> None:
    """Refuse what a cluster has no room for; raises ValueError with the remedy."""
    for name, each, kind in (("CPUS", s.CPUS, "CPU"), ("GPUS", gpus_of(s), "GPU")):
        have, need = there.get(kind, 0.0), s.REPLICAS * each
        if need > have:
            raise ValueError(f"REPLICAS={s.REPLICAS} with {name}={each:g} need {need:g} {kind}s, and there are "
                             f"{have:g}: use fewer replicas, or a part of one for each")  # fmt: skip


def free_port(host: str) -> int:
    """A port at which nobody listens."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]


def reason_of(text: str) -> str:
    """The line of Ray's report that says what a replica raised."""
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return lines[-1].split("Error: ", 1)[1] if lines else text
