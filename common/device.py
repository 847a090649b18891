"""Which device a script runs on, and what that device can do at best."""

import platform
import re
import sys

import torch

# Vendor datasheets, dense: bf16 matrix FLOP/s and memory bytes/s. MFU is stated against the first.
_PEAKS = {
    "h200": (989e12, 4.80e12),
    "h100": (989e12, 3.35e12),
    "a100": (312e12, 2.04e12),
    "l40": (181e12, 0.86e12),
    "4090": (165e12, 1.01e12),
    "3090": (71e12, 0.94e12),
}


def pick_device():
    """The best device present, as text: ``cuda``, then ``mps``, then ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """Turn the name of a device into a `torch.device`.

    Raises:
        ValueError: there is no such device here; the message says what there is.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"DEVICE={name!r} cannot be used here: use {pick_device()}") from error
    return device


def device_name(device):
    """A name for people: the GPU's own, or the processor's with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def device_slug(device):
    """A short name for files: ``h100``, ``h200``, ``a100``, ``mps``, ``cpu``."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    name = torch.cuda.get_device_name(device).lower()
    known = next((slug for slug in _PEAKS if slug in name), None)
    return known or re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def peak_flops(device):
    """Peak dense bf16 FLOP/s by the vendor's datasheet, or None where we do not know it."""
    return _PEAKS.get(device_slug(device), (None, None))[0]


def memory_bandwidth(device):
    """Peak memory bytes/s by the vendor's datasheet, or None where we do not know it."""
    return _PEAKS.get(device_slug(device), (None, None))[1]


def synchronize(device):
    """Wait until the device has finished everything it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device):
    """Begin a new measurement of peak memory (nothing to reset on a CPU)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Peak bytes: allocated on a GPU since the last reset; resident in this process on a CPU (None on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # POSIX only

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
