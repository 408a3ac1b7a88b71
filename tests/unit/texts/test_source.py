"""Files become documents: which format and which fields are taken, what is said about it, and what is refused."""

import gzip
import hashlib
import importlib.util
import json
import sys

import pytest

from quern.core.errors import BadFileError, UserError
from quern.texts import json_records as json_module
from quern.texts import stream
from quern.texts.records import chat_of
from quern.texts.source import Text, each, read_text, split_articles

WIKI = (
    " \n = First = \n \n Some text . \n \n = = Part = = \n \n More = text = here . \n"
    " \n = Second Title = \n \n Other . \n"
)
THREE = ["First, a text; with\tmarks.", 'Second "quoted"\nin two lines 你好', "Third {not} [JSON]"]


def chat(messages):
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def documents(path, chat=chat, **options):
    return ["".join(document) for document in read_text(path).read(chat, **options)]


def note(path, chat=chat):
    reading = read_text(path).read(chat)
    for _ in reading:
        pass
    return reading.note


@pytest.fixture
def write(tmp_path):
    def function(name, content):
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    return function


def json_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(rows, comma=","):
    return "\n".join(comma.join('"' + field.replace('"', '""') + '"' for field in row) for row in rows)


SPELLINGS = {
    "a.jsonl": json_lines({"id": 1, "text": text} for text in THREE),
    "windows.jsonl": "\ufeff" + json_lines({"text": text} for text in THREE).replace("\n", "\r\n"),
    "named as plain.txt": json_lines({"text": text} for text in THREE),
    "no_ending": json_lines({"content": text} for text in THREE),
    "a.json": json.dumps([{"Text": text} for text in THREE], indent=1),
    "strings.json": json.dumps(THREE),
    "lines.json": json_lines(THREE),
    "under one name.json": json.dumps({"data": [{"text": text} for text in THREE]}),
    "columns.json": json.dumps({"text": THREE}),
    "a.ndjson": json_lines({"text": text} for text in [THREE[0], None, "", *THREE[1:]]),
    "a.csv": table([("id", "text"), *(("7", text) for text in THREE)]),
    "windows.csv": "\ufeff" + table([("text", "id"), *((text, "7") for text in THREE)]).replace('"\n"', '"\r\n"'),
    "half.csv": table([("text", "id"), *((text, "7") for text in THREE)], ";"),
    "one.csv": table([("text",), *((text,) for text in THREE)]),
    "a.tsv": table([("text", "id"), *((text, "7") for text in THREE)], "\t"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_all_spellings_of_the_same_records(write, name, packed):
    raw = SPELLINGS[name].encode()
    path = write(name + ".gz", gzip.compress(raw)) if packed else write(name, raw)
    assert documents(path) == THREE
    assert "3 records" in note(path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_however_the_file_is_cut_into_pieces(write, monkeypatch, size):
    monkeypatch.setattr(stream, "CHUNK", size)
    for name in ("a.jsonl", "windows.jsonl", "a.json", "strings.json", "under one name.json", "windows.csv"):
        assert documents(write(name, SPELLINGS[name])) == THREE


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name in ("a.parquet", "parquet_by_its_content"):
        table = pyarrow.table({"id": [1, 2, 3, 4], "text": [THREE[0], None, *THREE[1:]]})
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=2)
        assert documents(tmp_path / name) == THREE
        assert note(tmp_path / name) == f"{name}: Parquet, field text, 3 records, 1 empty ones left out"
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [conversation] * 2}), tmp_path / "chat.parquet")
    assert documents(tmp_path / "chat.parquet") == ["<user>Hi<assistant>Yo"] * 2
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(raw[:-30])
    with pytest.raises(BadFileError, match="is not Parquet that can be read"):
        documents(tmp_path / "damaged.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(BadFileError, match="record 1 has the fields 'words'; known are"):
        documents(tmp_path / "other.parquet")


def test_parquet_without_pyarrow(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'quern\[parquet\]'"):
        documents(write("a.parquet", b"PAR1" + bytes(20)))


FORMS = [
    ({"messages": [{"role": "user", "content": "Q"}]}, "<user>Q", "field messages through the chat template"),
    (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "<user>Q<assistant>A",
        "field conversations through the chat template",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]}]},
        "<user>QR",
        "field messages",
    ),
    ([{"role": "user", "content": "Q"}], "<user>Q", "conversations through the chat template"),
    (
        {"instruction": "Do", "input": "it", "output": "Done"},
        "<user>Do\n\nit<assistant>Done",
        "instruction, input, output",
    ),
    (
        {"instruction": "Do", "output": "Done"},
        "<user>Do<assistant>Done",
        "instruction, output through the chat template",
    ),
    ({"instruction": "Do", "input": "", "output": "Done"}, "<user>Do<assistant>Done", "instruction, input, output"),
    ({"question": "Q", "answer": "A", "id": 3}, "<user>Q<assistant>A", "question, answer"),
    ({"prompt": "One and", "completion": " two"}, "One and two", "prompt, completion one after the other"),
    (
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        "<user>Q<assistant>A",
        "prompt, completion",
    ),
    ({"prompt": "P", "response": "R"}, "<user>P<assistant>R", "prompt, response through the chat template"),
    ({"text": "T", "messages": [{"role": "user", "content": "Q"}]}, "T", "field text"),
]


