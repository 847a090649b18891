"""
Segments

This file implements what is kept of a text's tokens, their keys and values, and files of them, following:
- "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (Gim et al., 2023) - attention states outlive a
  request, in memory or elsewhere

Each component is explained with paper references for educational purposes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from common.checkpoint import atomic_write


class Segment:
    """Keys and values of some consecutive tokens, in all layers: a `Span` of the tree.

    PAPER: "Prompt Cache: Modular Attention Reuse for Low-Latency Inference", arXiv:2311.04934, section 3.
    PAPER CONTEXT: the attention states of a text segment are computed once and kept for later prompts.
    INTUITION: notes on a few pages of a book, one sheet for each layer.
    IMPLEMENTATION: one pair (n, Hkv, D), (n, Hkv, Dv) a layer, as a cache gives and takes them. Splitting copies: a
        view would keep the memory of the whole when its other part is long evicted.
    WHY: positions are inside the keys, so a segment is valid behind exactly the tokens it was computed behind.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        self.layers = list(layers)

    def __len__(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return sum(x.nbytes for pair in self.layers for x in pair)

    def first(self, n: int) -> list[tuple[Tensor, Tensor]]:
        """The layers of the first n tokens, as views."""
        return [(k[:n], v[:n]) for k, v in self.layers]

    def split(self, n: int) -> "tuple[Segment, Segment]":
        """The first n tokens and the rest, copied."""
        head = [(k[:n].clone(), v[:n].clone()) for k, v in self.layers]
        return Segment(head), Segment([(k[n:].clone(), v[n:].clone()) for k, v in self.layers])

    def drop(self) -> None:
        """Let go of the memory."""
        self.layers = []


def fingerprint(model: nn.Module) -> str:
    """What says whether keys and values are this model's: its shape and all of its weights.

    PAPER: "Prompt Cache: Modular Attention Reuse for Low-Latency Inference", arXiv:2311.04934, section 3.
    PAPER CONTEXT: states are computed by one model; for another they mean nothing.
    INTUITION: notes in a private shorthand: check whose it is before you read them.
    IMPLEMENTATION: sums of the weights' bits as integers, plain and weighted by place: exact, in any order, on any
        device; the bits of any single weight change them.
    WHY: keys of another model fit in shape, and the text that comes of them is wrong without an error.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8).long()
        place = torch.arange(len(bits), device=bits.device) % 65521 + 1
        sums = int(bits.sum()), int((bits * place).sum())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()[:32]


def write_segment(folder: Path, text: Sequence[int], segment: Segment, owner: str) -> Path:
    """Write the segment of a text's last tokens to a file of its own; one that stands is left alone."""
    name = hashlib.sha256(json.dumps([owner, *text]).encode()).hexdigest()[:32]
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        tensors = {f"{i}.{part}": x.cpu() for i, pair in enumerate(segment.layers) for part, x in zip("kv", pair)}
        about = {"fingerprint": owner, "text": json.dumps(list(text))}
        atomic_write(path, save({name: x.contiguous() for name, x in tensors.items()}, metadata=about))
    return path


def read_segment(path: Path, owner: str, device) -> tuple[list[int], Segment]:
    """The text whose last tokens a file is for, and their segment.

    Raises ValueError, with the file's name, for a damaged file and for one of another model.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about, keys = file.metadata() or {}, set(file.keys())
            text = json.loads(about.get("text", "null"))
            layers = [(file.get_tensor(f"{i}.k"), file.get_tensor(f"{i}.v")) for i in range(len(keys) // 2)]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of kept keys and values, or is damaged ({error}): delete it") from error
    ids = isinstance(text, list) and all(isinstance(token, int) and 0 <= token < 2**63 for token in text)
    if not ids or not layers or len(text) < len(layers[0][0]):
        raise ValueError(f"{path} does not say for which text its keys and values are: delete it")
    if about.get("fingerprint") != owner:
        raise ValueError(f"{path} holds keys and values of another model (or of this one before it was trained further "
                         f"or cast): use another folder, or delete it")  # fmt: skip
    return text, Segment(layers)
