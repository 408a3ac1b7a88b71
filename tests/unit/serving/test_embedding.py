"""Texts that are embedded share steps with answers: in pieces, in order, cancelled, without room."""

from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from schedules import alone, decode, drained, prompt, scheduler, text_of
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.serving.embedding import scaled
from quern.serving.request import Finished, GenerationRequest
from quern.serving.scheduler import QueueFullError

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("embedded"), tiny_config(max_position_embeddings=256))


@pytest.fixture(scope="module")
def model(folder):
    return CpuEngine().load(folder, threads=1)


def vector(model, ids, pooling):
    sequence = model.open()
    states = model.hidden_states([(sequence, list(ids))]).double()
    sequence.close()
    return (states.mean(0) if pooling == "mean" else states[-1]).numpy()


def stepped(one, *futures):
    steps = 0
    while not all(future.done() for future in futures):
        one.step()
        steps += 1
        assert steps < 1000
    return steps


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_texts_read_at_once(model, pooling):
    texts = [list(prompt(seed, 1 + 23 * seed % 90)) for seed in range(9)]
    one = scheduler(model, prompt_tokens=16)
    first, second = one.embed(texts[:4], pooling), one.embed(texts[4:], pooling)
    assert one.waiting == 2
    tokens = sum(len(text) for text in texts)
    assert stepped(one, first, second) == -(-tokens // 16)
    assert one.counts.prompt_tokens == tokens
    assert one.waiting == 0
    for text, found in zip(texts, [*first.result(), *second.result()], strict=True):
        assert np.allclose(found, vector(model, text, pooling), rtol=1e-5, atol=1e-6)
    assert model.pool._pages.sequences == 0


def test_a_step_reads_no_more_than_it_may_and_answers_go_on(model, monkeypatch):
    one = scheduler(model, prompt_tokens=32)
    told, late = [], []
    writing = GenerationRequest(prompt(1, 5), 40, ignore_end=True)
    one.submit(writing, told.append)
    one.step()
    fed, step, states = [], model.step, model.hidden_states
    monkeypatch.setattr(model, "step", lambda batch, drafted: fed.append(batch) or step(batch, drafted))
    monkeypatch.setattr(model, "hidden_states", lambda batch: fed.append(batch) or states(batch))
    reading = GenerationRequest(prompt(2, 200), 4)
    one.submit(reading, late.append)
    future = one.embed([list(prompt(3, 200))], "mean")
    for count in range(2, 12):
        fed.clear()
        one.step()
        assert sum(len(tokens) for batch in fed for _, tokens in batch) <= 32 + 1
        assert sum(event.text != "" for event in told) == count  # it writes in every step
    monkeypatch.undo()
    stepped(one, future)
    while one.running:
        one.step()
    assert text_of(told) == decode(alone(model, writing))
    assert text_of(late) == decode(alone(model, reading))


def test_what_nobody_wants_is_not_read(model):
    one = scheduler(model, prompt_tokens=16, waiting=2)
    gone, kept = one.embed([[5] * 200], "mean"), one.embed([[6] * 10], "last")
    with pytest.raises(QueueFullError):
        one.embed([[7]], "mean")
    one.step()
    gone.cancel()
    assert stepped(one, kept) == 1
    assert one.counts.prompt_tokens == 26
    assert model.pool._pages.sequences == 0
    last = one.embed([[5] * 200], "mean")
    one.step()
    one.start()
    one.stop()
    with pytest.raises(CancelledError):
        last.result()
    assert model.pool._pages.sequences == 0


def test_without_room_texts_go_others_are_waited_for_and_what_never_fits_fails(folder, model, monkeypatch):
    small = CpuEngine().load(folder, threads=1)
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 8 * small.pool._page_bytes)  # seven pages
    one = scheduler(small, prompt_tokens=64)
    drained(one, [GenerationRequest(prompt(1, 60), 4)])
    assert one.kept == 1
    told = []
    one.submit(GenerationRequest(prompt(2, 40), 20, ignore_end=True), told.append)
    one.step()
    future = one.embed([list(prompt(3, 80))], "mean")
    stepped(one, future)
    assert np.allclose(future.result()[0], vector(model, prompt(3, 80), "mean"), rtol=1e-5, atol=1e-6)
    while one.running:
        one.step()
    assert isinstance(told[-1], Finished)
    large, after = one.embed([list(prompt(4, 200))], "mean"), one.embed([[1, 2]], "mean")
    stepped(one, large, after)
    with pytest.raises(UserError, match="do not fit"):
        large.result()
    assert after.result().shape == (1, 64)


def test_a_text_with_long_frequencies_has_them_from_its_first_token(tmp_path):
    config = tiny_config("llama", torch_dtype="float32", initializer_range=0.2, rope_parameters=LONGROPE)
    model = CpuEngine().load(write_model(tmp_path / "model", config, tokenizer=False), cache="float32", threads=1)
    assert model.switch_length == 64
    texts = [list(prompt(seed, length)) for seed, length in enumerate((64, 65, 100))]
    one = scheduler(model, prompt_tokens=24)
    future = one.embed(texts, "mean")
    stepped(one, future)
    for text, found in zip(texts, future.result(), strict=True):
        assert np.allclose(found, vector(model, text, "mean"), rtol=1e-4, atol=1e-5)


def test_an_engine_that_fails_fails_the_request_and_no_other(model, monkeypatch):
    one = scheduler(model)
    failing = one.embed([[1, 2, 3]], "mean")
    monkeypatch.setattr(model, "hidden_states", lambda batch: 1 / 0)
    one.step()
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        failing.result()
    after = one.embed([[1, 2, 3]], "mean")
    stepped(one, after)
    assert np.allclose(after.result()[0], vector(model, [1, 2, 3], "mean"), rtol=1e-5, atol=1e-6)


def test_vectors_have_length_one():
    draw = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).numpy()
    draw[3] = 0
    for dimensions in (None, 1, 7):
        found = scaled(draw, dimensions)
        assert found.shape == (5, dimensions or 12)
        assert np.allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 1], atol=1e-6)
        assert np.allclose(
            found * np.linalg.norm(draw[:, :dimensions], axis=1)[:, None], draw[:, :dimensions], atol=1e-6
        )
