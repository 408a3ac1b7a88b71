"""Requests whose answers are guessed get the answers that they get without, whoever else is there."""

from dataclasses import replace

import pytest
from schedules import END, alone, decode, drained, prompt, scheduler, text_of
from tiny_model import tiny_config, write_model

from quern.engines.cpu import CpuEngine
from quern.generation.sampling import SamplingOptions
from quern.generation.speculation.draft_model import DraftModel
from quern.generation.speculation.ngram import NgramDrafter
from quern.generation.speculation.speculation import Speculation
from quern.serving.request import Finished, FinishReason, GenerationRequest, Piece
from quern.serving.running import Running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"), tiny_config(max_position_embeddings=256))


@pytest.fixture(scope="module")
def model(folder):
    return CpuEngine().load(folder, threads=1)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    config = tiny_config(num_hidden_layers=1, max_position_embeddings=128)
    return CpuEngine().load(write_model(tmp_path_factory.mktemp("unlike"), config, seed=9), threads=1)


KINDS = ["ngram", "itself", "unlike"]


@pytest.fixture(params=KINDS)
def speculation(request, model, folder, unlike):
    drafter = NgramDrafter()
    if request.param != "ngram":
        drafter = DraftModel(unlike if request.param == "unlike" else CpuEngine().load(folder, threads=1), 300)
    return Speculation(drafter, 6)


def circles(seed, length):
    """A prompt that repeats itself."""
    return (prompt(seed, 7) * length)[:length]


def test_answers_are_those_of_a_lone_run_whoever_joins_meanwhile(model, speculation):
    requests = [
        GenerationRequest(circles(seed, 3 + 17 * seed % 90), 40, SamplingOptions(0.7 * (seed % 3)), seed)
        for seed in range(9)
    ]
    one = scheduler(model, speculation, parallel=4, prompt_tokens=16)
    events = drained(one, requests, after=5)
    for request, told in zip(requests, events, strict=True):
        assert text_of(told) == decode(alone(model, request))
        assert told[-1].usage.prompt == len(request.ids)
    assert one.drafts.drafted > 0
    assert one.counts.written_tokens >= sum(event[-1].usage.written for event in events)
    assert not speculation._paces
    # What was finished serves others: its keys and values are those of its tokens, wrong guesses left no trace.
    longer = GenerationRequest((*requests[4].ids, *alone(model, requests[4]), 5, 6), 20)
    (told,) = drained(one, [longer])
    assert text_of(told) == decode(alone(model, longer))
    assert told[-1].usage.cached > len(requests[4].ids)


def test_counts_and_fewer_steps(model, folder):
    """A model that guesses for itself is right in everything: a pass writes as many tokens as there are guesses, and one."""
    request = GenerationRequest(prompt(1, 20), 61, ignore_end=True)
    drafter = DraftModel(CpuEngine().load(folder, threads=1), 300)
    plain, guessed = scheduler(model), scheduler(model, Speculation(drafter, 4))
    (expected,), (told,) = drained(plain, [request]), drained(guessed, [request])
    assert text_of(told) == text_of(expected)
    assert (plain.drafts.drafted, plain.counts.steps) == (0, 61)
    assert guessed.drafts.accepted == guessed.drafts.drafted == 61 - guessed.counts.steps
    assert guessed.counts.steps == 13  # the prompt is too long for guesses beside it; then 12 times 5 tokens
    assert guessed.counts.written_tokens == plain.counts.written_tokens == 61


def test_what_is_told_of_an_answer_is_the_same(model, speculation):
    """Stop texts, penalties, biases, probabilities, ends, the context."""
    plain = GenerationRequest(circles(4, 30), 40, SamplingOptions(0.5), 3)
    written = alone(model, plain)
    wanted = [
        plain,
        replace(plain, stop=("nothing", decode(written[11:13]))),
        replace(plain, presence_penalty=0.5, frequency_penalty=0.5, logit_bias=((7, 3.0), (8, -5.0))),
        replace(plain, logit_bias=((256, 6.0),)),
        replace(plain, logit_bias=((256, 6.0),), ignore_end=True),
        replace(plain, top_logprobs=2, max_tokens=1),
        replace(plain, top_logprobs=2, max_tokens=17),
        replace(plain, max_tokens=200),
    ]
    for request in wanted:
        (expected,) = drained(scheduler(model, context=120), [request])
        (told,) = drained(scheduler(model, speculation, context=120), [request])
        assert told == expected


