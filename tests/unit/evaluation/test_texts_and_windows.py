"""Texts become documents, documents windows; every token is scored at most once."""

import hashlib
import json

import numpy as np
import pytest
from fake_model import VOCABULARY, FakeTokenizer

from quern.core.errors import BadFileError, UserError
from quern.evaluation.texts import (
    Text,
    cut_windows,
    load_windows,
    read_text,
    save_windows,
    split_articles,
)

WIKI = (
    " \n = First = \n \n Some text . \n \n = = Part = = \n \n More = text = here . \n"
    " \n = Second Title = \n \n Other . \n"
)


def cut(texts, tokens=20, window=8, tokenizer=None, vocabulary_size=VOCABULARY):
    tokenizer = tokenizer or FakeTokenizer(adds_bos=False)
    return cut_windows(texts, tokenizer, vocabulary_size=vocabulary_size, tokens=tokens, window=window)


class TestReading:
    def test_wikitext_is_cut_at_its_articles(self):
        articles = split_articles(WIKI)
        assert len(articles) == 2
        assert "".join(articles) == WIKI
        assert articles[0].startswith(" \n = First = ")
        assert "= = Part = =" in articles[0]
        assert articles[1].startswith(" = Second Title = ")

    def test_stripped_headings_too(self):
        assert len(split_articles("= A =\n\ntext\n\n= B =\n\n= = C = =\n\nmore\n")) == 2

    def test_wikitext_with_the_line_ends_of_another_system(self, tmp_path):
        path = tmp_path / "wiki.txt"
        path.write_bytes(WIKI.replace("\n", "\r\n").encode())
        assert read_text(path).documents == tuple(split_articles(WIKI))

    @pytest.mark.parametrize("text", ["x = 1\n = y = \n", "plain\n", "= = Part = =\n = A = \n", "===\n", "=\n", ""])
    def test_other_text_is_one_document(self, text):
        assert split_articles(text) == [text]

    def test_a_file_is_a_document(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_bytes(b"some text\r\nof two lines\n")
        text = read_text(path)
        assert (text.name, text.documents) == ("text.txt", ("some text\nof two lines\n",))
        assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_a_json_list(self, tmp_path):
        path = tmp_path / "stories.json"
        path.write_text(json.dumps(["one story", " ", "another"]))
        assert read_text(path).documents == ("one story", "another")

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("a.txt", b"", "no text"),
            ("a.txt", b" \n\n", "no text"),
            ("a.txt", b"caf\xe9", "not UTF-8"),
            ("a.json", b"[1, 2]", "not a JSON list of strings"),
            ("a.json", b'{"a": "b"}', "not a JSON list of strings"),
            ("a.json", b"[", "not JSON"),
            ("a.json", b"[" * 100_000, "not JSON"),
            ("a.json", b"[]", "no text"),
        ],
    )
    def test_unusable_files(self, tmp_path, name, content, problem):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadFileError, match=problem) as caught:
            read_text(path)
        assert str(path) in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(BadFileError, match="cannot be read"):
            read_text(tmp_path / "none.txt")

    def test_strings_in_memory(self):
        text = Text.of("mine", ["a", "  ", "b"])
        assert text.documents == ("a", "b")
        assert text.sha256 != Text.of("mine", ["a", "c"]).sha256
        with pytest.raises(UserError, match="'mine' is empty"):
            Text.of("mine", ["", "\n"])


class TestCutting:
    def test_documents_take_turns(self):
        windows = cut([Text.of("t", ["a" * 20, "b" * 5, "c" * 9])], tokens=22, window=8)
        spelled = [(w.document, FakeTokenizer().decode(list(w.ids))) for w in windows.windows]
        # After one window of each there is room for one more token, which could not be scored alone.
        assert spelled == [(0, "a" * 8), (1, "b" * 5), (2, "c" * 8)]

    def test_every_token_at_most_once_and_in_order(self):
        documents = ["abcdefghijklmnopqrstuvwxyz", "0123456789", "zyx"]
        windows = cut([Text.of("t", documents)], tokens=39, window=7)
        for number, document in enumerate(documents):
            own = "".join(FakeTokenizer().decode(list(w.ids)) for w in windows.windows if w.document == number)
            # A single token left over at a document's end cannot be scored, so it is left out.
            assert own in (document, document[:-1])

    def test_exactly_as_many_tokens_as_asked(self):
        for tokens in range(2, 40):
            windows = cut([Text.of("t", ["a" * 31, "b" * 30])], tokens=tokens, window=8)
            total = sum(len(w.ids) for w in windows.windows)
            assert tokens - 1 <= total <= tokens
            assert all(2 <= len(w.ids) <= 8 for w in windows.windows)
            assert windows.scored == total - len(windows.windows)

    def test_windows_begin_with_bos_where_the_tokenizer_has_it(self):
        windows = cut([Text.of("t", ["abcdefghij"])], tokens=12, window=5, tokenizer=FakeTokenizer(adds_bos=True))
        assert [w.ids[0] for w in windows.windows] == [0] * len(windows.windows)
        assert [len(w.ids) for w in windows.windows] == [5, 5, 2]

    def test_sources_count_their_tokens(self):
        texts = [Text.of("one", ["a" * 10]), Text.of("two", ["b" * 10, "c" * 10])]
        windows = cut(texts, tokens=24, window=8)
        assert [source.name for source in windows.sources] == ["one", "two"]
        assert sum(source.tokens for source in windows.sources) == windows.scored == 24 - len(windows.windows)
        assert all(source.tokens > 0 for source in windows.sources)

    def test_the_same_text_twice_counts_apart(self):
        text = Text.of("one", ["a" * 10])
        windows = cut([text, text], tokens=16, window=8)
        assert [source.tokens for source in windows.sources] == [7, 7]

    def test_too_little_text(self):
        with pytest.raises(UserError, match="100 tokens are asked for, t have 10") as caught:
            cut([Text.of("t", ["a" * 10])], tokens=100)
        assert "at most 10" in str(caught.value)
        cut([Text.of("t", ["a" * 10])], tokens=10)

    def test_no_texts(self):
        with pytest.raises(UserError, match="too little text"):
            cut([])

    def test_no_room_to_score(self):
        for tokens, window in ((20, 1), (1, 8), (0, 8)):
            with pytest.raises(UserError, match="at least 2"):
                cut([Text.of("t", ["a" * 50])], tokens=tokens, window=window)

    def test_tokens_outside_the_vocabulary(self):
        with pytest.raises(UserError, match=r"does not fit the model: it makes token 27 .'z'.*20 entries"):
            cut([Text.of("t", ["abcz" * 50])], vocabulary_size=20)

    def test_hash_depends_on_ids_and_cuts(self):
        text = Text.of("t", ["abcdefgh" * 10])
        hashes = {cut([text], tokens=40, window=w).sha256() for w in (4, 8)}
        hashes.add(cut([Text.of("t", ["abcdefgx" * 10])], tokens=40, window=8).sha256())
        assert len(hashes) == 3
        assert cut([text], tokens=40).sha256() == cut([text], tokens=40).sha256()

    def test_round_trip_through_a_file(self, tmp_path):
        windows = cut([Text.of("t", ["abcdefgh" * 10, "xyz"])], tokens=40)
        save_windows(tmp_path / "w.npz", windows)
        again = load_windows(tmp_path / "w.npz")
        assert [w.document for w in again] == [w.document for w in windows.windows]
        for a, b in zip(again, windows.windows):
            assert a.ids.dtype == np.int64
            assert (a.ids == b.ids).all()
