"""Conversations: the template decides what is fed, and what was fed before is not fed again."""

import json
import shutil

import pytest
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

from quern.cli.main import app
from quern.core.errors import UserError
from quern.generation.chat import Chat
from quern.generation.generate import generate

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None, max_position_embeddings=256)
    folder = write_model(tmp_path_factory.mktemp("chat") / "model", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_an_answer_continues_what_the_template_writes(model, engine):
    """Each turn against a fresh generation from the whole conversation so far."""
    chat = Chat(
        model, system="short", max_tokens=5, temperature=0, engine=engine, cache="float32" if engine == "cpu" else None
    )
    written = "[system]short;"
    for text in ("one", "two", "three"):
        written += f"[user]{text};[assistant]"
        answer = "".join(chat.reply(text))
        assert answer == "".join(
            generate(model, written, max_tokens=5, engine=engine, cache="float32" if engine == "cpu" else None)
        )
        written += answer + ";"


DROPPING = TEMPLATE.replace("m['content']", "m['content'][-2:] if m['role'] == 'assistant' else m['content']")


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("windows", [["full_attention", "sliding_attention"], ["sliding_attention"] * 2])
def test_a_template_that_rewrites_answers_rewinds_past_a_window(windows, engine, tmp_path):
    """Of an answer the template keeps the end: the tokens that were spoken are taken back."""
    config = tiny_config(
        torch_dtype="float32", eos_token_id=None, max_position_embeddings=256, num_hidden_layers=2,
        use_sliding_window=True, sliding_window=6, layer_types=windows,
    )  # fmt: skip
    folder = write_model(tmp_path / "model", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": DROPPING}))
    options = {"engine": engine, "cache": "float32" if engine == "cpu" else None}
    chat, written = Chat(folder, max_tokens=12, temperature=0, **options), ""
    for text in ("one", "two", "three"):
        written += f"[user]{text};[assistant]"
        answer = "".join(chat.reply(text))
        assert answer == "".join(generate(folder, written, max_tokens=12, **options))
        written += answer[-2:] + ";"


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_gguf_file_talks_like_its_folder(model, engine, tmp_path):
    source = shutil.copytree(model, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 296}))
    (file,) = write_gguf(source, tmp_path / "model.gguf")
    options = {"max_tokens": 6, "temperature": 0, "engine": engine}
    folder, single = Chat(source, **options), Chat(file, **options)
    assert single._end == folder._end == {296}
    for text in ("one", "two"):
        assert "".join(single.reply(text)) == "".join(folder.reply(text)) != ""


def test_only_what_is_new_is_fed(model, monkeypatch):
    from quern.engines._cpu_model import CpuSession

    fed, feed = [], CpuSession.feed
    monkeypatch.setattr(CpuSession, "feed", lambda self, ids: (fed.append(len(ids)), feed(self, ids))[1])
    chat = Chat(model, max_tokens=4, temperature=0, engine="cpu")
    "".join(chat.reply("a longer message to begin with"))
    whole, count = len(chat._encode([*chat._messages, {"role": "user", "content": "b"}])), len(fed)
    "".join(chat.reply("b"))
    assert fed[count] <= whole - fed[0], "the first message is in the cache"


def test_an_answer_that_is_cut_short_is_remembered_as_far_as_it_went(model):
    chat = Chat(model, max_tokens=8, temperature=0, engine="cpu")
    pieces = chat.reply("one")
    begun = next(pieces)
    pieces.close()
    assert "".join(chat.reply("two")) == "".join(
        generate(model, f"[user]one;[assistant]{begun};[user]two;[assistant]", max_tokens=8, engine="cpu")
    )


def test_refusals(model, tiny_model):
    with pytest.raises(UserError, match="has no chat template"):
        Chat(tiny_model)
    with pytest.raises(UserError, match="max_tokens is 0"):
        Chat(model, max_tokens=0)
    with pytest.raises(
        UserError, match=r"the conversation has \d+ tokens and the model's context 256; start a new one"
    ):
        Chat(model, engine="cpu").reply("word " * 300)
    with pytest.raises(UserError, match="cache='int8' is for the cpu engine"):
        Chat(model, engine="reference", cache="int8")
    with pytest.raises(UserError, match="cache='int3' is not known; give one of float32, float16, int8"):
        Chat(model, engine="cpu", cache="int3")


def test_the_verb_reads_lines_and_prints_json(model):
    words = ["chat", str(model), "--max-tokens", "3", "--temperature", "0", "--json"]
    done = CliRunner().invoke(app, words, input="one\ntwo\n\nnot read\n")
    assert done.exit_code == 0
    assert [turn["user"] for turn in json.loads(done.stdout)] == ["one", "two"]
    plain = CliRunner().invoke(app, words[:-1], input="one\ntwo\n")
    assert [turn["assistant"] for turn in json.loads(done.stdout)] == plain.stdout.split("\n")[:2]
