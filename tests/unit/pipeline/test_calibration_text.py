"""Calibration text to sequences: which windows, in which order, and what is said when it does not do."""

import hashlib

import pytest
import torch

from quern.core.errors import BadFileError, UserError
from quern.core.recipe import Calibration
from quern.pipeline.calibration_text import calibration_documents, calibration_sequences, read_texts, text_sha256


class Letters:
    """A token for each character, its code point."""

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


DOCUMENTS = [("a", "".join(map(chr, range(32, 532)))), ("b", "".join(map(chr, range(532, 1055))))]
STREAM = [ord(letter) for _, text in DOCUMENTS for letter in text]


def sequences(
    seed: int = 0, context: int = 1000, documents=DOCUMENTS, vocabulary: int = 2000, **settings
) -> torch.Tensor:
    chosen = Calibration.model_validate({"tokens": 160, "sequence_length": 16, **settings})
    return calibration_sequences(documents, Letters(), chosen, context, vocabulary, seed)


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
        UserError, match=r"has 1023 tokens; the recipe wants 100 sequences of 16 = 1600.*at most 1008 in"
    ):
        sequences(tokens=1600)


def test_tokens_beyond_the_embedding_are_refused():
    with pytest.raises(UserError, match=r"makes token 1054, but the embedding has 1054 rows"):
        sequences(vocabulary=1054)
    sequences(vocabulary=1055)


def test_texts_are_read_whole_or_refused(tmp_path):
    (tmp_path / "one.txt").write_text("Gruesse\n", "utf-8")
    assert read_texts([tmp_path / "one.txt"]) == [("one.txt", "Gruesse\n")]
    with pytest.raises(BadFileError, match="missing.txt: cannot be read: No such file"):
        read_texts([tmp_path / "missing.txt"])
    with pytest.raises(BadFileError, match="cannot be read: Is a directory"):
        read_texts([tmp_path])
    (tmp_path / "latin.txt").write_bytes(b"\xfc")
    with pytest.raises(BadFileError, match="is not UTF-8 text"):
        read_texts([tmp_path / "latin.txt"])


def test_the_default_text_comes_with_python():
    documents = calibration_documents([])
    assert len(documents) > 1
    assert sum(len(text) for _, text in documents) > 100_000
    assert documents == calibration_documents([])


def test_the_hash_is_over_the_texts_in_order_and_not_their_names():
    hashed = text_sha256([("a", "xy"), ("b", "z")])
    assert hashed == hashlib.sha256(b"\x02" + bytes(7) + b"xy" + b"\x01" + bytes(7) + b"z").hexdigest()
    assert hashed == text_sha256([("c", "xy"), ("d", "z")])
    assert len({hashed, text_sha256([("a", "x"), ("b", "yz")]), text_sha256([("b", "z"), ("a", "xy")])}) == 3
