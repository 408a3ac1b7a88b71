"""``quern write``: records that begin as the texts do, the same after an interruption, and read as calibration."""

import json
import re

import pytest
from tiny_model import tiny_config, write_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

import quern
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.cli.main import app
from quern.core.errors import BadFileError, UserError
from quern.texts.source import read_text

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SIZES = {"tokens": 120, "begin": 8, "length": 24, "threads": 1}
QUESTIONS = ["who are you", "what is that", "why"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None, max_position_embeddings=256)
    return write_model(tmp_path_factory.mktemp("write") / "model", config)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    config = tiny_config(torch_dtype="float32", eos_token_id=None, max_position_embeddings=256)
    folder = write_model(tmp_path_factory.mktemp("write-chat") / "model", config)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("write-text") / "text.txt"
    path.write_text(" ".join(f"line {number} of some text," for number in range(200)))
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("write-text") / "chat.jsonl"
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "SAID BEFORE"}]}
        for question in QUESTIONS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_begin_as_the_text_does(model, text, tmp_path):
    report = quern.write_text(model, tmp_path / "own.jsonl", texts=[text], **SIZES)
    found = records(report.path)
    assert (len(found), sum(record["tokens"] for record in found)) == (report.records, report.tokens)
    assert [record["tokens"] for record in found] == [24] * 5
    assert report.written_tokens == 5 * 16
    tokenizer, whole = AutoTokenizer.from_pretrained(model), text.read_text()
    for record in found:
        beginning = tokenizer.decode(tokenizer.encode(record["text"], add_special_tokens=False)[:6])
        assert beginning in whole
        assert record["text"] not in whole
    assert len({record["text"][:12] for record in found}) > 1
    taken = list(read_text(report.path).read())
    assert len(taken) == 5


def test_the_same_words_at_any_number_of_threads_and_after_an_interruption(model, text, tmp_path, monkeypatch):
    whole = quern.write_text(model, tmp_path / "whole.jsonl", texts=[text], **SIZES).path.read_bytes()
    finish = WorkFolder.finish

    def stop(self, step, files, data):
        finish(self, step, files, data)
        if step == "record 2":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            quern.write_text(model, tmp_path / "own.jsonl", texts=[text], **SIZES)
    assert not (tmp_path / "own.jsonl").exists()
    report = quern.write_text(model, tmp_path / "own.jsonl", texts=[text], **{**SIZES, "threads": 3})
    assert report.resumed
    assert report.path.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "whole.jsonl"]
    other = quern.write_text(model, tmp_path / "other.jsonl", texts=[text], seed=1, **SIZES)
    assert other.path.read_bytes() != whole


def test_first_questions_are_answered(chat_model, conversations, tmp_path):
    report = quern.write_text(chat_model, tmp_path / "own.jsonl", texts=[conversations], **{**SIZES, "tokens": 10_000})
    found = records(report.path)
    asked = [re.match(r"\[user\](.*);\[assistant\](?!SAID)", record["text"]) for record in found]
    assert sorted(one[1] for one in asked) == sorted(QUESTIONS)
    assert any("no more beginnings" in note for note in report.notes)


def test_texts_and_conversations_take_turns(chat_model, text, conversations, tmp_path):
    report = quern.write_text(chat_model, tmp_path / "own.jsonl", texts=[conversations, text], **SIZES)
    assert [record["text"].startswith("[user]") for record in records(report.path)][:4] == [False, True] * 2


def test_the_answer_ends_where_the_template_ends_it(chat_model, conversations, tmp_path):
    """With a token that ends every answer at once, the record has it and nothing behind it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in chat_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": list(range(config["vocab_size"]))}))
    report = quern.write_text(folder, tmp_path / "own.jsonl", texts=[conversations], **SIZES)
    assert report.written_tokens == len(QUESTIONS)


def test_what_was_written_calibrates(model, text, tmp_path):
    own = quern.write_text(model, tmp_path / "own.jsonl", texts=[text], **{**SIZES, "tokens": 600}).path
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: own\nweights: {bits: 4, group_size: 32}\nrounding: {method: gptq}\ncalibration: {tokens: 256, sequence_length: 64}\n"
    )
    quern.quantize(model, tmp_path / "quantized", recipe=recipe, calibration=[own], threads=1)


def test_bad_requests_write_nothing(model, text, conversations, tmp_path):
    def refused(match, error=UserError, **given):
        with pytest.raises(error, match=match):
            quern.write_text(model, **{"output": tmp_path / "own.jsonl", "texts": [text], **SIZES, **given})

    refused(r"end in \.jsonl", output=tmp_path / "own.txt")
    refused("length is 8", length=8)
    refused("tokens is 0", tokens=0)
    refused("temperature", temperature=-1.0)
    refused("no chat template", BadFileError, texts=[conversations])
    refused("no room to go on", begin=256, length=512)
    (tmp_path / "short.txt").write_text("ab")
    refused("and a beginning 8", texts=[tmp_path / "short.txt"])
    (tmp_path / "short.txt").unlink()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own.jsonl").write_text("mine\n")
    refused("not written by quern", fresh=True)
    (tmp_path / "own.jsonl").unlink()
    made = quern.write_text(model, tmp_path / "own.jsonl", texts=[text], fresh=True, **SIZES).path.read_bytes()
    refused("finished")
    assert quern.write_text(model, tmp_path / "own.jsonl", texts=[text], fresh=True, **SIZES).path.read_bytes() == made


def test_the_command(model, text, tmp_path):
    output = tmp_path / "own.jsonl"
    sizes = ["--tokens", "60", "--begin", "8", "--length", "24", "--threads", "1"]
    done = CliRunner().invoke(app, ["write", str(model), "-o", str(output), "--text", str(text), *sizes, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["records"] == 3
    again = CliRunner().invoke(app, ["write", str(model), "-o", str(output), "--text", str(text), *sizes])
    assert again.exit_code == 2
