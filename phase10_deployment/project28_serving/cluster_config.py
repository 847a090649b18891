"""Constants of project 28's cluster: several replicas of the server, on one machine or more."""

import sys

from common import settings as common_settings
from phase10_deployment.project28_serving import config as BASE_CONFIG

# == Cluster ==
REPLICAS = 2  # servers of the same model
MAX_REPLICAS: int | None = None  # up to so many under load; none: always REPLICAS
ADDRESS: str | None = None  # of a Ray cluster that runs already, such as auto; none: a new one, of this machine alone
CPUS = 0.5  # cores that Ray sets aside for a replica; parts of one will do
GPUS: float | None = None  # GPUs of a replica; none: one, if DEVICE is cuda
PATIENCE = 10.0  # seconds that a request waits for a replica to take it; then it is refused with 503

# == Routing ==
SLACK: int | None = None  # requests by which a replica that knows a text may be busier; none: MAX_RUNNING / 4
CHUNK = 128  # characters that are remembered and matched as a whole
REMEMBERED = 65536  # chunks at most; one takes some 300 bytes
WORTH = 0.5  # part of a text that must be known for it to matter which replica knows it

_RULES = {
    "REPLICAS": (lambda value: value >= 1, "be at least 1"),
    "CPUS": (lambda value: value >= 0, "be at least 0: 0.5 lets two replicas share a core"),
    "GPUS": (lambda value: value >= 0, "be at least 0: 1 gives each replica one of its own"),
    "PATIENCE": (lambda value: value > 0, "be positive: 10 is enough unless machines are far apart"),
    "SLACK": (lambda value: value >= 0, "be at least 0: a quarter of MAX_RUNNING is the default"),
    "CHUNK": (lambda value: value >= 1, "be at least 1: 128 characters are about two blocks of tokens"),
    "REMEMBERED": (lambda value: value >= 1, "be at least 1: 65536 chunks are 8 million characters"),
    "WORTH": (lambda value: 0 <= value <= 1, "lie between 0 and 1: 0.5 is half of a text"),
}


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    BASE_CONFIG.validate_config(settings)
    for name, (holds, words) in _RULES.items():
        value = getattr(s, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}={value} must {words}")
    if s.MAX_REPLICAS is not None and s.MAX_REPLICAS < s.REPLICAS:
        raise ValueError(f"MAX_REPLICAS={s.MAX_REPLICAS} must be at least REPLICAS={s.REPLICAS}, or none")
    rows = getattr(s, "MAX_RUNNING", BASE_CONFIG.MAX_RUNNING)  # the module itself has its own constants alone
    if s.SLACK is not None and rows < s.SLACK:
        raise ValueError(f"SLACK={s.SLACK} must be at most MAX_RUNNING={rows}: beyond, requests would queue at one "
                         f"replica while another one is idle")  # fmt: skip


def gpus_of(s) -> float:
    """GPUs of a replica."""
    return float(str(s.DEVICE).startswith("cuda")) if s.GPUS is None else s.GPUS


def slack_of(s) -> int:
    """Requests by which a replica that knows a text may be busier."""
    return s.MAX_RUNNING // 4 if s.SLACK is None else s.SLACK


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
