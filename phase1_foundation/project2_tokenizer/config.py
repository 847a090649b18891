"""Constants of project 2, a byte-level BPE tokenizer; each is a flag of the scripts (``--vocab_size 5000``)."""

import os
import sys

from common import settings as common_settings

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == Tokenizer ==
VOCAB_SIZE = 8192  # ids in all: 256 bytes, the merges, the special tokens
NUM_SPECIAL_TOKENS = 4  # how many of the ids belong to special tokens
SPECIAL_TOKENS: list[str] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # their names; more are reserved
PATTERN = "gpt2"  # how text is cut first: gpt2, gpt2_digits, gpt4, gpt4_digits or a regular expression
RULE = "longest_match"  # how text is encoded: longest_match, or merges as tiktoken and Hugging Face do
MIN_FREQUENCY = 2  # a pair that occurs less often is chance and not merged

# == Data ==
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "wikipedia_train.txt")  # one document per line, or JSON Lines with "text"
MAX_BYTES: int | None = None  # stop reading after so many bytes of text; none: read all

# == System ==
TOKENIZER_PATH = os.path.join(_ROOT, "checkpoints", "project2", "tokenizer.pkl")  # where the tokenizer is written
ENGINE = "fast"  # fast: compiled; reference: plain Python, for small texts
NUM_THREADS: int | None = None  # threads that count words; none: one per processor, 8 at most
MAX_UNIQUE_WORDS = 5_000_000  # distinct words kept, and 16 bytes for each; beyond it the rarest are forgotten
SEED = 0  # nothing here is random; scripts of the house have a seed all the same

# == Download ==
SIZE = "small"  # small: 10 MB, medium: 100 MB, large: 1 GB
SOURCE = "wikipedia"  # wikipedia (English) or wikitext (WikiText-103)
NO_FALLBACK = False  # fail instead of taking the bundled sample when the hub cannot be reached
# == Interactive ==
INTERACTIVE = False  # ask for text and show its tokens, instead of running the tests


def special_tokens(settings=None):
    """The names of the special tokens: the first of SPECIAL_TOKENS, and reserved ones where these are too few."""
    s = settings or sys.modules[__name__]
    reserved = [f"<|reserved_{i}|>" for i in range(s.NUM_SPECIAL_TOKENS - len(s.SPECIAL_TOKENS))]
    return [*s.SPECIAL_TOKENS[: s.NUM_SPECIAL_TOKENS], *reserved]


def validate_config(settings=None):
    """Refuse combinations that cannot work.

    Raises:
        ValueError: names the constants, their values and the remedy.
    """
    s = settings or sys.modules[__name__]
    if s.NUM_SPECIAL_TOKENS < 0:
        raise ValueError(f"NUM_SPECIAL_TOKENS={s.NUM_SPECIAL_TOKENS} must not be negative: use 0 or more")
    if s.VOCAB_SIZE - s.NUM_SPECIAL_TOKENS < 256:
        raise ValueError(
            f"VOCAB_SIZE={s.VOCAB_SIZE} minus NUM_SPECIAL_TOKENS={s.NUM_SPECIAL_TOKENS} leaves "
            f"{s.VOCAB_SIZE - s.NUM_SPECIAL_TOKENS} for 256 bytes: use VOCAB_SIZE={256 + s.NUM_SPECIAL_TOKENS} or more"
        )
    if s.VOCAB_SIZE > 1 << 20:
        raise ValueError(f"VOCAB_SIZE={s.VOCAB_SIZE} must be at most {1 << 20}: the fast engine packs ids in 20 bits")
    for name in ("MIN_FREQUENCY", "NUM_THREADS", "MAX_BYTES"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if s.MAX_UNIQUE_WORDS < 1000:
        raise ValueError(f"MAX_UNIQUE_WORDS={s.MAX_UNIQUE_WORDS} must be at least 1000: use 5000000")
    _one_of(s, "RULE", ("longest_match", "merges"))
    _one_of(s, "ENGINE", ("fast", "reference"))
    _one_of(s, "SIZE", ("small", "medium", "large"))
    _one_of(s, "SOURCE", ("wikipedia", "wikitext"))
    if len(set(special_tokens(s))) < s.NUM_SPECIAL_TOKENS or "" in special_tokens(s):
        raise ValueError(f"SPECIAL_TOKENS={s.SPECIAL_TOKENS} must be different, non-empty names: rename one")


def _one_of(s, name, allowed):
    """Raise unless a constant has one of the allowed values."""
    if getattr(s, name) not in allowed:
        raise ValueError(f"{name}={getattr(s, name)} must be one of {', '.join(allowed)}")


def print_config(settings=None):
    """Print every constant with its value and meaning, a * where a flag overrode it."""
    common_settings.print_config(settings or sys.modules[__name__])
