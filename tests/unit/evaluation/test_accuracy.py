"""Scores of a model on windows, with and without reference logits, from memory and from the cache."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_model import VOCABULARY, FakeModel, FakeTokenizer, bigram_table

from quern.core import metrics
from quern.core.errors import BadFileError, UserError
from quern.core.metrics import NonFiniteError
from quern.evaluation import batches
from quern.evaluation.accuracy import (
    DocumentScore,
    agreement,
    mean_divergence,
    reference_logits,
    score_windows,
    text_perplexity,
)
from quern.evaluation.batches import batched_logits
from quern.evaluation.reference_cache import ReferenceKey, ReferenceLogits, ReferenceWriter, has_reference
from quern.evaluation.texts import cut_windows
from quern.texts.source import Text

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "0123456789"]


@pytest.fixture
def windows():
    tokenizer = FakeTokenizer(adds_bos=False)
    return cut_windows([Text.of("t", TEXTS)], tokenizer, vocabulary_size=VOCABULARY, tokens=70, window=16).windows


@pytest.fixture
def key():
    return ReferenceKey(
        model_sha256="m", texts_sha256=("t",), windows_sha256="w", tokens=70, window=16, dtype="float32", engine="fake"
    )


class Memory:
    """A reference kept in memory."""

    def __init__(self, model, windows):
        self.logits = {}
        reference_logits(model, windows, lambda number, logits: self.logits.update({number: logits.copy()}))

    def __len__(self):
        return len(self.logits)

    def window(self, number):
        return self.logits[number]


def fill(cache, key, model, windows):
    scored = sum(len(window.ids) - 1 for window in windows)
    with ReferenceWriter(cache, key, scored=scored, vocabulary_size=VOCABULARY) as writer:
        reference_logits(model, windows, writer.add)


class TestBatches:
    @pytest.mark.parametrize("limit", [1, 4 * 16 * VOCABULARY, 4 * 40 * VOCABULARY, 1 << 30])
    def test_every_sequence_once_whatever_the_batch(self, windows, limit):
        model = FakeModel(bigram_table())
        sequences = [window.ids for window in windows]
        found = {n: logits.copy() for n, logits in batched_logits(model, sequences, limit)}
        assert sorted(found) == list(range(len(sequences)))
        for number, ids in enumerate(sequences):
            assert (found[number] == model.table.numpy()[ids]).all()
        largest = max(4 * VOCABULARY * rows * time for rows, time in model.batches)
        assert largest <= max(limit, 4 * VOCABULARY * 16)

    def test_too_long_for_the_context(self):
        with pytest.raises(UserError, match="65 tokens, the model's context 64"):
            list(batched_logits(FakeModel(bigram_table()), [np.zeros(65, dtype=np.int64)]))


class TestScores:
    def test_against_a_plain_loop(self, windows):
        model, other = FakeModel(bigram_table(0)), FakeModel(bigram_table(1))
        advanced = []
        scores = score_windows(other, windows, Memory(model, windows), advanced.append)
        assert sum(advanced) == sum(len(w.ids) for w in windows)
        for score in scores:
            nats = divergence = agreeing = tokens = 0
            for window in windows:
                if window.document == score.document:
                    for now, following in zip(window.ids[:-1], window.ids[1:]):
                        p = torch.log_softmax(model.table[now].double(), -1)
                        q = torch.log_softmax(other.table[now].double(), -1)
                        nats -= float(q[following])
                        divergence += float((p.exp() * (p - q)).sum())
                        agreeing += int(p.argmax() == q.argmax())
                        tokens += 1
            assert (score.tokens, score.agreeing) == (tokens, agreeing)
            assert score.nats == pytest.approx(nats, rel=1e-12)
            assert score.divergence == pytest.approx(divergence, rel=1e-12)

    def test_against_itself(self, windows):
        model = FakeModel(bigram_table())
        scores = score_windows(model, windows, Memory(model, windows))
        assert mean_divergence(scores, seed=0) == (0.0, (0.0, 0.0))
        assert agreement(scores) == 1.0

    def test_direction_of_the_divergence(self, windows):
        """KL(reference || model), so swapping the two gives another number."""
        a, b = FakeModel(bigram_table(0, 3.0)), FakeModel(bigram_table(1, 0.5))
        forward = mean_divergence(score_windows(b, windows, Memory(a, windows)), seed=0).mean
        backward = mean_divergence(score_windows(a, windows, Memory(b, windows)), seed=0).mean
        assert abs(forward - backward) > 0.5

    def test_without_reference(self, windows):
        scores = score_windows(FakeModel(bigram_table()), windows)
        assert mean_divergence(scores, seed=0) is None
        assert agreement(scores) is None
        assert text_perplexity(scores) > 1

    def test_perplexity_of_a_uniform_model(self, windows):
        model = FakeModel(torch.zeros(VOCABULARY, VOCABULARY))
        assert text_perplexity(score_windows(model, windows)) == pytest.approx(VOCABULARY, rel=1e-12)

    def test_batches_change_nothing(self, windows, monkeypatch):
        model, other = FakeModel(bigram_table(0)), FakeModel(bigram_table(1))
        scores = score_windows(other, windows, Memory(model, windows))
        monkeypatch.setattr(batches.batched_logits, "__defaults__", (1,))
        assert score_windows(other, windows, Memory(model, windows)) == scores

    def test_interval_is_over_documents(self):
        scores = [DocumentScore(n, 10, 20.0, float(n), 5) for n in range(8)]
        assert mean_divergence(scores, seed=4) == metrics.weighted_mean(range(8), [10] * 8, seed=4)
        assert text_perplexity(scores) == pytest.approx(math.exp(2))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_logits_that_are_not_finite(self, windows, bad):
        table = bigram_table()
        spoiled = table.clone()
        spoiled[int(windows[0].ids[0]), 3] = bad
        with pytest.raises(NonFiniteError):
            score_windows(FakeModel(spoiled), windows, Memory(FakeModel(table), windows))
        with pytest.raises(NonFiniteError, match="reference's own"):
            Memory(FakeModel(spoiled), windows)

    def test_nothing_to_score(self):
        with pytest.raises(UserError, match="no text"):
            score_windows(FakeModel(bigram_table()), [])
        with pytest.raises(UserError):
            text_perplexity([])

    def test_reference_of_another_text(self, windows):
        model = FakeModel(bigram_table())
        with pytest.raises(UserError, match="not of these"):
            score_windows(model, windows, Memory(model, windows[:-1]))

    def test_reference_of_another_vocabulary(self, windows):
        reference = Memory(FakeModel(bigram_table()), windows)
        wide = FakeModel(torch.cat([bigram_table(), torch.zeros(VOCABULARY, 1)], dim=1))
        wide.vocabulary_size = VOCABULARY + 1
        with pytest.raises(UserError, match="one shape"):
            score_windows(wide, windows, reference)


class TestCache:
    def test_round_trip(self, tmp_path, key, windows):
        model, other = FakeModel(bigram_table(0)), FakeModel(bigram_table(1))
        assert not has_reference(tmp_path, key)
        fill(tmp_path, key, model, windows)
        assert has_reference(tmp_path, key)
        cached = ReferenceLogits(tmp_path, key)
        memory = Memory(model, windows)
        assert len(cached) == len(memory)
        for number in range(len(cached)):
            assert cached.window(number).dtype == np.float32
            assert (cached.window(number) == memory.window(number)).all()
        assert score_windows(other, windows, cached) == score_windows(other, windows, memory)
        assert [path.name for path in tmp_path.iterdir()] == [key.folder(tmp_path).name]

    @pytest.mark.parametrize(
        "change",
        [
            {"model_sha256": "x"},
            {"texts_sha256": ("x",)},
            {"windows_sha256": "x"},
            {"tokens": 71},
            {"window": 17},
            {"dtype": "bfloat16"},
            {"engine": "other"},
            {"metrics_version": 0},
        ],
    )
    def test_everything_in_the_key_matters(self, tmp_path, key, windows, change):
        fill(tmp_path, key, FakeModel(bigram_table()), windows)
        assert not has_reference(tmp_path, replace(key, **change))

    def test_key_survives_json(self, key):
        assert ReferenceKey.from_json(json.loads(json.dumps(key.to_json()))) == key

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "key"])
    def test_damage_is_found(self, tmp_path, key, windows, damage):
        fill(tmp_path, key, FakeModel(bigram_table()), windows)
        path = key.folder(tmp_path) / "00001.npy"
        raw = bytearray(path.read_bytes())
        if damage == "flip":
            raw[-5] ^= 1
            path.write_bytes(raw)
        elif damage == "truncate":
            path.write_bytes(raw[:-4])
        elif damage == "remove":
            path.unlink()
        else:
            (key.folder(tmp_path) / "key.json").write_text(json.dumps(replace(key, tokens=1).to_json()))
        with pytest.raises(BadFileError, match=r"Remove .* and run again"):
            ReferenceLogits(tmp_path, key).window(1)

    def test_nothing_half_written_stays(self, tmp_path, key, windows):
        scored = sum(len(window.ids) - 1 for window in windows)

        def interrupted():
            with ReferenceWriter(tmp_path, key, scored=scored, vocabulary_size=VOCABULARY) as writer:
                writer.add(0, np.zeros((15, VOCABULARY), dtype=np.float32))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []

    def test_leftovers_of_a_killed_run_are_replaced(self, tmp_path, key, windows):
        left = tmp_path / f".{key.folder(tmp_path).name}.tmp"
        left.mkdir()
        (left / "00099.npy").write_bytes(b"half")
        fill(tmp_path, key, FakeModel(bigram_table()), windows)
        assert len(ReferenceLogits(tmp_path, key)) == len(windows)
        assert not left.exists()

    def test_full_disk(self, tmp_path, key):
        with (
            pytest.raises(UserError, match="reference logits need 4000 TB"),
            ReferenceWriter(tmp_path, key, scored=10**9, vocabulary_size=10**6),
        ):
            pass
        assert list(tmp_path.iterdir()) == []
