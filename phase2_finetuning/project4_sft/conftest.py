"""What the tests of this project share: the chat template of a tokenizer that knows bytes and its tokens alone."""

import pytest

from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens


@pytest.fixture(scope="module")
def template():
    """A template in which every byte is a token: what is tested can be read."""
    return ChatTemplate(with_chat_tokens(byte_tokenizer()))