@pytest.mark.parametrize(("record", "text", "said"), FORMS)
def test_forms_of_records(write, record, text, said):
    path = write("a.json", json.dumps([record, record]))
    assert documents(path) == [text, text]
    assert said in note(path)


def test_without_a_chat_template(write):
    path = write("a.jsonl", json_lines([{"instruction": "Do", "input": "it", "output": "Done"}]))
    assert documents(path, chat=None) == ["Do\n\nit\n\nDone"]
    path = write("b.jsonl", json_lines([{"messages": [{"role": "user", "content": "Q"}]}]))
    with pytest.raises(
        BadFileError, match="record 1 is a conversation, and this model's tokenizer has no chat template"
    ):
        documents(path, chat=None)


def test_a_template_that_refuses_is_named_with_the_record(write):
    class Strict:
        chat_template = "{{ raise_exception('roles must alternate') }}"

        def apply_chat_template(self, messages, tokenize):
            raise ValueError("roles must alternate")

    path = write("a.jsonl", json_lines([{"messages": [{"role": "user", "content": "Q"}]}]))
    with pytest.raises(BadFileError, match="record 1 is refused by the model's chat template: roles must alternate"):
        documents(path, chat=chat_of(Strict()))
    assert chat_of(object()) is None


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", " \n\n", "no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.json", "[1, 2]", "record 1 has the JSON type int; known are a list of texts"),
        ("a.json", '{"a": "b"}', "record 1 has the fields 'a'; known are"),
        ("a.json", "{}", "record 1 has no fields"),
        ("a.json", "[", "line 1 ends in the middle of a list"),
        ("a.json", '["a"', "line 1 is not JSON: a comma"),
        ("a.json", '["a", "b"] more', "line 1 goes on behind the end"),
        ("a.json", '["a",\n\n"b" "c"]', "line 3 is not JSON: a comma"),
        ("a.json", '["a",\n\n"b', "line 3 is not JSON: Unterminated string"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "id": ' + "9" * 5000 + "}",
            "line 2 holds a number with thousands of",
        ),
        ("a.json", "[]", "no text"),
        ("a.json", "", "no text"),
        ("a.json", '["", " "]', "no text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": nonsense of more letters}\n', "line 3 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"words": "b"}\n', "record 2 has no field 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', "record 2 has a value of type int under 'text'"),
        ("a.jsonl", '{"messages": "hello"}\n', "record 1 holds no list of messages"),
        ("a.jsonl", '{"messages": [{"role": 1, "content": "a"}]}\n', "role is of type int"),
        ("a.jsonl", '"a"\n{"text": "b"}', "record 2 is of type dict, not a text"),
        ("a.csv", "words,id\na,1\n", "record 1 has the fields 'words', 'id'"),
        ("a.csv", "text,text\na,1\n", "names a field twice"),
        ("a.csv", "text,id\na,1\nb,c,2\n", "line 3 has 3 fields, the first row names 2"),
        ("a.csv", 'text,id\n"a" b,1\n', "line 2 is no row of a table"),
        ("a.csv", "text,id\n", "no text"),
        ("a.parquet", "words", "does not begin as such"),
    ],
)
def test_what_is_refused(write, name, content, problem):
    with pytest.raises(BadFileError, match=problem) as caught:
        documents(write(name, content))
    assert name in str(caught.value)


