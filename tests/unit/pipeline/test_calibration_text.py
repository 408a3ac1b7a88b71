"""Calibration text to sequences: which windows, in which order, and what is said when it does not do."""

import hashlib
import json
import random

import pytest
import torch

from quern.core.errors import BadFileError, UserError
from quern.core.recipe_parts import Calibration
from quern.pipeline.blockwise import calibration_text
from quern.pipeline.blockwise.calibration_text import CalibrationText, text_sha256
from quern.texts.source import Text


class Letters:
    """A token for each character, its code point."""

    asked = 0

    def encode(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        self.asked += len(text)
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


DOCUMENTS = ["".join(map(chr, range(33, 533))), "".join(map(chr, range(533, 1056)))]
STREAM = [ord(letter) for text in DOCUMENTS for letter in text]


def material(texts, tokenizer=None, **settings) -> CalibrationText:
    chosen = Calibration.model_validate({"tokens": 160, "sequence_length": 16, **settings})
    return CalibrationText(texts, tokenizer or Letters(), chosen)


def sequences(seed: int = 0, context: int = 1000, documents=DOCUMENTS, vocabulary: int = 2000, **settings):
    return material([Text.of("t", documents)], **settings).sequences(context, vocabulary, seed)


def starts(found: torch.Tensor) -> list[int]:
    """Where each sequence begins in the joined documents, in windows."""
    windows = [STREAM[i * 16 : (i + 1) * 16] for i in range(len(STREAM) // 16)]
    return [windows.index(sequence) for sequence in found.tolist()]


def test_sequences_are_windows_of_the_joined_text_without_repetition():
    found = sequences()
    assert found.shape == (10, 16)
    assert found.dtype == torch.int64
    assert starts(found) == sorted(set(starts(found)))


def test_the_seed_chooses_the_windows():
    assert torch.equal(sequences(seed=1), sequences(seed=1))
    assert not torch.equal(sequences(seed=1), sequences(seed=2))
    assert starts(sequences(tokens=len(STREAM) // 16 * 16)) == list(range(len(STREAM) // 16)), "all of them, in order"


def test_sequences_are_no_longer_than_the_context():
    assert sequences(context=8).shape == (20, 8)
    assert sequences(tokens=5).shape == (1, 16), "never fewer than one"


def test_text_that_is_too_short_says_how_much_there_is():
    with pytest.raises(
        UserError,
        match=r"has 1023 tokens; the recipe wants 100 sequences of 16 = 1600.*fewer calibration_tokens: at most 1008",
    ):
        sequences(tokens=1600)
    with pytest.raises(
        UserError, match=r"has 5 tokens.*calibration.tokens and calibration.sequence_length to at most 5 in"
    ):
        sequences(documents=["abcde"])
    with pytest.raises(UserError, match=r"has 1 tokens; .*Give more text with calibration$"):
        sequences(documents=["a"])


def test_text_of_the_wanted_tokens_that_is_shorter_than_a_sequence_is_one():
    found = material([Text.of("t", ["abcdefghij"])], tokens=8)
    assert found.sequences(1000, 2000, 0).tolist() == [[ord(letter) for letter in "abcdefghij"]]
    assert "one sequence of 10 tokens" in found.notes[0]
    with pytest.raises(UserError, match="has 10 tokens"):
        sequences(documents=["abcdefghij"], tokens=11)


def test_tokens_beyond_the_embedding_are_refused_where_they_are_drawn():
    largest = int(sequences().max())
    with pytest.raises(UserError, match=rf"has token {largest} .*the embedding has {largest} rows"):
        sequences(vocabulary=largest)
    assert largest + 1 < max(STREAM), "others that were not drawn have no row"
    sequences(vocabulary=largest + 1)


def test_files_are_read_whole_or_refused(tmp_path):
    (tmp_path / "one.txt").write_bytes(b" = Head = \r\ntext\r = Next = \nmore")
    plain = " = Head = \ntext\n = Next = \nmore"
    assert material([tmp_path / "one.txt"]).sha256 == text_sha256([plain]), "one document, line ends of one kind"
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    assert material([tmp_path / "mark.txt"]).sha256 == text_sha256([plain])
    with pytest.raises(BadFileError, match=r"missing.txt: cannot be read: No such file"):
        material([tmp_path / "missing.txt"])
    with pytest.raises(BadFileError, match="is not a regular file"):
        material([tmp_path])
    (tmp_path / "latin.txt").write_bytes(b"\xfc")
    with pytest.raises(BadFileError, match="is not UTF-8 text"):
        material([tmp_path / "latin.txt"])


def test_records_are_read_by_their_fields_and_that_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS))
    found = material([tmp_path / "a.jsonl"])
    assert found.notes == ("a.jsonl: JSON, field text, 2 records",)
    assert found.sha256 == material([Text.of("t", DOCUMENTS)]).sha256
    assert torch.equal(found.sequences(1000, 2000, 0), sequences())


def test_the_default_text_comes_with_python():
    found, again = material([]), material([])
    assert found.sha256 == again.sha256
    assert found.sequences(1000, 10**6, 0).shape == (10, 16)
    assert found.notes == ()


class TestLongTexts:
    """Texts beyond the limit, which is lowered here: pieces of them are drawn while they are read."""

    @pytest.fixture(autouse=True)
    def limit(self, monkeypatch):
        monkeypatch.setattr(calibration_text, "WHOLE", 6000)

    @pytest.fixture
    def files(self, tmp_path):
        """Each word is its number, in one long text and in many short records."""
        words = [f"w{number:05d}" for number in range(6000)]
        (tmp_path / "long.txt").write_text(" ".join(words[:3000]))
        records = (json.dumps({"text": " ".join(words[start : start + 3])}) for start in range(3000, 6000, 3))
        (tmp_path / "many.jsonl").write_text("\n".join(records))
        return [tmp_path / "long.txt", tmp_path / "many.jsonl"]

    def test_few_of_its_tokens_are_made_and_they_are_of_the_text(self, files):
        tokenizer = Letters()
        found = material(files, tokenizer)
        drawn = found.sequences(1000, 2000, 0)
        assert drawn.shape == (10, 16)
        assert tokenizer.asked < 2 * (2 * 10 + 8) * 8 * 16
        joined = (
            "".join(path.read_text() for path in files).replace('{"text": "', "").replace('"}', "").replace("\n", "")
        )
        assert all("".join(map(chr, row)) in joined for row in drawn.tolist())
        assert "drawn by the seed" in found.notes[-1]
        assert "many.jsonl: JSON, field text, 1000 records" in found.notes

    def test_the_seed_and_the_files_decide(self, files, tmp_path):
        drawn = material(files).sequences(1000, 2000, 1)
        assert torch.equal(drawn, material(files).sequences(1000, 2000, 1))
        assert not torch.equal(drawn, material(files).sequences(1000, 2000, 2))
        before = material(files).sha256
        assert before == material(files).sha256
        files[0].write_text(files[0].read_text() + "!")
        assert material(files).sha256 != before

    def test_every_part_of_the_text_can_be_drawn(self, files):
        counts = [0] * 4
        for seed in range(60):
            for row in material(files).sequences(1000, 2000, seed).tolist():
                word = next(part for part in "".join(map(chr, row)).split("w") if len(part.strip()) == 5)
                counts[int(word) // 1500] += 1
        # 600 draws, a quarter of them each: five standard deviations are 53.
        assert all(abs(count - 150) < 53 for count in counts), counts

    def test_pieces_with_few_tokens_call_for_more(self, tmp_path):
        class Rare(Letters):
            def encode(self, text, **rest):
                return super().encode(text, **rest)[:3]

        (tmp_path / "a.txt").write_text("word " * 4000)
        with pytest.raises(UserError, match="the calibration text has"):
            material([tmp_path / "a.txt"], Rare()).sequences(1000, 2000, 0)

        class Sometimes(Letters):
            def encode(self, text, **rest):
                return super().encode(text, **rest) if "x" in text else []

        draw = random.Random(0)
        (tmp_path / "b.txt").write_text(" ".join("x" * 5 if draw.random() < 0.004 else "y" * 5 for _ in range(9000)))
        assert material([tmp_path / "b.txt"], Sometimes()).sequences(1000, 2000, 0).shape == (10, 16)


def test_the_hash_is_over_the_texts_in_order():
    hashed = text_sha256(["xy", "z"])
    assert hashed == hashlib.sha256(b"\x02" + bytes(7) + b"xy" + b"\x01" + bytes(7) + b"z").hexdigest()
    assert len({hashed, text_sha256(["x", "yz"]), text_sha256(["z", "xy"])}) == 3
