"""Continuous batching: everybody gets what they would get alone, whoever else is there."""

import threading
from dataclasses import replace

import pytest
import torch
from schedules import alone, decode, drained, prompt, scheduler, text_of

from quern.core.errors import UserError
from quern.engines.cpu import CpuEngine
from quern.generation.sampling import SamplingOptions
from quern.serving.request import Failed, Finished, FinishReason, GenerationRequest, Piece
from quern.serving.scheduler import QueueFullError

GREEDY = SamplingOptions()


@pytest.fixture(scope="module")
def model(tiny_model_of):
    return CpuEngine().load(tiny_model_of(max_position_embeddings=256), threads=1)


@pytest.fixture(scope="module")
def tiny_model_of(tmp_path_factory):
    from tiny_model import tiny_config, write_model

    def make(**changes):
        return write_model(tmp_path_factory.mktemp("served"), tiny_config(**changes))

    return make


def test_answers_are_those_of_a_lone_run_whoever_joins_meanwhile(model):
    requests = [
        GenerationRequest(prompt(seed, 3 + 17 * seed % 90), 20, replace(GREEDY, temperature=seed % 2), seed)
        for seed in range(9)
    ]
    events = drained(scheduler(model, parallel=4, prompt_tokens=16), requests, after=5)
    for request, told in zip(requests, events, strict=True):
        assert text_of(told) == decode(alone(model, request))
        assert isinstance(told[-1], Finished)
        assert told[-1].usage.prompt == len(request.ids)


def test_a_shared_beginning_is_read_once_and_changes_nothing(model):
    one, first = scheduler(model), prompt(1, 70)
    requests = [GenerationRequest((*first, *prompt(seed, 9)), 12) for seed in range(2, 6)]
    for request in requests:
        (told,) = drained(one, [request])
        assert text_of(told) == decode(alone(model, request))
        assert told[-1].usage.cached == (0 if request is requests[0] else 64)
    assert one.counts.cached_tokens == 3 * 64
    # A conversation that grows takes over what was written, too.
    longer = GenerationRequest((*requests[0].ids, *alone(model, requests[0]), 5, 6), 8)
    (told,) = drained(one, [longer])
    assert text_of(told) == decode(alone(model, longer))
    assert told[-1].usage.cached == (79 + 12 - 1) // 16 * 16


def test_sequences_that_share_pages_do_not_write_to_each_other(model):
    ids = list(prompt(3, 60))
    first = model.open()
    model.step([(first, ids)])
    second = first.fork(50)
    assert second.length == 48
    first.rewind(40)  # inside of a page that the second one has, too
    a = model.step([(first, [7, 8, 9])])[0]
    b = model.step([(second, ids[48:])])[0]
    assert torch.equal(b, model.logits(torch.tensor([ids]))[0, -1])
    assert torch.equal(a, model.logits(torch.tensor([[*ids[:40], 7, 8, 9]]))[0, -1])
    pages = model.pool._pages
    second.close()
    free = pages.free_pages
    first.rewind(0)
    assert pages.free_pages > free
    first.close()
    assert pages.free_pages == pages.pages


def test_without_room_texts_go_and_requests_give_way(model, tiny_model_of, monkeypatch):
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 0)
    small = CpuEngine().load(tiny_model_of(max_position_embeddings=256), threads=1)
    with pytest.raises(UserError):
        small.open()
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 20 * small.pool._page_bytes)
    one = scheduler(small, parallel=6)
    requests = [GenerationRequest(prompt(seed, 60), 60) for seed in range(6)]
    events = drained(one, requests)
    assert one.counts.preempted > 0
    monkeypatch.undo()
    for request, told in zip(requests, events, strict=True):
        assert text_of(told) == decode(alone(model, request))


def test_an_answer_without_room_ends_and_a_prompt_without_room_fails(tiny_model_of, monkeypatch):
    small = CpuEngine().load(tiny_model_of(max_position_embeddings=256), threads=1)
    pages = small.pool._page_bytes
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 5 * pages)
    one = scheduler(small)
    fits, large = GenerationRequest(prompt(1, 40), 100), GenerationRequest(prompt(2, 90), 4)
    told, refused = drained(one, [fits, large])
    assert told[-1].reason is FinishReason.LENGTH
    assert 0 < told[-1].usage.written < 100
    assert isinstance(refused[-1], Failed)
    assert "do not fit" in str(refused[-1].error)


