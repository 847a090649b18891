"""
Step buffers

This file implements numbers that the host writes and the device reads, at the same place every step, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - a decode step is short: nothing in it may wait

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class StepBuffers:
    """Named arrays of whole numbers on the host, and the same on the device.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2; how to feed it is practice.
    PAPER CONTEXT: at small batches a step of decoding takes little more than the reading of the weights.
    INTUITION: one tray carries all the cups: a waiter who runs for each of them is late for the next table.
    IMPLEMENTATION: all names are parts of one int64 buffer; `send` is one asynchronous copy out of pinned memory. The
        next `open` waits until that copy, not the work behind it, is done.
    WHY: addresses stay the same, so that a recorded graph finds them, and the host may run ahead of the device.

    >>> buffers = StepBuffers({"rows": 2, "ends": 3}, "cpu")
    >>> buffers.open()["ends"][:] = [7, 8, 9]
    >>> buffers.send()
    >>> buffers.device["ends"].tolist(), buffers.device["rows"].tolist()
    ([7, 8, 9], [0, 0])
    """

    def __init__(self, sizes: Mapping[str, int], device):
        on_gpu = torch.device(device).type == "cuda"
        lengths = list(sizes.values())
        self._all_host = torch.zeros(sum(lengths), dtype=torch.long, pin_memory=on_gpu)
        self._all_device = torch.zeros(sum(lengths), dtype=torch.long, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._host = dict(zip(sizes, np.split(self._all_host.numpy(), np.cumsum(lengths)[:-1])))
        self.device = dict(zip(sizes, self._all_device.split(lengths)))

    def open(self) -> dict[str, np.ndarray]:
        """The arrays to write into, once the last copy has left them; they hold what was written before."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host

    def send(self) -> None:
        """Copy everything to the device, without waiting for it where that can be."""
        # Without an event to wait for, the next step might overwrite what is still being copied.
        self._all_device.copy_(self._all_host, non_blocking=self._copied is not None)
        if self._copied is not None:
            self._copied.record()


def on_device(numbers: Sequence | np.ndarray, device, dtype=np.int64) -> Tensor:
    """Numbers of the host on the device, in their shape, without waiting for it."""
    tensor = torch.from_numpy(np.asarray(numbers, dtype=dtype))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
