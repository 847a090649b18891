"""Templates of other models, against transformers; transcripts of base models; GGUF files that know their template."""

import json
import sys

import pytest
import torch

import chat as chat_script
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.answering import answer, prompt_within
from phase2_finetuning.project4_sft.exporting import export_gguf
from phase2_finetuning.project4_sft.other_templates import JinjaTemplate, Transcript, read_template, template_for
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\n2 + 2? "},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": 'And "3"?'},
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}\n"
    "  {% if message.role == 'user' %}\n[INST] {{ message.content | trim }} [/INST]\n"
    "  {% else %}\n{{ message | tojson }}{{ eos_token }}\n  {% endif %}\n"
    "{% endfor %}"
)


def chatml_tokenizer():
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    return BPETokenizer.from_dict(byte_tokenizer().to_dict() | {"special_tokens": special})


def folder_with(path, template, stops=(258,), **settings):
    """A Hugging Face folder of a tiny model with a chat template."""
    to_huggingface(Transformer(PRESETS["cpu-tiny"](vocab_size=320, qk_norm=False)), chatml_tokenizer(), path)
    for name, entries in (
        ("tokenizer_config.json", {"chat_template": template, "eos_token": "<|im_end|>", **settings}),
        ("generation_config.json", {"eos_token_id": list(stops)}),
    ):
        file = path / name
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(content | entries), encoding="utf-8")
    return path


@pytest.mark.parametrize(("source", "talk"), [(CHATML, TALK), (CHATML, TALK[1:2]), (STRICT, TALK[1:])])
def test_a_models_own_template_gives_the_tokens_of_transformers(source, talk, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tmp_path, source)
    template = template_for(chatml_tokenizer(), folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(template, JinjaTemplate)
    assert template.prompt(talk) == theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


def test_a_template_says_what_it_refuses(tmp_path):
    template = template_for(chatml_tokenizer(), folder_with(tmp_path, STRICT))
    with pytest.raises(ValueError, match="refuses this conversation: no system role"):
        template.prompt(TALK)
    with pytest.raises(ValueError, match=r"holds <\|im_end\|>"):
        template.prompt([{"role": "user", "content": "I am done.<|im_end|>"}])
    with pytest.raises(ValueError, match="cannot be read"):
        JinjaTemplate(chatml_tokenizer(), "{% if %}", {})


def test_a_template_cannot_reach_out_of_its_sandbox():
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses this conversation"):
        JinjaTemplate(chatml_tokenizer(), hostile, {}).prompt(TALK)


def test_where_folders_keep_their_templates(tmp_path):
    folder = folder_with(tmp_path, [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}])
    source, texts, stops = read_template(folder)
    assert source == CHATML and texts["eos_token"] == "<|im_end|>" and stops == [258]
    (folder / "chat_template.jinja").write_text(STRICT, encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}), encoding="utf-8")
    (folder / "generation_config.json").unlink()
    source, texts, stops = read_template(folder)
    assert source == STRICT and texts == {"eos_token": "<|im_end|>"} and stops == [256]  # as config.json says
    assert JinjaTemplate(chatml_tokenizer(), source, texts, stops).stop_ids == {256, 258}
    (folder / "chat_template.jinja").unlink()
    assert read_template(folder) is None
    settings.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        read_template(folder)


def test_who_is_spoken_to_how(tmp_path):
    assert isinstance(template_for(with_chat_tokens(byte_tokenizer()), "any.pt"), ChatTemplate)
    assert isinstance(template_for(byte_tokenizer(), "any.pt"), Transcript)
    plain = to_huggingface(Transformer(PRESETS["cpu-tiny"](vocab_size=320, qk_norm=False)), byte_tokenizer(), tmp_path)
    assert isinstance(template_for(byte_tokenizer(), plain), Transcript)
    with pytest.raises(ValueError, match=r"any\.pt has no tokenizer"):
        template_for(None, "any.pt")


def test_a_transcript_ends_where_the_user_would_speak(monkeypatch):
    template = Transcript(byte_tokenizer())
    text = 'Be brief.\nUser:   What is\n2 + 2? \nAssistant: 4.\nUser: And "3"?\nAssistant:'
    assert template.tokenizer.decode(template.prompt(TALK)) == "<|endoftext|>" + text
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    reply = template.tokenizer.encode(" It is 5.\nUse more\nUser: Thanks")
    monkeypatch.setattr("phase2_finetuning.project4_sft.answering.stream", lambda *a, **k: iter(reply))
    said = list(answer(model, template, TALK))
    assert "".join(said) == " It is 5.\nUse more"
    assert all("\nUser:".startswith(piece) is False or piece == "\nUse" for piece in said[:-1])
    assert len(prompt_within(template, TALK, 12)) == 12
    characters = Transcript(CharTokenizer("Asitan:Uer \nH"))
    assert characters.tokenizer.decode(characters.prompt([{"role": "user", "content": "Hi"}])).startswith("User: Hi")
    assert characters.stop_ids == frozenset()


def test_a_gguf_file_knows_its_template(tmp_path):
    gguf = pytest.importorskip("gguf")
    template = ChatTemplate(with_chat_tokens(byte_tokenizer_that_merges()))
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, qk_norm=False))
    reader = gguf.GGUFReader(export_gguf(model, template, tmp_path / "model.gguf", torch.float32))
    field = reader.fields["tokenizer.chat_template"]
    assert bytes(field.parts[field.data[0]]).decode() == template.jinja
    field = reader.fields["tokenizer.ggml.eot_token_id"]
    assert int(field.parts[field.data[0]][0]) == template.end_id


def byte_tokenizer_that_merges():
    """llama.cpp wants at least one merge."""
    return BPETokenizer.train(["aa aa aa bb"], 258, ["<|endoftext|>"], rule="merges")


def test_a_chat_with_any_checkpoint(tmp_path, capsys, monkeypatch):
    folder = folder_with(tmp_path / "own", CHATML)
    plain = to_huggingface(
        Transformer(PRESETS["cpu-tiny"](vocab_size=320, qk_norm=False)), byte_tokenizer(), tmp_path / "plain"
    )
    for source, lines, expected in (
        (folder, ["Hi", "<|im_end|>", "/quit"], "error: a message holds <|im_end|>"),
        (plain, ["Hi", "/quit"], "(a base model: it only goes on with a transcript)"),
    ):
        replies = iter(lines)
        monkeypatch.setattr(chat_script, "ask", lambda prompt, replies=replies: next(replies))
        chat_script.main(["--checkpoint", str(source), "--device", "cpu", "--max_new_tokens", "4", "--seed", "1"])
        assert expected in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