def test_answers_of_a_form(model, speculation, folder):
    pytest.importorskip("llguidance")
    from quern.checkpoint.tokenizer import load_tokenizer
    from quern.serving.grammar import Grammars

    grammars = Grammars(load_tokenizer(folder), 300, frozenset([256]))
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"enum": [1, 2]}}, "required": ["n"]}
    for grammar in (grammars.json_schema(schema), grammars.regex("(ab|cd){4,20}!")):
        for seed in range(3):
            request = GenerationRequest(circles(5, 30), 60, SamplingOptions(1.0), seed, grammar=grammar)
            (expected,) = drained(scheduler(model), [request])
            (told,) = drained(scheduler(model, speculation), [request])
            assert told == expected
            assert isinstance(told[-1], Finished)


def test_what_cannot_follow_is_not_guessed(folder):
    pytest.importorskip("llguidance")
    from quern.checkpoint.tokenizer import load_tokenizer
    from quern.serving.grammar import Grammars

    tokenizer = load_tokenizer(folder)
    a, b, z = (tokenizer.get_vocab()[letter] for letter in "abz")
    plain = Running(GenerationRequest((1,), 9), print, decode, frozenset([END]))
    assert plain.possible([a, z, END, b]) == [a, z]
    grammar = Grammars(tokenizer, 300, frozenset([END])).regex("(ab|cd){4,20}!")
    bound = Running(GenerationRequest((1,), 9, grammar=grammar), print, decode, frozenset([END]))
    for _ in range(2):  # to ask changes nothing
        assert bound.possible([a, b, a, z, a]) == [a, b, a]
        assert bound.possible([z]) == bound.possible([]) == bound.possible([END]) == []


def test_without_room_guesses_go_first_and_then_requests_give_way(folder, model, monkeypatch):
    small = CpuEngine().load(folder, threads=1)
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 20 * small.pool._page_bytes)
    one = scheduler(small, Speculation(NgramDrafter(), 6), parallel=6)
    requests = [GenerationRequest(circles(seed, 60), 60) for seed in range(6)]
    events = drained(one, requests)
    assert one.counts.preempted > 0
    assert one.drafts.drafted > 0
    monkeypatch.undo()
    for request, told in zip(requests, events, strict=True):
        assert text_of(told) == decode(alone(model, request))


def test_a_draft_model_without_room_guesses_nothing(model, folder, monkeypatch):
    drafting = CpuEngine().load(folder, threads=1)
    one = scheduler(model, Speculation(DraftModel(drafting, 300), 6))
    request = GenerationRequest(prompt(3, 40), 40)
    monkeypatch.setattr("quern.engines._cpu_pool.free_memory", lambda: 3 * drafting.pool._page_bytes)
    first = drafting.open()  # its pool has room for two pages, and the prompt alone takes three
    monkeypatch.undo()
    (told,) = drained(one, [request])
    assert text_of(told) == decode(alone(model, request))
    assert one.drafts.drafted == 0
    first.close()


def test_cancelled_and_paused_requests(model, speculation):
    one, told, other = scheduler(model, speculation), [], []
    running = one.submit(GenerationRequest(circles(1, 20), 200, ignore_end=True), told.append)
    one.submit(GenerationRequest(circles(2, 20), 60, ignore_end=True), other.append)
    for _ in range(4):
        one.step()
    running.paused = True
    count = len(told)
    for _ in range(4):
        one.step()
    assert len(told) == count
    running.paused = False
    one.cancel(running)
    while one.running:
        one.step()
    assert told[-1].reason is FinishReason.CANCELLED
    assert not speculation._paces
    assert len(text_of(other)) == 60


class Failing:
    def propose(self, asked):
        raise ZeroDivisionError("a bug in a drafter")

    def forget(self, key):
        raise ZeroDivisionError("another one")


def test_a_drafter_that_fails_changes_no_answer(model, caplog):
    request = GenerationRequest(circles(1, 20), 20)
    (told,) = drained(scheduler(model, Speculation(Failing())), [request])
    assert text_of(told) == decode(alone(model, request))
    assert "guessing failed" in caplog.text
    assert all(isinstance(event, Piece) for event in told[:-1])
