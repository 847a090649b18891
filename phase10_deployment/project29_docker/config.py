"""Constants of project 29: the server, the chat page and their instruments in containers."""

import math
import os
import sys

from common import settings as common_settings

# == Stack ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the bundled or newest model
CUDA = False  # an image for NVIDIA GPUs, and one GPU for the server
BUILD = True  # build the image first; what has not changed is taken from the last build
DOWN = False  # stop and remove the containers; what Prometheus and Grafana have stored is kept
DRY_RUN = False  # only look whether it would work, and show the command
WAIT_SECONDS = 900  # for all to be healthy: the model is loaded by then
DRAIN_SECONDS = 30  # at most, for accepted requests to finish when the server is stopped
MEMORY_GIB: float | None = None  # of the server at most, not counting a GPU's; none: 4, with CUDA 16

# == Access ==
BIND = "127.0.0.1"  # address of this machine to listen at; 0.0.0.0: all of them, for which a key must be set
API_KEY: list[str] = []  # keys that are let in, also from LLM_ROADMAP_API_KEYS (comma separated); none: everybody
GRAFANA_PASSWORD: str | None = None  # of its user admin; none: admin, and whoever comes may look
SERVER_PORT = 8000  # the API is at http://localhost:8000/v1
UI_PORT = 7860  # of the chat page
PROMETHEUS_PORT = 9090  # on this machine alone, whatever BIND says
GRAFANA_PORT = 3000  # of the dashboard

# == Check ==
KUBERNETES_VERSION = "1.34"  # whose schemas the manifests must follow
STRICT = False  # what cannot be checked here counts as wrong

PORTS = ("SERVER_PORT", "UI_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")  # the flags that name ports of this machine
_LEAST = {"WAIT_SECONDS": 1, "DRAIN_SECONDS": 0, "MEMORY_GIB": 0.5}


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    for name, least in _LEAST.items():
        value = getattr(s, name)
        if value is not None and not least <= value < math.inf:
            default = getattr(sys.modules[__name__], name)
            raise ValueError(f"{name}={value} must be at least {least}: the default is {default}")
    taken = {}
    for name in PORTS:
        port = getattr(s, name)
        if not 1 <= port < 65536:
            default = getattr(sys.modules[__name__], name)
            raise ValueError(f"{name}={port} must lie between 1 and 65535: the default is {default}")
        if port in taken:
            raise ValueError(f"{name}={port} is the port of {taken[port]}, too: use another one")
        taken[port] = name
    if not is_loopback(s.BIND) and not api_keys(s):
        raise ValueError(f"BIND={s.BIND} lets the network in: set a key with --api_key, or in LLM_ROADMAP_API_KEYS")
    if not is_loopback(s.BIND) and not s.GRAFANA_PASSWORD:
        raise ValueError(f"BIND={s.BIND} lets the network in: give Grafana's admin a --grafana_password")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def api_keys(s) -> list[str]:
    """The keys of the flags and of the environment."""
    return [*s.API_KEY, *filter(None, os.environ.get("LLM_ROADMAP_API_KEYS", "").split(","))]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0"), is_loopback("192.168.0.7")
    (True, False, False)
    """
    return address == "::1" or address.startswith("127.")