def test_stops_ends_biases_and_lengths(model):
    plain = GenerationRequest(prompt(4, 12), 16)
    written = alone(model, plain)
    stop = decode(written[5:7])
    (told,) = drained(scheduler(model), [replace(plain, stop=("nothing", stop))])
    assert text_of(told) == decode(written)[: decode(written).index(stop)]
    assert (told[-1].reason, told[-1].stop) == (FinishReason.STOP, stop)
    (told,) = drained(scheduler(model), [replace(plain, logit_bias=((256, 100.0),))])
    assert text_of(told) == ""
    assert told[-1].reason is FinishReason.END
    (told,) = drained(scheduler(model), [replace(plain, logit_bias=((256, 100.0),), ignore_end=True)])
    assert text_of(told) == decode([256] * 16)
    (told,) = drained(scheduler(model), [replace(plain, presence_penalty=2.0, frequency_penalty=100.0, max_tokens=40)])
    assert len(set(text_of(told))) == 40
    (told,) = drained(scheduler(model, context=20), [plain])
    assert told[-1].usage.written == 8


def test_probabilities_are_those_of_the_logits(model):
    request = GenerationRequest(prompt(5, 10), 4, top_logprobs=3)
    (told,) = drained(scheduler(model), [request])
    tokens = [one for event in told if isinstance(event, Piece) for one in event.tokens]
    ids = list(request.ids)
    for one in tokens:
        expected = model.logits(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        best = expected.topk(3)
        assert one.token == one.likeliest[0][0] == int(best.indices[0])
        assert [value for _, value in one.likeliest] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-9)
        ids.append(one.token)
    assert len(tokens) == 4


def test_in_its_thread_it_waits_answers_cancels_and_ends(model):
    one = scheduler(model, parallel=1, waiting=1)
    one.start()
    begun, over = threading.Event(), threading.Event()
    told, ended = [], []

    def tell(event):
        told.append(event)
        begun.set()
        if isinstance(event, Finished):
            over.set()

    running = one.submit(GenerationRequest(prompt(1, 5), 200, ignore_end=True), tell)
    assert begun.wait(30)
    one.submit(GenerationRequest(prompt(2, 5), 200, ignore_end=True), ended.append)
    with pytest.raises(QueueFullError):
        one.submit(GenerationRequest(prompt(3, 5), 5), ended.append)
    one.cancel(running)
    assert over.wait(30)
    assert told[-1].reason is FinishReason.CANCELLED
    one.stop()
    assert isinstance(ended[-1], Finished)
    assert one.counts.refused == 1


def test_a_paused_answer_lets_others_go_on(model):
    one, slow, quick = scheduler(model), [], []
    running = one.submit(GenerationRequest(prompt(1, 5), 20, ignore_end=True), slow.append)
    one.submit(GenerationRequest(prompt(2, 5), 20, ignore_end=True), quick.append)
    one.step()
    running.paused = True
    for _ in range(25):
        one.step()
    assert isinstance(quick[-1], Finished)
    assert len(slow) == 1
    running.paused = False
    for _ in range(25):
        one.step()
    assert isinstance(slow[-1], Finished)


def test_a_prompt_beyond_the_context_is_refused(model):
    with pytest.raises(UserError, match="the context is 256"):
        scheduler(model).submit(GenerationRequest(prompt(1, 256), 1), print)


class PanicException(BaseException):
    """As pyo3 makes of a panic in Rust."""


class Broken:
    """A grammar that fails at its second token."""

    finished = False

    def __init__(self, error):
        self._error, self._steps = error, 0

    def constrain(self, logits):
        self._steps += 1
        if self._steps == 2:
            raise self._error("broken")

    def accept(self, token):
        pass


@pytest.mark.parametrize("error", [RuntimeError, PanicException])
def test_one_request_that_breaks_takes_nobody_with_it(model, error):
    other = GenerationRequest(prompt(1, 20), 8)
    broken = GenerationRequest(prompt(2, 5), 8, grammar=lambda: Broken(error))
    events = drained(scheduler(model), [other, broken, other])
    assert isinstance(events[1][-1], Failed)
    assert str(events[1][-1].error) == "broken"
    assert text_of(events[0]) == text_of(events[2]) == decode(alone(model, other))


def test_a_request_that_cannot_be_opened_is_told_and_others_go_on(model):
    class Once:
        """Gives no sequence the first time."""

        failed = False

        def __getattr__(self, name):
            return getattr(model, name)

        def open(self):
            if not self.failed:
                self.failed = True
                raise RuntimeError("no sequence")
            return model.open()

    request = GenerationRequest(prompt(1, 20), 8)
    events = drained(scheduler(Once()), [request, request])
    assert str(events[0][-1].error) == "no sequence"
    assert text_of(events[1]) == decode(alone(model, request))


def test_the_thread_survives_a_step_that_fails(model, monkeypatch):
    one = scheduler(model)
    step, failures = one.step, ["broken"]

    def failing():
        if one.running and failures:
            raise RuntimeError(failures.pop())
        step()

    monkeypatch.setattr(one, "step", failing)
    one.start()
    told, done = [], threading.Event()

    def tell(event):
        told.append(event)
        if not isinstance(event, Piece):
            done.set()

    for expected in (Failed, Finished):
        done.clear()
        one.submit(GenerationRequest(prompt(1, 20), 4, ignore_end=True), tell)
        assert done.wait(30)
        assert isinstance(told[-1], expected)
    one.stop()
