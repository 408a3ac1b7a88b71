"""Every reader of the user's text takes a byte order mark or says what stands in the way, and names other encodings."""

import gzip
import io
import json
import sys

import pytest
from sample_results import sample_results

from quern.checkpoint.files import read_json
from quern.cli.chat import _messages
from quern.core.errors import BadFileError, UserError
from quern.core.recipe import load_recipe
from quern.core.results import load_results
from quern.evaluation.choice import read_choices

MARK = b"\xef\xbb\xbf"
RECIPE = "name: mine\nweights: {bits: 4}\n"
CHOICES = json.dumps({"prompt": "ü", "choices": ["\ud83d", "b"], "answer": 0}) + "\r\n"


@pytest.fixture
def write(tmp_path):
    def function(name, raw):
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    return function


READERS = {
    "recipe.yaml": (load_recipe, RECIPE),
    "recipe.json": (load_recipe, json.dumps({"name": "mine", "weights": {"bits": 4}})),
    "results.json": (load_results, sample_results().model_dump_json()),
    "choices.jsonl": (read_choices, CHOICES),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mark_is_taken_and_other_encodings_are_named(write, name):
    read, content = READERS[name]
    plain = read(write(name, content.encode()))
    marked = read(write(name, MARK + content.encode()))
    if name == "choices.jsonl":
        assert plain.items == marked.items
    else:
        assert plain == marked
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(BadFileError, match=f"{name}: is UTF-16 and not UTF-8 text"):
            read(write(name, content.encode(encoding, "surrogatepass")))
    with pytest.raises(BadFileError, match=r"is not UTF-8 text \(byte 1\).*iconv -f WINDOWS-1252"):
        read(write(name, b"#\xfc" + content.encode()))


def test_choices_are_read_gzipped_too_and_half_characters_replaced(write):
    found = read_choices(write("choices.jsonl.gz", gzip.compress(CHOICES.encode())))
    assert found.items[0].prompt == "ü"
    assert found.items[0].options == ("\ufffd", "b")


def test_a_models_configuration_must_do_without(write):
    """Other libraries read the same files."""
    with pytest.raises(BadFileError, match="begins with a byte order mark.*Save it as UTF-8 without one"):
        read_json(write("config.json", MARK + b"{}"))
    with pytest.raises(BadFileError, match="is UTF-16. Save it as UTF-8"):
        read_json(write("config.json", "{}".encode("utf-16")))


class TestStandardInput:
    def read(self, monkeypatch, raw):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        return list(_messages())

    @pytest.mark.parametrize("mark", [b"", MARK])
    def test_is_utf8_whatever_the_terminal_says(self, monkeypatch, mark):
        assert self.read(monkeypatch, mark + "Grüße\r\n你好\n\nnot read".encode()) == ["Grüße", "你好"]

    @pytest.mark.parametrize(
        ("raw", "problem"),
        [
            ("hello\n".encode("utf-16"), "standard input: is UTF-16"),
            (b"caf\xe9\n", r"standard input: is not UTF-8 text \(byte 3\)"),
        ],
    )
    def test_other_encodings_are_named(self, monkeypatch, raw, problem):
        with pytest.raises(UserError, match=problem):
            self.read(monkeypatch, raw)
