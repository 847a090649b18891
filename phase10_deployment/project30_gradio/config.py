"""Constants of project 30: a chat page, and a playground that shows what the other projects do."""

import sys

from common import settings as common_settings
from phase10_deployment.project28_serving import config as BASE_CONFIG

# == Page ==
API_URL: str | None = None  # a running server, such as http://127.0.0.1:8000/v1; none: start an engine here
HOST = "127.0.0.1"  # address to listen at; 0.0.0.0: all of this machine
PORT = 7860  # of the page, and of the API beside it; 0: any free one
API_KEY: list[str] = []  # sent to the server at API_URL; without API_URL: keys that the API beside the page lets in
TITLE = "LLM roadmap"  # heading of the page
LOG_LEVEL = "warning"  # of the web server; with info there is a line for every look of every open page

# == Chat ==
SYSTEM_PROMPT = ""  # what the model is told before the first message
TEMPERATURE = 0.8  # 0: always the likeliest token
TOP_P = 0.95  # only the likeliest tokens that together reach this probability
MAX_TOKENS = 256  # of an answer

# == Engine ==
MAX_RUNNING = 16  # texts that are written at a time


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    BASE_CONFIG.validate_config(settings)
    if s.API_URL is not None and not s.API_URL.startswith(("http://", "https://")):
        raise ValueError(f"API_URL={s.API_URL} must begin with http:// or https://, such as http://127.0.0.1:8000/v1")
    if not 0 <= s.TEMPERATURE <= 2:
        raise ValueError(f"TEMPERATURE={s.TEMPERATURE} must lie between 0 and 2: 0.8 is a good start")
    if not 0 < s.TOP_P <= 1:
        raise ValueError(f"TOP_P={s.TOP_P} must be above 0 and at most 1: 1 keeps all tokens")
    if s.MAX_TOKENS < 1:
        raise ValueError(f"MAX_TOKENS={s.MAX_TOKENS} must be at least 1: 256 is a good start")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
