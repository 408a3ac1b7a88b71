"""Documents become windows; every token is scored at most once, and little more is tokenized than is scored."""

import json
import random

import numpy as np
import pytest
from fake_model import VOCABULARY, FakeTokenizer

from quern.core.errors import UserError
from quern.evaluation.texts import cut_windows, load_windows, save_windows
from quern.texts.source import Text, read_text


def cut(texts, tokens=20, window=8, tokenizer=None, vocabulary_size=VOCABULARY):
    tokenizer = tokenizer or FakeTokenizer(adds_bos=False)
    return cut_windows(texts, tokenizer, vocabulary_size=vocabulary_size, tokens=tokens, window=window)


def plainly(documents, tokens, window, prefix):
    """Windows from all documents whole: first windows, then second ones, until there are ``tokens``."""
    encoded = [FakeTokenizer(adds_bos=False).encode(document, add_special_tokens=False) for document in documents]
    chosen, total, step = [], 0, window - len(prefix)
    for start in range(0, max(map(len, encoded)), step):
        for number, ids in enumerate(encoded):
            ids = (prefix + ids[start : start + step])[: tokens - total] if len(ids) > start else []
            if len(ids) >= 2 and tokens - total >= 2:
                chosen.append((number, start, ids))
                total += len(ids)
    return [(number, ids) for number, _, ids in sorted(chosen)] if tokens - total < 2 else None


class Counting(FakeTokenizer):
    """Knows how many characters it was given."""

    def __init__(self, **rest):
        super().__init__(**rest)
        self.characters = 0

    def encode(self, text, **rest):
        self.characters += len(text)
        return super().encode(text, **rest)


class TestReadingOnlyWhatIsWanted:
    @pytest.mark.parametrize("seed", range(40))
    def test_the_windows_are_those_of_all_documents_tokenized_whole(self, seed):
        draw = random.Random(seed)
        documents = ["".join(draw.choices("abcdef", k=draw.choice((1, 2, 9, 40)))) for _ in range(draw.randrange(1, 9))]
        bos, window, tokens = draw.random() < 0.5, draw.randrange(2, 12), draw.randrange(2, 120)
        wanted = plainly(documents, tokens, window, [0] if bos else [])
        half = len(documents) // 2
        texts = [Text.of(str(number), part) for number, part in enumerate((documents[:half], documents[half:])) if part]
        if wanted is None:
            with pytest.raises(UserError, match="too little text"):
                cut(texts, tokens, window, FakeTokenizer(adds_bos=bos))
        else:
            found = cut(texts, tokens, window, FakeTokenizer(adds_bos=bos))
            assert [(w.document, w.ids.tolist()) for w in found.windows] == wanted
            assert sum(source.tokens for source in found.sources) == found.scored

    def test_of_many_records_the_first_and_of_a_long_text_its_beginning(self, tmp_path, monkeypatch):
        from quern.texts import tokens

        (tmp_path / "many.jsonl").write_text(
            "".join(json.dumps({"text": "abcdef gh " * 10}) + "\n" for _ in range(500))
        )
        tokenizer = Counting(adds_bos=False)
        found = cut([read_text(tmp_path / "many.jsonl")], 40, 16, tokenizer)
        assert tokenizer.characters <= 3 * 100
        assert found.sources[0].taken == "many.jsonl: JSON, field text, the first 3 records"
        monkeypatch.setattr(
            tokens, "cut_pieces", lambda strings: (s[i : i + 90] for s in strings for i in range(0, 9000, 90))
        )
        (tmp_path / "long.txt").write_text("abc def " * 5000)
        tokenizer = Counting(adds_bos=False)
        cut([read_text(tmp_path / "long.txt")], 300, 64, tokenizer)
        assert tokenizer.characters < 2000

    def test_a_text_that_spells_the_beginning_has_it_once(self):
        class Spelled(FakeTokenizer):
            def encode(self, text, **rest):
                inner = [0] if text.startswith("<s>") else []
                return inner + super().encode(text.removeprefix("<s>"), **rest)

        found = cut([Text.of("t", ["<s>abcdef"])], 7, 8, Spelled())
        assert [w.ids.tolist() for w in found.windows] == [[0, 2, 3, 4, 5, 6, 7]]

    def test_a_token_without_a_row_is_refused_where_it_is_scored(self):
        text = Text.of("t", ["abcdef" * 5 + "z"])
        cut([text], tokens=20, vocabulary_size=20)
        with pytest.raises(UserError, match=r"has token 27 .'z'"):
            cut([text], tokens=31, vocabulary_size=20)


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
        with pytest.raises(UserError, match="100 tokens are asked for, t has 10") as caught:
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
        with pytest.raises(UserError, match=r"the text has token 27 .'z'.*the embedding has 20 rows"):
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
