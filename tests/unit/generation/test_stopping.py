"""Which tokens end a text, and which stand in front of it and behind it when it is fed."""

import json
import shutil

import pytest
from tiny_model import tiny_config, write_model
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from quern.checkpoint.checkpoint import open_checkpoint
from quern.core.errors import BadFileError
from quern.engines._cpu_model import CpuSession
from quern.generation.chat import Chat
from quern.generation.generate import generate
from quern.generation.sampling import Sampler
from quern.generation.stopping import end_tokens
from quern.texts.turns import turn_end

PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
MARKED = PLAIN.replace(";", "<|end|>\n")
TEMPLATES = {
    "a token behind every turn": (MARKED, "<|end|>"),
    "white space in front of it": (PLAIN.replace(";", " \n<|end|>"), "<|end|>"),
    "the longest of two that fit": (PLAIN.replace(";", "<|end|>x"), "<|end|>x"),
    "a token between turns": (
        "{% for m in messages %}{% if not loop.first %}<|next|>{% endif %}{{ m['content'] }}{% endfor %}",
        "<|next|>",
    ),
    "the tokenizer's own": ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "<end>"),
    "reasoning that it drops": (
        MARKED.replace("m['content']", "m['content'].split('</think>')[-1]"),
        "<|end|>",
    ),
    "text alone": (PLAIN, None),
    "a template that fails": ("{{ raise_exception('no') }}", None),
    "a template that leaves answers out": (MARKED.replace("m['content']", "''"), None),
    "no template": (None, None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None, max_position_embeddings=256, vocab_size=310)
    folder = write_model(tmp_path_factory.mktemp("stopping") / "model", config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [AddedToken(word, special=False) for word in ("<|end|>x", "<|end|>", "<|next|>")]
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turns_end_is_read_off_the_template(name, model):
    template, expected = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    number = turn_end(tokenizer)
    assert (number if number is None else tokenizer.decode([number])) == expected


def test_a_text_ends_at_what_any_place_names(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = tokenizer.eos_token_id

    def ends():
        return end_tokens(open_checkpoint(folder), tokenizer)

    assert ends() == {own}
    (folder / "config.json").write_text(json.dumps(tiny_config(eos_token_id=7)))
    assert ends() == {7, own}
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert ends() == {7, own}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert ends() == {3, 4, 7, own}
    tokenizer.chat_template = MARKED
    assert ends() == {3, 4, 7, own, tokenizer.convert_tokens_to_ids("<|end|>")}
    for wrong in ('"stop"', "true", "[1.5]"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(BadFileError, match="eos_token_id is .*, which is no token number"):
            ends()


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_an_answer_ends_where_the_template_ends_turns(model, engine, tmp_path, monkeypatch):
    """A token that the model says becomes one that only the template names."""
    folder, chosen, choose = shutil.copytree(model, tmp_path / "model"), [], Sampler.choose
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: (chosen.append(choose(self, logits)), chosen[-1])[1])
    prompt, options = "[user]one;[assistant]", {"max_tokens": 12, "engine": engine}
    whole = "".join(generate(folder, prompt, **options))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    place = next(k for k in range(2, 12) if chosen[k] not in chosen[:k] and names.get(chosen[k], "").isalnum())
    entry = {"id": chosen[place], "content": names[chosen[place]], "special": True, "normalized": False}
    tokenizer["added_tokens"].append(entry | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = PLAIN.replace(";", entry["content"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    said = AutoTokenizer.from_pretrained(model).decode(chosen[:place])
    assert "".join(generate(folder, prompt, **options)) == said != whole


@pytest.fixture
def fed(monkeypatch):
    """What sessions are given."""
    kept, feed = [], CpuSession.feed
    monkeypatch.setattr(CpuSession, "feed", lambda self, ids: (kept.append(list(ids)), feed(self, ids))[1])
    return kept


@pytest.fixture
def wrapping(model, tmp_path):
    """A tokenizer that puts BOS in front of texts and EOS behind them."""
    folder = shutil.copytree(model, tmp_path / "wrapping")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    ids = [("<begin>", tokenizer.bos_token_id), ("<end>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=ids
    )
    tokenizer.chat_template = "{{ bos_token }}" + MARKED
    tokenizer.save_pretrained(folder)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).encode("a")[:: len("ab")] == [begin, end]
    return folder, begin, end


@pytest.mark.parametrize("prompt", ["abc", "<begin>abc"])
def test_one_beginning_and_no_end_in_front_of_a_continuation(wrapping, fed, prompt):
    folder, begin, end = wrapping
    next(generate(folder, prompt, max_tokens=1, engine="cpu"), None)
    assert fed[0][0] == begin
    assert begin not in fed[0][1:]
    assert end not in fed[0]


def test_a_template_that_writes_the_beginning_gets_no_other(wrapping, fed):
    folder, begin, end = wrapping
    chat = Chat(folder, max_tokens=1, engine="cpu")
    "".join(chat.reply("one"))
    assert fed[0].count(begin) == 1
    assert fed[0][0] == begin
    assert end not in fed[0]
