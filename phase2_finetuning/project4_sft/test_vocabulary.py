"""Tests of growing: new tokens change nothing about old ones, padding is used first and is no likelier than words."""

import pytest
import torch

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.template import CHAT_TOKENS, ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, grow_vocabulary, with_chat_tokens


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_says_the_same_about_old_tokens(tied):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=257, tie_head=tied)).eval()
    tokens = torch.randint(0, 257, (2, 9))
    before = model(tokens)
    grow_vocabulary(model, 257, 261)
    assert model.config.vocab_size == 320 and model(tokens).shape[-1] == 320
    torch.testing.assert_close(model(tokens)[..., :257], before)
    new = model.embed.tokens.weight[257:]
    mean = model.embed.tokens.weight[:257].mean(0)
    assert (new - mean).abs().max() < 0.1 * model.embed.tokens.weight.std() and len(new.unique(dim=0)) == 63
    again = model.embed.tokens.weight
    grow_vocabulary(model, 261, 261)
    assert model.embed.tokens.weight is again
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


def test_padding_is_no_likelier_than_words():
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=257, tie_head=False)).eval()
    with torch.no_grad():  # as published models do: all logits far below 0, here by one direction that all share
        model.head.weight += 5
        model.norm.weight.zero_()
        model.norm = torch.nn.Sequential(model.norm, Shift(-1.0))
    tokens = torch.randint(0, 257, (2, 9))
    assert model(tokens).max() < -100
    before = model(tokens, targets=tokens)
    grow_vocabulary(model, 257, 261)
    assert (model(tokens, targets=tokens) - before).abs().max() < 0.5


class Shift(torch.nn.Module):
    """Adds a number to everything."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def test_padding_rows_are_used_first():
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    grow_vocabulary(model, 257, 261)
    assert model.config.vocab_size == 320
    assert with_chat_tokens(with_chat_tokens(byte_tokenizer())).vocab_size == 257 + len(CHAT_TOKENS)
    bare = BPETokenizer({token: i for token, i in byte_tokenizer().vocab.items() if i < 256}, [], rule="merges")
    assert ChatTemplate(with_chat_tokens(bare)).start_id == 256
    with pytest.raises(ValueError, match="cannot be extended"):
        with_chat_tokens(CharTokenizer("abc"))
    with pytest.raises(ValueError, match="has no <"):
        ChatTemplate(CharTokenizer("abc"))
    forgeable = with_chat_tokens(byte_tokenizer()).to_dict() | {"always_matched": ["<|end|>"]}
    with pytest.raises(ValueError, match="forge"):
        ChatTemplate(BPETokenizer.from_dict(forgeable))


if __name__ == "__main__":
    print("special tokens, the template's among them:", with_chat_tokens(byte_tokenizer()).special_tokens)
    raise SystemExit(pytest.main([__file__]))
