"""
Exporting a model that chats

This file implements handing a fine-tuned model to other programs, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a model that answers
- "LIMA: Less Is More for Alignment" (Zhou et al., 2023) - an end-of-turn token, at which they must stop

Each component is explained with paper references for educational purposes.
"""

import json
from pathlib import Path

import torch
from torch import nn

from common.checkpoint import atomic_write
from phase1_foundation.project3_pretrain.hub import to_gguf, to_huggingface
from phase2_finetuning.project4_sft.template import END, ChatTemplate


def export(model: nn.Module, template: ChatTemplate, path: str | Path) -> Path:
    """
    A Hugging Face folder whose `apply_chat_template` and `generate` do what we do

    PAPER: "LIMA: Less Is More for Alignment", arXiv:2305.11206, section 3 (the end-of-turn token).
    PAPER CONTEXT: a token of its own ends each utterance and plays the role that <EOS> has in pre-training.
    INTUITION: whoever takes the actor over must be told the stage directions, too.
    IMPLEMENTATION: project 3's export, then the template as Jinja in tokenizer_config.json, and the tokens that end an
        answer in generation_config.json and config.json.
    WHY: servers and `transformers` render chats by what they find there; without it they would guess.

    Returns the folder. Raises ValueError for a model that no family of architectures expresses.
    """
    folder = to_huggingface(model, template.tokenizer, path)
    stops = {"eos_token_id": sorted(template.stop_ids), "pad_token_id": template.start_id}
    add_template(template, folder)
    _update(folder / "generation_config.json", stops)
    _update(folder / "config.json", stops)
    return folder


def add_template(template: ChatTemplate, folder: str | Path) -> None:
    """Write the template, in Jinja, beside the tokenizer that lies in a folder."""
    _update(Path(folder) / "tokenizer_config.json", {"chat_template": template.jinja, "eos_token": END})


def export_gguf(model: nn.Module, template: ChatTemplate, path: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """The model as one GGUF file with its template, for llama.cpp; arguments and errors as for `to_gguf`."""
    return to_gguf(model, template.tokenizer, path, dtype, template.jinja, template.end_id)


def _update(path: Path, entries: dict) -> None:
    """Set entries of a JSON file, which need not exist yet."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    atomic_write(path, json.dumps(content | entries, indent=2, ensure_ascii=False) + "\n")