def test_a_record_that_is_too_long(write, monkeypatch):
    monkeypatch.setattr(json_module, "LINE_LIMIT", 50)
    monkeypatch.setattr(stream, "CHUNK", 20)
    with pytest.raises(BadFileError, match="line 2 begins a record of more than 50 characters"):
        documents(write("a.jsonl", json_lines([{"text": "a"}, {"text": "b" * 200}])))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("plain words, and more\n", None),
        ("{braces} first\n", "looks like JSON"),
        ('["a", "b"]\n', "looks like JSON"),
        ("text,label\none,1\n", "looks like a table"),
        ("[1] Introduction\n", None),
    ],
)
def test_plain_text_is_taken_as_it_is_but_what_it_looks_like_is_said(write, content, said):
    path = write("a.txt", content)
    assert documents(path) == [content]
    assert note(path) is None if said is None else said in note(path)


def test_only_what_is_asked_for_is_read(write):
    path = write("a.jsonl", json_lines([{"text": "a"}, {"text": "b"}]) + "broken")
    reading = read_text(path).read()
    for _ in reading:
        break
    assert reading.note == "a.jsonl: JSON, field text, the first 1 record"


def test_half_characters_in_json(write):
    assert documents(write("a.json", '["a \\ud83d b", "\\ud83d\\ude00"]')) == ["a \ufffd b", "\U0001f600"]


class TestPlainText:
    def test_wikitext_is_cut_at_its_articles(self, write):
        articles = documents(write("wiki.txt", WIKI))
        assert len(articles) == 2
        assert "".join(articles) == WIKI
        assert articles[0].startswith(" \n = First = ")
        assert "= = Part = =" in articles[0]
        assert articles[1].startswith(" = Second Title = ")
        assert documents(write("wiki.txt", WIKI), articles=False) == [WIKI]

    def test_with_the_line_ends_of_another_system(self, write):
        assert documents(write("wiki.txt", WIKI.replace("\n", "\r\n"))) == documents(write("unix.txt", WIKI))

    def test_stripped_headings_too(self, write):
        assert len(documents(write("a.txt", "= A =\n\ntext\n\n= B =\n\n= = C = =\n\nmore\n"))) == 2

    def test_articles_that_are_not_read_to_their_end(self):
        starts = [next(iter(article)) for article in split_articles(iter([WIKI]))]
        assert starts == [" \n", " = Second Title = \n"]

    @pytest.mark.parametrize("text", ["x = 1\n = y = \n", "plain\n", "= = Part = =\n = A = \n", "===\n", "=\n"])
    def test_other_text_is_one_document(self, write, text):
        assert documents(write("a.txt", text)) == [text]

    def test_a_file_is_a_document_and_its_hash_is_that_of_its_bytes(self, write):
        path = write("text.txt", b"\n\nsome text\r\nof two lines\n")
        assert documents(path) == ["\n\nsome text\nof two lines\n"]
        assert read_text(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert read_text(path).name == "text.txt"

    def test_a_mark_is_no_text(self, write):
        assert documents(write("a.txt", "\ufefftext")) == ["text"]
        with pytest.raises(BadFileError, match="no text"):
            documents(write("a.txt", "\ufeff"))


def test_strings_in_memory():
    text = Text.of("mine", ["a", "  ", "b"])
    assert text.documents == ("a", "b")
    assert [list(document) for document in text.read()] == [["a"], ["b"]]
    assert text.sha256 != Text.of("mine", ["a", "c"]).sha256
    with pytest.raises(UserError, match="'mine' is empty"):
        Text.of("mine", ["", "\n"])


def test_one_path_is_no_sequence_of_letters(tmp_path):
    path = tmp_path / "ab.txt"
    assert each(str(path)) == [str(path)]
    assert each(path) == [path]
    assert each(name for name in ("a", "b")) == ["a", "b"]
